"""Which sequences run, and what each does in a step. Lives on the engine's thread; knows nothing about threads.

A step lets every running sequence go on by a token, and beside that reads as much of the prompts of new ones as
`chunk_tokens` allows, so a long prompt never holds up the answers under way (chunked prefill, arXiv 2308.16369).
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
_PATIENCE_S = 2.0  # a request that lacks room for its adapters waits so long before others make way
_INTERRUPT_S = 10.0  # and so long before those that run under the adapters which must go are interrupted


@dataclass(frozen=True)
class EngineLimits:
    """What the engine takes on.

    Attributes:
        context_length: Most tokens of prompt and answer together.
        running: Most requests in the batch.
        waiting: Most requests that wait.
        chunk_tokens: Most prompt tokens read in one step; more reads prompts faster and holds up answers longer.
        prefix_bytes: Memory for prompts already read.
        adapter_bytes: Memory for adapters.
    """

    context_length: int
    running: int = 32
    waiting: int = 512
    chunk_tokens: int = 256
    prefix_bytes: int = 256 << 20
    adapter_bytes: int = 1 << 30


class Scheduler:
    """The sequences that wait and run.

    Args:
        runner: Computes logits.
        tiers: The adapters.
        limits: How much may run at once.
        ended: Told of every sequence that is done with.
    """

    def __init__(
        self, runner: Runner, tiers: AdapterTiers, limits: EngineLimits, ended: Callable[[Sequence], None]
    ) -> None:
        self.running: list[Sequence] = []
        self.waiting: FairQueue[Sequence] = FairQueue()
        self.paused: set[Sequence] = set()
        self.prefixes = PrefixCache(limits.prefix_bytes)
        self.counts: Counter[str] = Counter()
        self.doubtful = False  # whether a step failed for which it is not known that others would not
        self._runner = runner
        self._tiers = tiers
        self._limits = limits
        self._ended = ended

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        self._wait(sequence)

    def step(self) -> None:
        """Admit who can be admitted, and compute one step if anything runs."""
        self._admit()
        composed = self._compose()
        if composed:
            self._compute(composed)

    def fail(self, sequence: Sequence, error: BaseException) -> None:
        """End a sequence with what was raised on its account."""
        self.end(sequence, "error", unforeseen(error), fault_of(error))
        self.forget_unwanted_adapters()

    def probe(self) -> str | None:
        """Say why nothing can be computed, not even a token of the bare base; None if it can."""
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
        """Let a sequence hold nothing and wait for nothing until `resume`."""
        if sequence in self.running:
            self._free(sequence)
            self.waiting.leave(sequence.request.turn)
        else:
            self.waiting.remove(sequence.request.turn, sequence)
        self.paused.add(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Let a paused sequence wait for its turn; its tokens are read again."""
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
                with suppress(BaseException):  # a caller that cannot be told is no reason to hurt others
                    sequence.finish(reason, error, fault)
            self._ended(sequence)

    def forget_unwanted_adapters(self) -> None:
        """Drop adapters that were read for requests that no longer wait."""
        self._tiers.forget_unwanted({name for sequence in self.waiting for name, _ in sequence.request.adapters})

    def _admit(self) -> None:
        """Let waiting requests join while there is room, in fair turn; one whose adapters are not here is passed by."""
        if not len(self.waiting) or len(self.running) >= self._limits.running:
            return
        self._make_way()
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
                    self._join(self.waiting.take(queue), slot)
                elif self.running:
                    return
                else:
                    self.fail(sequence, InputError(f"The prompt needs more memory {_KV}."))
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception
                self.fail(sequence, error)

    def _make_way(self) -> None:
        """See to it that a request whose adapters find no room, as others use it all, does not wait for ever."""
        now = time.monotonic()
        late = [head for head in self.waiting.heads() if now - head.waiting_since > _PATIENCE_S]
        lacking = [head for head in late if self._tiers.lacks_room(head.request.adapters)]
        first = min(lacking, key=lambda head: head.waiting_since, default=None)
        leaving = self._tiers.make_way(None if first is None else first.request.adapters, _PATIENCE_S)
        if first is not None and now - first.waiting_since > _INTERRUPT_S:
            for sequence in list(self.running):
                if any(adapter in leaving for adapter, _ in sequence.request.adapters):
                    self._put_back(sequence)

    def _join(self, sequence: Sequence, slot: int) -> None:
        sequence.slot = slot
        sequence.read = 0
        self._tiers.acquire(sequence.request.adapters)
        self.running.append(sequence)  # from here on `end` frees all it holds
        request = sequence.request
        # What is taken from the cache is not computed, so there would be no logits at its positions.
        blocks = [] if sequence.scoring else self.prefixes.find(request.owner, request.adapters, sequence.tokens)
        for number, block in enumerate(blocks):
            self._runner.cache.put(slot, number * BLOCK, block)
        sequence.read = len(blocks) * BLOCK
        if not sequence.generated:
            sequence.cached_tokens = sequence.read
        self.waiting.serve(request.turn, len(sequence.tokens) - sequence.read)

    def _compose(self) -> list[tuple[Sequence, Run]]:
        """Choose this step's tokens: the newest of every answer, and as much of the prompts as is read at once."""
        runs: list[tuple[Sequence, Run]] = []
        budget = self._limits.chunk_tokens
        for sequence in list(self.running):
            if sequence not in self.running:
                continue  # put back to make room for an earlier one
            count = 1 if sequence.decoding else min(len(sequence.tokens) - sequence.read, budget)
            try:
                if not count or not self._make_room(sequence, sequence.read + count):
                    continue
            except Exception as error:  # noqa: BLE001 - whatever it was, it is this sequence that wanted the room
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
        """Have the cache hold so many tokens of a sequence; the one that joined last gives way if need be."""
        assert sequence.slot is not None
        while not self._runner.cache.extend(sequence.slot, tokens):
            last = self.running[-1]
            if len(self.running) == 1:
                self.end(sequence, "error", f"The answer needs more memory {_KV}.", "request")
                return False
            self._put_back(last)
            if last is sequence:
                return False
        return True

    def _put_back(self, sequence: Sequence) -> None:
        """Interrupt a sequence: it waits in front of its queue, and its tokens are read again later."""
        self.counts["preemptions"] += 1
        self._free(sequence)
        self.waiting.leave(sequence.request.turn)
        self._wait(sequence, first=True)

    def _wait(self, sequence: Sequence, *, first: bool = False) -> None:
        sequence.waiting_since = time.monotonic()
        self.waiting.add(sequence.request.turn, sequence, first=first)

    def _compute(self, composed: list[tuple[Sequence, Run]]) -> None:
        """Compute a step. One that raises is computed again in halves, until those at fault are alone, and end."""
        try:
            logits = self._runner.step([run for _, run in composed])
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception
            half = len(composed) // 2
            if half:
                self._compute(composed[:half])
                self._compute(composed[half:])
            else:
                self.doubtful = True
                self.fail(composed[0][0], error)
            return
        self.counts["steps"] += 1
        speaking = []
        for sequence, run in composed:
            sequence.read += len(run.tokens)
            if len(run.tokens) > 1 or run.start == 0:
                self.counts["prompt"] += len(run.tokens)
            if run.wants_logits:
                speaking.append(sequence)
        for sequence, choice in zip(speaking, choose(logits, [s.sampler for s in speaking]), strict=True):
            self._speak(sequence, choice)

    def _speak(self, sequence: Sequence, choice: Choice) -> None:
        if choice.error is None:
            self._keep_prefix(sequence)
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

    def _keep_prefix(self, sequence: Sequence) -> None:
        """Keep the blocks of a prompt that has just been read."""
        if sequence.prefix_kept:
            return
        sequence.prefix_kept = True
        assert sequence.slot is not None
        prompt = sequence.tokens[: sequence.prompt_length]
        with suppress(Exception):  # without memory for them, they are not kept
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
