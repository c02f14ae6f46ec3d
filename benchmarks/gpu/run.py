"""All checks and measurements that need a GPU, one after the other, each in a process of its own and within a limit.

    environment   the card, versions, and which packages are missing
    tests         tests/gpu: the fused path equals PEFT, the loop trains and resumes
    1B-lora, 8B-lora, 8B-nf4   benchmarks/gpu_train: tokens/s and memory against PEFT
    profile       where the time of one training step goes
    serving       requests over the base and over adapters in one batch, against transformers with PEFT

A part that fails or takes too long is reported as such, and the others go on. What was measured so far is in
`results.json` after every part, the whole output in `log.txt`, the profile in `profile.txt`; the last line is the
result as one JSON object. Exit code 1 if a part failed. `--shapes tiny` runs every line on the CPU too.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_SHARED_MEMORY = Path("/dev/shm")
_LEAST_S = 10.0  # less is not worth a start


@dataclass(frozen=True)
class Part:
    """One part: a Python command that prints one JSON object as its last line, and the seconds it may take."""

    name: str
    words: tuple[str, ...]
    limit_s: float


def parts_of(given: argparse.Namespace, home: Path) -> list[Part]:
    """Return the parts in the order of what is most worth knowing."""
    shapes = ("--shapes", given.shapes)
    train = (str(HERE.parent / "gpu_train" / "run.py"), *shapes, "--home", str(home))
    if given.shapes == "tiny":
        train = (*train, "--warm", "1", "--rounds", "2")
    profile = (str(HERE / "profile_step.py"), *shapes, "--home", str(home), "--out", str(given.out / "profile.txt"))
    return [
        Part("environment", (str(HERE / "environment.py"),), 60),
        Part("tests", (str(HERE / "gpu_tests.py"), given.shapes), 120),
        Part("1B-lora", (*train, "--only", "1B-lora"), 120),
        Part("profile", profile, 60),
        Part("serving", (str(HERE / "serving.py"), *shapes, "--home", str(home)), 90),
        Part("8B-lora", (*train, "--only", "8B-lora"), 180),
        Part("8B-nf4", (*train, "--only", "8B-nf4"), 120),
    ]


def run_part(part: Part, limit_s: float, log: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run one part; whatever happens to it is its result."""
    started = time.monotonic()
    with log.open("a") as output:
        output.write(f"\n=== {part.name}\n")
        output.flush()
        begin = output.tell()
        process = subprocess.Popen(
            [sys.executable, *part.words], stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            cwd=ROOT, env=environment, start_new_session=True,
        )  # fmt: skip
        failure = None
        try:
            if process.wait(timeout=limit_s):
                failure = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            failure = f"not done after {limit_s:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    printed = log.read_bytes()[begin:].decode(errors="replace").splitlines()
    seconds = round(time.monotonic() - started, 1)
    found = result_of(printed)
    if failure is None and found is None:
        failure = "no result"
    if failure is not None:
        return {"failed": failure, "last_lines": printed[-5:], "seconds": seconds, **(found or {})}
    return {**(found or {}), "seconds": seconds}


def result_of(lines: list[str]) -> dict[str, Any] | None:
    """Return the JSON object that a part printed as its last line, if it did."""
    for line in reversed(lines):
        if line.startswith("{"):
            try:
                return dict(json.loads(line))
            except ValueError:
                return None
    return None


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result files")
    parser.add_argument("--shapes", choices=["real", "tiny"], default="real")
    parser.add_argument("--seconds", type=float, default=480, help="for all parts together")
    parser.add_argument("--only", help="parts, separated by commas")
    return parser.parse_args()


def main() -> int:
    """Run the parts and print the result."""
    given = arguments()
    end = time.monotonic() + given.seconds
    given.out.mkdir(parents=True, exist_ok=True)
    log = given.out / "log.txt"
    log.write_text("")
    home = Path(tempfile.mkdtemp(prefix="haori-gpu-", dir=_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None))
    environment = {**os.environ, "HAORI_HOME": str(home)}
    result: dict[str, Any] = {"benchmark": "gpu", "shapes": given.shapes, "parts": {}}
    try:
        parts = parts_of(given, home)
        wanted = given.only.split(",") if given.only else [part.name for part in parts]
        if unknown := [name for name in wanted if name not in {part.name for part in parts}]:
            print(f"There is no part {unknown[0]!r}; the parts are {', '.join(part.name for part in parts)}.")
            return 2
        for part in parts:
            if part.name not in wanted:
                continue
            left = end - time.monotonic()
            if left < _LEAST_S:
                result["parts"][part.name] = {"failed": f"not begun: {given.seconds:.0f} s were over"}
            else:
                result["parts"][part.name] = run_part(part, min(part.limit_s, left), log, environment)
            found = result["parts"][part.name]
            word = found.get("failed") or found.get("skipped") or "done"
            print(f"{part.name:12} {found.get('seconds', 0):6.1f} s  {word}", flush=True)
            (given.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    finally:
        shutil.rmtree(home, ignore_errors=True)
    print(json.dumps(result))
    return 1 if any("failed" in found for found in result["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
