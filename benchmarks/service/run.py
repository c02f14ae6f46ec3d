"""The service: jobs claimed by many workers, and killed at random instants.

    claims        8 processes empty a queue of 2,000 jobs in SQLite at once (claims.py)
    kill_points   200 kills of workers and their processes over 20 jobs and 3 workers (kill_points.py)
    submit        jobs submitted to a server that trains and answers, and answers beside training (submit.py)
    sl_loop       the cookbook's supervised loop against this server and against a row-by-row stock one (sl_loop.py)
    multi_train   steps of 8 tenants over one base against one after another, and their memory (multi_train.py)

Bars: 500 claims a second, none twice; of killed jobs none lost, none done twice, every adapter equal to that of an
undisturbed run to the byte. Prints a table and, as its last line, one JSON object; `--write` keeps it. A part that is
not measured keeps the figures that are in results.json.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from claims import claims
from kill_points import kill_points
from provenance import provenance, report


def _claims(home: Path, given: argparse.Namespace) -> dict[str, Any]:
    return claims(home, jobs=given.claimed, processes=8, rounds=given.rounds)


def _kill_points(home: Path, given: argparse.Namespace) -> dict[str, Any]:
    return kill_points(home, kills=given.kills, jobs=given.jobs, workers=given.workers, every_s=given.every)


def _multi_train(_home: Path, given: argparse.Namespace) -> dict[str, Any]:
    from multi_train import multi_train

    return multi_train(given.base, rounds=given.rounds)


def _submit(home: Path, given: argparse.Namespace) -> dict[str, Any]:
    from submit import submit

    return submit(home, given.base, jobs=given.submitted, answers=given.answers)


def _sl_loop(home: Path, given: argparse.Namespace) -> dict[str, Any]:
    from sl_loop import sl_loop

    return sl_loop(home, given.base, steps=given.steps, rounds=given.rounds)


# A further part: its function here, its figures in BARS, its options in main.
PARTS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "claims": _claims,
    "kill_points": _kill_points,
    "multi_train": _multi_train,
    "submit": _submit,
    "sl_loop": _sl_loop,
}
BARS = {
    "claims_per_s": 500.0, "claimed_twice": 0, "claims_lost": 0,
    "kill_lost": 0, "kill_twice": 0, "kill_other_bytes": 0,
    "multi_train_8x32": 1.3, "multi_train_8x512": 0.97, "tenants_memory_x": 4.0,
    "submit_p95_ms": 50.0, "serving_p95_ratio": 2.0,
    "sl_loop_step_ratio": 3.0,
}  # fmt: skip
AT_LEAST = {"claims_per_s", "multi_train_8x32", "multi_train_8x512", "sl_loop_step_ratio"}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--claimed", type=int, default=2000, help="claims: jobs")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="multi_train: the base")
    parser.add_argument("--rounds", type=int, default=3, help="claims, multi_train: how often")
    parser.add_argument("--submitted", type=int, default=60, help="submit: jobs")
    parser.add_argument("--answers", type=int, default=40, help="submit: answers timed with and without training")
    parser.add_argument("--steps", type=int, default=6, help="sl_loop: steps of a run")
    parser.add_argument("--kills", type=int, default=200, help="kill_points: kills")
    parser.add_argument("--jobs", type=int, default=20, help="kill_points: jobs")
    parser.add_argument("--workers", type=int, default=3, help="kill_points: workers")
    parser.add_argument("--every", type=float, default=6.0, help="kill_points: mean seconds between two kills")
    parser.add_argument("--write", action="store_true", help="keep the result")
    given = parser.parse_args()
    parts = _kept()
    for name in given.only.split(","):
        print(f"{name}:", flush=True)
        with tempfile.TemporaryDirectory() as place:
            parts[name] = {**PARTS[name](Path(place), given), "provenance": provenance()}
    found = {name: part[name] for part in parts.values() for name in BARS if name in part}
    missed = [name for name, value in found.items() if not _keeps(name, value)]
    for name, value in found.items():
        print(f"{name:20} {value:12,.3f} (bar {BARS[name]:g}: {'MISSED' if name in missed else 'kept'})")
    report({"benchmark": "service", **found, "bars": BARS, "parts": parts, **provenance()}, HERE)
    if missed:
        raise SystemExit(1)


def _kept() -> dict[str, Any]:
    file = HERE / "results.json"
    return json.loads(file.read_text())["parts"] if file.is_file() else {}


def _keeps(name: str, value: float) -> bool:
    return value >= BARS[name] if name in AT_LEAST else value <= BARS[name]


if __name__ == "__main__":
    main()
