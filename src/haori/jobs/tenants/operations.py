"""What a tenant may ask for, as operations that its queue holds."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from haori.jobs.tenants.records import LossOutput
from haori.jobs.tenants.rows import Row
from haori.jobs.tenants.tenant import Gradients, added

__all__ = ["Forward", "Task", "micro_batches"]


@dataclass(eq=False)
class Task:
    """A short operation: done in one go when its turn comes."""

    work: Callable[[], Any]
    future: "Future[Any]" = field(default_factory=Future)


@dataclass(eq=False)
class Forward:
    """A forward, with its backward unless `forward_only`; done micro-batch by micro-batch.

    Attributes:
        batches: Rows of each micro-batch that is left.
        rows: All rows, in the order of the request.
        data_hash: Of the rows.
        gradients: Sum over the micro-batches that are done.
    """

    rows: Sequence[Row]
    batches: list[list[Row]]
    forward_only: bool
    data_hash: str = ""
    future: "Future[LossOutput]" = field(default_factory=Future)
    gradients: Gradients | None = None

    @property
    def next_tokens(self) -> int:
        """Tokens of the next micro-batch."""
        return sum(row.length for row in self.batches[0])

    def add(self, gradients: Gradients) -> None:
        """Add the gradients of one micro-batch."""
        self.gradients = added(self.gradients, gradients)

    def output(self) -> LossOutput:
        """Return log-probabilities and loss, once every micro-batch is done."""
        logprobs = []
        for row in self.rows:
            assert row.logprobs is not None
            own = row.logprobs[:, 0] if row.flat else row.logprobs
            logprobs.append(own.numpy())
        return LossOutput(logprobs, {"loss:sum": sum(row.loss_sum() for row in self.rows)})


def micro_batches(rows: Sequence[Row], most_tokens: int) -> list[list[Row]]:
    """Cut rows, in their order, into batches of at most so many tokens; a longer row is a batch of its own."""
    batches: list[list[Row]] = []
    tokens = 0
    for row in rows:
        if not batches or tokens + row.length > most_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(row)
        tokens += row.length
    return batches
