"""Puts the fused path into a model with adapters, and takes it out again.

Only `forward` is replaced, on the instances; parameters, names and files stay PEFT's. Adapted linear layers run fused
one by one in any model; gated MLPs, causal self-attention, RMSNorms and the loss head of Llama-like models run fused
as a whole, and on a CPU the blocks of UNets.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from haori.adapters.fused.coverage import text_config
from haori.adapters.fused.diffusion.modules import KINDS, convolution_stand_in
from haori.adapters.fused.factors import has_adapter
from haori.adapters.fused.loss_forward import LossForward, why_no_head
from haori.adapters.fused.modules import (
    StandIn,
    attention_stand_in,
    linear_stand_in,
    mlp_stand_in,
    norm_stand_in,
)

__all__ = ["Fused", "FusedReport", "fuse", "runs_as_a_whole", "stock_forward"]


_KEPT = "_haori_fused"  # the attribute of a model that runs fused


class FusedReport(NamedTuple):
    """How many modules of each kind run fused, of how many, and why others do not."""

    fused: dict[str, int]
    found: dict[str, int]
    reasons: dict[str, str]
    """For a kind of which not all run fused: the commonest reason."""

    def sentence(self) -> str:
        """Say it in one line."""
        if not any(self.fused.values()):
            why = next(iter(self.reasons.values()), "the method has no adapted linear layers")
            return f"Stock path: nothing runs fused ({why})."
        parts = [f"{self.fused[kind]} of {total} {kind}" for kind, total in self.found.items() if total]
        rest = [f"{kind}: {reason}" for kind, reason in self.reasons.items()]
        return f"Fused path: {', '.join(parts)}" + (f" (not all, since {'; '.join(rest)})." if rest else ".")


class Fused:
    """The fused path in a model; `remove` puts the stock path back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.patched: list[Any] = []
        found: Counter[str] = Counter()
        fused: Counter[str] = Counter()
        reasons: dict[str, Counter[str]] = {}
        for kind, module, stand_in in _stand_ins(model):
            found[kind] += 1
            if stand_in.forward is None:
                reasons.setdefault(kind, Counter())[stand_in.reason] += 1
                continue
            fused[kind] += 1
            module.forward = stand_in.forward
            self.patched.append(module)
        layers = getattr(text_config(model), "num_hidden_layers", 0)
        every_attention = 0 < layers == found["attention blocks"] == fused["attention blocks"]
        self._head(found, fused, reasons, skip_mask=every_attention)
        self.report = FusedReport(
            {kind: fused[kind] for kind in found},
            dict(found),
            {kind: counts.most_common(1)[0][0] for kind, counts in reasons.items()},
        )

    def remove(self) -> None:
        """Put the stock path back."""
        self.model.__dict__.pop(_KEPT, None)
        for module in self.patched:
            del module.forward
        self.patched.clear()

    def _head(
        self, found: Counter[str], fused: Counter[str], reasons: dict[str, Counter[str]], *, skip_mask: bool
    ) -> None:
        base: Any = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # type: ignore[operator]
        if not found or not hasattr(base, "lm_head"):
            return
        found["loss head"] += 1
        reason = why_no_head(base)
        if reason is not None:
            reasons["loss head"] = Counter([reason])
            return
        fused["loss head"] += 1
        base.forward = LossForward(base, shares=skip_mask)
        self.patched.append(base)


def runs_as_a_whole(model: nn.Module) -> bool:
    """Say whether a model's every block runs fused: a language model with its loss head, or a UNet."""
    fused: Fused | None = model.__dict__.get(_KEPT)
    if fused is None:
        return False
    report = fused.report
    blocks = report.found.get("residual blocks", 0)
    return report.fused.get("loss head") == 1 or 0 < blocks == report.fused["residual blocks"]


def fuse(model: nn.Module) -> Fused:
    """Let a model with adapters run fused until `remove` is called on what is returned."""
    fused = model.__dict__[_KEPT] = Fused(model)
    return fused


@contextmanager
def stock_forward(model: nn.Module) -> Iterator[None]:
    """Put the stock path back inside the block, such as for adapters that are switched off there."""
    fused: Fused | None = model.__dict__.get(_KEPT)
    stand_ins = [(module, module.forward) for module in fused.patched] if fused is not None else []
    for module, _ in stand_ins:
        del module.forward
    try:
        yield
    finally:
        for module, forward in stand_ins:
            module.forward = forward


def _stand_ins(model: nn.Module) -> list[tuple[str, Any, StandIn]]:
    """Return kind, module and stand-in of everything that might run fused."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: list[tuple[str, Any, StandIn]] = []
    config = text_config(model)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            if isinstance(base, nn.Conv2d):
                found.append(("convolutions", module, convolution_stand_in(module)))
            elif not isinstance(base, nn.Embedding):
                found.append(("linear layers", module, linear_stand_in(module)))
            continue
        if has_adapter(module):
            found.append(("linear layers", module, linear_stand_in(module)))
        for kind, make in (("MLPs", mlp_stand_in), ("attention blocks", attention_stand_in)):
            stand_in = make(module, config)
            if stand_in is not None:
                found.append((kind, module, stand_in))
    if not found:
        return found
    found += _of_diffusion(model)
    if not any(stand_in.forward for _, _, stand_in in found):
        return found
    for module in model.modules():
        stand_in = norm_stand_in(module)
        if stand_in is not None:
            found.append(("norms", module, stand_in))
    return found


def _of_diffusion(model: nn.Module) -> list[tuple[str, Any, StandIn]]:
    """Return what stands in for the parts of UNets, on a CPU; a GPU has kernels of its own for these."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type != "cpu":
        return []
    found = [
        (kind, module, stand_in)
        for module in model.modules()
        for kind, make in KINDS
        if (stand_in := make(module)) is not None
    ]
    if any(kind == "residual blocks" for kind, _, _ in found):
        adapted = {id(layer.get_base_layer()) for layer in model.modules() if isinstance(layer, BaseTunerLayer)}
        frozen = [layer for layer in model.modules() if type(layer) is nn.Conv2d and id(layer) not in adapted]
        found += [("convolutions", layer, convolution_stand_in(layer)) for layer in frozen]
    return found
