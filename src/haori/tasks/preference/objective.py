"""Batches and losses of preference learning.

A batch of B rows is run as 2B right-padded sequences: the chosen answers and then the rejected ones, or, for KTO, the
judged answers and then answers to other prompts, from which the divergence is estimated. Logits are computed only where
answers are scored; on the fused path they are never all in memory. The loop divides by the number of rows of the whole
optimizer step, so that accumulation and padding do not change the result; KTO's divergence alone is the microbatch's.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from haori.adapters.fused import forms_its_loss, forward_arguments
from haori.tasks.preference.losses import (
    AnswerLoss,
    PairLoss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    mismatch_divergence,
    orpo_loss,
    simpo_loss,
)
from haori.tasks.preference.recipe import DpoLoss, HingeLoss, IpoLoss, KtoLoss, OrpoLoss, PreferenceLoss, SimpoLoss
from haori.tasks.task import LossSum, Size

if TYPE_CHECKING:
    from datasets import Dataset

    from haori.tasks.preference.reference import Reference

__all__ = ["Batch", "PreferenceObjective", "Sequences", "answer_scores"]

_IGNORED = -100


class Sequences(NamedTuple):
    """Right-padded sequences. All tensors are [S, T], int64."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def at(self, places: Sequence[int] | slice) -> "Sequences":
        """Return some of the sequences, as wide as all."""
        return Sequences(self.input_ids[places], self.attention_mask[places], self.labels[places])


class Batch(NamedTuple):
    """B rows as 2B sequences.

    Attributes:
        sequences: The first answers of all rows, then the second ones.
        reference: Log-probability of each answer under the reference [2B]; zeros where there is none.
        desirable: Whether each row's answer is good [B]; None for pairs.
        rows: Their numbers.
        counted: Whether the loss is to be trained on.
    """

    sequences: Sequences
    reference: Tensor
    desirable: Tensor | None
    rows: tuple[int, ...]
    counted: bool = True


