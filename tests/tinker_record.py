"""What is known of the real client's calls: tests/fixtures/tinker/methods.json, written by the tests that make them.

    HAORI_TINKER_UPDATE=1 python -m pytest tests/integration/test_tinker_methods.py

After that, `tools/write_tinker_calls.py` writes the guide's table.
"""

import json
import os
from pathlib import Path

PLACE = Path(__file__).with_name("fixtures") / "tinker" / "methods.json"
UPDATING = bool(os.environ.get("HAORI_TINKER_UPDATE"))


def held():
    """Return the record: the SDK's version, and of each call how it ends and which tests make it."""
    return json.loads(PLACE.read_text()) if PLACE.exists() else {"sdk": "", "calls": {}}


def check(test, sdk, ended):
    """Compare how calls ended with the record; where it is to be updated, write it."""
    record = held()
    if UPDATING:
        known = {name: how["tests"] for name, how in record["calls"].items()}
        mine = {
            name: {"tests": list(dict.fromkeys([test, *known.get(name, [])])), **how} for name, how in ended.items()
        }
        others = {name: how for name, how in record["calls"].items() if test not in how["tests"]}
        PLACE.write_text(json.dumps({"sdk": sdk, "calls": dict(sorted((others | mine).items()))}, indent=1) + "\n")
        return
    assert record["sdk"] == sdk
    known = {name: how for name, how in record["calls"].items() if test in how["tests"]}
    assert {name: {key: how[key] for key in how if key != "tests"} for name, how in known.items()} == ended


def note(test, *names):
    """Note that a test makes calls of which others told how they end; fail where the record does not say so."""
    record = held()
    if UPDATING:
        for name in names:
            tests = record["calls"][name]["tests"]
            record["calls"][name]["tests"] = [*tests, *({test} - {*tests})]
        PLACE.write_text(json.dumps(record, indent=1) + "\n")
        return
    assert all(test in record["calls"][name]["tests"] for name in names)
