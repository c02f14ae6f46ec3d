"""Fails when a source file is over 400 lines or a function over 60."""

import ast
import sys
from pathlib import Path

FILE_LIMIT, FUNCTION_LIMIT = 400, 60


def problems(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    found = [f"{path}: {lines} lines (at most {FILE_LIMIT})"] if lines > FILE_LIMIT else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LIMIT:
                found.append(f"{path}:{node.lineno}: {node.name} has {length} lines (at most {FUNCTION_LIMIT})")
    return found


def main() -> int:
    found = [line for path in sorted(Path("src").rglob("*.py")) for line in problems(path)]
    print("\n".join(found) or "lengths: fine")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
