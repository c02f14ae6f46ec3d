"""The scale of LyCORIS updates that were trained with `rs_lora`.

LyCORIS stores alpha · sqrt(rank) as the alpha, so that alpha / rank comes to alpha / sqrt(rank); in a file of float16
that is rounded by up to 5e-4, and the header tells the exact value. A LoKr update of two whole matrices has no rank
in its tensors; its scale, sqrt(rank) in training, is told by the header alone.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from haori.library.updates import ModuleUpdate

__all__ = ["with_rank_stabilised_scales"]

_ROUNDING = 4e-3  # of bfloat16


def with_rank_stabilised_scales(
    modules: Mapping[str, ModuleUpdate], metadata: Mapping[str, str]
) -> Mapping[str, ModuleUpdate]:
    """Return the updates with the exact scale, where the header says `rs_lora`; else as they are."""
    arguments = _arguments(metadata)
    if str(arguments.get("rs_lora", "")).lower() not in {"true", "1"}:
        return modules
    alphas = _numbers(metadata.get("ss_network_alpha"), arguments.get("conv_alpha"))
    ranks = _numbers(metadata.get("ss_network_dim"), arguments.get("conv_dim"))
    return {name: _stabilised(update, alphas, ranks) for name, update in modules.items()}


def _stabilised(update: ModuleUpdate, alphas: list[float], ranks: list[float]) -> ModuleUpdate:
    stored = update.alpha
    if stored is None or update.kind == "diff":
        return update
    if update.rank is not None:
        root = math.sqrt(update.rank)
        exact = next((alpha for alpha in alphas if math.isclose(alpha * root, stored, rel_tol=_ROUNDING)), None)
        return update if exact is None else replace(update, alpha=exact, rslora=True)
    rank = next((rank for rank in ranks if math.isclose(rank**1.5, stored, rel_tol=_ROUNDING)), stored ** (2 / 3))
    first = update.factors["w1"].float() * math.sqrt(rank)
    return replace(update, factors={**update.factors, "w1": first})


def _arguments(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    try:
        found = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _numbers(*values: Any) -> list[float]:
    found = []
    for value in values:
        try:
            found.append(float(value))
        except (TypeError, ValueError):
            continue
    return [value for value in found if value > 0]
