"""Values of a configuration that decide what an adapter computes: of the right type, in bounds, as its file has them.

PEFT takes whatever JSON holds, and a wrong value shows up as an error of torch's, as a huge allocation, or not at all.
They are checked here on every way in, before anything is built. Says nothing about any base.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from haori.core.errors import FileFormatError
from haori.core.safetensors_header import TensorEntry

__all__ = ["PatternValues", "check_values"]

_MOST_RANK = 1 << 16
_MOST_ALPHA = 1e6
_LORA = frozenset({"LORA", "ADALORA", "ARD_LORA"})
_RANKS = ("r", "init_r", "target_r")
_ALPHAS = ("lora_alpha", "alpha")
_SWITCHES = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out")
_NAMES = ("target_modules", "exclude_modules", "layers_pattern")
# What changes the shape of the factors: for these PEFT alone knows it.
_OTHER_SHAPES = ("target_parameters", "use_bdlora", "use_qalora")
# Dimension of each factor that is the rank.
_RANK_AXES = {
    ".lora_A.weight": 0,
    ".lora_B.weight": 1,
    ".lora_embedding_A": 0,
    ".lora_embedding_B": 1,
}
_RANK_SENTENCE = f"a whole number from 1 to {_MOST_RANK:,}, such as 8"
_ALPHA_SENTENCE = (
    f"a number from 0 to {_MOST_ALPHA:,.0f}, such as 16, without quotation marks (the opposite of an adapter is served "
    "by a strength, as in 'name:-1')"
)


def check_values(where: str, peft_type: str, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> None:
    """Refuse a configuration with a value of the wrong type or out of bounds, or with a rank its file does not have.

    Args:
        where: What errors call the folder.
        peft_type: The method as PEFT spells it.
        config: The configuration.
        tensors: The tensors of the weight file.

    Raises:
        FileFormatError: There is such a value.
    """
    _check_types(where, peft_type, config)
    if peft_type in _LORA:
        _check_dtypes(where, tensors)
    if peft_type == "LORA" and not any(config.get(field) for field in _OTHER_SHAPES):
        _check_ranks(where, config, tensors)


class PatternValues:
    """What a `rank_pattern` or `alpha_pattern` says of each module: PEFT takes the first key that matches its end.

    Args:
        pattern: The pattern; anything but a table says nothing.
        default: The value of modules that no key matches.
        modules: Every module that has one.
    """

    def __init__(self, pattern: Any, default: Any, modules: Collection[str]) -> None:
        self._pattern: Mapping[str, Any] = pattern if isinstance(pattern, dict) else {}
        self._default = default
        # Full names, as learnt ranks have them, need no regular expressions: hundreds of them against hundreds.
        self._is_exact = self._pattern.keys() <= set(modules)

    def of(self, module: str) -> Any:
        """Return the value of one module."""
        if self._is_exact:
            return self._pattern.get(module, self._default)
        matching = (value for key, value in self._pattern.items() if re.match(rf"(.*\.)?({key})$", module))
        return next(matching, self._default)


def _check_types(where: str, peft_type: str, config: Mapping[str, Any]) -> None:
    lora = peft_type in _LORA
    given = {field: config[field] for field in config if lora or config[field] is not None}
    for field in _RANKS:
        least = 1 if lora else 0  # OFT takes 0 for a rank that follows from its block size
        if field in given and not _is_rank(given[field], least):
            raise _wrong(where, repr(field), given[field], _RANK_SENTENCE)
    for field in _ALPHAS:
        if field in given and not _is_alpha(given[field]):
            raise _wrong(where, repr(field), given[field], _ALPHA_SENTENCE)
    if not lora:
        return
    for field in _SWITCHES:
        if not isinstance(config.get(field), bool | None):
            raise _wrong(where, repr(field), config[field], "true or false")
    for field in _NAMES:
        if not _are_names(config.get(field)):
            raise _wrong(where, repr(field), config[field], "a list of module names, or one regular expression")
    saved = config.get("modules_to_save")
    if not _are_names(saved) or isinstance(saved, str):
        raise _wrong(where, "'modules_to_save'", saved, "a list of module names")
    layers = config.get("layers_to_transform")
    if not (
        layers is None or _is_rank(layers, 0) or (isinstance(layers, list) and all(_is_rank(n, 0) for n in layers))
    ):
        raise _wrong(where, "'layers_to_transform'", layers, "a list of layer numbers")
    _check_combinations(where, config)
    _check_patterns(where, peft_type, config)
    _check_expressions(where, config)


def _check_combinations(where: str, config: Mapping[str, Any]) -> None:
    """Refuse what PEFT refuses together."""
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    if isinstance(config.get("target_modules"), str) and (layers is not None or pattern is not None):
        raise FileFormatError(
            f"{where} chooses layers beside a regular expression in 'target_modules'; list module names there, or take "
            "'layers_to_transform' and 'layers_pattern' away."
        )
    if pattern and layers is None:
        raise FileFormatError(f"{where} sets 'layers_pattern' without 'layers_to_transform'; give both or neither.")
    if config.get("lora_bias") and config.get("use_dora"):
        raise FileFormatError(f"{where} sets 'lora_bias' and 'use_dora', which PEFT does not allow together.")


def _check_patterns(where: str, peft_type: str, config: Mapping[str, Any]) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(field)
        if pattern is None:
            continue
        if not isinstance(pattern, dict):
            raise _wrong(where, repr(field), pattern, "a table of module names")
        for key, value in pattern.items():
            name = f"{field!r} for {key[:80]!r}"
            if field == "alpha_pattern" and not _is_alpha(value):
                raise _wrong(where, name, value, _ALPHA_SENTENCE)
            if field == "rank_pattern" and peft_type == "ADALORA":
                if not isinstance(value, list) or not all(isinstance(kept, bool) for kept in value):
                    raise _wrong(where, name, value, "a list of true and false")
            elif field == "rank_pattern" and not _is_rank(value, 1):
                raise _wrong(where, name, value, _RANK_SENTENCE)


def _check_expressions(where: str, config: Mapping[str, Any]) -> None:
    given = [config.get(field) for field in ("target_modules", "exclude_modules")]
    expressions = [expression for expression in given if isinstance(expression, str)]
    expressions += config.get("modules_to_save") or []
    layers = config.get("layers_pattern") or []
    expressions += [layers] if isinstance(layers, str) else layers
    for field in ("rank_pattern", "alpha_pattern"):
        expressions += config.get(field) or {}
    for expression in expressions:
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise FileFormatError(
                f"{where} uses {expression[:80]!r} as a regular expression, which it is not: {error}."
            ) from None


def _check_dtypes(where: str, tensors: Mapping[str, TensorEntry]) -> None:
    for key, entry in tensors.items():
        if not entry.dtype.startswith(("F", "BF")):
            raise FileFormatError(
                f"{where} holds the tensor {key[:200]!r} of dtype {entry.dtype}; save it as 16 or 32 bit floats."
            )


def _check_ranks(where: str, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> None:
    """Refuse factors of another rank than the configuration gives their module."""
    factors = [
        (key.removesuffix(suffix).removeprefix("base_model.model."), suffix, axis, entry.shape)
        for key, entry in tensors.items()
        for suffix, axis in _RANK_AXES.items()
        if key.endswith(suffix)
    ]
    ranks = PatternValues(config.get("rank_pattern"), config.get("r", 8), {module for module, *_ in factors})
    for module, suffix, axis, shape in factors:
        rank = ranks.of(module)
        if len(shape) <= axis or shape[axis] != rank:
            raise FileFormatError(
                f"{where} gives {module[:200]!r} the rank {rank}, and the shape {list(shape)} of its {suffix[1:]} has "
                "another; correct 'r' or 'rank_pattern' in its configuration."
            )


def _is_rank(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= _MOST_RANK


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _MOST_ALPHA


def _are_names(value: Any) -> bool:
    return (
        value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(n, str) for n in value))
    )


def _wrong(where: str, what: str, value: Any, allowed: str) -> FileFormatError:
    return FileFormatError(f"{where} sets {what} to {repr(value)[:80]}; it must be {allowed}.")
