"""The text engine: requests join and leave a running batch at every step (continuous batching).

One thread owns the model. In each step it receives new requests and cancellations, admits waiting requests in fair
turn, decodes a token of every running sequence, prefills a chunk of the prompts of new ones beside them, and delivers
stream chunks. Other threads only leave requests and cancellations. It knows nothing about HTTP.
"""

import threading
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from haori.core.errors import HaoriError, InputError, OverloadedError, UnavailableError
from haori.serve.adapters.tiers import AdapterTiers, FindFiles, PinnedAdapters, ReadAdapter
from haori.serve.engine.queue_share import check_share
from haori.serve.engine.runner import Runner
from haori.serve.engine.scheduler import EngineLimits, Scheduler
from haori.serve.engine.sequence import Sequence
from haori.serve.prompt_check import check_prompt
from haori.serve.request import Deliver, Sampling, TextRequest
from haori.serve.sampling.sampler import Constraint, SamplerState
from haori.serve.status import EngineStatus, adapters_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from haori.bases import Base
    from haori.library import AdapterFiles
    from haori.serve.adapters.reading import AdapterWeights
    from haori.serve.sampling.constraints import Constraints

__all__ = ["TextEngine"]

_POLL_S = 0.05
_PROBE_S = 1.0  # between two probes whether an engine that could not compute can again
_FAILURES = 3  # consecutive steps that raise an error which belongs to no request
_ENDED = "The engine has ended."


