"""What every committed result carries: processor, versions, commit; and the processes that are measured one by one."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "peft", "accelerate")


def processor() -> str:
    """Return the processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def commit() -> str:
    """Return the commit that was measured, with + when files were changed."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")


def provenance() -> dict[str, Any]:
    """Return what a result needs to be understood later."""
    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def report(result: dict[str, Any], folder: Path) -> None:
    """Print a result as the last line; `--write` keeps it as results.json in `folder`."""
    if "--write" in sys.argv:
        (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


class Contender:
    """A process that does one piece of work whenever it is told to, and says what it took.

    Args:
        script: Its program: reads a JSON object as its argument, prints `{"ready": ...}`, and then for each line it
            reads prints one JSON object.
        spec: The argument.
        home: Its HAORI_HOME.
        python: The interpreter it runs in.
    """

    def __init__(self, script: Path, spec: dict[str, Any], home: Path, python: str = sys.executable) -> None:
        self.log = home / f"contender-{time.time_ns()}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, script, json.dumps(spec)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, env={**os.environ, "HAORI_HOME": str(home), "TOKENIZERS_PARALLELISM": "false"},
            )  # fmt: skip
        self.facts = self._read()

    def turn(self, order: str = "go") -> dict[str, Any]:
        """Let it do one piece of work; `order` is the line it reads."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=120)

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError(f"The contender ended early:\n{self.log.read_text()[-2000:]}")


def serve(facts: dict[str, Any]) -> None:
    """In a contender: say that it is ready."""
    print(json.dumps({"ready": True, **facts}), flush=True)


def median(values: Sequence[float]) -> float:
    """Return the median."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
