"""A server on a free port of 127.0.0.1, over a small engine without a model, for tests of the HTTP side.

The engine repeats its prompt token by token from a thread of its own, as slowly as it is told to, so that a test
knows every answer and has time to interrupt one.
"""

import io
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from haori.bases import Base, Component
from haori.core.errors import InputError, LibraryError, OverloadedError
from haori.core.records import Fingerprint
from haori.data import PromptFormat
from haori.serve.embedding.classified import Classified, ClassifierInputs
from haori.serve.request import AdapterMix, Deliver, Embedded, StreamChunk, TextRequest, TokenLogprob
from haori.serve.status import EngineStatus
from haori.server import (
    Access,
    AccessLog,
    Backend,
    KeyStore,
    RunningServer,
    ServerSettings,
    Service,
    create_app,
    listen,
)


def sample_base(name: str = "tiny") -> Base:
    fingerprint = Fingerprint(architecture="LlamaForCausalLM", structure="s", weights="w")
    path = Path("/nowhere")
    return Base(
        name, path, f"folder:{path}", None, {"model": Component("model", path, fingerprint, 1, 1, 256, None)}, "MIT"
    )


@dataclass
class _Job:
    request: TextRequest
    deliver: Deliver
    left: deque[int]
    cancelled: bool = False
    paused: bool = False
    sent: int = 0


class RepeatingEngine:
    """Answers with the prompt's own tokens; `seed` shifts where they begin."""

    def __init__(self, tokenizer: Any, *, step_s: float = 0.0, room: int = 10_000) -> None:
        self.tokenizer = tokenizer
        self.base = sample_base()
        self.context_length = 256
        self.step_s = step_s
        self.room = room
        self.seen: list[TextRequest] = []
        self.fail_with: str | None = None
        self.failure: str | None = None
        self._jobs: dict[str, _Job] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def check_adapter(self, files: Any, adapter: str) -> None:
        """Take any."""

    def submit(self, request: TextRequest, deliver: Deliver) -> None:
        with self._changed:
            if len(self._jobs) >= self.room:
                raise OverloadedError("Too many requests wait; try again later.", retry_after_s=3.0)
            if 2 in request.sampling.logit_bias:
                raise InputError("The token 2 cannot be biased.")
            length = 8 if request.sampling.max_tokens is None else request.sampling.max_tokens
            start = request.sampling.seed or 0
            tokens = [request.prompt[(start + i) % len(request.prompt)] for i in range(length)]
            self.seen.append(request)
            self._jobs[request.id] = _Job(request, deliver, deque(tokens))
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            if request_id in self._jobs:
                self._jobs[request_id].cancelled = True
                self._changed.notify_all()

    def pause(self, request_id: str) -> None:
        with self._changed:
            if request_id in self._jobs:
                self._jobs[request_id].paused = True

    def resume(self, request_id: str) -> None:
        with self._changed:
            if request_id in self._jobs:
                self._jobs[request_id].paused = False
                self._changed.notify_all()

    def status(self) -> EngineStatus:
        with self._changed:
            mixes = [job.request.adapters for job in self._jobs.values()]
        names = tuple(sorted({identity for mix in mixes for identity, _ in mix}))
        return EngineStatus(
            running=len(mixes), running_adapters=names, kv_used_bytes=10 * len(mixes), kv_total_bytes=1000,
            prefix_queries=7, prefix_hits=3, adapter_loads=5,
        )  # fmt: skip

    def drain(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs, timeout_s)

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._at_work)
                jobs = [job for job in self._jobs.values() if not job.paused or job.cancelled or self._closing]
                for job in jobs:
                    job.cancelled = job.cancelled or self._closing
                if self._closing and not jobs:
                    return
            if self.step_s:
                time.sleep(self.step_s)
            for job in jobs:
                self._advance(job)

    def _at_work(self) -> bool:
        return self._closing or any(not job.paused or job.cancelled for job in self._jobs.values())

    def _advance(self, job: _Job) -> None:
        if job.cancelled or self.fail_with:
            finish = "cancelled" if job.cancelled else "error"
            return self._finish(job, StreamChunk(finish=finish, error=self.fail_with))
        wanted = job.request.sampling.prompt_logprobs
        scored = job.request.prompt[1:] if wanted is not None and not job.sent else ()
        scores = tuple(TokenLogprob(token, -0.25, ((3, -0.125),)[:wanted], 2) for token in scored)
        if not job.left:
            return self._finish(job, StreamChunk(finish="length", prompt_logprobs=scores))
        token = job.left.popleft()
        job.sent += 1
        logprobs = ()
        if job.request.sampling.logprobs is not None:
            top = tuple((other, -float(other)) for other in range(3, 3 + job.request.sampling.logprobs))
            logprobs = (TokenLogprob(token, -0.5 if job.sent > 1 else -math.inf, top),)
        text = self.tokenizer.decode([token], skip_special_tokens=True)
        if not job.left:
            end = StreamChunk(text, (token,), logprobs, "length", cached_tokens=2, prompt_logprobs=scores)
            return self._finish(job, end)
        return job.deliver(StreamChunk(text, (token,), logprobs, prompt_logprobs=scores))

    def _finish(self, job: _Job, chunk: StreamChunk) -> None:
        with self._changed:
            del self._jobs[job.request.id]
            self._changed.notify_all()
        job.deliver(chunk)


