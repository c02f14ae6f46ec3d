"""What tensors are called after the name of their module, in every safetensors format, and what they mean.

`read_modules` groups the tensors of a file by module and makes a `ModuleUpdate` of each, under the name that the file
itself gives the module; `place_modules` then gives each the neutral name. Each key is used or named in an error.
Knows nothing of how a format names modules.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from haori.core.errors import FileFormatError
from haori.library.formats.bundled_words import is_bundled
from haori.library.formats.format import Source
from haori.library.update_shapes import fault_of
from haori.library.updates import Kind, ModuleUpdate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FACTOR_NAMES", "REFUSED_NAMES", "REST_NAMES", "NamedModules", "place_modules", "read_modules", "split_key"]

Rest = Literal["alpha", "scalar", "magnitude", "magnitude_of_outputs", "bias", "bias_of_B"]

FACTOR_NAMES: Mapping[str, tuple[Kind, str]] = {
    # kohya, LyCORIS's LoCon
    "lora_down.weight": ("lora", "A"),
    "lora_up.weight": ("lora", "B"),
    "lora_mid.weight": ("lora", "mid"),
    # PEFT, diffusers
    "lora_A.weight": ("lora", "A"),
    "lora_B.weight": ("lora", "B"),
    # diffusers before PEFT
    "lora.down.weight": ("lora", "A"),
    "lora.up.weight": ("lora", "B"),
    "lora_linear_layer.down.weight": ("lora", "A"),
    "lora_linear_layer.up.weight": ("lora", "B"),
    # LyCORIS
    **{f"hada_{name}": ("loha", name) for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": ("lokr", name) for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "diff": ("diff", "diff"),
    "w_norm": ("diff", "diff"),
}
"""Kind of update and name of the factor by the end of the key."""

REST_NAMES: Mapping[str, Rest] = {
    "alpha": "alpha",
    "scalar": "scalar",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude_of_outputs",
    "lora_magnitude_vector.weight": "magnitude_of_outputs",
    "diff_b": "bias",
    "b_norm": "bias",
    "lora_B.bias": "bias_of_B",
}
"""What else a key may hold. LyCORIS's magnitude has the shape of the norm, PEFT's is one of the output rows."""

REFUSED_NAMES: Mapping[str, str] = {
    "oft_blocks": "OFT or BOFT",
    "oft_diag": "OFT",
    "oft_R": "OFT",
    "oft_R.weight": "OFT",
    "boft_R": "BOFT",
    "boft_s": "BOFT",
    "a1.weight": "GLoRA",
    "on_input": "IA3",
    "ia3_l": "IA3",
    "lambda_layer": "T-LoRA",
    "vera_lambda_b": "VeRA",
    "vera_lambda_d": "VeRA",
    "hra_u": "HRA",
    "set_weight": "a whole weight in place of the base's (set_weight)",
    "reshape_weight": "a weight of another shape than the base's (reshape_weight)",
}
"""Methods that are no sum W + dW with dW told by the file: they multiply W, or replace it."""

_ADAPTER_NAME = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.(?!weight$|bias$)([^.]+)(?=\.(?:weight|bias)$|$)")
_LONGEST = 3


class _Part(NamedTuple):
    key: str
    suffix: str


@dataclass(frozen=True)
class NamedModules:
    """The updates of a file by the file's own names of the modules.

    Attributes:
        modules: The updates.
        extra: Tensors that belong to no module: textual-inversion vectors, `bundle_emb...`.
    """

    modules: Mapping[str, ModuleUpdate]
    extra: Mapping[str, "Tensor"]


def split_key(key: str) -> tuple[str, str] | None:
    """Split a key into the module's name and the longest known end; None if no end is known.

    The name of an adapter, as in `to_q.lora_A.default.weight`, is passed over.
    """
    segments = _ADAPTER_NAME.sub(r".\1", key).split(".")
    for count in range(min(_LONGEST, len(segments) - 1), 0, -1):
        suffix = ".".join(segments[-count:])
        if suffix in FACTOR_NAMES or suffix in REST_NAMES or suffix in REFUSED_NAMES:
            return ".".join(segments[:-count]), suffix
    return None


def read_modules(source: Source, respell: Callable[[str], str] = lambda key: key) -> NamedModules:
    """Read all tensors of a safetensors file and make an update of those of each module.

    Args:
        source: The file.
        respell: Gives a key the spelling of the tables above, for a format with other ends.

    Raises:
        FileFormatError: A key has an end that is not known, is of a method that no sum of weights expresses, or is
            one of several that contradict each other or do not fit together.
    """
    tensors = source.load()
    extra = {key: tensors.pop(key) for key in sorted(tensors) if is_bundled(key)}
    groups = _grouped(source, tensors, respell)
    modules: dict[str, ModuleUpdate] = {}
    for module, parts in groups.items():
        update = _update(source, parts, tensors)
        if fault := fault_of(update):
            raise _bad(source, f"the tensors of {module[:120]!r} make no {update.kind} update: {fault}")
        modules[module] = update
    return NamedModules(modules, extra)


def place_modules(
    source: Source, modules: Mapping[str, ModuleUpdate], name_of: Callable[[str], str | None]
) -> dict[str, ModuleUpdate]:
    """Give each update the neutral name of its module.

    Args:
        source: The file they are from, for messages.
        modules: Updates by the file's own names.
        name_of: Returns the neutral name for the file's own, or None if the format knows no such module.

    Raises:
        FileFormatError: A module is not known, or two of them are the same.
    """
    placed: dict[str, ModuleUpdate] = {}
    origin: dict[str, str] = {}
    unknown = [own for own in modules if name_of(own) is None]
    if unknown:
        raise _bad(
            source, f"no base that is known has the modules {_list(unknown)} ({len(unknown)} of its {len(modules)})"
        )
    for own, update in modules.items():
        name = str(name_of(own))
        if name in placed:
            raise _bad(source, f"{origin[name][:120]!r} and {own[:120]!r} are both the module {name!r}")
        placed[name], origin[name] = update, own
    return placed


def _grouped(source: Source, keys: Collection[str], respell: Callable[[str], str]) -> dict[str, list[_Part]]:
    groups: dict[str, list[_Part]] = defaultdict(list)
    unknown: list[str] = []
    for key in sorted(keys):
        split = split_key(respell(key))
        if split is None:
            unknown.append(key)
            continue
        module, suffix = split
        if suffix in REFUSED_NAMES:
            raise _bad(
                source,
                f"{key[:120]!r} belongs to {REFUSED_NAMES[suffix]}, which is no sum of the base's weight and an "
                "update; merge it into its base with the tool that made it, and extract a LoRA from the difference",
            )
        groups[module].append(_Part(key, suffix))
    if unknown:
        raise _bad(source, f"the meaning of {_list(unknown)} is not known ({len(unknown)} of its {len(keys)} keys)")
    return groups


def _update(source: Source, parts: list[_Part], tensors: "Mapping[str, Tensor]") -> ModuleUpdate:
    factors: dict[str, Tensor] = {}
    rest: dict[Rest, Tensor] = {}
    first: dict[str, str] = {}
    kinds: dict[Kind, str] = {}
    for key, suffix in parts:
        factor = FACTOR_NAMES.get(suffix)
        name = factor[1] if factor else REST_NAMES[suffix].removesuffix("_of_outputs")
        if name in first:
            raise _bad(source, f"{first[name][:120]!r} and {key[:120]!r} say the same of one module")
        first[name] = key
        if factor is None:
            rest[REST_NAMES[suffix]] = tensors[key]
        else:
            kinds.setdefault(factor[0], key)
            factors[name] = tensors[key]
    if len(kinds) > 1:
        raise _bad(source, f"{_list(sorted(kinds.values()))} are updates of different kinds of one module")
    kind: Kind = next(iter(kinds), "diff")
    if not kinds and "bias" not in rest:
        raise _bad(source, f"{parts[0].key[:120]!r} stands alone: its module has no other tensor")
    update = ModuleUpdate(
        kind,
        _scaled(kind, factors, _number(source, first, rest, "scalar")),
        alpha=_number(source, first, rest, "alpha"),
        magnitude=rest.get("magnitude", _flat(rest.get("magnitude_of_outputs"))),
        bias=rest.get("bias"),
    )
    if (bias := rest.get("bias_of_B")) is None:
        return update
    if update.bias is not None or "A" not in factors:
        raise _bad(source, f"{first['bias_of_B'][:120]!r} stands beside no LoRA, or beside another bias")
    scaled = bias if update.scale == 1 else bias.float() * update.scale  # y = W x + scale (B A x + b)
    return replace(update, bias=scaled)


def _number(source: Source, first: Mapping[str, str], rest: "Mapping[Rest, Tensor]", name: Rest) -> float | None:
    if (tensor := rest.get(name)) is None:
        return None
    if tensor.numel() != 1:
        raise _bad(source, f"{first[name][:120]!r} has the shape {list(tensor.shape)}, and is a single number")
    if not math.isfinite(value := float(tensor)):
        raise _bad(source, f"{first[name][:120]!r} is {value}")
    return value


def _scaled(kind: Kind, factors: "dict[str, Tensor]", scalar: float | None) -> "dict[str, Tensor]":
    """Multiply one factor by LyCORIS's learnt `scalar`, in float32."""
    if scalar is None or scalar == 1:
        return factors
    name = {"lora": "B", "loha": "w1_a", "lokr": "w1" if "w1" in factors else "w1_a", "diff": "diff"}[kind]
    return {key: factor.float() * scalar if key == name else factor for key, factor in factors.items()}


def _flat(magnitude: "Tensor | None") -> "Tensor | None":
    return None if magnitude is None else magnitude.flatten()


def _list(keys: list[str]) -> str:
    shown = ", ".join(repr(key[:120]) for key in keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"


def _bad(source: Source, reason: str) -> FileFormatError:
    return FileFormatError(f"{str(source.path)!r} cannot be read as an adapter: {reason}.")
