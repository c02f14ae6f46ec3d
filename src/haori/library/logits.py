"""Runs short prompts through a model and compares the logits: the measuring device of every proof.

The live model, the reloaded one and the merged one are all measured here, in the same way: one prompt at a time
without padding, eval mode, no autocast, the last positions only, in fp32.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from haori.core.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "TOLERANCES",
    "LogitDifference",
    "Tolerance",
    "compare_logits",
    "default_probes",
    "live_probe_logits",
    "model_dtype",
]

_POSITIONS = 8
_QUESTIONS = (
    "Is this review positive or negative? The plot is thin, but the actors make it worth seeing.",
    "Write one sentence about the sea.",
    "What is 17 + 25?",
)


class Tolerance(NamedTuple):
    """Largest root mean square difference between logits, relative to their spread, that counts as equal."""

    reloaded: float
    merged: float


# Measured on SmolLM2-135M (30 layers), LoRA and DoRA of rank 16 on all linear layers, updates of 0.1% to 1.4% of the
# weights' norm, merged against unmerged: fp32 4e-6, fp16 0.7e-2 to 1.1e-2, bf16 4e-2 to 7.5e-2. In 16 bits that is
# nearly all rounding of activations: two ways to compute the same thing differ so much without any merging. The
# limits leave room for deeper models. A reloaded adapter runs through the same code on the same values and is equal
# to the last bit; its limits only admit a kernel that adds in another order.
TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(reloaded=1e-5, merged=1e-4),
    "fp16": Tolerance(reloaded=1e-3, merged=3e-2),
    "bf16": Tolerance(reloaded=1e-2, merged=0.15),
}


class LogitDifference(NamedTuple):
    """How far two sets of logits are apart, relative to the spread (standard deviation) of the first.

    Attributes:
        rms: Root mean square difference.
        max: Largest difference.
        same_token: Share of positions at which both prefer the same token.
    """

    rms: float
    max: float
    same_token: float


def default_probes(tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Return the token ids of three short prompts as inference renders them."""
    from haori.data import render_prompt

    try:
        return [render_prompt(tokenizer, [{"role": "user", "content": text}]) for text in _QUESTIONS]
    except DataError:
        # A template for something else than a user's question; any text measures as well.
        return [list(tokenizer(text)["input_ids"]) for text in _QUESTIONS]


def live_probe_logits(model: "nn.Module", probes: Sequence[Sequence[int]]) -> "list[Tensor]":
    """Return the logits of the last positions of each probe, [T', V] in fp32 on the CPU, with T' at most 8.

    The model's training flags are put back afterwards. A model without a head gives its last hidden states. Pass a
    model that Accelerate has unwrapped: its wrapper computes in mixed precision.
    """
    import torch

    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return [_last_logits(model, torch.tensor([list(probe)], device=device)) for probe in probes]
    finally:
        for module, training in modes.items():
            module.training = training


def compare_logits(first: "Sequence[Tensor]", second: "Sequence[Tensor]") -> LogitDifference:
    """Compare logits of the same probes; NaN where either holds NaN.

    Raises:
        ValueError: The two are not of the same probes.
    """
    import torch

    if [tuple(a.shape) for a in first] != [tuple(b.shape) for b in second]:
        raise ValueError("logits of different probes cannot be compared")
    a, b = torch.cat(list(first)), torch.cat(list(second))  # [sum of T', V]
    centred = a - a.mean(-1, keepdim=True)
    spread = centred.square().mean().sqrt().clamp_min(1e-12)
    difference = a - b
    return LogitDifference(
        rms=float(difference.square().mean().sqrt() / spread),
        max=float(difference.abs().max() / spread),
        same_token=float((a.argmax(-1) == b.argmax(-1)).float().mean()),
    )


def model_dtype(model: "nn.Module") -> str:
    """Return `fp32`, `bf16` or `fp16`: the dtype of the base's floating-point weights (adapters may be fp32)."""
    import torch

    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    counts: dict[str, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            name = names.get(parameter.dtype, "fp32")
            counts[name] = counts.get(name, 0) + parameter.numel()
    return max(counts, key=lambda name: counts[name], default="fp32")


def _last_logits(model: "nn.Module", ids: "Tensor") -> "Tensor":
    import torch

    # ids: [1, T]; an explicit mask, which prompt tuning lengthens.
    output: Any = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    values: Tensor = output.logits if hasattr(output, "logits") else output[0]  # [1, T, V]
    return values[0, -_POSITIONS:].float().cpu()
