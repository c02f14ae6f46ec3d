"""Movie reviews over all-minilm-l6-v2: LoRA, full fine-tuning and the head alone, three seeds each.

Runs `haori compare`, every run in a process of its own, each method with the learning rate that Haori chooses for it.
Accuracy is on the 400 test reviews, with a bootstrap interval over rows and the spread over seeds; seconds are those in
optimizer steps; peak memory is that of the whole process. Python and its libraries take a part of it before anything is
loaded, so what a process that only imports them takes is measured too, and the ratio without it is given beside.
Bars: LoRA at most a point below full fine-tuning, and at most 0.6 of its peak memory. Prints a table and, as its last
line, one JSON object; `--home DIR` keeps what is done there, and the same command goes on from it.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]
from provenance import provenance, report

METHODS = ("lora", "full", "head")
ROWS, SEEDS = 640, 3
BARS = {"lora_minus_full_points": -1.0, "memory_ratio_full": 0.6}
_IMPORTS = (
    "import resource, torch, transformers, peft, accelerate, datasets, haori.training.loop; "
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
)


def write_reviews(home: Path) -> tuple[Path, Path]:
    """Write the reviews to train on and the fixed 400 to test on, as CSV with text and label."""
    from haori.data import fetch_reviews

    found = fetch_reviews()
    paths = home / "reviews.csv", home / "test.csv"
    for path, reviews in zip(paths, (found.pool[:ROWS], found.test), strict=True):
        _write(path, [(review.text, review.label) for review in reviews])
    return paths


def _write(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(rows)


def compare(train: Path, test: Path, home: Path) -> dict[str, Any]:
    """Run the comparison and return its comparison.json."""
    out = home / "comparison"
    haori = [sys.executable, "-m", "haori.cli.app", "compare"]
    wanted = [
        "--task", "classification", "--base", "all-minilm-l6-v2", "--data", train, "--name", "reviews",
        "--methods", ",".join(METHODS), "--seeds", str(SEEDS), "--test", test, "--out", out,
    ]  # fmt: skip
    subprocess.run(
        [*haori, "--resume", out] if out.exists() else [*haori, *wanted],
        check=True, env={**os.environ, "HAORI_HOME": str(home)},
    )  # fmt: skip
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return found


def imported_bytes() -> int:
    """Return the peak memory of a process that imports what a training imports, and does nothing."""
    done = subprocess.run([sys.executable, "-c", _IMPORTS], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    """Compare, check the bars and report."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(sys.argv[sys.argv.index("--home") + 1]).resolve() if "--home" in sys.argv else Path(folder)
        home.mkdir(parents=True, exist_ok=True)
        os.environ["HAORI_HOME"] = str(home)
        comparison = compare(*write_reviews(home), home)
        found: dict[str, Any] = {}
        for method in comparison["methods"]:
            if method["cost"] is None:
                continue
            cost, accuracy = method["cost"], method["scores"]["accuracy"]
            found[method["method"]] = {
                "accuracy": accuracy, "macro_f1": method["scores"]["macro_f1"], "mcc": method["scores"]["mcc"],
                "auroc": method["scores"]["auroc"], "lr": method["lr"], "seconds": round(cost["seconds"], 1),
                "peak_memory_bytes": cost["peak_memory_bytes"], "size_bytes": cost["size_bytes"],
                "trainable_parameters": cost["trainable_parameters"],
            }  # fmt: skip
            interval = f"{100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f}"
            print(
                f"{method['method']:5} accuracy {100 * accuracy['value']:.1f}% ({interval}; seeds "
                f"{', '.join(f'{100 * one:.1f}' for one in accuracy['each'])})  {cost['seconds']:5.0f} s  "
                f"{cost['peak_memory_bytes'] / 1e6:5.0f} MB  {cost['trainable_parameters']:,} trained"
            )
        bare = imported_bytes()
        lora, full = found["lora"], found["full"]
        points = 100 * (lora["accuracy"]["value"] - full["accuracy"]["value"])
        against = lora["accuracy"]["against"].get("full")
        ratio = lora["peak_memory_bytes"] / full["peak_memory_bytes"]
        above = (lora["peak_memory_bytes"] - bare) / (full["peak_memory_bytes"] - bare)
        print(f"LoRA minus full: {points:+.2f} points (bar >= {BARS['lora_minus_full_points']}), paired: {against}")
        print(f"peak memory: {ratio:.2f} of full's (bar <= {BARS['memory_ratio_full']}); {above:.2f} above the imports")
    report(
        {
            "benchmark": "classification", "rows": ROWS, "seeds": SEEDS, "methods": found,
            "lora_minus_full_points": round(points, 3), "lora_minus_full": against,
            "memory_ratio_full": round(ratio, 3), "imported_bytes": bare,
            "memory_ratio_full_above_imports": round(above, 3), "bars": BARS, **provenance(),
        },
        HERE,
    )  # fmt: skip


if __name__ == "__main__":
    main()
