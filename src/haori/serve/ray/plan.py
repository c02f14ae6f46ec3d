"""What a replica is told when it begins, and what it sends. Never imports Ray."""

from dataclasses import dataclass
from pathlib import Path

from haori.bases import Base
from haori.serve.engine.scheduler import EngineLimits
from haori.serve.request import StreamChunk

__all__ = ["ReplicaChunks", "ReplicaFacts", "ReplicaPlan"]


@dataclass(frozen=True)
class ReplicaPlan:
    """All that a replica needs to open the base; every machine finds the same files under the same paths.

    Attributes:
        base: The base.
        limits: What the engine of each replica takes on.
        weights: Format of the base's weights.
        cache_bytes: Memory for keys and values.
        roots: Folders that registered adapters may lie in.
        home: Folder of the library and of registered names.
        workspace: Where the library is, if not in `home`.
        pinned: Names of adapters that are never evicted.
    """

    base: Base
    limits: EngineLimits
    weights: str
    cache_bytes: int
    roots: tuple[Path, ...]
    home: Path
    workspace: Path | None
    pinned: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReplicaFacts:
    """What is known of the model once a replica has opened it.

    Attributes:
        context_length: Longest prompt and answer together, in tokens.
        vocabulary: Width of the logits.
        stop_tokens: Ids that end an answer.
        remarks: Sentences for people, such as that the slow runner was taken.
    """

    context_length: int
    vocabulary: int
    stop_tokens: frozenset[int]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class ReplicaChunks:
    """The stream chunks of one answer that have gathered since the last message, and the replica that wrote them."""

    replica: str
    chunks: tuple[StreamChunk, ...]
