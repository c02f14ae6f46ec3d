"""Time of a step against the length of rows, and peak memory against the rank; both drawn as pictures.

Rows of 256 to 4,096 tokens, 4,096 tokens a step, every token labelled: Haori and PEFT (bf16 base) take turns at each
length. Peak memory at rank 4 to 256 with 4 x 512 tokens. Prints tables and, as its last line, one JSON object;
`--write` keeps it and the pictures.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SPEED = HERE.parent / "train_speed"
sys.path[:0] = [str(HERE.parent)]
from provenance import Contender, median, provenance, report

LENGTHS = (256, 512, 1024, 2048, 4096)
RANKS = (4, 16, 64, 256)
TOKENS = 4096
PEFT = {"base": "bfloat16", "adapter": "float32", "autocast": False, "cast": True, "attention": "sdpa"}


def recipe(home: Path, length: int, rank: int, tokens: int) -> dict[str, Any]:
    """Return a recipe whose rows all have `length` tokens."""
    return {
        "name": "length", "base": "smollm2-135m-instruct",
        "data": {
            "path": str(home / "long.jsonl"), "validation_share": 0.0, "max_length": length, "too_long": "truncate",
            "train_on": "all",
        },
        "method": {"kind": "lora", "rank": rank, "alpha": 2.0 * rank}, "optimizer": {"lr": 1e-4},
        "training": {"epochs": 1, "dtype": "bf16", "batch_tokens": tokens, "micro_batch_tokens": tokens},
    }  # fmt: skip


def write_data(home: Path) -> None:
    """Write long rows of review text."""
    import os

    os.environ["HAORI_HOME"] = str(home)
    from haori.bases import find_base
    from haori.data import fetch_reviews

    find_base("smollm2-135m-instruct")
    train, _ = fetch_reviews().write(home / "reviews", train_rows=640)
    words = " ".join(json.loads(line)["messages"][0]["content"] for line in train.read_text().splitlines()).split()
    rows = [" ".join((words + words)[i * 97 : i * 97 + 4500]) for i in range(64)]
    (home / "long.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def by_length(home: Path) -> dict[str, list[dict[str, float]]]:
    """Return seconds of a step of each system at each length."""
    found: dict[str, list[dict[str, float]]] = {"Haori": [], "PEFT": []}
    for length in LENGTHS:
        wanted = recipe(home, length, 16, TOKENS)
        running = {
            "Haori": Contender(SPEED / "contender.py", {"system": "haori", "recipe": wanted}, home),
            "PEFT": Contender(SPEED / "contender.py", {"system": "peft", "options": PEFT, "recipe": wanted}, home),
        }
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
        for _ in range(3):
            for name, contender in running.items():
                turns[name].append(contender.turn())
        for name, contender in running.items():
            contender.close()
            seconds = median([turn["seconds"] for turn in turns[name][1:]])
            found[name].append(
                {"length": length, "seconds": seconds, "peak_bytes": max(t["peak_bytes"] for t in turns[name])}
            )
        ours, theirs = found["Haori"][-1], found["PEFT"][-1]
        print(
            f"{length:5} tokens a row: Haori {ours['seconds']:6.1f} s {ours['peak_bytes'] / 1e9:5.2f} GB   "
            f"PEFT {theirs['seconds']:6.1f} s {theirs['peak_bytes'] / 1e9:5.2f} GB",
            flush=True,
        )
    return found


def by_rank(home: Path) -> list[dict[str, float]]:
    """Return peak memory and seconds of a step at each rank."""
    found = []
    for rank in RANKS:
        spec = {"system": "haori", "recipe": recipe(home, 512, rank, 2048)}
        contender = Contender(SPEED / "contender.py", spec, home)
        turns = [contender.turn() for _ in range(3)]
        contender.close()
        found.append({"rank": rank, "seconds": turns[-1]["seconds"], "peak_bytes": turns[-1]["peak_bytes"]})
        print(f"rank {rank:4}: {found[-1]['seconds']:5.1f} s   {found[-1]['peak_bytes'] / 1e9:.2f} GB", flush=True)
    return found


def draw(lengths: dict[str, list[dict[str, float]]], ranks: list[dict[str, float]]) -> None:
    """Draw both pictures into scaling.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for (name, points), color in zip(lengths.items(), ("#2f5d8a", "#c4502e"), strict=True):
        left.plot([p["length"] for p in points], [p["seconds"] for p in points], marker="o", color=color, label=name)
    left.set_xscale("log", base=2)
    left.set_xticks(LENGTHS, [f"{n:,}" for n in LENGTHS])
    left.set(xlabel="tokens in a row", ylabel=f"seconds for a step of {TOKENS:,} tokens", title="Time against length")
    right.plot([p["rank"] for p in ranks], [p["peak_bytes"] / 1e9 for p in ranks], marker="o", color="#2f5d8a")
    right.set_xscale("log", base=2)
    right.set_xticks(RANKS, [str(n) for n in RANKS])
    right.set(xlabel="rank", ylabel="peak memory, GB (4 x 512 tokens)", title="Memory against rank")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    left.legend(frameon=False)
    figure.savefig(HERE / "scaling.png")


def main() -> None:
    """Measure, draw, report."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_data(home)
        lengths, ranks = by_length(home), by_rank(home)
    if "--write" in sys.argv:
        draw(lengths, ranks)
    report({"benchmark": "length_scaling", "by_length": lengths, "by_rank": ranks, **provenance()}, HERE)


if __name__ == "__main__":
    main()
