"""Runs short prompts through a model and compares the logits: the measuring device of every proof.

The live model and the reloaded one are measured here, in the same way: one prompt at a time without padding, eval mode,
no autocast, the last positions only, in the arithmetic of their own weights. `exact` measures in float64. Of a model
for pictures the prediction of noise is measured; what is said of logits here is true of it too.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from haori.core.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from haori.library.adapter_files import AdapterFiles

__all__ = [
    "LogitDifference",
    "Probe",
    "adapter_probes",
    "compare_logits",
    "default_probes",
    "last_logits",
    "live_probe_logits",
    "model_dtype",
    "noise_of",
]

_POSITIONS = 8
_TRAINED_TOKENS = 64
_QUESTIONS = (
    "Is this review positive or negative? The plot is thin, but the actors make it worth seeing.",
    "Write one sentence about the sea.",
    "What is 17 + 25?",
)


Probe: TypeAlias = "Sequence[int] | Mapping[str, Tensor]"
"""What a proof runs through a model: token ids of a prompt, or the arguments of the forward, one row each."""


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


def adapter_probes(files: "AdapterFiles", probes: Sequence[Probe]) -> list[Probe]:
    """Return the probes with what an adapter needs to show itself; probes that have it stay as they are.

    An activated LoRA works only after its invocation tokens: they are put behind each probe. Trained tokens matter
    where they occur: those that occur nowhere come before the last probe, some in each of as many copies of it.
    """
    prompts = [list(probe) for probe in probes if not isinstance(probe, Mapping)]
    if len(prompts) < len(probes):
        return list(probes)
    invocation: Any = list(files.config.get("alora_invocation_tokens") or [])
    found = [list(p) if p[len(p) - len(invocation) :] == invocation else [*p, *invocation] for p in prompts]
    absent = [token for token in files.trainable_tokens if not any(token in probe for probe in found)]
    last = found[-1]
    parts = [absent[start : start + _TRAINED_TOKENS] for start in range(0, len(absent), _TRAINED_TOKENS)]
    return [*found, *([*part, *last] for part in parts)]


def live_probe_logits(model: "nn.Module", probes: Sequence[Probe]) -> "list[Tensor]":
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
            return [last_logits(model, probe, device).float().cpu() for probe in probes]
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
    centred = a - a.mean(-1, keepdim=True) if a.shape[-1] > 1 else a  # the one score of one label has no spread
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


def last_logits(model: "nn.Module", probe: Probe, device: "torch.device") -> "Tensor":
    """Return the last positions of what a model computes for one probe: [T', V], or [1, C] for one answer per row.

    Of a model for pictures it is its prediction of noise, as `noise_of` gives it.
    """
    import torch

    if isinstance(probe, Mapping):
        output: Any = model(**{name: tensor.to(device) for name, tensor in probe.items()})
    else:
        ids = torch.tensor([list(probe)], device=device)  # [1, T]; an explicit mask, which prompt tuning lengthens
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    if hasattr(output, "sample"):
        return noise_of(output.sample)
    values: Tensor = output.logits if hasattr(output, "logits") else output[0]  # [1, T, V] or [1, C]
    return values if values.dim() == 2 else values[0, -_POSITIONS:]


def noise_of(prediction: "Tensor") -> "Tensor":
    """Return a prediction [B, C, h, w] as a column [B * C * h * w, 1], which is compared value by value."""
    return prediction.reshape(-1, 1)
