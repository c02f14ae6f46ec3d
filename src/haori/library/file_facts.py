"""What the header of an adapter's file tells of its training, in lines that people read.

The keys are those that sd-scripts, OneTrainer and ai-toolkit write (`ss_*`) and Stability's ModelSpec. Everything in a
header is a claim by who wrote it.
"""

import json
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from haori.core.records import AdapterCard

__all__ = ["file_facts", "frequent_tags"]

_MOST_TAGS = 12
_LONGEST = 200
# Label, then the keys of which the first that says something counts.
_FACTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("trained on", ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")),
    ("pictures", ("ss_num_train_images",)),
    ("resolution", ("ss_resolution", "modelspec.resolution")),
    ("epochs", ("ss_num_epochs",)),
    ("steps", ("ss_steps", "ss_max_train_steps")),
    ("learning rate", ("ss_unet_lr", "ss_learning_rate")),
    ("optimizer", ("ss_optimizer",)),
    ("network", ("ss_network_module",)),
    ("clip skip", ("ss_clip_skip",)),
    ("seed", ("ss_seed",)),
    ("author", ("modelspec.author",)),
)
_SILENT = {"", "None", "null", "Dynamic"}


def file_facts(card: AdapterCard) -> list[tuple[str, str]]:
    """Return label and text of what the file of an adapter says and is known by; empty for a PEFT folder."""
    if card.format == "peft":
        return []
    said = card.file_metadata
    hashes = "  ".join(f"{name} {digits}" for name, digits in card.file_hashes.items())
    training = [f"{label} {value}" for label, keys in _FACTS if (value := _first(said, keys))]
    if started := _time(said.get("ss_training_started_at")):
        training.append(f"begun {started}")
    tags = ", ".join(f"{tag} ({count})" for tag, count in frequent_tags(said)[:_MOST_TAGS])
    return [
        ("format", card.format),
        ("components", ", ".join(card.components)),
        ("hashes", hashes),
        ("its header says", "; ".join(training)),
        ("frequent tags", tags),
    ]


def frequent_tags(metadata: Mapping[str, str]) -> list[tuple[str, int]]:
    """Return the tags of the training captions with how often each occurred, the most frequent first.

    `ss_tag_frequency` holds a table of tags for each folder of pictures.
    """
    try:
        folders: Any = json.loads(metadata.get("ss_tag_frequency", "{}"))
    except (ValueError, RecursionError):
        return []
    counts: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int) and tag.strip():
                counts[tag.strip()[:_LONGEST]] += count
    return counts.most_common()


def _first(said: Mapping[str, str], keys: tuple[str, ...]) -> str:
    return next((" ".join(said[key].split())[:_LONGEST] for key in keys if said.get(key, "") not in _SILENT), "")


def _time(stamp: str | None) -> str:
    try:
        return datetime.fromtimestamp(float(stamp or ""), UTC).strftime("%Y-%m-%d")
    except (ValueError, OverflowError, OSError):
        return ""
