"""The table "where to add what" is executed: each row has a toy that does what the row says, and it works.

All toys are added to one copy of the repository by real changes of its files, and used in one process over it. The
same process over a copy without them must fail at each of them.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.additions.checks import CHECKS
from tests.additions.toys import TOYS, Toy

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
ELSEWHERE = {"a task": "tests/integration/test_tasks_end_to_end.py::test_a_task_is_added_by_one_folder_and_one_line"}
"""Rows whose toy has tests of its own."""
WHEEL = "tiny_base-1.0-py3-none-any.whl"


def table() -> dict[str, str]:
    """Return what to do by what is to be added."""
    text = PAGE.read_text("utf-8").partition("## Where to add what")[2].partition("\n## ")[0]
    found = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row: do for row, do in found if row != "to add"}


def named(do: str) -> set[str]:
    """Return the paths that a row names, in code or as a link."""
    links = {f"docs/{path}" for path in re.findall(r"\]\(([^)#]+)", do)}
    return links | {span for span in re.findall(r"`([^`]+)`", do) if "/" in span}


def outside(toy: Toy, do: str) -> list[str]:
    """Return what a toy touches and its row does not name: files, and folders of new files."""
    paths = named(do)
    folders = {path if "." not in Path(path).name else str(Path(path).parent) for path in paths}
    changed = {edit.path: edit for edit in toy.edits}
    found = [
        path for path, edit in changed.items()
        if not (path in paths or str(Path(path).parent) in paths or (toy.renamed and toy.renamed in edit.old))
    ]  # fmt: skip
    return found + [path for path in toy.files if not any(path.startswith(f"{folder}/") for folder in folders)]


def test_every_row_has_a_toy_and_every_toy_a_row():
    assert len(table()) >= 20
    assert set(table()) == set(TOYS) | set(ELSEWHERE)
    assert set(CHECKS) == set(TOYS)
    for place in ELSEWHERE.values():
        file, _, test = place.partition("::")
        assert f"def {test}(" in (ROOT / file).read_text("utf-8")


@pytest.mark.parametrize("row", TOYS)
def test_a_toy_touches_only_what_its_row_names(row: str):
    assert outside(TOYS[row], table()[row]) == []


def test_what_a_row_does_not_name_is_found():
    do = table()["a route"]
    more = Toy(TOYS["a route"].edits + TOYS["a command"].edits, {"src/haori/core/x.py": "", **TOYS["a route"].files})
    assert outside(more, do) == ["src/haori/cli/app.py", "src/haori/core/x.py"]


def build_wheel(base: Path, folder: Path) -> dict[str, str]:
    """Write a wheel with a base in it; return what its entry says, by the marks that stand for it in the toy."""
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        for file in base.iterdir():
            wheel.write(file, f"tiny_base/model/{file.name}")
        info = "tiny_base-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    data = (folder / WHEEL).read_bytes()
    members = repr([file.name for file in base.iterdir()])
    return {"@SHA256@": hashlib.sha256(data).hexdigest(), "@SIZE@": str(len(data)), "@MEMBERS@": members}


def add(toy: Toy, repository: Path, marks: dict[str, str]) -> None:
    """Do what a row says."""
    for edit in toy.edits:
        file = repository / edit.path
        text, new = file.read_text("utf-8"), edit.new
        assert text.count(edit.old) == 1, f"{edit.path} holds {edit.old!r} {text.count(edit.old)} times"
        for mark, value in marks.items():
            new = new.replace(mark, value)
        file.write_text(text.replace(edit.old, new), encoding="utf-8")
    for path, text in toy.files.items():
        file = repository / path
        assert not file.exists()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def copied(folder: Path) -> Path:
    for part in ("src", "docs", "tools"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return folder


def use(repository: Path, folder: Path, base: Path) -> dict[str, str]:
    """Use every toy in a process over a copy; return what went wrong with each."""
    folder.mkdir()
    (folder / "base").symlink_to(base)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {
        "PYTHONPATH": f"{repository / 'src'}{os.pathsep}{ROOT}", "HAORI_HOME": str(folder / "home"),
        "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(repository / "links"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.additions.checks", str(folder)], cwd=folder, env=environment,
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads((folder / "found.json").read_text("utf-8")))


def test_every_toy_added_where_its_row_says_works(tmp_path: Path, tiny_base_folder: Path):
    repository = copied(tmp_path / "repository")
    marks = build_wheel(tiny_base_folder, repository / "links")
    for toy in TOYS.values():
        add(toy, repository, marks)
    found = use(repository, tmp_path / "used", tiny_base_folder)
    assert set(found) == set(TOYS)
    assert "\n".join(f"{row}: {problem}" for row, problem in found.items() if problem) == ""


def test_without_its_toy_no_row_works(tmp_path: Path, tiny_base_folder: Path):
    found = use(ROOT, tmp_path / "used", tiny_base_folder)
    assert [row for row, problem in found.items() if not problem] == []
