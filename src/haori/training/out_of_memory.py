"""When memory runs out: what held it, and which settings would have helped by about how much.

The figures are the run's own. What a microbatch takes is the peak minus what was there before the first step and minus
gradients and AdamW's moments; it grows in proportion to what a microbatch costs (tokens, pixels). Gradient
checkpointing (Chen et al. 2016, arXiv 1604.06174) keeps one layer's activations and every layer's input, [T, D]. These
are estimates: a setting that is said to save a gigabyte saves about that.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from haori.core.errors import TrainingError
from haori.core.methods import QloraMethod
from haori.core.out_of_memory import is_out_of_memory, requested_bytes
from haori.training.memory import current_memory_bytes, peak_memory_bytes, size_in_words
from haori.training.preparation import Prepared

if TYPE_CHECKING:
    from torch import nn

    from haori.training.loop import Loop

__all__ = ["Remedy", "Usage", "explaining_memory", "remedies"]

_WORTH = 0.02  # a remedy that frees less than this share of what is held is not worth saying


class Usage(NamedTuple):
    """Where the memory was when it ran out, in bytes."""

    held: int
    """Weights, gradients and AdamW's moments."""
    activations: int
    """Of one microbatch, at least."""
    trained: int
    """Gradients and moments among `held`."""
    quantisable: int
    """What `held` would be smaller by if the base were in 4 bits."""


class Remedy(NamedTuple):
    """A setting, and about how many bytes it frees."""

    setting: str
    saves: int


@dataclass
class Watched:
    """What the block has built so far; a model without a loop is only measured."""

    model: "nn.Module | None" = None
    loop: "Loop | None" = None

    def forget(self) -> None:
        """Let go of the model, which is to be freed when its owner is done."""
        self.model = self.loop = None


@contextmanager
def explaining_memory(prepared: Prepared) -> Iterator[Watched]:
    """Yield where the block notes its model and loop; an exhausted memory in it becomes a sentence.

    Raises:
        TrainingError: Memory ran out.
    """
    watched = Watched()
    before = current_memory_bytes(prepared.device)
    try:
        yield watched
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        peak = peak_memory_bytes(prepared.device)
        traceback.clear_frames(error.__traceback__)  # they hold the activations
        sentence = _sentence(prepared, watched, requested_bytes(error), before, peak)
        watched.forget()
        raise TrainingError(sentence) from None


def remedies(prepared: Prepared, usage: Usage, layers: int, boundary: int) -> list[Remedy]:
    """Return what would help, in the order in which it should be tried.

    Args:
        prepared: The run.
        usage: Where the memory was.
        layers: Number of transformer layers, or of blocks that are computed again.
        boundary: Bytes of one layer's input for one microbatch.
    """
    training = prepared.recipe.training
    found = _smaller_batches(prepared, usage)
    if not training.gradient_checkpointing and layers > 1:
        saves = round(usage.activations * (1 - 1 / layers)) - layers * boundary
        found.append(Remedy("training.gradient_checkpointing=true", saves))
    method = prepared.recipe.method
    if not isinstance(method, QloraMethod):
        trained = usage.trained if method.kind == "full" else 0
        found.append(Remedy("method.kind=qlora", usage.quantisable + trained))
    elif method.bits == 8:
        found.append(Remedy("method.bits=4", usage.quantisable))
    least = _WORTH * (usage.held + usage.activations)
    return [remedy for remedy in found if remedy.saves > least]


def _smaller_batches(prepared: Prepared, usage: Usage) -> list[Remedy]:
    """Return what smaller microbatches, or else smaller rows, would free."""
    parts = (prepared.train, prepared.validation)
    longest = max(cost for part in parts if part is not None for cost in part.costs)
    found = prepared.recipe.training.lighter(longest)
    return [] if found is None else [Remedy(found.settings, round(usage.activations * (1 - found.share)))]


def _sentence(prepared: Prepared, watched: Watched, asked: int | None, before: int, peak: int) -> str:
    more = f" when another {size_in_words(asked)} could not be had" if asked else ""
    if watched.model is None:
        return (
            f"Out of memory while the model was built: the process held {size_in_words(peak)}{more}. The base's files "
            f"hold {size_in_words(prepared.base.size_bytes)}; method.kind=qlora holds the base in 4 bits, or take a "
            "smaller one."
        )
    usage = _usage(prepared, watched.model, watched.loop, before, peak)
    most = prepared.recipe.training.budgets().microbatch
    layers, boundary = _layers(watched.model, most)
    said = [f"{r.setting} (about {size_in_words(r.saves)} less)" for r in remedies(prepared, usage, layers, boundary)]
    when = f"after step {watched.loop.position.step}" if watched.loop is not None else "in the largest microbatch"
    return (
        f"Out of memory {when}: weights, gradients and AdamW's moments took {size_in_words(usage.held)}, and a "
        f"microbatch of up to {most} {prepared.task.unit} at least {size_in_words(usage.activations)} more{more}. "
        f"Any of these helps: {'; '.join(said) or 'a smaller base'}."
    )


def _usage(prepared: Prepared, model: "nn.Module", loop: "Loop | None", before: int, peak: int) -> Usage:
    from haori.bases import weight_bytes

    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    state: Any = loop.optimizer.state if loop is not None else {}
    moments = sum(v.numel() * v.element_size() for kept in state.values() for v in kept.values())
    held = weight_bytes(model) + gradients + moments
    return Usage(
        held=held,
        activations=max(0, peak - before - held),
        trained=gradients + moments,
        quantisable=max(0, _base_bytes(prepared) - _base_bytes(prepared, QloraMethod(kind="qlora"))),
    )


def _base_bytes(prepared: Prepared, method: QloraMethod | None = None) -> int:
    """Return the bytes of the base's weights as this run holds them, or as `method` would."""
    from haori.adapters.loading import loading_of
    from haori.adapters.qlora import base_bytes

    own = prepared.recipe.method
    quantised = method or (own if isinstance(own, QloraMethod) else None)
    loading = loading_of(quantised or own, prepared.recipe.training.dtype)
    skeleton: Any = prepared.task.skeleton(prepared.base, prepared.recipe)
    before, after, _ = base_bytes(skeleton, quantised or QloraMethod(kind="qlora"), loading.dtype)
    return before if quantised is None else after


def _layers(model: Any, cost: int) -> tuple[int, int]:
    """Return the number of layers and the bytes of one layer's input."""
    if hasattr(model, "checkpointed_blocks"):
        found: tuple[int, int] = model.checkpointed_blocks(cost)
        return found
    config: Any = model.config.get_text_config()
    layers = int(getattr(config, "num_hidden_layers", 1))
    hidden = int(getattr(config, "hidden_size", 0))
    return layers, cost * hidden * 4
