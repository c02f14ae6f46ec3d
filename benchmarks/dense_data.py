"""The two kinds of training batch that speed is measured on, and the recipes that make them.

dense   rows of 512 tokens, every token labelled, 2,048 tokens a step
real    the demo's reviews, about 16 rows a step, only answers labelled
"""

import json
import os
from pathlib import Path
from typing import Any

BASE = "smollm2-135m-instruct"


def recipe(case: str, home: Path, method: dict[str, Any], dtype: str = "bf16") -> dict[str, Any]:
    """Return the recipe of a case."""
    data: dict[str, Any] = {"path": str(home / f"{case}.jsonl"), "validation_share": 0.0}
    if case == "dense":
        data |= {"max_length": 512, "too_long": "truncate", "train_on": "all"}
    return {
        "name": case, "base": BASE, "data": data, "method": method, "optimizer": {"lr": 5e-4},
        "training": {
            "epochs": 1, "dtype": dtype,
            "batch_tokens": 2048 if case == "dense" else 1180, "micro_batch_tokens": 2048,
        },
    }  # fmt: skip


def write_data(home: Path) -> None:
    """Fetch the base and write both cases' data into `home`."""
    os.environ["HAORI_HOME"] = str(home)
    from haori.bases import find_base
    from haori.data import fetch_reviews

    find_base(BASE)
    reviews = fetch_reviews()
    train, _ = reviews.write(home / "reviews", train_rows=640)
    (home / "real.jsonl").write_bytes(train.read_bytes())
    words = " ".join(json.loads(line)["messages"][0]["content"] for line in train.read_text().splitlines()).split()
    rows = [" ".join(words[i * 40 : i * 40 + 900]) for i in range(48)]
    (home / "dense.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
