"""Batches and losses of text generation.

Loss is the sum of -log p(token | tokens before it) over labelled tokens; the loop divides by the number of
labelled tokens of the whole optimizer step, so that accumulation and padding do not change the result.
Logits are computed only at positions that carry a label; on the fused path they are never all in memory.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from haori.adapters.fused import forms_its_loss, forward_arguments
from haori.tasks.task import LossSum, Size

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Batch", "CausalLmObjective"]

_IGNORED = -100


class Batch(NamedTuple):
    """Right-padded rows. All tensors are [B, T], int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    rows: tuple[int, ...]


class CausalLmObjective:
    """Supplies batches and losses of one part of the split.

    It has the columns `input_ids`, `labels` (-100 where there is no loss), `length` and `origin`.
    """

    separable = True

    def __init__(self, data: "Dataset", pad_token_id: int) -> None:
        self.data = data
        self.pad_token_id = pad_token_id
        self.costs: list[int] = list(data["length"])

    def begin(self, model: torch.nn.Module) -> None:
        """Do nothing: the loss needs nothing but the model."""

    def batch(self, rows: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """Collate rows into a padded batch on `device`."""
        found = self.data.select(list(rows))
        picked = {name: [list(v) for v in found[name]] for name in ("input_ids", "labels")}
        width = max(len(ids) for ids in picked["input_ids"])

        def pad(lists: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([ids + [fill] * (width - len(ids)) for ids in lists], device=device)

        mask = pad([[1] * len(ids) for ids in picked["input_ids"]], 0)
        return Batch(pad(picked["input_ids"], self.pad_token_id), mask, pad(picked["labels"], _IGNORED), tuple(rows))

    def blank(self, batch: Batch) -> Batch:
        """Return the batch without labels."""
        return batch._replace(labels=torch.full_like(batch.labels, _IGNORED))

    def size(self, batch: Batch) -> Size:
        """Return labelled tokens, and tokens."""
        return Size(int((batch.labels[:, 1:] != _IGNORED).sum()), int(batch.attention_mask.sum()))

    def loss(self, model: torch.nn.Module, batch: Batch) -> LossSum:
        """Run the model and sum the loss over labelled tokens.

        Args:
            model: A causal language model; `logits_to_keep` is used where its forward takes it.
            batch: Right-padded rows.
        """
        targets = batch.labels[:, 1:]  # B T-1
        wanted = targets != _IGNORED
        if forms_its_loss(model):
            total, each = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, head_targets=targets
            )
            return LossSum(total, len(each), each.detach(), wanted.nonzero()[:, 0])
        keep = wanted.any(dim=0).nonzero().flatten()  # positions labelled in any row
        arguments: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if "logits_to_keep" in forward_arguments(model):
            logits = model(**arguments, use_cache=False, logits_to_keep=keep).logits  # B K V
        else:
            logits = model(**arguments, use_cache=False).logits[:, keep]
        mask = wanted[:, keep]
        each = torch.nn.functional.cross_entropy(logits[mask].float(), targets[:, keep][mask], reduction="none")
        return LossSum(each.sum(), int(mask.sum()), each.detach(), mask.nonzero()[:, 0])

    def part(self, batch: Batch, places: Sequence[int]) -> Batch:
        """Return the rows at these places, as wide as the batch."""
        chosen = list(places)
        return Batch(
            batch.input_ids[chosen],
            batch.attention_mask[chosen],
            batch.labels[chosen],
            tuple(batch.rows[place] for place in chosen),
        )

    def inputs(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Return ids and mask."""
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}

    def origins(self, rows: Sequence[int]) -> list[str]:
        """Return where rows come from, as file:row."""
        return [str(origin) for origin in self.data.select(list(rows))["origin"]]
