"""Texts to vectors or labels with one encoder and its adapters: requests that come at the same time share batches.

One thread owns the model. In each round it takes texts of the running requests in turn, whatever their adapters are,
sorts them by length, so that little is padded, and computes them in batches; requests join between rounds, oldest
first, when their adapters are in memory. Other threads only tokenise. It knows nothing about HTTP.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Never, TypeVar

from haori.core.errors import HaoriError, InputError, OverloadedError, UnavailableError
from haori.data.batching import plan_batches
from haori.serve.adapters.tiers import AdapterTiers, FindFiles, PinnedAdapters, ReadAdapter
from haori.serve.embedding.classified import Classified, ClassifierInputs, scores_of
from haori.serve.embedding.heads import AdapterHeads
from haori.serve.embedding.jobs import Job, JobText
from haori.serve.embedding.texts import TextReader
from haori.serve.models.encoder import AdaptedEncoder, Row
from haori.serve.request import AdapterMix, Deliver, Embedded, TextRequest
from haori.serve.status import EngineStatus, adapters_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from haori.bases import Base

__all__ = ["EmbedderLimits", "TextEmbedder"]

_POLL_S = 0.05
_BATCH_TOKENS = 1024  # with padding; MiniLM on a CPU gives fewer tokens/s in larger batches (4096: -15%, 16384: -45%)
_ROUND_TOKENS = 4 * _BATCH_TOKENS  # a new request waits for so much at most
_MOST_RUNNING = 64
_PATIENCE_S = 5.0
_PROBE_S = 1.0  # between two probes whether an embedder that could not compute can again

R = TypeVar("R")


@dataclass(frozen=True)
class EmbedderLimits:
    """What an embedder takes on.

    Attributes:
        longest: Longest text in tokens.
        waiting: Most requests that wait.
        adapter_bytes: Memory for adapters.
        longest_classified: Longest text that is classified; None for what is embedded.
    """

    longest: int
    waiting: int = 512
    adapter_bytes: int = 1 << 30
    longest_classified: int | None = None


class TextEmbedder:
    """Turns texts into vectors, or labels them; every method may be called from any thread.

    Args:
        base: What is served.
        tokenizer: Its tokenizer.
        encoder: Computes vectors and logits.
        read_adapter: Reads an adapter, given its files and its content id.
        files_of: Finds an adapter's files by its content id.
        heads: Which adapters classify.
        limits: What it takes on.
        prepare_text: Applied to each text before it is tokenised.
        pinned: Adapters that are never evicted once they are in memory.
    """

    def __init__(
        self,
        base: "Base",
        tokenizer: "PreTrainedTokenizerBase",
        encoder: AdaptedEncoder,
        read_adapter: ReadAdapter,
        files_of: FindFiles,
        heads: AdapterHeads,
        *,
        limits: EmbedderLimits,
        prepare_text: Callable[[str], str] = str.strip,
        pinned: PinnedAdapters = tuple,
    ) -> None:
        self.base, self.tokenizer = base, tokenizer
        self.limits = limits
        self.context_length = limits.longest
        self._encoder = encoder
        self._heads = heads
        self._texts = TextReader(
            tokenizer, prepare_text, longest=limits.longest,
            longest_classified=limits.longest_classified or limits.longest, name=base.name,
        )  # fmt: skip
        self._tiers = AdapterTiers(
            encoder.bank, files_of, read_adapter, limits.adapter_bytes, landed=self._wake, pinned=pinned
        )
        self.check_adapter = self._tiers.check
        self._condition = threading.Condition()
        self._waiting: deque[Job[Any]] = deque()
        self._running: list[Job[Any]] = []
        self._awake = False
        self._closing = self._ended = False
        self._failure: str | None = None
        self._batches = 0
        self._status = self._measure()
        self._thread = threading.Thread(target=self._work, name="haori-embedder", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """Say why nothing can be embedded, for now or for good; None while requests can be answered."""
        return self._failure

    def embed(self, texts: Sequence[str], mix: AdapterMix) -> "Future[Embedded]":
        """Queue texts; the future gives their vectors, or the HaoriError for which an adapter cannot be served.

        Cancelling the future takes texts that have not been embedded out of the queue.

        Raises:
            InputError: A text is too long, or there is none, or an adapter is a classifier.
            OverloadedError: Too many requests wait.
            UnavailableError: The embedder has ended on its own.
        """
        if not texts:
            raise InputError("There is no text to embed; give at least one.")
        self._heads.check_embeds(mix)
        rows = [Row(ids, mix) for ids in self._texts.embedded(texts)]
        return self._queue(Job(rows, mix, Embedded))

    def classify(self, inputs: ClassifierInputs, mix: AdapterMix) -> "Future[Classified]":
        """Queue texts to be classified by the one adapter of a mix, or by the base's own head; see `embed`.

        Raises:
            InputError: There is no text, one is too long, or there is no head, or more than one.
            OverloadedError: Too many requests wait.
            UnavailableError: The embedder has ended on its own.
        """
        if not inputs.given:
            raise InputError("There is no text to classify; give at least one.")
        head = self._heads.of_mix(mix)
        rows = [Row(ids, mix, classify=True) for ids in self._texts.classified(inputs)]

        def answer(logits: list[list[float]], tokens: list[int]) -> Classified:
            return Classified(head.labels, [scores_of(head, row, activated=inputs.activated) for row in logits], tokens)

        return self._queue(Job(rows, mix, answer))

    def labels(self, adapter: str | None) -> Sequence[str] | None:
        """Return the labels of a classifier, given its content id, or the base's own; None for what is none.

        Raises:
            HaoriError: The adapter is not here, or its files are unusable.
        """
        head = self._heads.own if adapter is None else self._heads.of_adapter(adapter)
        return None if head is None else head.labels

    def _queue(self, job: Job[R]) -> "Future[R]":
        with self._condition:
            if self._closing:
                raise OverloadedError("The embedder is shutting down.", retry_after_s=5.0)
            if self._ended:
                raise UnavailableError(self._failure or "The embedder has ended.")
            if len(self._waiting) >= self.limits.waiting:
                raise OverloadedError(
                    f"{len(self._waiting)} requests are waiting, which is as many as may (--max-queue); try again "
                    "later.",
                    retry_after_s=1.0,
                )
            self._waiting.append(job)
            self._awake = True
            self._condition.notify_all()
        return job.future

    def submit(self, request: TextRequest, deliver: Deliver) -> Never:
        """Refuse a request for text: a server asks the same of everything behind it.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"The base {self.base.name!r} is an encoder and writes no text; it makes embeddings and classifies."
        )

    def cancel(self, request_id: str) -> None:
        """Do nothing: there are no requests for text."""

    pause = resume = cancel

    def status(self) -> EngineStatus:
        """Return how busy it is, as of its last round."""
        with self._condition:
            return replace(
                self._status, waiting=len(self._waiting), waiting_adapters=adapters_of(job.mix for job in self._waiting)
            )

    def drain(self, timeout_s: float) -> bool:
        """Wait until every request has ended; False if some have not after `timeout_s`."""
        with self._condition:
            return self._condition.wait_for(lambda: not self._waiting and not self._running, timeout_s)

    def close(self) -> None:
        """End after the round that runs; requests that wait are refused."""
        with self._condition:
            self._closing = True
            self._awake = True
            self._condition.notify_all()
        self._thread.join()
        self._tiers.close()

    def _wake(self) -> None:
        with self._condition:
            self._awake = True
            self._condition.notify_all()

    def _work(self) -> None:
        reason: HaoriError = OverloadedError("The embedder is shutting down.", retry_after_s=5.0)
        try:
            while self._wait():
                if self._failure:
                    self._failure = self._probe()
                while self._admit():
                    self._round()
        except BaseException as error:  # noqa: BLE001 - whatever it was, those who wait must hear of it
            self._failure = f"The embedder has ended ({type(error).__name__}: {error}); start the server again."
            reason = UnavailableError(self._failure)
        with self._condition:
            self._ended = True
            for job in (*self._running, *self._waiting):
                job.fail(reason)
            self._waiting.clear()
            self._running.clear()
            self._status = self._measure()
            self._condition.notify_all()

    def _wait(self) -> bool:
        """Wait until there may be something to do; False when it is time to end."""
        with self._condition:
            # A request whose adapter is being read is looked at again when one has landed.
            pause_s = _POLL_S if self._waiting else _PROBE_S if self._failure else None
            self._condition.wait_for(lambda: self._awake, pause_s)
            self._awake = False
            return not self._closing

    def _admit(self) -> bool:
        """Let requests join whose adapters are in memory, oldest first; say whether any run."""
        with self._condition:
            waiting = [] if self._closing else list(self._waiting)
        for job in waiting:
            if len(self._running) >= _MOST_RUNNING:
                break
            try:
                if not job.cancelled and not self._tiers.prepare(job.mix):
                    if time.monotonic() - job.began > _PATIENCE_S:
                        break  # running requests may hold all the memory; no later one is admitted first any more
                    continue
            except Exception as error:  # noqa: BLE001 - whatever it was, the caller must hear of it
                self._refuse(job, error)
                continue
            if not job.cancelled:
                self._tiers.acquire(job.mix)
                self._running.append(job)
            with self._condition:
                self._waiting.remove(job)
        with self._condition:
            self._status = self._measure()
            self._condition.notify_all()
        return bool(self._running) and not self._closing

    def _refuse(self, job: Job[Any], error: BaseException) -> None:
        with self._condition:
            self._waiting.remove(job)
            wanted = adapters_of(job.mix for job in self._waiting)
            self._condition.notify_all()
        job.fail(error)
        self._tiers.forget_unwanted(wanted)

    def _round(self) -> None:
        """Compute some texts of the running requests, in turn, so that a long request does not hold up short ones."""
        chosen: list[JobText] = []
        turns = deque(job for job in self._running if job.left and not job.cancelled)
        tokens = 0
        while turns and tokens < _ROUND_TOKENS:
            job = turns.popleft()
            chosen.append(JobText(job, job.left.popleft()))
            tokens += chosen[-1].length
            if job.left:
                turns.append(job)
        for batch in plan_batches([text.length for text in chosen], _BATCH_TOKENS):
            self._compute([chosen[index] for index in batch])
        running = [job for job in self._running if job.left and not job.cancelled]
        for job in self._running:
            if job not in running:
                self._tiers.release(job.mix)
        self._running = running
        with self._condition:
            self._status = self._measure()
            self._condition.notify_all()

    def _compute(self, batch: Sequence[JobText]) -> None:
        """Compute a batch. One that raises is computed again in halves, until the texts at fault are alone."""
        batch = [text for text in batch if text.wanted]
        if not batch:
            return
        try:
            computed = [found.tolist() for found in self._encoder.compute([text.row for text in batch])]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it was, its caller must hear of it and others go on
            half = len(batch) // 2
            if half:
                self._compute(batch[:half])
                self._compute(batch[half:])
            else:
                batch[0].job.fail(error)
                self._failure = self._probe()
            return
        self._batches += 1
        self._status = self._measure()  # before any caller has its answer
        for text, numbers in zip(batch, computed, strict=True):
            text.job.take(text.index, numbers)

    def _probe(self) -> str | None:
        """Say why nothing can be computed, not even by the bare base; None if it can."""
        try:
            self._encoder.compute([Row([0], ())])
        except Exception as error:  # noqa: BLE001 - whatever it was, it is the answer
            return f"The embedder cannot compute ({type(error).__name__}: {error}); it may have to be started again."
        return None

    def _measure(self) -> EngineStatus:
        """Say how busy it is; on its own thread."""
        tiers = self._tiers
        return EngineStatus(
            running=len(self._running),
            waiting=len(self._waiting),
            running_adapters=adapters_of(job.mix for job in self._running),
            waiting_adapters=adapters_of(job.mix for job in self._waiting),
            resident_adapters=tiers.resident,
            adapter_used_bytes=tiers.used_bytes,
            adapter_total_bytes=tiers.budget_bytes,
            adapter_loads=tiers.loads,
            adapter_evictions=tiers.evictions,
            steps=self._batches,
        )
