"""The single checks that proofs are made of: what was measured, against which limit, said in words."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from haori.core.records import Check, Verification, now
from haori.library.proof.logits import compare_logits

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "check_effect",
    "check_prompts",
    "check_reloaded",
    "check_repeated",
    "failed",
    "passed",
    "verification_of",
]


# Share of the effect by which logits that should be equal may differ: half of the tenth that must always be found. On
# one machine they are equal to the last bit; this only admits a kernel that adds in another order.
_SHARE = 0.05


def check_effect(
    of_trained: "Sequence[Tensor]", of_base: "Sequence[Tensor]", *, subject: str = "adapter", measured: str = "logits"
) -> Check:
    """Check that what was trained computes numbers, and others than the base; `measured` says what numbers."""
    effect = compare_logits(of_trained, of_base)
    if not math.isfinite(effect.rms):
        return failed("effect", f"with the {subject} the {measured} are NaN or infinite")
    detail = f"the {subject} moves the {measured} by {effect.rms:.2g} of their spread"
    if effect.max == 0:
        detail = f"with the {subject} the model computes exactly what the base does"
    return Check(name="effect", passed=effect.max > 0, detail=detail, value=effect.rms, limit=0.0)


def check_reloaded(
    of_reloaded: "Sequence[Tensor]",
    live: "Sequence[Tensor] | None",
    effect: float,
    *,
    measured: str = "logits",
    share: float = _SHARE,
) -> Check:
    """Check that what was read from disk computes what the live model did, within a share of the training's effect."""
    if live is None:
        return passed("reload", "skipped: there is no live model to compare with")
    error, limit = compare_logits(live, of_reloaded).rms, share * effect
    detail = f"reloaded and live {measured} are equal to the last bit"
    if error != 0:
        detail = (
            f"reloaded and live {measured} differ by {error:.2g} of their spread (limit {limit:.2g}, which is "
            f"{share:g} of the {effect:.2g} by which training moved them)"
        )
    return Check(name="reload", passed=error <= limit, detail=detail, value=error, limit=limit)


def check_repeated(first: "Sequence[Tensor]", second: "Sequence[Tensor]", effect: float, start: str) -> Check:
    """Check that an adapter whose start changes the base does so alike at every load."""
    error, limit = compare_logits(first, second).rms, _SHARE * effect
    detail = f"the start {start!r} changes the base in the same way at every load"
    if not error <= limit:
        detail = (
            f"two loads of the adapter differ by {error:.2g} of the logits' spread (limit {limit:.2g}), since its "
            f"start {start!r} takes a random part out of the base each time; where it was trained, save it as a plain "
            "LoRA with PEFT's model.save_pretrained(folder, path_initial_model_for_weight_conversion=...), which needs "
            "the adapter as it was before training"
        )
    return Check(name="repeat", passed=error <= limit, detail=detail, value=error, limit=limit)


def check_prompts(pair: tuple[Sequence[int], Sequence[int]] | None) -> Check:
    """Check that a prompt is rendered in training (first) as it is for inference (second)."""
    if pair is None:
        return passed("prompt", "skipped: no prompt as training rendered it was given")
    train, inference = list(pair[0]), list(pair[1])
    if train == inference:
        return passed("prompt", f"training and inference render the same {len(train)} token ids")
    place = next(
        (i for i, (a, b) in enumerate(zip(train, inference, strict=False)) if a != b), min(len(train), len(inference))
    )
    return failed(
        "prompt",
        f"training and inference render a prompt differently from token {place} on ({len(train)} and {len(inference)} "
        "tokens): the model would be asked in another form than it learnt",
    )


def verification_of(checks: Sequence[Check], dtype: str) -> Verification:
    """Return the record of checks that were made now."""
    return Verification(passed=all(check.passed for check in checks), checks=tuple(checks), dtype=dtype, time=now())


def passed(name: str, detail: str) -> Check:
    """Return a check that holds and has no figure."""
    return Check(name=name, passed=True, detail=detail)


def failed(name: str, detail: str) -> Check:
    """Return a check that does not hold and has no figure."""
    return Check(name=name, passed=False, detail=detail)
