"""The demo, measured from outside: gain over the base, time, peak memory of the process.

Runs `haori demo` in a fresh HAORI_HOME, as a new user would meet it. Bars: at least 8 points of accuracy over the
base with an interval that excludes 0, under 3 GB peak memory, at most 8 minutes. Prints a table and, as its last
line, one JSON object; `--write` keeps it as results.json and puts the figures into the READMEs.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]
from provenance import ROOT, commit, processor

HAORI = Path(sys.executable).with_name("haori")
BARS = {"points": 8.0, "peak_gb": 3.0, "seconds": 480.0}


def measure(home: Path) -> dict[str, Any]:
    """Run the demo and gather its figures."""
    started = time.perf_counter()
    subprocess.run([HAORI, "demo"], check=True, env={**os.environ, "HAORI_HOME": str(home)})
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    evaluation = json.loads(next(home.glob("evaluations/*/evaluation.json")).read_text())
    run = json.loads(next(home.glob("runs/*/run.json")).read_text())
    card = json.loads(next(home.glob("library/adapters/*/*/card.json")).read_text())
    accuracy, f1 = evaluation["metrics"]["accuracy"], evaluation["metrics"]["macro_f1"]
    return {
        "benchmark": "demo",
        "base_accuracy": accuracy["base"],
        "accuracy": accuracy["value"],
        "points": 100 * accuracy["difference"],
        "points_low": 100 * accuracy["difference_low"],
        "points_high": 100 * accuracy["difference_high"],
        "base_macro_f1": f1["base"],
        "macro_f1": f1["value"],
        "test_rows": len(evaluation["rows"]),
        "train_rows": card["data"][0]["rows"]["train"],
        "seconds": seconds,
        "training_seconds": run["seconds"],
        "training_tokens_per_s": run["tokens"] / run["seconds"],
        "peak_gb": peak / 1e9,
        "adapter_mb": card["size_bytes"] / 1e6,
        "base_mb": card["base"]["size_bytes"] / 1e6,
        "checks": len(card["verification"]["checks"]),
        "commit": commit(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("haori", "torch", "transformers", "peft")},
        "bars": BARS,
    }


def passed(result: dict[str, Any]) -> bool:
    """Say whether every bar was met."""
    gain = result["points"] >= BARS["points"] and result["points_low"] > 0
    return bool(gain and result["peak_gb"] < BARS["peak_gb"] and result["seconds"] <= BARS["seconds"])


def write_readmes(result: dict[str, Any]) -> None:
    """Put the figures between the demo markers of both READMEs."""
    figures = {
        "base": f"{result['base_accuracy']:.1%}", "adapter": f"{result['accuracy']:.1%}",
        "base_f1": f"{result['base_macro_f1']:.1%}", "adapter_f1": f"{result['macro_f1']:.1%}",
        "gain": f"{result['points']:+.1f}", "low": f"{result['points_low']:+.1f}",
        "high": f"{result['points_high']:+.1f}",
        "minutes": f"{result['seconds'] / 60:.1f}", "training": f"{result['training_seconds']:.0f}",
        "peak": f"{result['peak_gb']:.1f}", "file": f"{result['adapter_mb']:.1f}", "of": f"{result['base_mb']:.0f}",
        "rows": result["train_rows"], "tests": result["test_rows"], "cores": result["cores"],
    }  # fmt: skip
    for name in ("README.md", "README.ja.md"):
        path = ROOT / name
        before, _, rest = path.read_text(encoding="utf-8").partition("<!-- demo:begin -->\n")
        after = rest.partition("<!-- demo:end -->")[2]
        block = (HERE / f"{name.removesuffix('.md')}.txt").read_text(encoding="utf-8").format(**figures)
        path.write_text(f"{before}<!-- demo:begin -->\n{block}<!-- demo:end -->{after}", encoding="utf-8")


def main() -> int:
    """Measure, print, keep if asked to, and return 1 if a bar is missed."""
    with tempfile.TemporaryDirectory() as home:
        result = measure(Path(home))
    result["passed"] = passed(result)
    for key, value in result.items():
        print(f"{key:24} {value:.3f}" if isinstance(value, float) else f"{key:24} {value}")
    if "--write" in sys.argv[1:]:
        (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")
        write_readmes(result)
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
