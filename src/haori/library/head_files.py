"""The head of a stored classifier: what it classifies, into which labels.

Stock PEFT keeps the weights of a head with the adapter, but not the names of its labels. They are in `head.json` beside
the weights; without that file the labels are called LABEL_0, LABEL_1, ... as transformers calls them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from haori.core.errors import FileFormatError
from haori.core.records import Head
from haori.core.safetensors_header import TensorEntry

__all__ = ["HEAD_NAME", "read_head", "stock_head", "write_head"]

HEAD_NAME = "head.json"
_LIMIT_BYTES = 1 << 20
_PREFIX = "base_model.model."
_KINDS: dict[str, Literal["sequence_classification", "token_classification"]] = {
    "SEQ_CLS": "sequence_classification",
    "TOKEN_CLS": "token_classification",
}
# The last layer of the heads of transformers, whose outputs are the labels; of two that match it is the first here.
_LAST_LAYERS = ("score", "classifier.out_proj", "classification_head.out_proj", "classifier", "logits_proj")


def write_head(folder: Path, head: Head) -> None:
    """Write the head beside the weights in `folder`."""
    (folder / HEAD_NAME).write_text(head.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_head(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> Head | None:
    """Return the head of the adapter in `folder`; None for an adapter that is no classifier.

    Args:
        folder: A PEFT folder.
        config: Its adapter_config.json.
        tensors: The tensors of its weight file.

    Raises:
        FileFormatError: It is a classifier whose head is not in its file, or its head.json is damaged, or is about
            other labels than the weights.
    """
    found = stock_head(folder, config, tensors)
    path = folder / HEAD_NAME
    if not path.is_file():
        return found
    if found is None:
        raise FileFormatError(
            f"The adapter in {str(folder)!r} has a {HEAD_NAME}, as classifiers have, but its task_type is "
            f"{str(config.get('task_type'))[:40]!r}; remove the file if it classifies nothing."
        )
    if path.stat().st_size > _LIMIT_BYTES:
        raise FileFormatError(f"{str(path)!r} is larger than {_LIMIT_BYTES:,} bytes, which no list of labels is.")
    try:
        head = Head.model_validate(json.loads(path.read_bytes()))
    except (ValidationError, ValueError, RecursionError):
        raise FileFormatError(
            f'{str(path)!r} is not what describes a head; expected {{"kind": ..., "labels": [...]}} with different '
            "names as labels."
        ) from None
    if head.kind != found.kind or len(head.labels) != len(found.labels):
        raise FileFormatError(
            f"{str(path)!r} describes {len(head.labels)} labels of a {head.kind.replace('_', ' ')}, and the weights "
            f"beside it are those of {len(found.labels)} of a {found.kind.replace('_', ' ')}."
        )
    return head


def stock_head(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> Head | None:
    """Return the head as the weights alone tell it, with the names that transformers gives labels without names.

    Raises:
        FileFormatError: The adapter is a classifier whose head is not in its file.
    """
    kind = _KINDS.get(str(config.get("task_type")))
    if kind is None:
        return None
    rows = next(
        (
            entry.shape[0]
            for layer in _LAST_LAYERS
            for key, entry in tensors.items()
            if f".{key}".endswith(f".{layer}.weight") and len(entry.shape) == 2 and key.startswith(_PREFIX)
        ),
        None,
    )
    if rows is None:
        raise FileFormatError(
            f"The adapter in {str(folder)!r} is a classifier ({config.get('task_type')}), but its file lacks the head "
            "that gives the scores of labels; save it with PEFT's save_pretrained, which keeps the head."
        )
    labels = tuple(f"LABEL_{number}" for number in range(rows))
    return Head(kind=kind, labels=labels, multi_label=rows == 1)
