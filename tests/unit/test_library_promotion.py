import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from haori.core.errors import LibraryDamagedError, LibraryError
from haori.library import Library
from haori.server.errors import api_error_of
from tests.command_line import haori
from tests.library_samples import card_of, written_adapter


@pytest.fixture
def library(haori_home) -> Library:
    return Library()


def put(library: Library, tmp_path: Path, name: str, seed: int):
    folder = tmp_path / f"made-{seed}"
    if not folder.exists():
        written_adapter(folder, seed=seed)
    return library.add(folder, name, card_of(folder))


def three(library: Library, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        put(library, tmp_path, "support", seed)


def test_a_promoted_version_is_what_the_name_means(library, tmp_path):
    three(library, tmp_path)
    assert library.promote("support@2").name == "support@2"
    put(library, tmp_path, "support", 4)
    fresh = Library()
    assert fresh.get("support").name == "support@2"
    assert fresh.get("support@4").promoted is None
    marked = {stored.name: bool(stored.promoted) for stored in fresh.list()}
    assert marked == {"support@1": False, "support@2": True, "support@3": False, "support@4": False}
    assert [listed.promoted for listed in fresh.search("tiny support@2").listed] == [True]


def test_going_back_leads_to_what_was_meant_before(library, tmp_path):
    three(library, tmp_path)
    library.promote("support@1")  # it meant its newest, 3
    library.promote("support@2")
    assert library.rollback("support").name == "support@1"
    assert library.rollback("support").name == "support@3"
    with pytest.raises(LibraryError, match="Nothing was promoted before support@3"):
        library.rollback("support")
    assert library.get("support").name == "support@3"
    history = json.loads((library.root / "promoted.json").read_text())["names"]["support"]
    assert [(entry["version"], entry["withdrawn"] is None) for entry in history] == [(3, True), (1, False), (2, False)]


def test_promoting_again_writes_nothing_and_an_older_one_can_come_back(library, tmp_path):
    three(library, tmp_path)
    library.promote("support@3")
    written = (library.root / "promoted.json").stat().st_mtime_ns
    assert library.promote("support@3").name == "support@3"
    assert (library.root / "promoted.json").stat().st_mtime_ns == written
    for version in (2, 3, 2):
        library.promote(f"support@{version}")
    assert [library.rollback("support").name for _ in range(3)] == ["support@3", "support@2", "support@3"]


def test_a_removed_version_no_longer_counts(library, tmp_path):
    three(library, tmp_path)
    library.promote("support@1")
    library.promote("support@2")
    library.remove("support@2")
    assert library.get("support").name == "support@1"
    library.remove("support")
    assert library.get("support").name == "support@3"


def test_a_number_given_out_again_is_not_promoted(library, tmp_path):
    three(library, tmp_path)
    library.promote("support@1")
    library.promote("support@3")
    library.remove("support@3")
    assert put(library, tmp_path, "support", 4).name == "support@3"
    assert library.get("support").name == "support@1"


def test_names_are_promoted_on_their_own(library, tmp_path):
    three(library, tmp_path)
    put(library, tmp_path, "helper", 1)
    put(library, tmp_path, "helper", 5)
    library.promote("support@1")
    assert library.get("helper").name == "helper@2"
    library.promote("helper@1")
    assert library.get("helper").path == library.get("support").path
    library.rollback("helper")
    assert (library.get("helper").name, library.get("support").name) == ("helper@2", "support@1")


@pytest.mark.parametrize(
    ("change", "spec", "said"),
    [
        ("promote", "support", "does not say which version"),
        ("promote", "support@9", "has no version '9'; it has 1, 2, 3"),
        ("promote", "suport@1", "did you mean 'support'"),
        ("rollback", "support", "newest counts. .* promote support@3"),
        ("rollback", "support@2", "without version: 'support'"),
        ("rollback", "nobody", "no adapter 'nobody'"),
    ],
)
def test_refusals(library, tmp_path, change, spec, said):
    three(library, tmp_path)
    with pytest.raises(LibraryError, match=said):
        getattr(library, change)(spec)
    assert not (library.root / "promoted.json").exists()


def test_the_index_is_not_needed(library, tmp_path):
    three(library, tmp_path)
    library.promote("support@2")
    library.list()
    (library.root / "index.sqlite").unlink()
    assert Library().get("support").name == "support@2"
    Library().rebuild()
    assert Library().get("support").name == "support@2"


@pytest.mark.parametrize("text", ["", "{", '{"names": {"support": 3}}', '{"schema_version": 9, "names": {}}'])
def test_a_damaged_history_is_never_taken_for_none(library, tmp_path, text):
    three(library, tmp_path)
    library.promote("support@2")
    (library.root / "promoted.json").write_text(text)
    with pytest.raises(LibraryError, match=r"promoted\.json.* is damaged"):
        library.get("support")


_PROMOTER = """
import sys, itertools
from pathlib import Path
from haori.library import Library
from haori.server.errors import api_error_of
library = Library(Path(sys.argv[1]))
print("ready", flush=True)
for version in itertools.cycle((1, 2, 3)):
    print(library.promote(f"support@{version}").name, flush=True)
"""


def test_a_killed_promotion_leaves_the_old_or_the_new(library, tmp_path):
    three(library, tmp_path)
    for delay_s in (0.01, 0.05, 0.1):
        process = subprocess.Popen(
            [sys.executable, "-c", _PROMOTER, str(library.root)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            text=True,
            stdout=subprocess.PIPE,
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[0].split()
        following = {f"support@{n}": f"support@{n % 3 + 1}" for n in (1, 2, 3)}
        if said:
            assert library.get("support").name in {said[-1], following[said[-1]]}
    assert library.promote("support@1").name == "support@1"


def test_commands(capsys, library, tmp_path):
    three(library, tmp_path)
    done = haori(capsys, "library", "promote", "support@2")
    assert done.code == 0 and "support means support@2 from now on" in done.out
    assert "support@2 (promoted)" in haori(capsys, "library", "list").out
    assert "support means this version since" in haori(capsys, "library", "show", "support").out
    library.promote("support@3")
    done = haori(capsys, "library", "rollback", "support")
    assert done.code == 0 and "support means support@2 again" in done.out
    done = haori(capsys, "library", "remove", "support@2")
    assert "support means support@3." in done.out
    done = haori(capsys, "library", "rollback", "support")
    assert done.code == 2 and "promote the one you want" in done.err


def test_adding_says_that_a_promoted_name_keeps_its_meaning(capsys, library, tmp_path):
    from haori.cli.library import print_meaning

    three(library, tmp_path)
    print_meaning("support@3")
    assert capsys.readouterr().out == ""
    library.promote("support@2")
    print_meaning(put(library, tmp_path, "support", 4).name)
    assert capsys.readouterr().out == (
        "support means support@2; `haori library promote support@4` makes it mean the new one.\n"
    )


def test_a_damaged_history_is_no_fault_of_who_asks_a_server(library, tmp_path):
    three(library, tmp_path)
    (library.root / "promoted.json").write_text("{")
    with pytest.raises(LibraryDamagedError) as caught:
        library.get("support")
    assert api_error_of(caught.value).status == 500
