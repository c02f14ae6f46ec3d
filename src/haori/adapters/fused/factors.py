"""What an adapted linear layer computes, read from PEFT's layer: y = c * (W x + s B A x) + bias.

Every method that can be written so shares the fused Functions: LoRA and rsLoRA (c = 1), DoRA (c = m / ||W + s B A||),
AdaLoRA (A scaled by its singular values), ARD-LoRA (A and B gated). The factors are PEFT's own parameters, or
differentiable expressions of them, so that gradients arrive where PEFT keeps its parameters.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "FrozenLinear",
    "LinearPlan",
    "RowAdapters",
    "RowFactors",
    "has_adapter",
    "linear_plan",
    "read_factors",
    "why_not",
]

_ROWS = "_haori_rows"  # the attribute of a frozen layer whose rows have adapters of their own


class RowFactors(NamedTuple):
    """LoRA factors of one adapter on rows `start` to `stop` of a packed input; `a` is [R, in], `b` [out, R]."""

    start: int
    stop: int
    a: Tensor
    b: Tensor
    scale: float


class RowAdapters:
    """The adapters of several owners on one frozen linear layer: each acts on rows of its own, set before a forward."""

    def __init__(self, layer: nn.Module) -> None:
        self.active: list[RowFactors] = []
        layer.__dict__[_ROWS] = self


def has_adapter(layer: Any) -> bool:
    """Say whether a module is a linear layer with an adapter of PEFT, or with adapters by rows."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer) or _ROWS in layer.__dict__


class FrozenLinear:
    """The frozen weight [out, in] and bias [out] of a linear layer, dense or quantised by bitsandbytes."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        self.quantized = type(layer).__module__.startswith("bitsandbytes")

    @property
    def bias(self) -> Tensor | None:
        """The bias, if there is one."""
        bias: Tensor | None = self.layer.bias
        return bias

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return W in `dtype`; a quantised weight is dequantised for the call and not kept."""
        weight: Tensor = self.layer.weight
        if self.quantized:
            from peft.utils.integrations import dequantize_bnb_weight

            weight = dequantize_bnb_weight(self.layer.weight, state=getattr(self.layer, "state", None))
        return weight.detach().to(dtype)


class Factors(NamedTuple):
    """One adapter on one layer. `a` is [R, in], `b` [out, R], `c` [out] or None."""

    a: Tensor
    b: Tensor
    c: Tensor | None


class LinearPlan(NamedTuple):
    """A linear layer of the base and how to read its adapter; `adapter` is None where there is none."""

    frozen: FrozenLinear
    adapter: Any
    name: str
    scale: float
    dropout: float

    @property
    def rescaled(self) -> bool:
        """Whether output rows are rescaled (DoRA)."""
        return self.adapter is not None and bool(getattr(self.adapter, "lora_variant", {}))

    @property
    def by_rows(self) -> bool:
        """Whether rows of the input have adapters of their own."""
        return isinstance(self.adapter, RowAdapters)


def why_not(layer: nn.Module) -> str | None:
    """Return why a module cannot run fused, or None if it can. Plain linear layers can."""
    from peft.tuners.adalora.layer import SVDLinear
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(layer, BaseTunerLayer):
        return _why_not_frozen(layer)
    kind = type(layer).__name__
    if layer.merged or layer.disable_adapters or len(layer.active_adapters) != 1:
        return "its adapter is merged, switched off, or not the only one"
    if not (isinstance(layer, (LoraLinear, SVDLinear)) or hasattr(layer, "factors") or _is_quantized_lora(layer)):
        return f"{kind} has no fused form"
    name = layer.active_adapters[0]
    owned: Any = layer
    if getattr(owned, "lora_bias", {}).get(name):
        return "its B has a bias"
    if getattr(owned, "fan_in_fan_out", False):
        return "its weight is stored transposed"
    variant = getattr(owned, "lora_variant", {}).get(name)
    if variant is not None and type(variant).__name__ != "DoraLinearVariant":
        return f"{type(variant).__name__} has no fused form"
    if variant is not None and getattr(owned.lora_dropout[name], "p", 0.0) > 0:
        return "DoRA with dropout takes another formula"
    return _why_not_frozen(layer.get_base_layer())


