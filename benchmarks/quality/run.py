"""What each method is worth: LoRA, DoRA, ARD-LoRA, AdaLoRA and full fine-tuning, three seeds, two tasks.

Runs `haori compare` on the demo's reviews (accuracy) and on docstrings of Python's standard library (chrF and loss),
each method with the learning rate that Haori chooses for it; and the three LoRA adapters blended at half strength.
Bars: the best adapter within a point of full fine-tuning, and forgetting at most half of full fine-tuning's. Prints
tables and, as its last line, one JSON object;
`--write` keeps it with both reports. It takes an hour or two: `--home DIR` keeps what is done there, and the same
command goes on from it.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]
from blended import blended
from provenance import provenance, report
from tasks import write_docstrings, write_reviews

METHODS = ("lora", "dora", "ard_lora", "adalora", "full")
SEEDS = 3
BARS = {"points_below_full": 1.0, "forgetting_share": 0.5}


def compare(task: str, train: Path, test: Path, home: Path) -> dict[str, Any]:
    """Run one comparison and return its comparison.json."""
    recipe = home / f"{task}.yaml"
    document = {
        "name": task, "base": "smollm2-135m-instruct", "data": {"path": str(train)}, "training": {"epochs": 1},
        "method": {"rank": 16, "alpha": 32.0},
    }  # fmt: skip
    recipe.write_text(json.dumps(document))
    out = home / f"comparison-{task}"
    haori = [Path(sys.executable).with_name("haori"), "compare"]
    wanted = ["--methods", ",".join(("base", *METHODS)), "--seeds", str(SEEDS), "--test", test, "--out", out]
    subprocess.run(
        [*haori, "--resume", out] if out.exists() else [*haori, recipe, *wanted],
        check=True, env={**os.environ, "HAORI_HOME": str(home)},
    )  # fmt: skip
    if "--write" in sys.argv:
        page = (out / "comparison.html").read_text(encoding="utf-8")
        (HERE / f"{task}.html").write_text(page.replace(f"{home}{os.sep}", ""), encoding="utf-8")
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return found


def figures(comparison: dict[str, Any], score: str) -> dict[str, Any]:
    """Return each method's score, forgetting and cost."""
    found = {}
    for method in comparison["methods"]:
        cost = method["cost"] or {}
        forgotten = method["forgetting"].get("shipped", {}).get("whole")
        found[method["method"]] = {
            "score": method["scores"][score], "loss": method["scores"].get("loss"), "forgetting": forgotten,
            "lr": method["lr"], "tokens_per_s": cost.get("tokens_per_s"),
            "peak_memory_bytes": cost.get("peak_memory_bytes"), "size_bytes": cost.get("size_bytes"),
            "trainable_parameters": cost.get("trainable_parameters"),
        }  # fmt: skip
    return found


def share_of(one: dict[str, Any], full: dict[str, Any]) -> float | None:
    """Return forgetting as a share of full fine-tuning's; None where that forgot nothing."""
    if full["forgetting"]["low"] <= 0:  # after some tasks the general text is predicted better than before
        return None
    return round(one["forgetting"]["difference"] / full["forgetting"]["difference"], 3)


def say(one: dict[str, Any], full: dict[str, Any], share: float | None) -> None:
    """Print what was forgotten."""
    of_full = "full forgot nothing" if share is None else f"a share of {share:.2f} (bar <= 0.5)"
    forgotten = (method["forgetting"]["difference"] for method in (one, full))
    print("  {:+.4f} nats per token, full {:+.4f}; {}".format(*forgotten, of_full))


def main() -> None:
    """Run both comparisons, check the bars and report."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(sys.argv[sys.argv.index("--home") + 1]).resolve() if "--home" in sys.argv else Path(folder)
        tasks = {
            "reviews": ("accuracy", *write_reviews(home, 640)),
            "docstrings": ("chrf", *write_docstrings(home, 200, 60)),
        }
        for task, (score, train, test) in tasks.items():
            of = figures(compare(task, train, test, home), score)
            adapters = [name for name in METHODS if name != "full"]
            best = max(adapters, key=lambda name: of[name]["score"]["value"])
            unit = 100 if score == "accuracy" else 1
            below = unit * (of["full"]["score"]["value"] - of[best]["score"]["value"])
            share = share_of(of[best], of["full"])
            print(f"{task}: best adapter {best}, {below:+.2f} points below full (bar <= 1); it forgot")
            say(of[best], of["full"], share)
            blend = blended(task, test, home, score, SEEDS)
            blend_below = unit * (of["full"]["score"]["value"] - blend["score"]["value"])
            blend_share = share_of(blend, of["full"])
            print(f"  three LoRA blended at half strength, {blend_below:+.2f} points below full; they forgot")
            say(blend, of["full"], blend_share)
            results[task] = {
                "score": score, "best": best, "points_below_full": round(below, 3), "forgetting_share": share,
                "methods": of,
                "blend": {**blend, "points_below_full": round(blend_below, 3), "forgetting_share": blend_share},
            }  # fmt: skip
    report({"benchmark": "quality", "seeds": SEEDS, "tasks": results, "bars": BARS, **provenance()}, HERE)


if __name__ == "__main__":
    main()
