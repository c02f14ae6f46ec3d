"""Which sequences run, and what each does in a step. Used by the engine's thread alone; knows nothing about threads.

A step decodes a token of every running sequence, and prefills as many tokens of new prompts beside them as
`chunk_tokens` allows, so a long prompt never holds up running answers (chunked prefill, arXiv 2308.16369).
"""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from haori.core.errors import InputError
from haori.serve.adapters.tiers import AdapterTiers
from haori.serve.engine.fair_queue import FairQueue, QueueKey
from haori.serve.engine.prefix_cache import BLOCK, PrefixCache
from haori.serve.engine.runner import Run, Runner
from haori.serve.engine.sequence import Sequence
from haori.serve.engine.unforeseen import fault_of, unforeseen
from haori.serve.request import Fault, Finish
from haori.serve.sampling.sampler import Choice, choose

__all__ = ["EngineLimits", "Scheduler"]

_KV = "than there is for keys and values (--kv-memory)"
_PATIENCE_S = 2.0  # how long a request waits for room for its adapters before others have to leave memory
_INTERRUPT_S = 10.0  # and before the sequences that run under those others are preempted


@dataclass(frozen=True)
class EngineLimits:
    """What the engine takes on.

    Attributes:
        context_length: Most tokens of prompt and answer together.
        running: Most requests in the batch.
        waiting: Most requests that wait.
        chunk_tokens: Most prompt tokens prefilled in one step; more reads prompts faster and delays decoding.
        prefix_bytes: Memory of the prefix cache.
        adapter_bytes: Memory for adapters.
    """

    context_length: int
    running: int = 32
    waiting: int = 512
    chunk_tokens: int = 256
    prefix_bytes: int = 256 << 20
    adapter_bytes: int = 1 << 30