class TextEngine:
    """Answers requests with one base and any of its adapters.

    Args:
        base: What is served.
        tokenizer: Its tokenizer.
        runner: Computes logits.
        find_adapter: Finds an adapter's files.
        read_adapter: Reads them.
        stop_tokens: Ids that end an answer.
        limits: What it takes on.
        vocabulary: Width of the logits.
        pinned: Adapters that are never evicted once they are in memory.
    """

    def __init__(
        self,
        base: "Base",
        tokenizer: "PreTrainedTokenizerBase",
        runner: Runner,
        find_adapter: FindFiles,
        read_adapter: ReadAdapter,
        *,
        stop_tokens: frozenset[int],
        limits: EngineLimits,
        vocabulary: int,
        pinned: PinnedAdapters = tuple,
    ) -> None:
        self.base = base
        self.tokenizer = tokenizer
        self.limits = limits
        self.context_length = limits.context_length
        self._runner = runner
        self.stop_tokens = stop_tokens
        self.vocabulary = vocabulary
        self._tiers = AdapterTiers(
            runner.bank, find_adapter, read_adapter, limits.adapter_bytes, landed=self._wake, pinned=pinned
        )
        self._scheduler = Scheduler(runner, self._tiers, limits, self._forget)
        self._constraints: Constraints | None = None
        self._constraints_lock = threading.Lock()
        self._condition = threading.Condition()
        self._arrived: list[Sequence] = []
        self._cancelled: set[str] = set()
        self._dropped_adapters: set[str] = set()
        self._pause_changes: dict[str, bool] = {}  # requests that are to pause, or to go on
        self._paused = 0
        self._sequences: dict[str, Sequence] = {}
        self._awake = False
        self._closing = False
        self._ended = False
        self._failure: str | None = None
        self._status = self._measure()
        self._thread = threading.Thread(target=self._work, name="haori-engine", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """Say why no request can be answered, for now or for good; None while requests can be answered."""
        return self._failure

    def check_adapter(self, files: "AdapterFiles", adapter: str) -> None:
        """Refuse an adapter that no request could be answered with.

        Raises:
            HaoriError: It is one.
        """
        self._tiers.check(files, adapter)

    def put_adapter(self, adapter_id: str, weights: "AdapterWeights") -> None:
        """Let requests use weights that are in memory only, such as those of a training session as they are now.

        Args:
            adapter_id: What requests name in their mix. New weights need a new id: keys and values of earlier prompts
                are kept under it.
            weights: The adapter, at whatever dtype; the engine keeps a copy in its own.

        Raises:
            InputError: There is an adapter of this id.
            MismatchError: The engine cannot apply it per request.
        """
        self._tiers.put_live(replace(weights, id=adapter_id))

    def drop_adapter(self, adapter_id: str) -> None:
        """Forget what `put_adapter` was given; requests under way keep it to their end. None is no error."""
        with self._condition:
            self._dropped_adapters.add(adapter_id)
            self._awake = True
            self._condition.notify_all()

    def submit(self, request: TextRequest, deliver: Deliver) -> None:
        """Queue a request. `deliver` is called on the engine's thread, the last time with `finish` set.

        Raises:
            InputError: The prompt is empty or too long, a token id is none of the model's, or the request's id is in
                use.
            OverloadedError: Too many requests wait.
            UnavailableError: The engine has ended on its own.
        """
        check_prompt(request.prompt, self.context_length, self.vocabulary, request.prompt_targets.values())
        constraint = self._constraint(request.sampling)
        sampler = SamplerState(
            request.sampling, request.prompt, self.vocabulary, self.stop_tokens, constraint=constraint
        )
        sequence = Sequence(request, deliver, sampler, self.tokenizer, self.limits.context_length, self.stop_tokens)
        with self._condition:
            if self._closing:
                raise OverloadedError("The engine is shutting down.", retry_after_s=5.0)
            if self._ended:
                raise UnavailableError(self._failure or _ENDED)
            if request.id in self._sequences:
                raise InputError(f"A request {request.id!r} is under way already; choose another id.")
            waiting, paused = self._waiting, self._scheduler.paused
            queued = (s for s in self._sequences.values() if s.slot is None and s not in paused)
            own = sum(sequence.request.owner == request.owner for sequence in queued)
            again = max(1.0, round(waiting / max(self.limits.running, 1)))
            check_share(request.owner, own, waiting, self.limits.waiting, retry_after_s=again, why="--max-queue")
            self._sequences[request.id] = sequence
            self._arrived.append(sequence)
            self._awake = True
            self._condition.notify_all()

    def cancel(self, request_id: str) -> None:
        """End a request before the next step; one that has ended is no error."""
        with self._condition:
            if request_id in self._sequences:
                self._cancelled.add(request_id)
                self._awake = True
                self._condition.notify_all()

    def pause(self, request_id: str) -> None:
        """Stop a request and free its slot until `resume`; one that has ended is no error."""
        self._set_paused(request_id, paused=True)

    def resume(self, request_id: str) -> None:
        """Let a paused request go on; one that was not paused is no error."""
        self._set_paused(request_id, paused=False)

    def _set_paused(self, request_id: str, *, paused: bool) -> None:
        with self._condition:
            if request_id in self._sequences:
                self._pause_changes[request_id] = paused
                self._awake = True
                self._condition.notify_all()

    def status(self) -> EngineStatus:
        """Return how busy the engine is, as of its last step."""
        with self._condition:
            return replace(self._status, waiting=self._waiting)

    @property
    def _waiting(self) -> int:
        """Requests that wait to be admitted; paused ones wait for their readers and do not count."""
        return max(len(self._sequences) - self._status.running - self._paused, 0)

    def drain(self, timeout_s: float) -> bool:
        """Wait until every request has ended; False if some have not after `timeout_s`."""
        with self._condition:
            return self._condition.wait_for(lambda: not self._sequences, timeout_s)

    def close(self) -> None:
        """Cancel what runs and free everything."""
        with self._condition:
            self._closing = True
            self._awake = True
            self._condition.notify_all()
        self._thread.join()
        self._tiers.close()
        if self._constraints is not None:
            self._constraints.close()

    def prepare_constraints(self) -> None:
        """Read the tokenizer for schemas and grammars in advance: later it would slow running answers down."""
        with suppress(HaoriError):  # the request that needs it is told
            self._constraints_made().read_tokenizer()

    def _constraint(self, sampling: Sampling) -> Constraint | None:
        if sampling.json_schema is None and sampling.grammar is None:
            return None
        return self._constraints_made().of(sampling)

    def _constraints_made(self) -> "Constraints":
        from haori.serve.sampling.constraints import Constraints

        with self._constraints_lock:
            if self._constraints is None:
                self._constraints = Constraints(self.tokenizer, self.vocabulary, self.stop_tokens)
            return self._constraints

    def _wake(self) -> None:
        with self._condition:
            self._awake = True
            self._condition.notify_all()

    def _work(self) -> None:
        failures = 0
        try:
            while self._receive():
                try:
                    self._scheduler.step()
                    failures = 0
                except Exception as error:
                    failures += 1
                    if failures == _FAILURES:
                        raise
                    for sequence in list(self._scheduler.running):
                        self._scheduler.fail(sequence, error)
                    self._scheduler.doubtful = True
                if self._scheduler.doubtful:
                    self._failure = self._scheduler.probe()
        except BaseException as error:  # noqa: BLE001 - whatever it was, every caller must be told
            self._failure = f"{_ENDED[:-1]} ({type(error).__name__}: {error}); start the server again."
        self._end_all()

    def _end_all(self) -> None:
        with self._condition:
            self._ended = True  # no request is accepted from here on
            left = list(self._sequences.values())
        for sequence in left:
            with suppress(Exception):
                if self._closing:
                    self._scheduler.end(sequence, "cancelled")
                else:
                    self._scheduler.end(sequence, "error", self._failure, "outage")
        with self._condition:
            self._sequences.clear()
            self._condition.notify_all()

    def _receive(self) -> bool:
        """Receive new requests and cancellations, waiting if there is no work; False when the engine is to end."""
        scheduler = self._scheduler
        with self._condition:
            self._status, self._paused = self._measure(), len(scheduler.paused)
            if not scheduler.running:
                # A finished read wakes this thread; the timeouts are for adapters that lack room, and for an engine
                # that could not compute.
                pause_s = _POLL_S if len(scheduler.waiting) else _PROBE_S if self._failure else None
                self._condition.wait_for(lambda: self._awake, pause_s)
            self._awake = False
            arrived, self._arrived = self._arrived, []
            dropped, self._dropped_adapters = self._dropped_adapters, set()
            cancelled, self._cancelled = self._cancelled, set()
            gone = [self._sequences[name] for name in cancelled if name in self._sequences]
            changes = [
                (self._sequences[n], paused) for n, paused in self._pause_changes.items() if n in self._sequences
            ]
            self._pause_changes = {}
        for sequence in arrived:
            scheduler.add(sequence)
        for adapter in dropped:
            self._tiers.drop_live(adapter)
        for sequence, paused in changes:
            (scheduler.pause if paused else scheduler.resume)(sequence)
        for sequence in gone:
            scheduler.end(sequence, "cancelled")
        if gone:
            scheduler.forget_unwanted_adapters()
        return not self._closing

    def _forget(self, sequence: Sequence) -> None:
        with self._condition:
            self._sequences.pop(sequence.request.id, None)
            if not self._sequences:
                self._condition.notify_all()

    def _measure(self) -> EngineStatus:
        """Return how busy the engine is; called on its own thread."""
        scheduler, tiers, cache = self._scheduler, self._tiers, self._runner.cache
        counts, prefixes = scheduler.counts, scheduler.prefixes
        return EngineStatus(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            running_adapters=adapters_of({sequence.request.adapters for sequence in scheduler.running}),
            waiting_adapters=adapters_of({sequence.request.adapters for sequence in scheduler.waiting}),
            resident_adapters=tiers.resident,
            adapter_used_bytes=tiers.used_bytes,
            adapter_total_bytes=tiers.budget_bytes,
            kv_used_bytes=cache.used_bytes,
            kv_total_bytes=cache.budget_bytes,
            prefix_queries=prefixes.queries,
            prefix_hits=prefixes.hits,
            prompt_tokens=counts["prompt"],
            generated_tokens=counts["generated"],
            steps=counts["steps"],
            preemptions=counts["preemptions"],
            adapter_loads=tiers.loads,
            adapter_evictions=tiers.evictions,
        )
