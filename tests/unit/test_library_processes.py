"""Several processes change one library at once, and some are killed: nothing is lost, nothing is half there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from haori.library import Library
from tests.lora_files import kohya_file

_CHANGER = """
import sys
from pathlib import Path
from tests.library_samples import card_of, written_adapter
from haori.library import Library
root, who, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
library = Library(root / "library")
made = [written_adapter(root / f"{who}-{seed}", seed=seed + 1000 * int(who)) for seed in range(count)]
cards = [card_of(folder) for folder in made]
print("ready", flush=True)
sys.stdin.readline()
for seed, (folder, card) in enumerate(zip(made, cards)):
    shared = library.add(folder, "shared", card).name
    library.add(folder, f"own-{who}-{seed}", card)
    if seed % 2:
        library.remove(shared)
        print("-", shared)
    else:
        print("+", shared)
    if seed % 3 == 0:
        library.remove(f"own-{who}-{seed}")
"""

_REBUILDER = """
import sys
from pathlib import Path
from haori.library import Library
library = Library(Path(sys.argv[1]) / "library")
print("ready", flush=True)
sys.stdin.readline()
while True:
    library.rebuild()
"""

_SCANNER = """
import sys
from pathlib import Path
from haori.library import Library
mounts = Library(Path(sys.argv[1]) / "library").mounts
print("ready", flush=True)
sys.stdin.readline()
for _ in range(5):
    mounts.rescan()
"""


def started(code: str, *arguments: object) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])},
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def let_go(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()


def held(library: Library) -> list[str]:
    return [listed.entry.full_name for listed in library.search("").listed]


def test_two_processes_that_add_and_remove_lose_nothing(tmp_path):
    both = [started(_CHANGER, tmp_path, who, 12) for who in (1, 2)]
    let_go(*both)
    said = [process.communicate(timeout=120)[0].split("\n") for process in both]
    assert [process.returncode for process in both] == [0, 0]
    kept = {line[2:] for lines in said for line in lines if line.startswith("+")}
    own = {f"own-{who}-{seed}@1" for who in (1, 2) for seed in range(12) if seed % 3}
    library = Library(tmp_path / "library")
    assert len(kept) == 12  # no two were given one version while both were there
    assert set(held(library)) == kept | own
    # What the index says is what the folders say, and each name leads to the files it was given for.
    before = held(library)
    assert library.rebuild().problems == ()
    assert held(library) == before
    assert {name for stored in library.list() for name in stored.card.names} == kept | own
    assert not list(library.root.glob("adapters/*/.*"))


def test_a_rebuild_that_is_killed_loses_nothing(tmp_path):
    process = started(_CHANGER, tmp_path, 1, 6)
    let_go(process)
    process.communicate(timeout=60)
    library = Library(tmp_path / "library")
    expected = held(library)
    for delay_s in (0.001, 0.004, 0.02):
        killed = started(_REBUILDER, tmp_path)
        let_go(killed)
        time.sleep(delay_s)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert held(library) == expected
        assert library.rebuild().problems == ()


def test_two_processes_that_scan_one_tree_agree(tmp_path):
    for number in range(40):
        kohya_file(tmp_path / "tree" / f"f{number}.safetensors", seed=number)
    library = Library(tmp_path / "library")
    library.mounts.add(tmp_path / "tree")
    both = [started(_SCANNER, tmp_path) for _ in range(2)]
    let_go(*both)
    for number in range(40, 60):
        kohya_file(tmp_path / "tree" / f"f{number}.safetensors", seed=number)
        (tmp_path / "tree" / f"f{number - 40}.safetensors").unlink()
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 0
    library.mounts.rescan()
    assert sorted(held(library)) == sorted(f"tree/f{number}" for number in range(20, 60))
