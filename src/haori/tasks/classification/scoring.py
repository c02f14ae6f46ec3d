"""What a classifier answers: probabilities of labels, for whole texts or for words."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from haori.core.progress_bar import progress_bar
from haori.core.records import Head
from haori.data.batching import plan_batches
from haori.tasks.classification.encoding import Encoded
from haori.tasks.classification.objective import collate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["head_of", "probabilities"]

_BATCH_TOKENS = 4096


def head_of(model: "nn.Module") -> Head:
    """Return the head that a loaded classifier has, by its configuration."""
    config: Any = model.config
    base: Any = getattr(model, "get_base_model", lambda: model)
    inner = base()
    of_words = type(inner).__name__.endswith("ForTokenClassification")
    return Head(
        kind="token_classification" if of_words else "sequence_classification",
        labels=tuple(config.id2label[number] for number in range(len(config.id2label))),
        multi_label=config.problem_type == "multi_label_classification",
    )


def probabilities(
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Encoded],
    *,
    title: str | None = None,
) -> "list[NDArray[np.float64]]":
    """Return the probability of each label, [C] of a text or [words, C]; NaN for words without tokens.

    Those of labels that exclude one another sum to 1 (softmax); where a row may have several, each stands for itself.

    Args:
        model: The classifier, in evaluation mode.
        tokenizer: Its tokenizer, for the token that pads.
        rows: Encoded rows.
        title: Of a progress bar.
    """
    import numpy as np
    import torch

    head, device = head_of(model), next(model.parameters()).device
    pad: Any = tokenizer.pad_token_id
    found: list[NDArray[np.float64]] = [np.empty(0)] * len(rows)
    batches = plan_batches([len(row.input_ids) for row in rows], _BATCH_TOKENS)
    with torch.no_grad(), progress_bar(title or "Classifying", len(rows), "rows") as advance:
        for batch in batches:
            chosen = [rows[place] for place in batch]
            inputs = collate([row.input_ids for row in chosen], [row.token_type_ids for row in chosen], pad, device)
            logits = model(**inputs).logits.double()
            shares = logits.sigmoid() if head.multi_label else logits.softmax(-1)
            for place, share in zip(batch, shares.cpu().numpy(), strict=True):  # [C] or [T, C]
                found[place] = share if head.kind == "sequence_classification" else _of_words(share, rows[place])
            advance(len(batch))
    return found


def _of_words(shares: "NDArray[np.float64]", row: Encoded) -> "NDArray[np.float64]":
    import numpy as np

    missing = np.full(shares.shape[-1], np.nan)
    return np.stack([missing if place is None else shares[place] for place in row.first_of])
