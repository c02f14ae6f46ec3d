"""The losses of preference learning, as functions of log-probabilities of answers.

Each takes log p(answer | prompt), summed over the answer's tokens, under the policy (with graph) and the reference
(constants), and returns the loss of each pair with the rewards that its paper gives to both answers. Writing
r = log policy - log reference for an answer, w for the chosen one, l for the rejected one and |y| for its tokens:

    dpo     -(1 - e) log s(beta (r_w - r_l)) - e log s(-beta (r_w - r_l)) Rafailov 2023, eq. 7; Mitchell 2023, eq. 3
    ipo     (r_w/|y_w| - r_l/|y_l| - 1/(2 beta))^2                        Azar 2023, eq. 17
    hinge   max(0, 1 - beta (r_w - r_l))                                  Liu 2023 (RSO), eq. 11
    orpo    -log p_w/|y_w| - beta log s(log odds_w - log odds_l)          Hong 2024, eq. 6 and 7
    simpo   -log s(beta log p_w/|y_w| - beta log p_l/|y_l| - gamma)       Meng 2024, eq. 6
    kto     weight (1 - s(+-(beta r - beta z)))                           Ethayarajh 2024, eq. 8

s is the logistic function and e the label smoothing. Knows nothing about models, batches or tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = [
    "AnswerLoss",
    "PairLoss",
    "dpo_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_loss",
    "mismatch_divergence",
    "orpo_loss",
    "simpo_loss",
]

_LARGEST_LOG_PROBABILITY = -1e-6  # odds of an answer that is certain would be infinite


class PairLoss(NamedTuple):
    """Loss of each pair [B], with graph, and the rewards of its two answers [B], without."""

    loss: Tensor
    chosen: Tensor
    rejected: Tensor


class AnswerLoss(NamedTuple):
    """Loss of each judged answer [B], with graph, and its reward [B], without."""

    loss: Tensor
    reward: Tensor


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PairLoss:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    `label_smoothing` is the assumed share of pairs whose labels are swapped: the conservative DPO of Mitchell's note
    (2023, equation 3). TRL smooths its `robust` and `exo_pair` losses only.

    Args:
        chosen: Summed log-probabilities of the chosen answers under the policy [B].
        rejected: Those of the rejected answers [B].
        reference_chosen: Those of the chosen answers under the reference [B].
        reference_rejected: Those of the rejected answers under the reference [B].
        beta: Strength of the pull towards the reference.
        label_smoothing: From 0 to below 0.5.
    """
    ratio_chosen, ratio_rejected = chosen - reference_chosen, rejected - reference_rejected
    margin = beta * (ratio_chosen - ratio_rejected)
    loss = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return _paired(loss, beta * ratio_chosen, beta * ratio_rejected)


