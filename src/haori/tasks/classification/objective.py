"""Batches and losses of classification.

Loss is the sum over rows of -log p(label) (softmax), or for several labels of the mean over labels of the binary cross
entropy (logistic), each weighted by its label; for words it is the sum over labelled words. The loop divides by the
number of rows, or words, of the whole optimizer step, so that accumulation and padding do not change the result.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

from haori.tasks.task import LossSum, Size

if TYPE_CHECKING:
    from datasets import Dataset

    from haori.core.records import Head

__all__ = ["Batch", "ClassificationObjective", "collate"]

_IGNORED = -100


class Batch(NamedTuple):
    """Right-padded rows; B rows, T tokens, C labels.

    Attributes:
        inputs: `input_ids`, `attention_mask` and where the base wants them `token_type_ids`, each [B, T].
        targets: [B] label numbers, [B, C] zeros and ones, or [B, T] label numbers; -100 where there is no loss.
        rows: Numbers of the rows.
    """

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    rows: tuple[int, ...]


def collate(
    ids: Sequence[Sequence[int]],
    kinds: Sequence[Sequence[int] | None],
    pad_token_id: int,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """Return encoded rows, right-padded, as arguments of a model's forward, each [B, T].

    Args:
        ids: Token ids of each row.
        kinds: Token types of each row; None where the base does not want them.
        pad_token_id: What fills shorter rows.
        device: Where to put them.
    """
    width = max(len(row) for row in ids)

    def pad(lists: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in lists], device=device)

    found = {"input_ids": pad(ids, pad_token_id), "attention_mask": pad([[1] * len(row) for row in ids], 0)}
    given = [row for row in kinds if row is not None]
    return found | ({"token_type_ids": pad(given, 0)} if len(given) == len(ids) else {})


class ClassificationObjective:
    """Supplies batches and losses of one part of the split; see `ClassificationSplit` for its columns.

    Args:
        data: The rows.
        head: What the labels are, and of what.
        pad_token_id: What fills shorter rows.
        class_weights: Weight of each label; those that are not in it weigh 1.
    """

    separable = True

    def __init__(
        self, data: "Dataset", head: "Head", pad_token_id: int, class_weights: Mapping[str, float] | None = None
    ) -> None:
        self.data, self.head, self.pad_token_id = data, head, pad_token_id
        self.costs: list[int] = list(data["length"])
        self._number = {label: number for number, label in enumerate(head.labels)}
        weights = [(class_weights or {}).get(label, 1.0) for label in head.labels]
        self._weights = torch.tensor(weights)  # C

    def begin(self, model: torch.nn.Module) -> None:
        """Do nothing: the loss needs nothing but the model."""

    def batch(self, rows: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """Collate rows into a padded batch on `device`."""
        found = self.data.select(list(rows))
        inputs = collate(found["input_ids"], found["token_type_ids"], self.pad_token_id, device)
        width = inputs["input_ids"].shape[1]
        return Batch(inputs, self._targets(found["labels"], width).to(device), tuple(rows))

    def _targets(self, labels: Sequence[Sequence[str | None]], width: int) -> torch.Tensor:
        if self.head.kind == "token_classification":
            numbers = [[_IGNORED if name is None else self._number[name] for name in row] for row in labels]
            return torch.tensor([[*row, *[_IGNORED] * (width - len(row))] for row in numbers])
        if self.head.multi_label:
            held = torch.zeros(len(labels), len(self.head.labels))
            for row, names in enumerate(labels):
                held[row, [self._number[str(name)] for name in names]] = 1.0
            return held
        return torch.tensor([self._number[str(names[0])] for names in labels])

    def blank(self, batch: Batch) -> Batch:
        """Return the batch with nothing to learn from."""
        return batch._replace(targets=torch.full_like(batch.targets, _IGNORED))

    def size(self, batch: Batch) -> Size:
        """Return rows or words with a label, and tokens."""
        return Size(int(self._wanted(batch).sum()), int(batch.inputs["attention_mask"].sum()))

    def loss(self, model: torch.nn.Module, batch: Batch) -> LossSum:
        """Run the model and sum the loss over rows, or over labelled words."""
        logits = model(**batch.inputs).logits.float()  # B C, or B T C
        wanted = self._wanted(batch)
        scores, targets = logits[wanted], batch.targets[wanted]  # N C, and N or N C
        weights = self._weights.to(scores.device)
        if self.head.multi_label:
            apart = functional.binary_cross_entropy_with_logits(scores, targets, pos_weight=weights, reduction="none")
            each = apart.mean(-1)
            right = ((scores > 0) == (targets > 0)).float().mean(-1).sum()
        else:
            each = functional.cross_entropy(scores, targets, weight=weights, reduction="none")
            right = (scores.argmax(-1) == targets).float().sum()
        return LossSum(each.sum(), len(each), each.detach(), wanted.nonzero()[:, 0], {"accuracy": right.detach()})

    def _wanted(self, batch: Batch) -> torch.Tensor:
        """Return where there is a label: [B], or [B, T] for words."""
        return batch.targets[:, 0] != _IGNORED if self.head.multi_label else batch.targets != _IGNORED

    def part(self, batch: Batch, places: Sequence[int]) -> Batch:
        """Return the rows at these places, as wide as the batch."""
        chosen = list(places)
        inputs = {name: tensor[chosen] for name, tensor in batch.inputs.items()}
        return Batch(inputs, batch.targets[chosen], tuple(batch.rows[place] for place in chosen))

    def inputs(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Return the arguments of the model's forward."""
        return batch.inputs

    def origins(self, rows: Sequence[int]) -> list[str]:
        """Return where rows come from, as file:row."""
        return [str(origin) for origin in self.data.select(list(rows))["origin"]]
