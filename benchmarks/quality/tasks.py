"""The two tasks of the quality benchmark, made from data that is at hand without a network.

reviews    the demo's movie-review sentences: which of two labels (400 test rows)
docstrings the first line of a docstring for a short function of Python's standard library, split by module
"""

import ast
import hashlib
import json
import os
import sysconfig
from pathlib import Path

__all__ = ["write_docstrings", "write_reviews"]

_PROMPT = "Say in one line what this Python function does.\n\n"


def write_reviews(home: Path, rows: int) -> tuple[Path, Path]:
    """Write the demo's training and test rows."""
    os.environ["HAORI_HOME"] = str(home)
    from haori.data import fetch_reviews

    return fetch_reviews().write(home / "reviews", train_rows=rows)


def write_docstrings(home: Path, rows: int, test_rows: int) -> tuple[Path, Path]:
    """Write training and test rows; a module's functions are all in one of the two."""
    found: dict[bool, list[dict[str, str]]] = {True: [], False: []}
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(inside.parts):
            continue
        held_out = hashlib.sha256(str(inside).encode()).digest()[0] < 60
        found[held_out] += _rows_of(path)
    written = []
    for name, held_out, count in (("train", False, rows), ("test", True, test_rows)):
        chosen = sorted(found[held_out], key=lambda row: hashlib.sha256(row["prompt"].encode()).digest())[:count]
        if len(chosen) < count:
            raise SystemExit(f"This Python's standard library gave {len(chosen)} rows for {name}; {count} are needed.")
        written.append(home / f"docstrings-{name}.jsonl")
        written[-1].write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return written[0], written[1]


def _rows_of(path: Path) -> list[dict[str, str]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    rows = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or len(node.body) < 2:
            continue
        said = (ast.get_docstring(node) or "").strip().partition("\n")[0].strip()
        node.body = node.body[1:]
        source = ast.unparse(node)
        if 20 <= len(said) <= 100 and said.endswith(".") and 60 <= len(source) <= 350:
            rows.append({"prompt": _PROMPT + source, "completion": said})
    return rows