def ipo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    beta: float,
) -> PairLoss:
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, equation 17); beta is the paper's tau.

    The paper writes probabilities of whole answers. As in TRL, whose maintainers say that its authors confirmed it and
    that the paper's results were so obtained, log-ratios are means over an answer's tokens: with sums, the distance
    1/(2 beta) would mean something else for every length. TRL reports rewards from sums; here they are what the loss
    compares.

    Args:
        chosen: Summed log-probabilities of the chosen answers under the policy [B].
        rejected: Those of the rejected answers [B].
        reference_chosen: Those of the chosen answers under the reference [B].
        reference_rejected: Those of the rejected answers under the reference [B].
        chosen_tokens: Tokens of the chosen answers [B].
        rejected_tokens: Tokens of the rejected answers [B].
        beta: Strength of the pull towards the reference.
    """
    ratio_chosen = (chosen - reference_chosen) / chosen_tokens
    ratio_rejected = (rejected - reference_rejected) / rejected_tokens
    loss = (ratio_chosen - ratio_rejected - 1 / (2 * beta)).square()
    return _paired(loss, beta * ratio_chosen, beta * ratio_rejected)


def hinge_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *, beta: float
) -> PairLoss:
    """Hinge loss on DPO's margin (Liu et al. 2023, RSO, arXiv 2309.06657, equation 11), as TRL's `hinge`.

    SLiC (Zhao et al. 2023, arXiv 2305.10425) has the same hinge on log-probabilities that are not divided by the
    reference's, and a margin of its own.

    Args:
        chosen: Summed log-probabilities of the chosen answers under the policy [B].
        rejected: Those of the rejected answers [B].
        reference_chosen: Those of the chosen answers under the reference [B].
        reference_rejected: Those of the rejected answers under the reference [B].
        beta: Reciprocal of the margin of log-ratios from which a pair costs nothing.
    """
    ratio_chosen, ratio_rejected = chosen - reference_chosen, rejected - reference_rejected
    loss = torch.relu(1 - beta * (ratio_chosen - ratio_rejected))
    return _paired(loss, beta * ratio_chosen, beta * ratio_rejected)


def orpo_loss(
    chosen: Tensor, rejected: Tensor, *, chosen_tokens: Tensor, rejected_tokens: Tensor, beta: float
) -> PairLoss:
    """Odds ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691, equations 6 and 7); needs no reference.

    log P = mean log-probability of an answer's tokens (equation 3), odds = P / (1 - P) (equation 4); the first term is
    the usual loss of the chosen answer (equation 2), and beta is the paper's lambda. TRL takes that term over prompt
    and answer, and as a mean over the tokens of a batch instead of the pairs.

    Args:
        chosen: Summed log-probabilities of the chosen answers [B].
        rejected: Those of the rejected answers [B].
        chosen_tokens: Tokens of the chosen answers [B].
        rejected_tokens: Tokens of the rejected answers [B].
        beta: Weight of the odds ratio beside the usual loss.
    """
    mean_chosen, mean_rejected = chosen / chosen_tokens, rejected / rejected_tokens
    loss = -mean_chosen - beta * logsigmoid(_log_odds(mean_chosen) - _log_odds(mean_rejected))
    return _paired(loss, beta * mean_chosen, beta * mean_rejected)


def simpo_loss(
    chosen: Tensor, rejected: Tensor, *, chosen_tokens: Tensor, rejected_tokens: Tensor, beta: float, gamma: float
) -> PairLoss:
    """Simple preference optimisation (Meng et al. 2024, arXiv 2405.14734, equation 6); needs no reference.

    TRL gives gamma divided by beta, and multiplies by beta again: the same.

    Args:
        chosen: Summed log-probabilities of the chosen answers [B].
        rejected: Those of the rejected answers [B].
        chosen_tokens: Tokens of the chosen answers [B].
        rejected_tokens: Tokens of the rejected answers [B].
        beta: Scale of the reward, which is a mean log-probability.
        gamma: Margin by which the chosen reward is to be above the rejected one.
    """
    reward_chosen, reward_rejected = beta * chosen / chosen_tokens, beta * rejected / rejected_tokens
    return _paired(-logsigmoid(reward_chosen - reward_rejected - gamma), reward_chosen, reward_rejected)


def kto_loss(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    divergence: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> AnswerLoss:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306, equation 8), for answers judged alone.

    lambda_y - v, with v = lambda_D s(beta (r - z)) for a desirable answer and lambda_U s(beta (z - r)) for another.

    Args:
        policy: Summed log-probabilities of the answers under the policy [B].
        reference: Those under the reference [B].
        desirable: Which answers are good [B], bool.
        divergence: z, from `mismatch_divergence` [].
        beta: Strength of the pull towards the reference.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.
    """
    ratio = policy - reference
    signed = torch.where(desirable, ratio - divergence, divergence - ratio)
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(ratio.dtype)
    return AnswerLoss(weight * (1 - torch.sigmoid(beta * signed)), (beta * ratio).detach())


def mismatch_divergence(policy: Tensor, reference: Tensor) -> Tensor:
    """Estimate KL(policy || reference) from answers to other prompts, never below zero (Ethayarajh 2024, section 4.1).

    Args:
        policy: Summed log-probabilities of the mismatched answers under the policy [B].
        reference: Those under the reference [B].

    Returns:
        z [], without graph: the paper does not differentiate through it.
    """
    return (policy - reference).detach().mean().clamp(min=0)


def _paired(loss: Tensor, chosen: Tensor, rejected: Tensor) -> PairLoss:
    return PairLoss(loss, chosen.detach(), rejected.detach())


def _log_odds(mean: Tensor) -> Tensor:
    """Return log(P / (1 - P)) of a mean log-probability log P."""
    bounded = mean.clamp(max=_LARGEST_LOG_PROBABILITY)
    return bounded - torch.log(-torch.expm1(bounded))