def answer_scores(model: torch.nn.Module, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Return log p(answer | prompt) of each sequence [S], with graph and in fp32, and the answers' tokens [S].

    Args:
        model: A causal language model; `logits_to_keep` is used where its forward takes it.
        sequences: Only the tokens of answers carry labels.
    """
    targets = sequences.labels[:, 1:]  # S T-1
    wanted = targets != _IGNORED
    arguments: dict[str, Any] = {"input_ids": sequences.input_ids, "attention_mask": sequences.attention_mask}
    if forms_its_loss(model):
        _, each = model(**arguments, use_cache=False, head_targets=targets)
    else:
        keep = wanted.any(dim=0).nonzero().flatten()  # positions labelled in any sequence
        if "logits_to_keep" in forward_arguments(model):
            logits = model(**arguments, use_cache=False, logits_to_keep=keep).logits  # S K V
        else:
            logits = model(**arguments, use_cache=False).logits[:, keep]
        mask = wanted[:, keep]
        each = torch.nn.functional.cross_entropy(logits[mask].float(), targets[:, keep][mask], reduction="none")
    spread = torch.zeros(wanted.shape, dtype=torch.float32, device=each.device).masked_scatter(wanted, -each.float())
    return spread.sum(1), wanted.sum(1)


class PreferenceObjective:
    """Supplies batches and losses of one part of the split.

    Args:
        data: With the columns of `writing`.
        pad_token_id: Padding.
        section: The loss.
        max_length: Longest sequence in tokens.
        reference: Where log-probabilities under the reference come from; None for a loss that needs none.
    """

    def __init__(
        self,
        data: "Dataset",
        pad_token_id: int,
        section: PreferenceLoss,
        max_length: int,
        reference: "Reference | None",
    ) -> None:
        self.data, self.pad_token_id, self.section = data, pad_token_id, section
        self.one_by_one = isinstance(section, KtoLoss)
        self.max_length, self.reference = max_length, reference
        self.separable = not self.one_by_one
        longest: list[int] = list(data["longest"])
        if self.one_by_one:
            self.partners = _partners(list(data["prompt"]))
            prompts: list[int] = list(data["prompt_length"])
            mismatched = [min(max_length, prompts[i] + longest[j] - prompts[j]) for i, j in enumerate(self.partners)]
            longest = [max(pair) for pair in zip(longest, mismatched, strict=True)]
            self.desirable = torch.tensor(list(data["desirable"]), dtype=torch.bool)
        self.costs: list[int] = [2 * tokens for tokens in longest]
        self._known = torch.zeros(len(longest), 2)  # log-probabilities under the reference

    def begin(self, model: torch.nn.Module) -> None:
        """Find the log-probabilities of all answers under the reference, computed with the model as it is now."""
        if self.reference is not None:
            self._known = self.reference.scores(model, self.sequences, self.costs, self.pad_token_id)

    def sequences(self, rows: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """Return ids and labels of the first answers of rows, then those of the second ones."""
        found = self.data.select(list(rows))
        first = [(list(ids), list(labels)) for ids, labels in zip(found["input_ids"], found["labels"], strict=True)]
        if not self.one_by_one:
            second = zip(found["rejected_input_ids"], found["rejected_labels"], strict=True)
            return [*first, *((list(ids), list(labels)) for ids, labels in second)]
        others = self.data.select([self.partners[row] for row in rows])
        mismatched = []
        for (ids, labels), length, other in zip(first, found["prompt_length"], others, strict=True):
            start = other["prompt_length"]
            mismatched.append(
                (
                    [*ids[:length], *other["input_ids"][start:]][: self.max_length],
                    [*labels[:length], *other["labels"][start:]][: self.max_length],
                )
            )
        return [*first, *mismatched]

    def batch(self, rows: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """Collate rows into a padded batch on `device`."""
        chosen = list(rows)
        known = self._known[chosen].T.flatten().to(device)  # first answers, then second ones
        desirable = self.desirable[chosen].to(device) if self.one_by_one else None
        padded = pad(self.sequences(chosen), self.pad_token_id, device)
        return Batch(padded, known, desirable, tuple(rows))

    def blank(self, batch: Batch) -> Batch:
        """Return the batch without loss."""
        return batch._replace(counted=False)

    def size(self, batch: Batch) -> Size:
        """Return rows, and tokens."""
        return Size(len(batch.rows) if batch.counted else 0, int(batch.sequences.attention_mask.sum()))

    def loss(self, model: torch.nn.Module, batch: Batch) -> LossSum:
        """Run the model and sum the loss over pairs, or over judged answers."""
        found, also = self._judged(model, batch) if self.one_by_one else self._compared(model, batch)
        if not batch.counted:
            nothing = found.new_zeros(0)
            return LossSum(found.sum() * 0.0, 0, nothing, nothing.long())
        places = torch.arange(len(batch.rows), device=found.device)
        return LossSum(found.sum(), len(batch.rows), found.detach(), places, also)

    def part(self, batch: Batch, places: Sequence[int]) -> Batch:
        """Return the rows at these places, as wide as the batch."""
        chosen = list(places)
        both = [*chosen, *(len(batch.rows) + place for place in chosen)]
        return Batch(
            batch.sequences.at(both),
            batch.reference[both],
            None if batch.desirable is None else batch.desirable[chosen],
            tuple(batch.rows[place] for place in chosen),
            batch.counted,
        )

    def inputs(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return ids and mask of all sequences."""
        return {"input_ids": batch.sequences.input_ids, "attention_mask": batch.sequences.attention_mask}

    def origins(self, rows: Sequence[int]) -> list[str]:
        """Return where rows come from, as file:row."""
        return [str(origin) for origin in self.data.select(list(rows))["origin"]]

    def _compared(self, model: torch.nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        scores, tokens = answer_scores(model, batch.sequences)
        found = pair_loss(self.section, scores, tokens, batch.reference)
        margin = found.chosen - found.rejected
        return found.loss, {
            "accuracy": (margin > 0).sum(),
            "chosen_reward": found.chosen.sum(),
            "rejected_reward": found.rejected.sum(),
            "margin": margin.sum(),
        }

    def _judged(self, model: torch.nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        section, half = self.section, len(batch.rows)
        assert isinstance(section, KtoLoss) and batch.desirable is not None
        with torch.no_grad():  # the divergence is not differentiated through
            mismatched, _ = answer_scores(model, batch.sequences.at(slice(half, None)))
        divergence = mismatch_divergence(mismatched, batch.reference[half:])
        scores, _ = answer_scores(model, batch.sequences.at(slice(half)))
        found: AnswerLoss = kto_loss(
            scores, batch.reference[:half], batch.desirable, divergence, beta=section.beta,
            desirable_weight=section.desirable_weight, undesirable_weight=section.undesirable_weight,
        )  # fmt: skip
        signed = torch.where(batch.desirable, 1.0, -1.0) * (found.reward - section.beta * divergence)
        # Scaled such that the mean over all rows of the split is the mean over its good, or bad, answers.
        good = self.desirable.float().mean().clamp(min=1e-9).to(found.reward.device)
        chosen = (found.reward * batch.desirable).sum() / good
        rejected = (found.reward * ~batch.desirable).sum() / (1 - good).clamp(min=1e-9)
        return found.loss, {
            "accuracy": (signed > 0).sum(),
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "margin": chosen - rejected,
            "divergence": divergence * half,
        }


def pair_loss(section: PreferenceLoss, scores: Tensor, tokens: Tensor, reference: Tensor) -> PairLoss:
    """Return the loss that a section asks for.

    Args:
        section: Kind and settings.
        scores: Log-probabilities under the policy, of chosen answers and then of rejected ones [2B].
        tokens: Tokens of the answers [2B].
        reference: Log-probabilities under the reference [2B].
    """
    chosen, rejected = scores.chunk(2)
    counts = dict(zip(("chosen_tokens", "rejected_tokens"), tokens.chunk(2), strict=True))
    four = (chosen, rejected, *reference.chunk(2))
    match section:
        case DpoLoss():
            return dpo_loss(*four, beta=section.beta, label_smoothing=section.label_smoothing)
        case IpoLoss():
            return ipo_loss(*four, **counts, beta=section.beta)
        case HingeLoss():
            return hinge_loss(*four, beta=section.beta)
        case OrpoLoss():
            return orpo_loss(chosen, rejected, **counts, beta=section.beta)
        case SimpoLoss():
            return simpo_loss(chosen, rejected, **counts, beta=section.beta, gamma=section.gamma)
    raise TypeError(f"{type(section).__name__} is no loss of pairs")


def pad(rows: Sequence[tuple[list[int], list[int]]], pad_token_id: int, device: torch.device | str) -> Sequences:
    """Return ids and labels as right-padded sequences on `device`."""
    width = max(len(ids) for ids, _ in rows)

    def padded(lists: Sequence[list[int]], fill: int) -> Tensor:
        return torch.tensor([ids + [fill] * (width - len(ids)) for ids in lists], device=device)

    mask = padded([[1] * len(ids) for ids, _ in rows], 0)
    return Sequences(
        padded([ids for ids, _ in rows], pad_token_id), mask, padded([labels for _, labels in rows], _IGNORED)
    )


def _partners(prompts: Sequence[float]) -> list[int]:
    """Return for each row the next one with another prompt; the next one where there is no other prompt."""
    count = len(prompts)

    def after(row: int) -> int:
        others = (place % count for place in range(row + 1, row + count))
        return next((place for place in others if prompts[place] != prompts[row]), (row + 1) % count)

    return [after(row) for row in range(count)]
