"""What the server needs of those who do the work: an engine, a directory of names, perhaps an embedder.

Small Protocols, so that the server can be put in front of any engine; it knows nothing about tensors.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from haori.bases import Base
from haori.data import PromptFormat
from haori.library import AdapterFiles
from haori.serve.adapters.directory import CheckAdapter
from haori.serve.embedding.classified import Classified, ClassifierInputs
from haori.serve.request import AdapterMix, Deliver, Embedded, TextRequest
from haori.serve.status import EngineStatus

__all__ = ["Backend", "Directory", "Embedder", "Engine", "ModelEntry", "Resolved"]


class Engine(Protocol):
    """Answers requests; every method may be called from any thread."""

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""

    @property
    def base(self) -> Base:
        """The base that is served."""

    @property
    def context_length(self) -> int:
        """Longest prompt and answer together, in tokens."""

    @property
    def failure(self) -> str | None:
        """Why it can answer nothing, for now or for good; None while it can."""

    def check_adapter(self, files: AdapterFiles, adapter: str, /) -> None:
        """Refuse an adapter, by its content id, that no request could be answered with.

        Raises:
            HaoriError: It is one.
        """

    def submit(self, request: TextRequest, deliver: Deliver) -> None:
        """Queue a request; `deliver` is called on another thread, the last time with `finish` set.

        Raises:
            InputError: The request cannot be answered.
            OverloadedError: There is no room in the queue.
            UnavailableError: It has ended on its own.
        """

    def cancel(self, request_id: str) -> None:
        """End a request at once; one that has ended is no error."""

    def pause(self, request_id: str) -> None:
        """Write no more of an answer until `resume`, if it can; one that has ended is no error."""

    def resume(self, request_id: str) -> None:
        """Go on with an answer; one that was not paused is no error."""

    def status(self) -> EngineStatus:
        """Return how busy it is."""

    def drain(self, timeout_s: float) -> bool:
        """Wait until every request has ended; False if some have not after `timeout_s`."""

    def close(self) -> None:
        """Cancel what runs and free everything."""


class Resolved(Protocol):
    """What a model name means now."""

    @property
    def mix(self) -> AdapterMix:
        """The adapters and their strengths."""

    @property
    def label(self) -> str:
        """The same with versions, for logs."""

    @property
    def names(self) -> Sequence[str]:
        """The name of each adapter, or the base's, without version; an id's is one of its adapter's."""

    @property
    def full_names(self) -> Sequence[Sequence[str]]:
        """Of each adapter asked for, every name that it has, in full; none for the base."""


class ModelEntry(Protocol):
    """One line of `/v1/models`."""

    @property
    def id(self) -> str:
        """The name to ask for."""

    @property
    def created_unix_s(self) -> int:
        """When it was made, in seconds since 1970."""

    @property
    def root(self) -> Path | None:
        """Folder of an adapter."""

    @property
    def parent(self) -> str | None:
        """The base of an adapter; None for the base itself."""

    @property
    def adapter(self) -> str | None:
        """Content id of an adapter."""


class Directory(Protocol):
    """Names of the base, of adapters and of blends; every method may be called from any thread."""

    def resolve(self, model: str) -> Resolved:
        """Say what a name means.

        Raises:
            LibraryError: There is no such adapter.
            InputError: It is no name.
        """

    def entries(self) -> Sequence[ModelEntry]:
        """Return every name that can be asked for, the base's first."""

    def prompt_format(self, tokenizer: Any, mix: AdapterMix) -> PromptFormat:
        """Return how the adapters of a mix are spoken to.

        Raises:
            MismatchError: One would be given other prompts than in training.
            InputError: They cannot be spoken to together.
        """

    def register(self, name: str, folder: str | Path, check: CheckAdapter, *, replace: bool = False) -> None:
        """Give a library adapter, or a folder inside the allowed roots, a name, if `check` does not refuse it.

        Raises:
            LibraryError: The name is taken, or there is no such adapter or folder.
            InputError: The adapter cannot be served.
        """

    def unregister(self, name: str) -> None:
        """Take such a name away.

        Raises:
            LibraryError: It was not registered.
        """


class Embedder(Protocol):
    """Turns texts into vectors, or labels them."""

    def embed(self, texts: Sequence[str], mix: AdapterMix) -> "Future[Embedded]":
        """Queue texts; the future gives their vectors and token counts, and may be cancelled.

        Raises:
            InputError: A text is too long.
            OverloadedError: There is no room in the queue.
        """

    def classify(self, inputs: ClassifierInputs, mix: AdapterMix) -> "Future[Classified]":
        """Queue texts; the future gives the scores of their labels and token counts, and may be cancelled.

        Raises:
            InputError: A text is too long, or nothing classifies under this mix.
            OverloadedError: There is no room in the queue.
        """

    def labels(self, adapter: str | None) -> Sequence[str] | None:
        """Return the labels of a classifier, given its content id, or the base's own; None for what is none.

        Raises:
            HaoriError: The adapter is not here, or its files are unusable.
        """


@dataclass(frozen=True)
class Backend:
    """All that answers requests, once it is loaded; an engine over an encoder does not write text."""

    engine: Engine
    directory: Directory
    embedder: Embedder | None = None
    writes_text: bool = True
