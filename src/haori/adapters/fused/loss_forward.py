"""A language model's forward that goes straight to the loss: labelled rows only, and what rows share only once.

It stands in for the model's `forward` when it is called with `head_targets`. Rows must be right-padded: then the
causal mask alone hides padding from every token that matters, and no padding mask is needed.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from haori.adapters.fused.loss_head import head_losses
from haori.adapters.fused.modules import SharedPrefix

__all__ = ["LossForward", "common_prefix", "forms_its_loss", "forward_arguments", "why_no_head"]

_IGNORED = -100
_WORTHWHILE = 0.05  # share of the batch's tokens that must be saved for the other layout


def forms_its_loss(model: nn.Module) -> bool:
    """Say whether a model runs fused as a whole, and forms the loss of labelled tokens itself."""
    return "head_targets" in forward_arguments(model)


def forward_arguments(model: nn.Module) -> Iterable[str]:
    """Return the arguments that the base's forward takes, under adapters and other wrapping."""
    inner: Any = getattr(model, "module", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return inspect.signature(inner.forward).parameters


class LossForward:
    """The forward of a causal language model with a plain head.

    Args:
        model: The model under the adapters, with `model` and `lm_head`.
        shares: Whether every attention block runs fused, so that no mask is needed and prefixes can be shared.
    """

    def __init__(self, model: Any, *, shares: bool) -> None:
        self.model, self.unmasked = model, shares
        self.stock = model.forward
        self.windows = [
            size for name in ("sliding_window", "attention_chunk_size") if (size := getattr(model.config, name, None))
        ]
        self.dropouts = [
            dropout for layer in model.modules() for dropout in getattr(layer, "lora_dropout", {}).values()
            if isinstance(dropout, nn.Dropout)
        ]  # fmt: skip
        self.shares_prefix = shares and self._shares_well()

    def __call__(self, *args: Any, head_targets: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the model; with `head_targets` [B, T-1] (-100 where none) return summed loss and loss of each label."""
        if head_targets is None:
            return self.stock(*args, **kwargs)
        ids: Tensor = kwargs["input_ids"]  # [B, T]
        wanted = (head_targets != _IGNORED).nonzero(as_tuple=True)
        prefix = self._prefix(ids)
        if prefix:
            hidden = self._shared(ids, prefix)[_places(wanted, prefix, ids.shape[1])]
        else:
            if self.unmasked:
                kwargs["attention_mask"] = None
            hidden = self.model.model(*args, **kwargs)[0][wanted]  # [labels, D]
        return head_losses(hidden, self.model.lm_head.weight, head_targets[wanted])

    def _prefix(self, ids: Tensor) -> int:
        """Return how many tokens to share, or 0 where that does not pay or would change the result."""
        rows, length = ids.shape
        drops = any(dropout.training and dropout.p > 0 for dropout in self.dropouts)  # rows draw masks of their own
        if not self.shares_prefix or drops or rows < 2 or any(length > size for size in self.windows):
            return 0
        prefix = common_prefix(ids)
        return prefix if (rows - 1) * prefix >= _WORTHWHILE * rows * length else 0

    @torch.no_grad()
    def _shares_well(self) -> bool:
        """Try both layouts on two short rows: a model may treat positions or masks in a way of its own."""
        device = self.model.lm_head.weight.device
        ids = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 6, 5, 4]], device=device) % self.model.config.vocab_size
        state = torch.get_rng_state()
        try:
            plain: Tensor = self.model.model(input_ids=ids, use_cache=False)[0]
            shared = self._shared(ids, 3)
        except (TypeError, ValueError, RuntimeError):
            return False
        finally:
            torch.set_rng_state(state)
        expected = torch.cat([plain[0, :3], plain[:, 3:].flatten(0, 1)]).float()
        limit = 1e-4 if shared.dtype == torch.float32 else 0.02  # rounding in 16 bits makes a thousandth
        return bool((shared.float() - expected).norm() <= limit * expected.norm())

    def _shared(self, ids: Tensor, prefix: int) -> Tensor:
        """Return the hidden states [P + B S, D] of the shared tokens and of each row's own."""
        rows, length = ids.shape
        packed = torch.cat([ids[0, :prefix], ids[:, prefix:].flatten()]).unsqueeze(0)
        positions = torch.arange(length, device=ids.device)
        positions = torch.cat([positions[:prefix], positions[prefix:].repeat(rows)]).unsqueeze(0)
        given = torch.zeros(1, 1, 1, 1, device=ids.device)  # four dimensions: transformers builds no mask of its own
        hidden: Tensor = self.model.model(
            input_ids=packed, position_ids=positions, attention_mask=given, use_cache=False,
            row_layout=SharedPrefix(prefix, rows),
        )[0]  # fmt: skip
        return hidden[0]


def common_prefix(ids: Tensor) -> int:
    """Return how many first tokens are the same in all rows of ids [B, T]; at most T - 1."""
    same = (ids[:, :-1] == ids[:1, :-1]).all(0)
    return int(same.long().cumprod(0).sum())


def why_no_head(model: Any) -> str | None:
    """Return why a model's loss cannot be formed from its hidden states alone, or None if it can."""
    head = model.lm_head
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        return "it is adapted, trained or has a bias"
    if not isinstance(getattr(model, "model", None), nn.Module):
        return "the model keeps its layers elsewhere"
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            return f"the model changes its logits ({name})"
    return None if _logits_are_plain(model) else "the model changes its logits"


@torch.no_grad()
def _logits_are_plain(model: Any) -> bool:
    """Compare the model's logits on a short row with the product of its hidden states and its head."""
    weight: Tensor = model.lm_head.weight
    seen: list[Tensor] = []
    hook = model.model.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0]))
    state = torch.get_rng_state()
    try:
        ids = torch.arange(1, 7, device=weight.device).unsqueeze(0) % model.config.vocab_size
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    finally:
        hook.remove()
        torch.set_rng_state(state)
    if not seen:  # it goes around `model.model`, as OPT does
        return False
    expected = nn.functional.linear(seen[-1].to(weight.dtype), weight).float()
    limit = 1e-5 if weight.dtype == torch.float32 else 1e-2
    return found.shape == expected.shape and bool((found.float() - expected).norm() <= limit * expected.norm())


def _places(wanted: tuple[Tensor, ...], prefix: int, length: int) -> Tensor:
    """Return where positions (row, column) of the batch stand in the shared layout."""
    row, column = wanted
    return torch.where(column < prefix, column, prefix + row * (length - prefix) + column - prefix)
