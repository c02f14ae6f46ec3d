"""What clients of training sessions ask for and are answered."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from haori.serve.request import Sampling, TokenLogprob

if TYPE_CHECKING:
    from haori.jobs.tenants.records import AdamParams, Datum

__all__ = [
    "Call",
    "ForwardCall",
    "LoadCall",
    "Promise",
    "SampleCall",
    "Sampled",
    "SaveCall",
    "StepCall",
]


@dataclass(frozen=True)
class ForwardCall:
    """A forward, with its backward unless `forward_only`."""

    data: "Sequence[Datum]"
    loss: str
    config: Mapping[str, float | str]
    forward_only: bool = False


@dataclass(frozen=True)
class StepCall:
    """A step of the optimizer."""

    params: "AdamParams"


@dataclass(frozen=True)
class SaveCall:
    """A checkpoint, or the weights of this moment for sampling.

    Attributes:
        kind: `training` keeps the optimizer's state, `sampler` the weights alone, `external` those for a download.
        name: Of the checkpoint; one is made where there is none.
        sampler: Instead of a checkpoint: the id of a sampling session that is given the weights.
        ttl_s: How long the checkpoint is kept; None for ever.
        overwrite: Whether one of that name may be replaced.
    """

    kind: str
    name: str | None = None
    sampler: str | None = None
    ttl_s: int | None = None
    overwrite: bool = False
    user_metadata: Mapping[str, str] | None = None


@dataclass(frozen=True)
class LoadCall:
    """The weights of a checkpoint or library adapter, as the first thing that a run does.

    Attributes:
        path: Of the checkpoint, or `library:NAME@VERSION`.
        optimizer: Whether to go on with the optimizer's state too.
        adapter: Content id of the library adapter that the path meant when the call was taken up.
    """

    path: str
    optimizer: bool
    adapter: str | None = None


Call = ForwardCall | StepCall | SaveCall | LoadCall


@dataclass(frozen=True)
class SampleCall:
    """Samples of one prompt.

    Attributes:
        prompt: Token ids.
        samples: How many.
        sampling: How tokens are chosen; its `stop` holds stop strings.
        stop_ids: Ids that end a sample and are its last token.
        targets: Ids whose log-probabilities are wanted too, by position in the prompt.
    """

    prompt: tuple[int, ...]
    samples: int
    sampling: Sampling
    stop_ids: frozenset[int] = frozenset()
    targets: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass
class Sampled:
    """One sample. `stopped`: it ended by itself, and not for its length."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprob] = ()
    stopped: bool = False
    cached_tokens: int = 0


@dataclass
class Promise:
    """An answer that will come.

    Attributes:
        id: What the client asks for it by.
        owner: The account that may.
        future: Gives the answer, or fails with a `HaoriError`.
        run: The training run, where it is one's.
        samples: Ids of the samples, where it is of samples.
        call: What was asked, where the answer is written by it.
    """

    id: str
    owner: str
    future: "Future[Any]" = field(default_factory=Future)
    run: str | None = None
    samples: tuple[str, ...] = ()
    call: Any = None
    retrieved_s: float | None = None

    def mark_retrieved(self) -> None:
        """Note that the client has had the answer; it is kept a while longer, since the reply may be lost."""
        self.retrieved_s = self.retrieved_s or time.monotonic()
