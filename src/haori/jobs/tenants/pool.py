"""Training sessions of many tenants over one base: one thread computes, requests of a tenant are done in order.

Tenants take turns by micro-batch, who has had the fewest tokens first. Micro-batches of few tokens run in one forward
and backward with those of other tenants that wait: reading the base's weights is what they cost. A request that fails
fails its own future with a sentence and changes nothing; what other tenants asked for goes on. The pool knows nothing
about HTTP or databases.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.client_runs import ClientRun
from haori.core.errors import HaoriError, InputError, TrainingError, UnavailableError
from haori.core.events import EventSink, discard
from haori.jobs.tenants.files import read_tenant, save_tenant
from haori.jobs.tenants.history import forwarded, gone_on, rows_hash, saved_as
from haori.jobs.tenants.losses import find_loss
from haori.jobs.tenants.operations import Forward, Task, micro_batches
from haori.jobs.tenants.records import AdamParams, AdapterSpec, Datum, LossOutput, PoolStatus
from haori.jobs.tenants.rows import check_rows
from haori.jobs.tenants.share import TrainShare
from haori.jobs.tenants.shared_model import Part, SharedModel
from haori.jobs.tenants.snapshots import snapshot
from haori.jobs.tenants.starts import fresh_factors
from haori.jobs.tenants.tenant import Tenant
from haori.jobs.tenants.turns import Turns
from haori.serve.kernels.openmp import let_workers_go

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.serve.adapters.reading import AdapterWeights

__all__ = ["TrainingPool"]

_MICRO_BATCH_TOKENS = 2048
_MIXED_TOKENS = 256  # measured: benchmarks/service/multi_train.py
_CLOSED = "The training pool is closed."


class TrainingPool:
    """One base in memory, and adapters that are trained over it.

    Every method returns at once with a future; a failure is a `HaoriError` whose message says what to do.

    Args:
        base: A causal language model.
        dtype: Of the base: `auto`, `fp32`, `bf16` or `fp16`. Adapters and their optimizers are in fp32.
        micro_batch_tokens: Most tokens in one forward; a longer row is one of its own.
        mixed_tokens: Micro-batches of at most so many tokens share a forward with other tenants'; 0 mixes none. Taking
            turns, a tenant's numbers are those of its run alone to the bit; mixed, products over more rows round
            otherwise (in fp32 by a few millionths).
        train_share: Share of the time that training takes at most while `is_serving`; 1 for all of it.
        is_serving: Whether requests are under way on this machine, as the serving engine's status says.
        on_event: Receives a line on what runs fused.

    Raises:
        BaseError: The base cannot be loaded or trained so.
        InputError: The share is out of range.
    """

    def __init__(
        self,
        base: "Base",
        *,
        dtype: str = "auto",
        micro_batch_tokens: int = _MICRO_BATCH_TOKENS,
        mixed_tokens: int = _MIXED_TOKENS,
        train_share: float = 1.0,
        is_serving: Callable[[], bool] = lambda: False,
        on_event: EventSink = discard,
    ) -> None:
        self.base = base
        self.share = TrainShare(train_share, is_serving)
        self.mixed_tokens = mixed_tokens
        self._shared = SharedModel(base, dtype=dtype, on_event=on_event)
        self._micro_batch_tokens = micro_batch_tokens
        self._tenants: dict[str, Tenant] = {}
        self._queues: dict[str, deque[Task | Forward]] = {}
        self._turns = Turns()
        self._batches = self._mixed = 0
        self._closing = False
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="haori-training-pool", daemon=True)
        self._thread.start()

    @property
    def context_length(self) -> int:
        """Most tokens in a row."""
        return self._shared.context_length

    def create(self, tenant: str, spec: AdapterSpec, run: ClientRun | None = None) -> "Future[None]":
        """Begin an adapter: A as stock PEFT draws it for the seed, B zero; `run` says who trains it."""

        def work() -> None:
            if tenant in self._tenants:
                raise InputError(f"There is a training session {tenant!r} already; choose another name.")
            begun = Tenant(tenant, spec, fresh_factors(self._shared, spec), runs=(run or ClientRun(),))
            self._tenants[tenant] = begun

        return self._submit(tenant, Task(work))

    def forward_backward(
        self,
        tenant: str,
        data: Sequence[Datum],
        loss: str,
        config: Mapping[str, float | str] | None = None,
        *,
        forward_only: bool = False,
    ) -> "Future[LossOutput]":
        """Add the gradients of a loss, summed over all tokens of all rows, to those of the tenant.

        Args:
            tenant: The session.
            data: Rows.
            loss: A name of `losses.LOSSES`.
            config: Settings of the loss.
            forward_only: Compute log-probabilities and the loss alone.
        """
        try:
            found = find_loss(loss)
            rows = check_rows(
                data, found, found.configured(config or {}), vocabulary=self._shared.vocabulary,
                longest=self._shared.context_length, forward_only=forward_only,
            )  # fmt: skip
        except HaoriError as error:
            return self._submit(tenant, Task(_raising(error)))  # in its turn, as any other failure
        hashed = "" if forward_only else rows_hash(data, loss, config or {})
        batches = micro_batches(rows, self._micro_batch_tokens)
        return self._submit(tenant, Forward(rows, batches, forward_only, hashed))

    def optim_step(self, tenant: str, params: AdamParams) -> "Future[dict[str, float]]":
        """Apply the gradients summed up since the last step with AdamW; return their norm before clipping."""
        return self._submit(tenant, Task(lambda: self._tenant(tenant).step(params)))

    def save(
        self, tenant: str, folder: Path, *, optimizer: bool, checkpoint: str | None = None, request: int | None = None
    ) -> "Future[Path]":
        """Write PEFT files that stock PEFT loads, with the optimizer's state for a resume if it is asked for.

        Gradients that no step has applied yet go with the optimizer's state. Beside it stands what was done to the
        adapter; there, `checkpoint` is what the folder is called elsewhere, and `request` what asked for it.
        """

        def work() -> Path:
            held = self._tenant(tenant)
            runs = saved_as(held.runs, checkpoint, request)
            return save_tenant(held, self._shared, folder, optimizer=optimizer, runs=runs)

        return self._submit(tenant, Task(work))

    def load(
        self, tenant: str, folder: Path, spec: AdapterSpec | None = None, *, optimizer: bool = False,
        run: ClientRun | None = None,
    ) -> "Future[AdapterSpec]":  # fmt: skip
        """Begin a session, or take one back, with what `save` wrote, or with the LoRA in any PEFT folder.

        Args:
            tenant: The session; one that is under way is replaced.
            folder: Files.
            spec: If given, its rank must be the adapter's.
            optimizer: Go on with the optimizer's state too, to the bit; otherwise it begins afresh.
            run: The run that goes on from these files; None for the one that wrote them.

        Returns:
            The adapter's spec.
        """

        def work() -> AdapterSpec:
            found = read_tenant(tenant, self._shared, folder, spec, optimizer=optimizer)
            if run is not None:
                found.runs = gone_on(found.runs, run)
            elif not found.runs:
                found.runs = (ClientRun(started_from="files"),)
            if tenant in self._tenants:
                found.tokens = self._tenants[tenant].tokens
            self._tenants[tenant] = found
            return found.spec

        return self._submit(tenant, Task(work))

    def weights(self, tenant: str) -> "Future[AdapterWeights]":
        """Return a copy of the adapter as it is now, for `TextEngine.put_adapter`, with an id of its own."""
        return self._submit(tenant, Task(lambda: snapshot(self._tenant(tenant))))

    def drop(self, tenant: str) -> "Future[None]":
        """Forget a session and free its memory, once what it asked for before is done."""

        def work() -> None:
            self._tenant(tenant)
            del self._tenants[tenant]

        return self._submit(tenant, Task(work))

    def status(self) -> PoolStatus:
        """Return how busy the pool is."""
        with self._condition:
            return PoolStatus(
                tuple(self._tenants),
                {name: len(queue) for name, queue in self._queues.items()},
                {name: tenant.tokens for name, tenant in self._tenants.items()},
                {name: tenant.size_bytes for name, tenant in self._tenants.items()},
                self._mixed,
                self._batches,
            )

    def close(self) -> None:
        """End after the micro-batch under way; what waits fails with a sentence."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join()

    def _submit(self, tenant: str, operation: Task | Forward) -> "Future[Any]":
        with self._condition:
            if self._closing:
                operation.future.set_exception(UnavailableError(_CLOSED))
                return operation.future
            if tenant not in self._queues:
                self._turns.enter(tenant, self._queues)
                self._queues[tenant] = deque()
            self._queues[tenant].append(operation)
            self._condition.notify_all()
        return operation.future

    def _tenant(self, name: str) -> Tenant:
        if name not in self._tenants:
            raise InputError(f"There is no training session {name!r}; create one first.")
        return self._tenants[name]

    def _work(self) -> None:
        while True:
            with self._condition:
                if not self._queues:
                    let_workers_go()  # the engine that serves beside this computes on its own thread
                self._condition.wait_for(lambda: self._queues or self._closing)
                if self._closing:
                    break
                turn = self._next()
            begun = time.monotonic()
            if isinstance(turn, list):
                self._forward(turn)
            else:
                self._do(*turn)
            self.share.rest(time.monotonic() - begun, lambda: self._closing)
        with self._condition:
            left = [operation for queue in self._queues.values() for operation in queue]
            self._queues.clear()
        for operation in left:
            if operation.future.running() or operation.future.set_running_or_notify_cancel():
                operation.future.set_exception(UnavailableError(_CLOSED))

    def _next(self) -> tuple[str, Task] | list[tuple[str, Forward]]:
        """Return what is done next: a short operation, or the micro-batches that run together."""
        order = self._turns.order(self._queues)
        first = self._queues[order[0]][0]
        if isinstance(first, Task):
            return order[0], first
        turn, tokens = [(order[0], first)], first.next_tokens
        if tokens > self.mixed_tokens:
            return turn
        for name in order[1:]:
            other = self._queues[name][0]
            if isinstance(other, Task) or other.forward_only != first.forward_only:
                continue
            if other.next_tokens <= min(self.mixed_tokens, self._micro_batch_tokens - tokens):
                turn.append((name, other))
                tokens += other.next_tokens
        return turn

    def _do(self, name: str, task: Task) -> None:
        """Do a short operation."""
        self._turns.take(name, 0)
        if task.future.set_running_or_notify_cancel():
            try:
                result = task.work()
            except BaseException as error:  # noqa: BLE001 - whoever asked is told
                self._end(name, task)
                task.future.set_exception(_in_words(error))
                return
            self._end(name, task)
            task.future.set_result(result)
        else:
            self._end(name, task)

    def _forward(self, turn: list[tuple[str, Forward]]) -> None:
        """Run one micro-batch of each operation of a turn together."""
        parts, acting = [], []
        for name, operation in turn:
            if not operation.future.running() and not operation.future.set_running_or_notify_cancel():
                self._end(name, operation)
                continue
            if name not in self._tenants:
                self._fail(name, operation, InputError(f"There is no training session {name!r}; create one first."))
                continue
            self._turns.take(name, operation.next_tokens)
            parts.append(Part(name, self._tenants[name].factors, operation.batches[0]))
            acting.append((name, operation))
        if not parts:
            return
        try:
            self._shared.run(parts, backward=not acting[0][1].forward_only)
        except BaseException as error:  # noqa: BLE001 - whoever asked is told
            for name, operation in acting:
                self._fail(name, operation, _in_words(error))
            return
        self._batches += 1
        self._mixed += len(parts) > 1
        for part, (name, operation) in zip(parts, acting, strict=True):
            self._take(name, operation, part)

    def _take(self, name: str, operation: Forward, part: Part) -> None:
        """Take what a micro-batch gave to its operation."""
        if part.problem is not None:
            self._fail(name, operation, part.problem)
            return
        tenant = self._tenants[name]
        tenant.tokens += operation.next_tokens
        operation.batches.pop(0)
        if not operation.forward_only:
            operation.add(part.gradients)
        if operation.batches:
            return
        output = operation.output()
        if operation.gradients is not None:
            tenant.accumulate(operation.gradients)
            tenant.runs = forwarded(
                tenant.runs, operation.rows[0].loss.name, rows=len(operation.rows),
                tokens=sum(row.length for row in operation.rows), data_hash=operation.data_hash,
                metrics=output.metrics,
            )  # fmt: skip
        self._end(name, operation)
        operation.future.set_result(output)

    def _fail(self, name: str, operation: Forward, error: HaoriError) -> None:
        self._end(name, operation)
        if operation.future.running() or operation.future.set_running_or_notify_cancel():
            operation.future.set_exception(error)

    def _end(self, name: str, operation: Task | Forward) -> None:
        """Take an operation that is done off its queue."""
        with self._condition:
            queue = self._queues[name]
            assert queue[0] is operation
            queue.popleft()
            if not queue:
                del self._queues[name]
                if name not in self._tenants:
                    self._turns.leave(name)


def _raising(error: HaoriError) -> Callable[[], Any]:
    def work() -> None:
        raise error

    return work


def _in_words(error: BaseException) -> HaoriError:
    if isinstance(error, HaoriError):
        return error
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "alloc" in str(error).lower():
        return TrainingError("There was not enough memory for this request; send fewer or shorter rows at once.")
    found = TrainingError(f"The request could not be computed ({type(error).__name__}: {str(error)[:300]}).")
    found.__cause__ = error
    return found
