"""What of a base decides how llama.cpp keeps its adapter: names of weights, and the order of their rows."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from haori.core.errors import FileFormatError, InputError
from haori.core.records import MODEL_COMPONENT
from haori.library.formats.gguf_header import Value
from haori.library.formats.gguf_names import FAMILIES, Family
from haori.library.updates import AdapterUpdates

if TYPE_CHECKING:
    from torch import Tensor

    from haori.core.records import AdapterCard

__all__ = ["GgufModel", "model_of_base", "model_of_file", "module_of", "slot_of", "turned"]

_TENSOR = re.compile(r"(?:blk\.(\d{1,6})\.)?([a-z_]+)\.weight\.lora_([ab])")
_LAYER = re.compile(r"(.*?\.)(\d+)(\..*)")


class GgufModel(NamedTuple):
    """What of a base decides how its adapter is kept.

    Attributes:
        family: Names and orders.
        heads: Of q and of k, where they are known.
        tied: Embedding and output are one weight; None where that is not known.
    """

    family: Family
    heads: Mapping[str, int]
    tied: bool | None


def model_of_base(updates: AdapterUpdates, card: "AdapterCard | None", config: Mapping[str, Any] | None) -> GgufModel:
    """Return what the base's configuration says, or the file that the adapter was read from.

    Raises:
        InputError: The class of the model is not known, or not which it is.
    """
    found = card.base.components.get(MODEL_COMPONENT) if card is not None else None
    architecture = found.architecture if found is not None else None
    if config is not None:
        architecture = str((config.get("architectures") or [None])[0])
    family = FAMILIES.get(architecture) if architecture is not None else _family(updates.metadata)
    if family is None:
        what = f"is {architecture!r}" if architecture is not None else "is not known"
        raise InputError(
            f"A GGUF adapter is written for one class of models, and that of the base {what}; written are "
            f"{', '.join(sorted(FAMILIES))}. Give the base."
        )
    if config is None:
        return GgufModel(family, _heads(family, updates.metadata), None)
    heads = config.get("num_attention_heads")
    counts = {"attn_q": heads, "attn_k": config.get("num_key_value_heads") or heads}
    known = {slot: count for slot, count in counts.items() if type(count) is int and 0 < count < 1 << 16}
    return GgufModel(
        family, known if len(known) == len(counts) else {}, bool(config.get("tie_word_embeddings", family.tied))
    )


def model_of_file(where: str, metadata: Mapping[str, Value], config: Mapping[str, Any] | None) -> GgufModel:
    """Return what an adapter's file says of its model, with the base's configuration where that is known.

    Raises:
        FileFormatError: Its architecture is not known, or not that of the base.
    """
    family = _family(metadata)
    if family is None:
        known = ", ".join(sorted({found.architecture for found in FAMILIES.values()}))
        raise FileFormatError(
            f"{where} is for models of the architecture {str(metadata.get('general.architecture'))[:40]!r}; read are "
            f"{known}."
        )
    if config is None:
        return GgufModel(family, _heads(family, metadata), None)
    model = model_of_base(AdapterUpdates({}), None, config)
    if model.family.architecture != family.architecture:
        raise FileFormatError(
            f"{where} is for models of the architecture {family.architecture!r}, and the base is of "
            f"{model.family.architecture!r}."
        )
    return model


def _family(metadata: Mapping[str, Any]) -> Family | None:
    name = metadata.get("general.architecture")
    return next((family for family in FAMILIES.values() if family.architecture == name), None)


def _heads(family: Family, metadata: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of heads that a file states, as this format writes them."""
    counts = [str(metadata.get(f"{family.architecture}.attention.{key}")) for key in ("head_count", "head_count_kv")]
    if not all(count.isdecimal() and 0 < int(count) < 1 << 16 for count in counts):
        return {}
    return {"attn_q": int(counts[0]), "attn_k": int(counts[1])}


def module_of(where: str, name: str, family: Family) -> tuple[str, str, str]:
    """Return the module that a tensor belongs to, its name in llama.cpp without the layer, and which factor it is."""
    if found := _TENSOR.fullmatch(name):
        layer, slot, side = found.groups()
        tops = {"token_embd": family.embedding, "output": "lm_head"}
        names = family.names if layer is not None else tops
        if slot in names:
            prefix = family.layer.format(int(layer)) if layer is not None else ""
            return prefix + names[slot], slot, side
    raise FileFormatError(f"{where} holds {name[:120]!r}, which is no update of a weight of {family.architecture!r}.")


def turned(where: str, module: str, b: "Tensor", heads: int, *, back: bool) -> "Tensor":
    """Put the rows of B [out, r] from two halves per head to neighbouring pairs, or back."""
    rows = b.shape[0]
    if rows % (2 * heads):
        raise InputError(f"{where} has {rows} outputs of {module!r}, which are no {heads} heads of even size.")
    half = rows // heads // 2
    parts = (heads, half, 2) if back else (heads, 2, half)
    return b.reshape(*parts, -1).swapaxes(1, 2).reshape(rows, -1)


def slot_of(module: str, family: Family) -> tuple[str, str]:
    """Return llama.cpp's name of a module, without and with its layer."""
    for slot, top in {"token_embd": family.embedding, "output": "lm_head"}.items():
        if module == top:
            return slot, slot
    if found := _LAYER.fullmatch(module):
        before, number, after = found.groups()
        for slot, inner in family.names.items():
            if f"{before}{{}}{after}" == family.layer + inner:
                return slot, f"blk.{int(number)}.{slot}"
    raise InputError(
        f"llama.cpp applies no adapter to {module!r} of a {family.architecture!r} model; merge it with `haori merge` "
        "instead."
    )
