"""The causal language modelling task: batches, loss, and the rows behind a bad loss.

Loss is the sum of -log p(token | tokens before it) over labelled tokens; the loop divides by the number of
labelled tokens of the whole optimizer step, so that accumulation and padding do not change the result.
Logits are computed only at positions that carry a label; on the fused path they are never all in memory.
"""

import inspect
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Batch", "CausalLM", "LossSum", "forms_its_loss"]

_IGNORED = -100


class Batch(NamedTuple):
    """Right-padded rows. All tensors are [B, T], int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    rows: tuple[int, ...]


class LossSum(NamedTuple):
    """Summed loss with graph, number of labelled tokens, and the loss of each labelled token with its row."""

    total: torch.Tensor  # []
    tokens: int
    each: torch.Tensor  # [labelled tokens]
    row_of: torch.Tensor  # [labelled tokens], index into Batch.rows


class CausalLM:
    """Supplies batches and losses of one data split to the training loop.

    The split has the columns `input_ids`, `labels` (-100 where there is no loss), `length` and `origin`.
    """

    def __init__(self, data: "Dataset", pad_token_id: int) -> None:
        self.data = data
        self.pad_token_id = pad_token_id
        self.lengths: list[int] = list(data["length"])

    def batch(self, rows: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """Collate rows into a padded batch on `device`."""
        found = self.data.select(list(rows))
        picked = {name: [list(v) for v in found[name]] for name in ("input_ids", "labels")}
        width = max(len(ids) for ids in picked["input_ids"])

        def pad(lists: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([ids + [fill] * (width - len(ids)) for ids in lists], device=device)

        mask = pad([[1] * len(ids) for ids in picked["input_ids"]], 0)
        return Batch(pad(picked["input_ids"], self.pad_token_id), mask, pad(picked["labels"], _IGNORED), tuple(rows))

    @staticmethod
    def loss(model: torch.nn.Module, batch: Batch) -> LossSum:
        """Run the model and sum the loss over labelled tokens.

        Args:
            model: A causal language model; `logits_to_keep` is used where its forward takes it.
            batch: Right-padded rows.
        """
        targets = batch.labels[:, 1:]  # B T-1
        wanted = targets != _IGNORED
        known = _arguments_of(model)
        if "head_targets" in known:
            total, each = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, head_targets=targets
            )
            return LossSum(total, len(each), each, wanted.nonzero()[:, 0])
        keep = wanted.any(dim=0).nonzero().flatten()  # positions labelled in any row
        arguments: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if "logits_to_keep" in known:
            logits = model(**arguments, use_cache=False, logits_to_keep=keep).logits  # B K V
        else:
            logits = model(**arguments, use_cache=False).logits[:, keep]
        mask = wanted[:, keep]
        each = torch.nn.functional.cross_entropy(logits[mask].float(), targets[:, keep][mask], reduction="none")
        return LossSum(each.sum(), int(mask.sum()), each.detach(), mask.nonzero()[:, 0])

    def origins(self, rows: Sequence[int]) -> list[str]:
        """Return where rows come from, as file:row."""
        return [str(origin) for origin in self.data.select(list(rows))["origin"]]


def forms_its_loss(model: torch.nn.Module) -> bool:
    """Say whether a model runs on the fused path (adapters/fused) as a whole, and forms its loss itself."""
    return "head_targets" in _arguments_of(model)


def _arguments_of(model: torch.nn.Module) -> Iterable[str]:
    """Return the arguments that the base's forward takes, under adapters and other wrapping."""
    inner: Any = getattr(model, "module", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return inspect.signature(inner.forward).parameters
