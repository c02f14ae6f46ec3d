"""`tools/check_cycles.py` finds circles of imports between files, hidden ones too, and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAZY = "from haori.core.lazy_exports import lazy_exports\n__getattr__ = lazy_exports(__name__, {'b': ('Thing',)})\n"


def check(folder: Path, **files: str) -> tuple[int, str]:
    """Write `pkg` with the given files (`x__y` is x/y.py) and return exit code and output of the check."""
    for name, text in {"__init__": "", "inner____init__": "", "a": "", **files}.items():
        path = folder / "pkg" / f"{name.replace('__init__', 'INIT').replace('__', '/').replace('INIT', '__init__')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    done = subprocess.run(
        [sys.executable, ROOT / "tools/check_cycles.py", folder], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.replace(f"{folder}/", "")


IN_FUNCTION = "def later():\n    from pkg.a import x\n"
CIRCLES = {
    "at the top": ({"a": "from pkg import inner\nimport pkg.b\n", "b": "from pkg.a import x\n"}, 2, 1),
    "in a function": ({"a": "import pkg.b\n", "b": IN_FUNCTION}, 1, 2),
    "in a method": ({"a": "import pkg.b\n", "b": "class K:\n    def later(self):\n        import pkg.a\n"}, 1, 3),
    "relative": ({"a": "from . import b\n", "b": "from .a import x\n"}, 1, 1),
    "by name": ({"a": "import pkg.b\n", "b": "from importlib import import_module\nimport_module('pkg.a')\n"}, 1, 2),
    "beside annotations": (
        {"a": "import pkg.b\n", "b": "if TYPE_CHECKING:\n    import pkg.c\nelse:\n    import pkg.a\n", "c": ""},
        1,
        4,
    ),
}


@pytest.mark.parametrize("case", CIRCLES)
def test_a_circle_of_two_files_is_printed_with_its_lines(case: str, tmp_path: Path):
    files, there, back = CIRCLES[case]
    expected = f"pkg/a.py imports pkg/b.py (line {there}), which imports pkg/a.py (line {back})."
    assert check(tmp_path, **files) == (1, f"circle: {expected}\n")


@pytest.mark.parametrize(
    "package",
    [LAZY, "from pkg.inner.b import Thing\n", "from .b import Thing\n", "from pkg.inner.b import Other as Thing\n"],
)
def test_a_name_that_a_package_passes_on_is_its_modules(package: str, tmp_path: Path):
    files = {"inner____init__": package, "a": "from pkg.inner import Thing\n", "inner__b": "from pkg import a\n"}
    code, out = check(tmp_path, **files)
    assert (code, out) == (1, "circle: pkg/a.py imports pkg/inner/b.py (line 1), which imports pkg/a.py (line 1).\n")


def test_a_name_passed_on_twice_is_its_modules(tmp_path: Path):
    outer = LAZY.replace("'b'", "'inner'")
    files = {"__init__": outer, "inner____init__": LAZY, "inner__b": IN_FUNCTION}
    code, out = check(tmp_path, a="from pkg import Thing\n", **files)
    assert (code, out) == (1, "circle: pkg/a.py imports pkg/inner/b.py (line 1), which imports pkg/a.py (line 2).\n")


def test_every_circle_is_printed(tmp_path: Path):
    files = {"a": "import pkg.b, pkg.c", "b": "import pkg.a", "c": "import pkg.d", "d": "import pkg.a"}
    code, out = check(tmp_path, **files)
    assert code == 1
    assert out.splitlines() == [
        "circle: pkg/a.py imports pkg/b.py (line 1), which imports pkg/a.py (line 1).",
        "circle: pkg/a.py imports pkg/c.py (line 1), which imports pkg/d.py (line 1), which imports pkg/a.py (line 1).",
    ]


NONE = {
    "only annotations": {"a": "import pkg.b", "b": "if TYPE_CHECKING:\n    from pkg.a import x\n"},
    "a diamond": {"a": "import pkg.b, pkg.c", "b": "import pkg.d", "c": "import pkg.d", "d": ""},
    "siblings of a lazy package": {"inner____init__": LAZY, "inner__b": "import pkg.inner.c",
                                   "inner__c": "import json, pkg.a"},
    "names alike elsewhere": {"a": "from other.pkg import b\nimport b", "b": "import pkg.a"},
}  # fmt: skip


@pytest.mark.parametrize("case", NONE)
def test_what_is_no_circle_passes(case: str, tmp_path: Path):
    assert check(tmp_path, **NONE[case]) == (0, "circles: none\n")


def test_this_project_has_no_circle():
    done = subprocess.run(
        [sys.executable, "tools/check_cycles.py"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "circles: none\n"
    assert done.returncode == 0
