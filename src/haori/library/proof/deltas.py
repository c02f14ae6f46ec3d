"""How far an adapter that sits on its base moves each weight, and the check that it moves some in every component."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from haori.core.records import Check
from haori.library.proof.checks import passed

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

__all__ = ["check_delta", "delta_norms"]

# Methods whose layers say dW in full. The others rotate, rescale or prepend; for them only the logits are compared.
_ADDITIVE = frozenset({
    "ADALORA", "ARD_LORA", "C3A", "DELORA", "FOURIERFT", "LOHA", "LOKR", "LORA", "RANDLORA", "VBLORA", "VERA",
})  # fmt: skip


def delta_norms(adapted: "PeftModel") -> dict[str, float]:
    """Return the Frobenius norm of what the adapter changes, by module name.

    For LoRA and its kin the norm of dW (before DoRA's rescaling); for modules saved whole and trained tokens the norm
    of the difference to the base. Modules of methods that do not add to weights are absent.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    additive = str(adapted.peft_config["default"].peft_type.value) in _ADDITIVE
    norms = {}
    for full_name, module in adapted.named_modules():
        name = full_name.removeprefix("base_model.model.")
        if isinstance(module, ModulesToSaveWrapper):
            norms[name] = _distance(module.modules_to_save["default"], module.original_module)
        elif isinstance(module, TrainableTokensLayer):
            if module.tied_adapter is None:
                norms[name] = _token_distance(module)
        elif isinstance(module, BaseTunerLayer) and additive and hasattr(module, "get_delta_weight"):
            if getattr(module, "r", {}).get("default") == 0:
                continue  # AdaLoRA took every rank away
            delta: Tensor = module.get_delta_weight("default")
            norms[name] = float(delta.detach().float().norm())
    return norms


def check_delta(adapted: "PeftModel", components: Sequence[str]) -> list[Check]:
    """Check that something is changed, and where the adapter changes several components, something in each of them.

    Args:
        adapted: The base with the adapter.
        components: The components that it changes; several make a check each.
    """
    from haori.bases import head_modules

    norms = delta_norms(adapted)
    heads = head_modules(adapted.get_base_model())
    trained = {name: norm for name, norm in norms.items() if name not in heads}
    # The head of a classifier is trained from scratch: it says nothing of the rest, unless it is all there is.
    norms = trained or norms
    if not norms:
        skipped = "skipped: this method adds nothing to weights; its effect on the logits is checked"
        return [passed("delta", skipped)]
    if len(components) < 2:
        return [_check_norms("delta", norms)]
    parts = {of: {n: norm for n, norm in norms.items() if n.partition(".")[0] == of} for of in components}
    return [_check_norms(f"delta of {component}", part) for component, part in parts.items() if part]


def _check_norms(name: str, norms: Mapping[str, float]) -> Check:
    zero = [name for name, norm in norms.items() if not norm > 0]
    if len(zero) == len(norms):
        detail = f"{len(zero)} of {len(norms)} modules were not changed at all, first {zero[0]!r}"
        return Check(name=name, passed=False, detail=detail, value=0.0, limit=0.0)
    least = min((name for name in norms if norms[name] > 0), key=lambda name: norms[name])
    detail = f"{len(norms) - len(zero)} of {len(norms)} modules changed; smallest norm {norms[least]:.3g} in {least!r}"
    if zero:
        detail += f"; not changed at all: {_some(zero)}"
    return Check(name=name, passed=True, detail=detail, value=norms[least], limit=0.0)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _distance(changed: "nn.Module", original: "nn.Module") -> float:
    before = dict(original.named_parameters())
    squares = [
        float((value.detach().float() - before[key].detach().float()).square().sum())
        for key, value in changed.named_parameters()
    ]
    return math.sqrt(sum(squares))


def _token_distance(layer: Any) -> float:
    rows = layer.token_indices["default"]
    base: Tensor = layer.get_base_layer().weight[rows]
    return float((layer.trainable_tokens_delta["default"].detach().float() - base.detach().float()).norm())
