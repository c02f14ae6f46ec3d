"""What a training session is asked and answers, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import Field

from haori.core.records import Record

if TYPE_CHECKING:
    import numpy as np

__all__ = ["AdamParams", "AdapterSpec", "Datum", "LossOutput", "PoolStatus"]


class AdapterSpec(Record):
    """The adapter that a tenant trains: LoRA (arXiv 2106.09685), y = W x + (alpha / rank) B A x."""

    rank: int = Field(ge=1, le=1024, description="Rank of every adapted module.")
    alpha: float = Field(default=32.0, gt=0, allow_inf_nan=False, description="Alpha; the scale is alpha / rank.")
    seed: int | None = Field(default=None, ge=0, lt=1 << 63, description="Of A; drawn where none is given.")
    train_mlp: bool = Field(default=True, description="Adapt the MLPs.")
    train_attn: bool = Field(default=True, description="Adapt the attention projections.")
    train_unembed: bool = Field(
        default=False,
        description="Adapt the output head; one that is tied to the embedding leaves the embedding as it is.",
    )


class AdamParams(Record):
    """One step of AdamW (arXiv 1711.05101), with bias correction and decoupled decay."""

    learning_rate: float = Field(default=1e-4, ge=0, allow_inf_nan=False)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-12, ge=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    grad_clip_norm: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="Greatest norm of all gradients together; 0 clips nothing."
    )


@dataclass(frozen=True)
class Datum:
    """One row: its tokens (T,), and what the loss needs of each, aligned so that entry t scores what follows token t.

    Attributes:
        tokens: Ids the model reads, (T,).
        inputs: Arrays by name, (T,) or, for soft targets of cross_entropy, (T, K).
    """

    tokens: "np.ndarray"
    inputs: "Mapping[str, np.ndarray]"


@dataclass(frozen=True)
class LossOutput:
    """What a forward gave.

    Attributes:
        logprobs: Log-probability of each target, float32 in the shape of `target_tokens`, row by row.
        metrics: Figures named `name:reduction`; `loss:sum` is always there.
    """

    logprobs: "list[np.ndarray]"
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PoolStatus:
    """How busy a pool is.

    Attributes:
        tenants: Names of the tenants.
        waiting: Operations under way or waiting, by tenant.
        tokens: Tokens that went through forward passes so far, by tenant.
        adapter_bytes: Memory of each adapter, without gradients and optimizer.
        mixed_batches: Forward passes that several tenants shared.
        batches: Forward passes.
    """

    tenants: tuple[str, ...]
    waiting: Mapping[str, int]
    tokens: Mapping[str, int]
    adapter_bytes: Mapping[str, int]
    mixed_batches: int
    batches: int
