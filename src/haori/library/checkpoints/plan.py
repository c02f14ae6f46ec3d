"""What becomes of each weight file of a base when an adapter is merged into it.

Every tensor keeps its file, its place in it and its dtype. Only a base whose output head shares the input embedding
gets one more where the adapter changes the two apart: `lm_head.weight`, at the end of the file of the embedding.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from haori.core.errors import BaseError, MismatchError
from haori.core.safetensors_header import TensorEntry
from haori.library.checkpoints.tensors import DTYPES, BaseTensors, WeightFile
from haori.library.fit import BaseWeight, match
from haori.library.formats.bundled_words import word_names
from haori.library.updates import AdapterUpdates, ModuleUpdate

__all__ = ["Change", "FilePlan", "MergePlan", "new_index", "plan_merge", "untie"]

_HEAD = "lm_head.weight"
_SHARING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class Change:
    """What happens to one tensor.

    Attributes:
        module: The module's full name.
        update: What the adapter does to it; None for a tensor that is only copied to another place.
        is_bias: The tensor is the module's bias, not its weight.
    """

    module: str
    update: ModuleUpdate | None
    is_bias: bool = False


@dataclass
class FilePlan:
    """One weight file.

    Attributes:
        source: The base's file.
        component: The component that it belongs to.
        changes: By tensor name.
        added: Tensors that the base's file does not have: which of its tensors each begins as, and the change of it.
    """

    source: WeightFile
    component: str
    changes: dict[str, Change] = field(default_factory=dict)
    added: dict[str, tuple[str, Change]] = field(default_factory=dict)

    def header(self) -> bytes:
        """Return the bytes before the data of the merged file: the base's own, unless there are tensors to add."""
        with self.source.path.open("rb") as file:
            raw = file.read(self.source.header.data_start)
        if not self.added:
            return raw
        document = json.loads(raw[8:])
        for name, entry in self.entries_added().items():
            document[name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [entry.start, entry.end],
            }
        text = json.dumps(document, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def entries_added(self) -> dict[str, TensorEntry]:
        """Return where the added tensors lie, behind the others."""
        held = self.source.header.tensors
        end = max((entry.end for entry in held.values()), default=0)
        found = {}
        for name, (like, _) in self.added.items():
            size = held[like].end - held[like].start
            found[name] = held[like]._replace(start=end, end=end + size)
            end += size
        return found


@dataclass(frozen=True)
class MergePlan:
    """All weight files of a base.

    Attributes:
        files: One plan each.
        untied: Components whose output head no longer shares the input embedding.
    """

    files: tuple[FilePlan, ...]
    untied: tuple[str, ...]

    @property
    def changed(self) -> int:
        """Return how many tensors are changed or added."""
        return sum(len(file.changes) + len(file.added) for file in self.files)


def plan_merge(tensors: BaseTensors, updates: AdapterUpdates, *, adapter: str) -> MergePlan:
    """Find the place of everything that the adapter changes.

    Args:
        tensors: The base's.
        updates: The adapter.
        adapter: What to call it in messages.

    Raises:
        MismatchError: Something of the adapter has no place in the base's weights.
        BaseError: A weight that it changes is stored in fewer than 16 bits.
    """
    if words := word_names(updates.extra):
        raise MismatchError(
            f"The adapter {adapter!r} brings the new words {', '.join(words)}, which the vocabulary of the base has no "
            "place for; export it as diffusers, and load both its files into the base's pipeline."
        )
    if updates.extra:
        raise MismatchError(
            f"The adapter {adapter!r} holds {min(updates.extra)[:80]!r}, which changes no weight of the base tensor by "
            "tensor; merge it without --stream."
        )
    fit = match(updates, tensors.weights)
    fit.require(adapter, tensors.base.name)
    plans = {file.path: FilePlan(file, component) for component, files in tensors.files.items() for file in files}
    untied: dict[str, BaseWeight] = {}
    for weights, is_bias in ((fit.weights, False), (fit.biases, True)):
        for module, weight in weights.items():
            component = module.partition(".")[0]
            change = Change(module, updates.modules[module], is_bias)
            plan = plans[tensors.file_of(component, weight.name).path]
            _check_dtype(plan.source, weight.name)
            head = _shared_head(tensors, component)
            if head is not None and head.name == weight.name and not is_bias:
                untied[component] = head
                plan.added.setdefault(_HEAD, (weight.name, Change(f"{component}.{_HEAD}", None)))
            if weight.tied:
                if head is None:
                    raise MismatchError(
                        f"The adapter {adapter!r} changes the output head {module!r}, and the base "
                        f"{tensors.base.name!r} has none."
                    )
                plan.added[_HEAD] = (weight.name, change)
            else:
                plan.changes[weight.name] = change
    return MergePlan(tuple(plans.values()), tuple(untied))


def untie(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration that says that embedding and head are two matrices."""
    changed = {**config, "tie_word_embeddings": False}
    inner = config.get("text_config")
    if isinstance(inner, Mapping) and "tie_word_embeddings" in inner:
        changed["text_config"] = {**inner, "tie_word_embeddings": False}
    return changed


def _shared_head(tensors: BaseTensors, component: str) -> BaseWeight | None:
    """Return the embedding that the output head shares, if it does and the architecture has such a head at all."""
    head = tensors.weights[component].get(_HEAD)
    has_head = tensors.folders[component].architecture.endswith(_SHARING)
    return head if head is not None and head.tied and has_head else None


def _check_dtype(file: WeightFile, name: str) -> None:
    dtype = file.header.tensors[name].dtype
    if dtype not in DTYPES:
        raise BaseError(
            f"The weight {name!r} in {str(file.path)!r} is stored as {dtype}: merged weights would be rounded to its "
            "coarse grid and no longer do what the adapter does. Merge into the 16-bit model it was made from."
        )


def new_index(index: Path, plans: Mapping[Path, FilePlan]) -> str:
    """Return the text of a shard index with the added tensors in it."""
    document = json.loads(index.read_text(encoding="utf-8"))
    for path, plan in plans.items():
        if path.parent != index.parent:
            continue
        for name, entry in plan.entries_added().items():
            document["weight_map"][name] = path.name
            totals = document.setdefault("metadata", {})
            totals["total_size"] = totals.get("total_size", 0) + entry.end - entry.start
            if "total_parameters" in totals:
                totals["total_parameters"] += (entry.end - entry.start) // DTYPES[entry.dtype].itemsize
    return json.dumps(document, indent=2) + "\n"
