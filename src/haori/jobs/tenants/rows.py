"""Rows of a request, checked once where they enter, as tensors that the losses take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haori.core.errors import DataError
from haori.jobs.tenants.losses import Config, Loss
from haori.jobs.tenants.records import Datum

__all__ = ["Row", "check_rows"]

_TARGETS = "target_tokens"


@dataclass
class Row:
    """One row of a request.

    Attributes:
        number: Its place in the request.
        tokens: (T,), int64.
        targets: (T, K), int64.
        inputs: What the loss needs, each (T, K) in fp32.
        loss: The loss and its configuration.
        flat: Whether targets came as (T,).
        logprobs: (T, K) once they are computed.
    """

    number: int
    tokens: Tensor
    targets: Tensor
    inputs: Mapping[str, Tensor]
    loss: Loss
    config: Config
    flat: bool
    logprobs: Tensor | None = field(default=None)

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.tokens)

    def coefficients(self, logprobs: Tensor, part: slice) -> Tensor:
        """Return c = -dL/dlogp of the tokens of a slice, given their log-probabilities."""
        inputs = {name: value[part] for name, value in self.inputs.items()}
        return self.loss.terms(logprobs, inputs, self.config).coefficients

    def loss_sum(self) -> float:
        """Return its loss, summed over tokens in fp64."""
        assert self.logprobs is not None
        inputs = {name: value.double() for name, value in self.inputs.items()}
        return float(self.loss.terms(self.logprobs.double(), inputs, self.config).losses.sum())


def check_rows(
    data: Sequence[Datum], loss: Loss, config: Config, *, vocabulary: int, longest: int, forward_only: bool
) -> list[Row]:
    """Check every row of a request.

    Args:
        data: The rows.
        loss: Their loss.
        config: Its configuration, with defaults.
        vocabulary: Tokens the model knows.
        longest: Most tokens in a row.
        forward_only: Whether only log-probabilities are asked for; weights then default to one, and arrays that the
            loss does not know may stand beside them.

    Raises:
        DataError: A row cannot be trained on; the sentence names it.
    """
    if not data:
        raise DataError("The request has no rows; give at least one.")
    return [
        _Checked(number, datum, loss, vocabulary, longest, forward_only=forward_only).row(config)
        for number, datum in enumerate(data)
    ]


class _Checked:
    def __init__(
        self, number: int, datum: Datum, loss: Loss, vocabulary: int, longest: int, *, forward_only: bool
    ) -> None:
        self.number, self.datum, self.loss = number, datum, loss
        self.vocabulary, self.longest, self.forward_only = vocabulary, longest, forward_only
        self.where = f"Row {number} of the request"

    def row(self, config: Config) -> Row:
        tokens = self.ids("tokens", self.datum.tokens)
        if tokens.ndim != 1 or not tokens.size:
            raise DataError(f"{self.where} has tokens of shape {list(tokens.shape)}; give one list of at least one.")
        if len(tokens) > self.longest:
            raise DataError(f"{self.where} has {len(tokens):,} tokens; the base reads {self.longest:,} at most.")
        inputs = dict(self.datum.inputs)
        if _TARGETS not in inputs:
            raise DataError(f"{self.where} lacks 'target_tokens', which every loss needs.")
        targets = self.ids(_TARGETS, inputs.pop(_TARGETS))
        soft = targets.ndim == 2 and self.loss.name == "cross_entropy"
        if not (targets.ndim == 1 or soft) or len(targets) != len(tokens) or not targets.size:
            more = ", or several targets for each token" if self.loss.name == "cross_entropy" else ""
            raise DataError(
                f"{self.where} has 'target_tokens' of shape {list(targets.shape)} for {len(tokens)} tokens; give one "
                f"target for each token{more}."
            )
        if self.forward_only and self.loss.name == "cross_entropy":
            inputs.setdefault("weights", np.ones(targets.shape, np.float32))
        unknown = [name for name in inputs if name not in self.loss.inputs]
        if unknown and not self.forward_only:
            raise DataError(
                f"{self.where} holds {unknown[0]!r}, which the loss {self.loss.name!r} does not read; it reads "
                f"target_tokens, {', '.join(self.loss.inputs)}."
            )
        columns = targets.shape[1] if targets.ndim == 2 else 1
        arrays = {
            name: self.floats(name, inputs, targets.shape).reshape(len(tokens), columns) for name in self.loss.inputs
        }
        if "sequence_ratio_mask" in arrays and not arrays["sequence_ratio_mask"].any():
            raise DataError(
                f"{self.where} has a 'sequence_ratio_mask' of zeros only; mark the tokens that were sampled."
            )
        return Row(
            self.number,
            torch.from_numpy(tokens.astype(np.int64)),
            torch.from_numpy(targets.astype(np.int64).reshape(len(tokens), columns)),
            {name: torch.from_numpy(value) for name, value in arrays.items()},
            self.loss,
            config,
            targets.ndim == 1,
        )

    def ids(self, name: str, given: Any) -> "np.ndarray[Any, Any]":
        array = np.asarray(given)
        if array.dtype.kind not in "iu" and not (array.dtype.kind == "f" and (array == np.floor(array)).all()):
            raise DataError(f"{self.where} has {name!r} of type {array.dtype}; give token ids.")
        if array.size and not (array.min() >= 0 and array.max() < self.vocabulary):
            wrong = int(array.min()) if array.min() < 0 else int(array.max())
            raise DataError(
                f"{self.where} has the token {wrong} in {name!r}; the base knows 0 to {self.vocabulary - 1:,}."
            )
        return array

    def floats(self, name: str, inputs: Mapping[str, Any], shape: tuple[int, ...]) -> "np.ndarray[Any, Any]":
        if name not in inputs:
            raise DataError(f"{self.where} lacks {name!r}, which the loss {self.loss.name!r} needs.")
        array = np.asarray(inputs[name])
        if array.dtype.kind not in "fiub" or array.shape != shape:
            raise DataError(
                f"{self.where} has {name!r} of shape {list(array.shape)} and type {array.dtype}; its targets need "
                f"numbers of shape {list(shape)}."
            )
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise DataError(f"{self.where} has NaN or infinity in {name!r}.")
        return array
