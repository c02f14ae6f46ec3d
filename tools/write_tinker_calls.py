"""Writes the table of the tinker SDK's calls into docs/guide/tinker.md: every public method, and how it ends here.

What it says is the record of the tests that call them by the real client, tests/fixtures/tinker/methods.json; a test
fails where the SDK has a method that the record does not have, or a call ends otherwise. `--check` only says whether
the page is up to date.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guide" / "tinker.md"
RECORD = ROOT / "tests" / "fixtures" / "tinker" / "methods.json"
CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "AdminClient")
BEGIN, END = "<!-- calls: tools/write_tinker_calls.py -->", "<!-- end of calls -->"


def table() -> str:
    """Return a line for each call: what it is, how it ends, and which tests make it."""
    calls = json.loads(RECORD.read_text("utf-8"))["calls"]
    tests = sorted({test for how in calls.values() for test in how["tests"] if "[" not in test})
    marks = {test: f"[{number}]" for number, test in enumerate(tests, 1)}
    lines = ["| call | here | also called by |", "|---|---|---|"]
    for name in sorted(calls, key=lambda name: (CLIENTS.index(name.partition(".")[0]), name)):
        how = calls[name]
        outcome = {"client": "by the client alone"}.get(how["outcome"], how["outcome"])
        ends = f"{outcome}: {how['said']}" if "said" in how else outcome
        also = " ".join(marks[test] for test in how["tests"] if test in marks)
        lines.append(f"| `{name}` | {ends} | {also} |".replace("|  |", "| |"))
    named = [f"{mark} `{test}`" for test, mark in marks.items()]
    return "\n".join([*lines, "", "Each is called by `test_every_method_of` of its client; " + ", ".join(named) + "."])


def main() -> None:
    """Write the page, or check it."""
    old = PAGE.read_text("utf-8")
    before, _, rest = old.partition(BEGIN)
    new = f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"
    if "--check" in sys.argv[1:]:
        raise SystemExit(0 if new == old else f"{PAGE} is old: run tools/write_tinker_calls.py")
    PAGE.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
