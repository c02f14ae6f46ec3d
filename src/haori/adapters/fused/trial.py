"""Tries a fused form against the module it stands in for, before anything is trained with it.

A fresh adapter has no effect, since B is zero: compared so, a fused form that leaves it out would pass. For the trial B
is random and as large as makes s B A weigh as much as W, and what the two may differ by is a share of what that does.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from haori.adapters.fused.factors import linear_plan, read_factors

__all__ = ["PROBE_TOKENS", "Forward", "StandIn", "tried"]

Forward = Callable[..., Any]
PROBE_TOKENS = 8
_SAMPLE_ROWS = 64
# Share of the adapters' effect. 16 bits round it by a hundredth to a twentieth; a tenth of the effect must be found.
_LIMITS = {torch.float32: 1e-3}
_LIMIT_16_BITS = 0.08


class StandIn(NamedTuple):
    """The fused forward of a module, or why there is none."""

    forward: Forward | None
    reason: str = ""


@torch.no_grad()
def tried(
    forward: Forward,
    stock: Forward,
    arguments: Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]],
    like: Any,
    parts: Sequence[Any],
) -> StandIn:
    """Compare stand-in and module on a random input.

    Args:
        forward: The fused form.
        stock: The module's own forward.
        arguments: Makes the call's arguments of an input.
        like: A layer or norm that takes the input.
        parts: The linear layers inside; adapters on them are given an effect meanwhile.
    """
    weight = like.weight
    width = getattr(like, "in_features", weight.shape[-1])
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, PROBE_TOKENS, width, generator=random).to(weight.device, dtype)
    args, kwargs = arguments(x)
    state = torch.get_rng_state()  # dropout must neither spoil the comparison nor use up the run's random numbers

    def result(call: Forward) -> Tensor:
        torch.set_rng_state(state)
        found = call(*args, **kwargs)
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output.float()

    try:
        with _outer_factors(parts, random) as shown:
            fused, expected = result(forward), result(stock)
            for tensor in shown:
                tensor.zero_()
            effect = expected - result(stock) if shown else expected
    except (TypeError, ValueError, RuntimeError, AttributeError) as problem:
        return StandIn(None, f"it takes other arguments ({type(problem).__name__})")
    finally:
        torch.set_rng_state(state)
    error = float((fused - expected).norm() / effect.norm().clamp_min(1e-30))
    if not error <= _LIMITS.get(dtype, _LIMIT_16_BITS):
        return StandIn(None, f"the fused form differs from it by {error:.2g} of its output")
    return StandIn(forward)


@contextmanager
def _outer_factors(parts: Sequence[Any], random: torch.Generator) -> Iterator[list[Tensor]]:
    """Put random values in place of B (of the singular values in AdaLoRA) while the block runs, and yield them."""
    kept: list[tuple[Any, Tensor]] = []
    try:
        for part in parts:
            factors = getattr(part, "lora_E", None) or getattr(part, "lora_B", None)
            if not factors:
                continue
            plan = linear_plan(part)
            owner = factors[plan.name]
            parameter = getattr(owner, "weight", owner)
            kept.append((parameter, parameter.data))
            parameter.data = torch.randn(parameter.shape, generator=random).to(parameter.data)
            a, b = (factor.flatten(1) for factor in read_factors(plan)[:2])  # a convolution's have more axes
            update = plan.scale * ((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt()  # ||s B A||, without forming B A
            weight = plan.frozen.weight(torch.float32)[:_SAMPLE_ROWS].flatten(1)
            norm = weight.norm() * (b.shape[0] / weight.shape[0]) ** 0.5  # ||W||, from some of its rows
            parameter.data = parameter.data * (norm / update.clamp_min(1e-30)).to(parameter.device)
        yield [parameter.data for parameter, _ in kept]
    finally:
        for parameter, before in kept:
            parameter.data = before
