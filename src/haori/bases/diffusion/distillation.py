"""Bases that were distilled to a few steps, told by their configurations or names, and what that means for training.

A LoRA that is trained on such a base with the usual loss learns its pictures and unlearns the distillation: after some
hundred steps pictures made in few steps become blurred.
"""

import re

from haori.bases.diffusion.configs import PipelineConfigs

__all__ = ["distillation_of", "distilled_sentence"]

_NAMES = re.compile(
    r"(?<![a-z])(turbo|lightning|hyper-?sd|lcm|dmd2?|schnell|distill(?:ed)?|flash)(?![a-z])", re.IGNORECASE
)
_FEW_STEPS = ("LCMScheduler", "TCDScheduler")


def distillation_of(configs: PipelineConfigs, undistilled: str) -> str | None:
    """Return the sentence for a base whose name or scheduler tells that it was distilled; else None.

    Args:
        configs: What its files say.
        undistilled: The base of the family to train on instead.
    """
    scheduler = configs.parts.get("scheduler")
    if scheduler is not None and scheduler.kind in _FEW_STEPS:
        return distilled_sentence(configs, f"its scheduler is {scheduler.kind}", undistilled)
    found = _NAMES.search(configs.base)
    if found:
        return distilled_sentence(configs, f"its name says {found[1]!r}", undistilled)
    return None


def distilled_sentence(configs: PipelineConfigs, why: str, undistilled: str) -> str:
    """Say that a base is distilled, why that is believed, and what to do."""
    return (
        f"The base {configs.base!r} is distilled to few steps ({why}); training on it undoes the distillation, and "
        f"pictures of few steps become blurred. Train on {undistilled} and use the adapter on both, or train briefly "
        "and look at the samples."
    )
