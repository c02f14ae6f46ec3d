"""Time from typing to help: `haori --help` and that of every subcommand, and what they import.

Each command is started afresh five times, in turns; the median counts. Bar: under 0.3 s each, torch not imported.
Prints a table and, as its last line, one JSON object.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

BAR_S = 0.3
REPEATS = 5
HAORI = Path(sys.executable).with_name("haori")


def commands() -> list[list[str]]:
    """Every command and group, read from the application itself."""
    import typer.main

    from haori.cli.app import app

    found: list[list[str]] = []

    def walk(command: object, path: list[str]) -> None:
        found.append(path)
        for name, child in getattr(command, "commands", {}).items():
            walk(child, [*path, name])

    walk(typer.main.get_command(app), [])
    return found


def seconds(path: list[str]) -> float:
    """Time one start of `haori ... --help`."""
    started = time.perf_counter()
    subprocess.run([HAORI, *path, "--help"], check=True, capture_output=True)
    return time.perf_counter() - started


def imports_torch(path: list[str]) -> bool:
    """Say whether printing this help imports torch."""
    code = (
        "import sys; sys.argv = ['haori', *sys.argv[1:], '--help']\n"
        "from haori.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    return subprocess.run([sys.executable, "-c", code, *path], capture_output=True, check=False).returncode != 0


def main() -> int:
    """Measure, print, and return 1 if the bar is missed."""
    paths = commands()
    samples: dict[str, list[float]] = {" ".join(["haori", *path]): [] for path in paths}
    for _ in range(REPEATS):
        for path in paths:
            samples[" ".join(["haori", *path])].append(seconds(path))
    torch = [" ".join(["haori", *path]) for path in paths if imports_torch(path)]
    medians = {name: statistics.median(values) for name, values in samples.items()}
    print(f"{'command':28} {'median s':>9} {'min':>6} {'max':>6}")
    for name, values in samples.items():
        print(f"{name:28} {medians[name]:9.3f} {min(values):6.3f} {max(values):6.3f}")
    slowest = max(medians.values())
    result = {
        "benchmark": "cli_start",
        "slowest_median_s": round(slowest, 3),
        "bar_s": BAR_S,
        "imports_torch": torch,
        "passed": slowest < BAR_S and not torch,
        "samples_s": {name: [round(value, 4) for value in values] for name, values in samples.items()},
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
