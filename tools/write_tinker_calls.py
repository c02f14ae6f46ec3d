"""Writes the table of the training API's calls into docs/guide/tinker.md: every route, and which SDK called it.

A version is in the table for the calls that tests/fixtures/tinker holds of it, which a test sends again. Run it after
adding a route or a recording; `--check` only says whether the page is up to date.
"""

import json
import re
import sys
from pathlib import Path

from fastapi.routing import APIRoute

from haori.server.tinker import routes_lists, routes_sampling, routes_sessions, routes_training

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guide" / "tinker.md"
RECORDED = ROOT / "tests" / "fixtures" / "tinker"
BEGIN, END = "<!-- calls: tools/write_tinker_calls.py -->", "<!-- end of calls -->"


def table() -> str:
    """Return the table."""
    held = {place.stem: json.loads(place.read_text())["requests"] for place in sorted(RECORDED.glob("*.json"))}
    lines = ["| call | what it does | recorded of SDK |", "|---|---|---|"]
    for module in (routes_sessions, routes_training, routes_sampling, routes_lists):
        for route in module.router.routes:
            if not isinstance(route, APIRoute) or route.path.endswith("{rest:path}"):
                continue
            form = re.compile(re.sub(r"\{[^}]*\}", "[^/]+", route.path))
            versions = [
                version for version, requests in held.items()
                if any(one["method"] in (route.methods or ()) and form.fullmatch(one["path"]) for one in requests)
            ]  # fmt: skip
            does = (route.endpoint.__doc__ or "").splitlines()[0].rstrip(".").replace("|", "\\|")
            method = " ".join(sorted(route.methods or ()))
            path = re.sub(r":path\}", "}", route.path.removeprefix("/api/v1"))
            lines.append(f"| `{method} {path}` | {does} | {', '.join(versions)} |")
    return "\n".join(lines)


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
