"""Labelled rows for the tests of classification, whose labels follow from their words."""

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.encoder_models import WORDS

__all__ = ["animals", "write_csv", "write_jsonl"]


def animals(count: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """Return texts of the tiny vocabulary: labelled `cat`, `dog` or `other` by the words in them."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.choices(WORDS, k=draw.randint(3, 10))
        label = "cat" if "cat" in words else "dog" if "dog" in words else "other"
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
