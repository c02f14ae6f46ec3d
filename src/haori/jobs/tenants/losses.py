"""The losses by name: sums over tokens, each as its value and c = -dL/dlogp in closed form.

With r_t = exp(logp_t - q_t), q the log-probabilities of whoever sampled, and A the advantages:

    cross_entropy        -sum w logp
    importance_sampling  -sum r A
    ppo                  -sum min(r A, clip(r) A)                      (arXiv 1707.06347)
    cispo                -sum sg(clip(r)) logp A                       (arXiv 2506.13585)
    gspo                 -sum min(s_t A, clip(s_t) A), s_t of the value exp(mean over M of log r) and the gradient of
                         logp_t                                        (GSPO-token, arXiv 2507.18071)
    dro                  -sum (logp A - beta/2 (logp - q)^2)           (arXiv 2405.19107)

A loss whose formula was not published is refused; a guess would be worse than no answer.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from haori.core.errors import InputError, nearest

__all__ = ["LOSSES", "Loss", "Terms", "find_loss"]

Inputs = Mapping[str, Tensor]
Config = Mapping[str, float]


class Terms(NamedTuple):
    """Loss of each token, and c = -dL/dlogp; in the shape of the log-probabilities."""

    losses: Tensor
    coefficients: Tensor


@dataclass(frozen=True)
class Loss:
    """One loss.

    Attributes:
        name: What requests call it.
        inputs: Arrays it needs besides `target_tokens`.
        config: Its keys with their defaults; None must be given.
        terms: Computes it from log-probabilities (T, K), inputs of that shape and the configuration.
        whole_rows: Whether the terms of a token depend on the other tokens of its row.
    """

    name: str
    inputs: tuple[str, ...]
    config: Mapping[str, float | None]
    terms: Callable[[Tensor, Inputs, Config], Terms]
    whole_rows: bool = False

    def configured(self, given: Mapping[str, float | str]) -> Config:
        """Return the configuration with defaults filled in.

        Raises:
            InputError: A key is unknown, missing or no number, or the clip bounds are the wrong way round.
        """
        for key, value in given.items():
            if key not in self.config:
                allowed = ", ".join(self.config) or "none"
                raise InputError(f"The loss {self.name!r} has no setting {key!r}; its settings are: {allowed}.")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
                raise InputError(f"The setting {key!r} of the loss {self.name!r} is {value!r}; give a number.")
        chosen: dict[str, float | str | None] = {**self.config, **given}
        made: dict[str, float] = {}
        for key, setting in chosen.items():
            if setting is None:
                raise InputError(f"The loss {self.name!r} needs the setting {key!r}; give a number.")
            made[key] = float(setting)
        if "clip_low_threshold" in made and made["clip_low_threshold"] > made["clip_high_threshold"]:
            raise InputError(
                f"clip_low_threshold is {made['clip_low_threshold']} and clip_high_threshold "
                f"{made['clip_high_threshold']}; the low one may not be above the high one."
            )
        return made


def find_loss(name: str) -> Loss:
    """Return the loss of this name.

    Raises:
        InputError: There is none, or its formula is not published.
    """
    if name in LOSSES:
        return LOSSES[name]
    if name == "stable_reinforce":
        raise InputError(
            "The loss 'stable_reinforce' has no published formula, so it is not offered; use "
            "loss_fn='importance_sampling', which takes the same inputs."
        )
    hint = nearest(name, LOSSES) or f"allowed are {', '.join(LOSSES)}."
    raise InputError(f"There is no loss {name[:80]!r}; {hint}")


def _cross_entropy(logp: Tensor, inputs: Inputs, _config: Config) -> Terms:
    weights = inputs["weights"]
    return Terms(-logp * weights, weights)


def _importance_sampling(logp: Tensor, inputs: Inputs, _config: Config) -> Terms:
    gain = torch.exp(logp - inputs["logprobs"]) * inputs["advantages"]
    return Terms(-gain, gain)


def _clipped(ratio: Tensor, inputs: Inputs, config: Config) -> Terms:
    """Return min(r A, clip(r) A) negated, whose gradient is that of r A wherever this is the smaller one, else zero."""
    advantages = inputs["advantages"]
    gain = ratio * advantages
    bounded = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"]) * advantages
    return Terms(-torch.minimum(gain, bounded), torch.where(gain > bounded, torch.zeros_like(gain), gain))


def _ppo(logp: Tensor, inputs: Inputs, config: Config) -> Terms:
    return _clipped(torch.exp(logp - inputs["logprobs"]), inputs, config)


def _cispo(logp: Tensor, inputs: Inputs, config: Config) -> Terms:
    ratio = torch.exp(logp - inputs["logprobs"])
    c = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"]) * inputs["advantages"]
    return Terms(-c * logp, c)


def _gspo(logp: Tensor, inputs: Inputs, config: Config) -> Terms:
    counted = inputs["sequence_ratio_mask"] != 0
    ratio = torch.exp((logp - inputs["logprobs"])[counted].mean())
    return _clipped(ratio.expand_as(logp), inputs, config)


def _dro(logp: Tensor, inputs: Inputs, config: Config) -> Terms:
    away, beta = logp - inputs["logprobs"], config["beta"]
    advantages = inputs["advantages"]
    return Terms(-(logp * advantages - 0.5 * beta * away.square()), advantages - beta * away)


_SAMPLED = ("logprobs", "advantages")
_PPO_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
LOSSES: Mapping[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", ("weights",), {}, _cross_entropy),
        Loss("importance_sampling", _SAMPLED, {}, _importance_sampling),
        Loss("ppo", _SAMPLED, _PPO_CLIP, _ppo),
        Loss("cispo", _SAMPLED, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}, _cispo),
        Loss("gspo", (*_SAMPLED, "sequence_ratio_mask"), _PPO_CLIP, _gspo, whole_rows=True),
        Loss("dro", _SAMPLED, {"beta": None}, _dro),
    )
}
