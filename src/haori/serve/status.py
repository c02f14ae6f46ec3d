"""How busy an engine is: one record, which every engine returns, whatever computes its answers."""

from collections.abc import Iterable
from dataclasses import dataclass

from haori.serve.request import AdapterMix

__all__ = ["EngineStatus", "WorkerStatus", "adapters_of"]


@dataclass(frozen=True)
class EngineStatus:
    """How busy an engine is, and what it has done since it began; 0 or empty where it does not know.

    Attributes:
        running: Requests that take part in the engine's steps.
        waiting: Requests in the queues.
        running_adapters: Content ids of the adapters of running requests.
        waiting_adapters: Those of waiting requests.
        resident_adapters: Those of adapters in memory.
        adapter_used_bytes: Memory of the adapters.
        adapter_total_bytes: Memory that they may take.
        kv_used_bytes: Memory of the keys and values of running requests.
        kv_total_bytes: Memory that they may take.
        prefix_queries: Prompt tokens looked up in the prefix cache.
        prefix_hits: Prompt tokens found there.
        prompt_tokens: Prompt tokens read.
        generated_tokens: Tokens of answers.
        steps: Steps computed; of an embedder, batches.
        preemptions: Times that a running request had to wait again.
        adapter_loads: Times that an adapter was brought into memory.
        adapter_evictions: Times that an adapter was evicted.
        workers: The servers or replicas that compute, if others do.
    """

    running: int = 0
    waiting: int = 0
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    resident_adapters: tuple[str, ...] = ()
    adapter_used_bytes: int = 0
    adapter_total_bytes: int = 0
    kv_used_bytes: int = 0
    kv_total_bytes: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    workers: "tuple[WorkerStatus, ...]" = ()


@dataclass(frozen=True)
class WorkerStatus:
    """A server or replica that computes for an engine.

    Attributes:
        name: Its address or name.
        alive: Whether it answers.
        pid: Its process, if that is known.
        engine: How busy it is, if it says so.
    """

    name: str
    alive: bool = True
    pid: int | None = None
    engine: EngineStatus | None = None


def adapters_of(mixes: Iterable[AdapterMix]) -> tuple[str, ...]:
    """Return the content ids of the adapters in some mixes, sorted."""
    return tuple(sorted({adapter for mix in mixes for adapter, _ in mix}))
