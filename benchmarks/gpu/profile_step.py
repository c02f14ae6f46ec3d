"""Where the time of one training step goes: torch's profiler over three steps of a LoRA on the 1B shape."""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "gpu_train"), str(HERE.parent / "train_speed")]
_WARM, _STEPS, _ROWS = 3, 3, 30


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", choices=["real", "tiny"], default="real")
    parser.add_argument("--home", type=Path, required=True, help="folder for the base")
    parser.add_argument("--out", type=Path, required=True, help="file for the table")
    return parser.parse_args()


def recipe_for(given: argparse.Namespace) -> dict[str, Any]:
    """Write base and rows, and return the recipe; those of gpu_train."""
    from bases import write_base
    from run import recipe, write_rows

    write_rows(given.home)
    shape, length = ("1B", 1024) if given.shapes == "real" else ("tiny", 64)
    return recipe(given.home, write_base(given.home / shape, shape), "lora", length)


def main() -> None:
    """Profile, write the table, print the ten longest."""
    given = arguments()
    os.environ["HAORI_HOME"] = str(given.home)
    import torch
    from contender import prepared_of, steps_of
    from torch.profiler import ProfilerActivity, profile

    from haori.training.session import opened_loop

    on_gpu = torch.cuda.is_available()
    prepared = prepared_of({"recipe": recipe_for(given)})
    steps = steps_of(prepared)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with tempfile.TemporaryDirectory() as folder, opened_loop(prepared, Path(folder)) as loop:
        for rows in steps[:_WARM]:
            loop.step(rows, last_of_epoch=False)
        with profile(activities=activities) as profiler:
            for rows in steps[_WARM : _WARM + _STEPS]:
                loop.step(rows, last_of_epoch=False)
        seconds = [line["seconds"] for line in loop.measurements.series("train")[_WARM:]]
    kind = "device" if on_gpu else "cpu"
    averages = profiler.key_averages()
    table = averages.table(sort_by=f"self_{kind}_time_total", row_limit=_ROWS, max_name_column_width=90)
    given.out.write_text(f"{_STEPS} steps, {sum(seconds) / len(seconds):.4f} s each under the profiler\n{table}\n")
    spent = sorted(((getattr(row, f"self_{kind}_time_total"), row.key) for row in averages), reverse=True)
    total = sum(time for time, _ in spent)
    print(json.dumps({"step_s": seconds, "device": kind, "longest": [
        {"name": name[:120], "share": round(time / total, 4)} for time, name in spent[:10]
    ]}))  # fmt: skip


if __name__ == "__main__":
    main()
