"""Reads a stored adapter into the neutral form, knowing its base."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.records import MODEL_COMPONENT
from haori.library.formats.format import open_source
from haori.library.formats.registry import format_of

if TYPE_CHECKING:
    from torch import Tensor

    from haori.bases import Base
    from haori.library.checkpoints.tensors import BaseTensors
    from haori.library.updates import AdapterUpdates

__all__ = ["read_stored", "without_copies"]


def read_stored(folder: Path, base: "Base") -> "AdapterUpdates":
    """Read a stored adapter into the neutral form, knowing its base."""
    source = open_source(folder)
    model = base.components.get(MODEL_COMPONENT)
    if model is not None:
        config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
        source = replace(source, base_config=config)
    return format_of(source).read(source)


def without_copies(updates: "AdapterUpdates", tensors: "BaseTensors") -> "AdapterUpdates":
    """Return an adapter without those of its whole tensors that are the base's own, value by value."""

    def is_copy(key: str, tensor: "Tensor") -> bool:
        component, _, path = key.partition(".")
        weight = tensors.weights.get(component, {}).get(path.replace(".base_layer.", "."))
        if weight is None or weight.shape != tuple(tensor.shape):
            return False
        return bool((tensors.read(component, weight).to(tensor.dtype) == tensor).all())

    kept = {key: tensor for key, tensor in updates.extra.items() if not is_copy(key, tensor)}
    return updates if len(kept) == len(updates.extra) else replace(updates, extra=kept)