class Scheduler:
    """The waiting and the running sequences.

    Args:
        runner: Computes logits.
        tiers: The adapters.
        limits: How much may run at once.
        ended: Called with every sequence that has ended.
    """

    def __init__(
        self, runner: Runner, tiers: AdapterTiers, limits: EngineLimits, ended: Callable[[Sequence], None]
    ) -> None:
        self.running: list[Sequence] = []
        self.waiting: FairQueue[Sequence] = FairQueue()
        self.paused: set[Sequence] = set()
        self.prefixes = PrefixCache(limits.prefix_bytes)
        self.counts: Counter[str] = Counter()
        self.doubtful = False  # a step failed, and it is not known whether all others would too
        self._runner = runner
        self._tiers = tiers
        self._limits = limits
        self._ended = ended

    def add(self, sequence: Sequence) -> None:
        """Put a sequence into its queue."""
        self._wait(sequence)

    def step(self) -> None:
        """Admit waiting sequences, and compute one step if any run."""
        self._admit()
        planned = self._plan_step()
        if planned:
            self._compute(planned)

    def fail(self, sequence: Sequence, error: BaseException) -> None:
        """End a sequence with the error that it raised."""
        self.end(sequence, "error", unforeseen(error), fault_of(error))
        self.forget_unwanted_adapters()

    def probe(self) -> str | None:
        """Say why nothing can be computed, not even a token of the bare base; None if that can."""
        self.doubtful = False
        try:
            slot = self._runner.cache.open(1)
            if slot is not None:
                try:
                    self._runner.step([Run(slot, 0, [0], ())])
                finally:
                    self._runner.cache.close(slot)
        except Exception as error:  # noqa: BLE001 - whatever it was, it is the answer
            self.doubtful = True
            return f"The engine cannot compute ({type(error).__name__}: {error}); it may have to be started again."
        return None

    def pause(self, sequence: Sequence) -> None:
        """Take a sequence out of the batch or its queue, and free its slot, until `resume`."""
        if sequence in self.running:
            self._free(sequence)
            self.waiting.leave(sequence.request.turn)
        else:
            self.waiting.remove(sequence.request.turn, sequence)
        self.paused.add(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Put a paused sequence in front of its queue; its tokens are prefilled again."""
        if sequence in self.paused:
            self.paused.remove(sequence)
            self._wait(sequence, first=True)

    def end(
        self, sequence: Sequence, reason: Finish | None = None, error: str | None = None, fault: Fault = "engine"
    ) -> None:
        """Free everything a sequence holds, and tell its caller if its answer is not complete."""
        try:
            if sequence in self.running:
                self.waiting.leave(sequence.request.turn)
                self._free(sequence)
            else:
                self.paused.discard(sequence)
                self.waiting.remove(sequence.request.turn, sequence)
        finally:
            if reason is not None:
                with suppress(BaseException):  # a caller that raises must not hurt others
                    sequence.finish(reason, error, fault)
            self._ended(sequence)

    def forget_unwanted_adapters(self) -> None:
        """Drop adapters that were read for requests that no longer wait."""
        self._tiers.forget_unwanted({name for sequence in self.waiting for name, _ in sequence.request.adapters})

    def _admit(self) -> None:
        """Start waiting sequences in fair turn while there is room, except those whose adapters are not in memory."""
        if not len(self.waiting) or len(self.running) >= self._limits.running:
            return
        self._reserve_room()
        passed: set[QueueKey] = set()
        while len(self.running) < self._limits.running:
            queue = next((name for name in self.waiting.in_turn() if name not in passed), None)
            if queue is None:
                return
            sequence = self.waiting.peek(queue)
            try:
                if not self._tiers.prepare(sequence.request.adapters):
                    passed.add(queue)
                    continue
                slot = self._runner.cache.open(len(sequence.tokens) + 1)
                if slot is not None:
                    self._start(self.waiting.take(queue), slot)
                elif self.running:
                    return
                else:
                    self.fail(sequence, InputError(f"The prompt needs more memory {_KV}."))
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception
                self.fail(sequence, error)

    def _reserve_room(self) -> None:
        """Reserve room for a request whose adapters find none in memory, so that it does not wait for ever."""
        now = time.monotonic()
        late = [head for head in self.waiting.heads() if now - head.waiting_since > _PATIENCE_S]
        lacking = [head for head in late if self._tiers.lacks_room(head.request.adapters)]
        first = min(lacking, key=lambda head: head.waiting_since, default=None)
        leaving = self._tiers.make_way(None if first is None else first.request.adapters, _PATIENCE_S)
        if first is not None and now - first.waiting_since > _INTERRUPT_S:
            for sequence in list(self.running):
                if any(adapter in leaving for adapter, _ in sequence.request.adapters):
                    self._preempt(sequence)

    def _start(self, sequence: Sequence, slot: int) -> None:
        sequence.slot = slot
        sequence.read = 0
        self._tiers.acquire(sequence.request.adapters)
        self.running.append(sequence)  # from here on `end` frees its slot and adapters
        request = sequence.request
        # No logits are computed at positions that come from the prefix cache.
        blocks = [] if sequence.scoring else self.prefixes.find(request.owner, request.adapters, sequence.tokens)
        for number, block in enumerate(blocks):
            self._runner.cache.put(slot, number * BLOCK, block)
        sequence.read = len(blocks) * BLOCK
        if not sequence.generated:
            sequence.cached_tokens = sequence.read
        self.waiting.serve(request.turn, len(sequence.tokens) - sequence.read)

    def _plan_step(self) -> list[tuple[Sequence, Run]]:
        """Choose the step's tokens: the newest one of every answer, and the next chunk of prompts."""
        runs: list[tuple[Sequence, Run]] = []
        budget = self._limits.chunk_tokens
        for sequence in list(self.running):
            if sequence not in self.running:
                continue  # preempted for an earlier one
            count = 1 if sequence.decoding else min(len(sequence.tokens) - sequence.read, budget)
            try:
                if not count or not self._make_room(sequence, sequence.read + count):
                    continue
            except Exception as error:  # noqa: BLE001 - whatever it was, this sequence needed the room
                self.fail(sequence, error)
                continue
            if not sequence.decoding:
                budget -= count
            stop = sequence.read + count
            assert sequence.slot is not None
            run = Run(
                sequence.slot, sequence.read, sequence.tokens[sequence.read : stop], sequence.request.adapters,
                wants_logits=stop == len(sequence.tokens),
                take_logits=None if sequence.scores is None else sequence.scores.take,
            )  # fmt: skip
            runs.append((sequence, run))
        return [(sequence, run) for sequence, run in runs if sequence in self.running]

    def _make_room(self, sequence: Sequence, tokens: int) -> bool:
        """Extend a sequence's slot to so many tokens, preempting the sequence that started last if need be."""
        assert sequence.slot is not None
        while not self._runner.cache.extend(sequence.slot, tokens):
            last = self.running[-1]
            if len(self.running) == 1:
                self.end(sequence, "error", f"The answer needs more memory {_KV}.", "request")
                return False
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Put a running sequence back in front of its queue; its tokens are prefilled again later."""
        self.counts["preemptions"] += 1
        self._free(sequence)
        self.waiting.leave(sequence.request.turn)
        self._wait(sequence, first=True)

    def _wait(self, sequence: Sequence, *, first: bool = False) -> None:
        sequence.waiting_since = time.monotonic()
        self.waiting.add(sequence.request.turn, sequence, first=first)

    def _compute(self, planned: list[tuple[Sequence, Run]]) -> None:
        """Compute a step. One that raises is computed again in halves, until the sequences at fault are alone."""
        try:
            logits = self._runner.step([run for _, run in planned])
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception
            half = len(planned) // 2
            if half:
                self._compute(planned[:half])
                self._compute(planned[half:])
            else:
                self.doubtful = True
                self.fail(planned[0][0], error)
            return
        self.counts["steps"] += 1
        sampled = []
        for sequence, run in planned:
            sequence.read += len(run.tokens)
            if len(run.tokens) > 1 or run.start == 0:
                self.counts["prompt"] += len(run.tokens)
            if run.wants_logits:
                sampled.append(sequence)
        for sequence, choice in zip(sampled, choose(logits, [s.sampler for s in sampled]), strict=True):
            self._take_token(sequence, choice)

    def _take_token(self, sequence: Sequence, choice: Choice) -> None:
        if choice.error is None:
            self._cache_prefix(sequence)
        try:
            sequence.take(choice)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception
            self.fail(sequence, error)
            return
        self.counts["generated"] += sequence.generated > 0
        self.waiting.serve(sequence.request.turn, 1)
        if sequence.ended:
            self.end(sequence)

    def _cache_prefix(self, sequence: Sequence) -> None:
        """Put a prompt that was just prefilled into the prefix cache."""
        if sequence.prefix_cached:
            return
        sequence.prefix_cached = True
        assert sequence.slot is not None
        prompt = sequence.tokens[: sequence.prompt_length]
        with suppress(Exception):  # without memory for them, its blocks are not cached
            for start, key in self.prefixes.missing(sequence.request.owner, sequence.request.adapters, prompt):
                block = self._runner.cache.take(sequence.slot, start, start + BLOCK)
                if block is None:
                    return
                self.prefixes.keep(key, block)

    def _free(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        slot, sequence.slot = sequence.slot, None
        assert slot is not None
        try:
            self._runner.cache.close(slot)
        finally:
            self._tiers.release(sequence.request.adapters)