def linear_plan(layer: nn.Module) -> LinearPlan:
    """Describe a module that `why_not` has no objection to."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(layer, BaseTunerLayer):
        return LinearPlan(FrozenLinear(layer), layer.__dict__.get(_ROWS), "", 0.0, 0.0)
    owned: Any = layer
    name = layer.active_adapters[0]
    return LinearPlan(
        FrozenLinear(layer.get_base_layer()), owned, name, float(owned.scaling[name]), _dropout(owned, name)
    )


def read_factors(plan: LinearPlan) -> Factors:
    """Return the layer's factors as they are now, attached to the graph."""
    layer, name = plan.adapter, plan.name
    if hasattr(layer, "factors"):
        a, b, _ = layer.factors(name)
        return Factors(a, b, None)
    a, b = layer.lora_A[name], layer.lora_B[name]
    if hasattr(layer, "lora_E"):
        return Factors(a * (layer.lora_E[name] / (layer.ranknum[name] + 1e-5)), b, None)
    magnitude = layer.lora_magnitude_vector[name].weight if plan.rescaled else None
    if magnitude is None:
        return Factors(a.weight, b.weight, None)
    return Factors(a.weight, b.weight, magnitude / _row_norm(plan, a.weight, b.weight))


@torch.no_grad()
def _row_norm(plan: LinearPlan, a: Tensor, b: Tensor) -> Tensor:
    """Return ||W + s B A|| of each output row, [out], in fp32, without forming B A.

    ||W + s B A||^2 = ||W||^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B (A A^T)) * B); ||W||^2 is kept, and the whole
    as long as A and B stay what they are. The norm is a constant for the gradient (DoRA, section 4.3).
    """
    layer = plan.adapter
    cache = layer.__dict__.setdefault("_haori_row_norm", {})
    stamp = (a._version, b._version, a.data_ptr(), b.data_ptr())
    if cache.get("stamp") == stamp:
        norm: Tensor = cache["norm"]
        return norm
    dtype = torch.float32 if plan.frozen.quantized else plan.frozen.layer.weight.dtype
    with torch.autocast(a.device.type, enabled=False):
        weight = plan.frozen.weight(dtype)
        if "base" not in cache:
            cache["base"] = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        a32, b32, s = a.float(), b.float(), plan.scale
        cross = ((weight @ a.to(dtype).T).float() * b32).sum(1)  # [out]
        own = ((b32 @ (a32 @ a32.T)) * b32).sum(1)  # [out]
        cache["norm"] = (cache["base"] + 2 * s * cross + s * s * own).clamp_min_(0).sqrt_()
    cache["stamp"] = stamp
    found: Tensor = cache["norm"]
    return found


def _dropout(layer: Any, name: str) -> float:
    """Return the dropout probability that applies now."""
    module = layer.lora_dropout[name]
    return float(module.p) if isinstance(module, nn.Dropout) and module.training else 0.0


def _is_quantized_lora(layer: nn.Module) -> bool:
    return type(layer).__module__ == "peft.tuners.lora.bnb" and type(layer).__name__ in ("Linear4bit", "Linear8bitLt")


def _why_not_frozen(layer: nn.Module) -> str | None:
    kind = type(layer).__name__
    if type(layer).__module__.startswith("bitsandbytes") and kind == "Linear8bitLt":
        return "LLM.int8 rounds activations too, so its products are left to bitsandbytes"
    if type(layer).__module__.startswith("bitsandbytes") and kind == "Linear4bit":
        return None
    if type(layer) is not nn.Linear:
        return f"{kind} is not a plain linear layer"
    if layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad):
        return "its own weights are trained"
    return None