@dataclass
class Found:
    mix: AdapterMix
    label: str
    names: Sequence[str]
    full_names: Sequence[Sequence[str]] = ()


@dataclass
class Entry:
    id: str
    created_unix_s: int = 1_700_000_000
    root: Path | None = None
    parent: str | None = "tiny"
    adapter: str | None = None


@dataclass
class SmallDirectory:
    """Three adapters with fixed ids, and what was registered."""

    names: list[str] = field(default_factory=lambda: ["support", "support@2", "other-one"])
    roots: Sequence[Path] = ()

    def resolve(self, model: str) -> Found:
        if model == "tiny":
            return Found((), model, (model,))
        parts = [part.partition(":") for part in model.split("+")]
        if model == "abcdef012345":  # digits of an id
            parts = [("other-one", "", "")]
        if missing := next((name for name, _, _ in parts if name not in self.names), None):
            raise LibraryError(
                f"The library has no adapter {missing[:80]!r}; `haori library list` shows what it holds."
            )
        try:
            mix = tuple((f"sha256:{name}", float(strength or 1)) for name, _, strength in parts)
        except ValueError:
            raise InputError(f"{model[:80]!r} is no blend.") from None
        names = tuple(name for name, _, _ in parts)
        return Found(mix, model, tuple(name.partition("@")[0] for name in names), tuple((name,) for name in names))

    def entries(self) -> list[Entry]:
        adapters = [Entry(name, root=Path("/library") / name, adapter=f"sha256:{name}") for name in self.names]
        return [Entry("tiny", parent=None), *adapters]

    def prompt_format(self, tokenizer: Any, mix: Any) -> PromptFormat:
        return PromptFormat(tokenizer)

    def register(self, name: str, folder: str | Path, check: Any, *, replace: bool = False) -> None:
        place = Path(folder).resolve()
        if not any(place.is_relative_to(root.resolve()) for root in self.roots):
            raise InputError(f"{str(folder)!r} is outside the folders that this server may read.")
        if not place.is_dir():
            raise LibraryError(f"There is no folder {str(folder)!r}.")
        if name == "tiny" or (name in self.names and not replace):
            raise InputError(f"{name!r} is taken; choose another name.")
        if name not in self.names:
            self.names.append(name)

    def unregister(self, name: str) -> None:
        if name not in self.names:
            raise LibraryError(f"No adapter was loaded as {name!r}.")
        self.names.remove(name)


class TwoNumbers:
    """Embeds a text as its length and its first letter, and finds it short or long."""

    def embed(self, texts: Sequence[str], mix: AdapterMix) -> "Future[Embedded]":
        future: Future[Embedded] = Future()
        vectors = [[float(len(text)), float(ord(text[0]))] for text in texts]
        future.set_result(Embedded(vectors, [len(text.split()) for text in texts]))
        return future

    def classify(self, inputs: ClassifierInputs, mix: AdapterMix) -> "Future[Classified]":
        future: Future[Classified] = Future()
        scores = [[0.75, 0.25] if len(given) < 6 else [0.25, 0.75] for given in inputs.given]
        tokens = [len(given.split()) if isinstance(given, str) else len(given) for given in inputs.given]
        future.set_result(Classified(("short", "long"), scores, tokens))
        return future

    def labels(self, adapter: str | None) -> Sequence[str] | None:
        return None if adapter is None else ("short", "long")


@dataclass
class Served:
    url: str
    service: Service
    engine: Any
    directory: Any
    log: io.StringIO
    server: RunningServer

    def until_idle(self, timeout_s: float = 5.0) -> bool:
        return self.engine.drain(timeout_s)


def until(condition, timeout_s=5.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


@contextmanager
def served(
    engine: Any,
    directory: Any = None,
    *,
    home: Path,
    embedder: Any = None,
    loaded: bool = True,
    settings: ServerSettings | None = None,
    host: str = "127.0.0.1",
    jobs: Any = None,
) -> Iterator[Served]:
    """Run a real server on a free port of loopback in a thread; `host` is what it believes to be bound to."""
    log = io.StringIO()
    service = Service(engine.base, settings or ServerSettings(), AccessLog("json", log), jobs=jobs)
    access = Access(KeyStore(home / "keys.json"), host)
    directory = directory or SmallDirectory()
    if loaded:
        service.attach(Backend(engine, directory, embedder))
    taken = listen("127.0.0.1", 0)
    server = RunningServer(create_app(service, access), service)
    thread = threading.Thread(target=server.serve_on, args=(taken,), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield Served(f"http://127.0.0.1:{taken.getsockname()[1]}", service, engine, directory, log, server)
    finally:
        server.stop()
        thread.join(20)
        if not loaded:
            engine.close()
        assert not thread.is_alive()
