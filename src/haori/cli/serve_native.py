"""The options of `haori serve` that are for the native engine, and what they open."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.serve import AdapterDirectory
    from haori.server import AccessLog, Backend, ServerSettings

__all__ = [
    "MEMORY",
    "AdapterMemory",
    "KvMemory",
    "NativeChoice",
    "Pins",
    "Weights",
    "check_native",
    "open_native",
    "tell_hidden",
]

_FORMATS = ("auto", "fp32", "bf16", "int8", "int4")
MEMORY = "1GB"

KvMemory = Annotated[str, typer.Option(help="Memory for keys and values, such as 512MB or 1GB.")]
AdapterMemory = Annotated[str, typer.Option(help="Memory for adapters in use.")]
Weights = Annotated[str, typer.Option(help=f"Format of the base's weights: {', '.join(_FORMATS)}.")]
Pins = Annotated[list[str] | None, typer.Option(help="Adapter that stays in memory once it is in it; may be repeated.")]


class NativeChoice(NamedTuple):
    """How the native engine is to work.

    Attributes:
        roots: Folders that an admin may load adapters from.
        waiting: Most requests that wait.
        cache_bytes: Memory for keys and values.
        adapter_bytes: Memory for adapters.
        weights: Format of the base's weights.
        pinned: Names of adapters that are never evicted.
    """

    roots: tuple[Path, ...]
    waiting: int
    cache_bytes: int
    adapter_bytes: int
    weights: str
    pinned: tuple[str, ...]


def check_native(engine: str, kv_memory: str, adapter_memory: str, weights: str, pins: bool) -> None:
    """Refuse options of the native engine that are wrong, or that another engine would ignore.

    Raises:
        InputError: There is such an option.
    """
    from haori.core.errors import InputError

    if weights not in _FORMATS:
        raise InputError(f"Weights cannot be {weights!r}; choose {', '.join(_FORMATS)}.")
    changed = {
        "--pin": pins, "--weights": weights != "auto", "--kv-memory": kv_memory != MEMORY,
        "--adapter-memory": adapter_memory != MEMORY,
    }  # fmt: skip
    ignored = [option for option, is_changed in changed.items() if is_changed]
    if engine != "native" and ignored:
        raise InputError(
            f"{ignored[0]} is for the native engine; vLLM has arguments of its own, such as --vllm-arg=--max-loras=32 "
            "or --vllm-arg=--dtype=bfloat16."
        )


def tell_hidden(directory: "AdapterDirectory", log: "AccessLog") -> None:
    """Say which adapters are called as the base is, and how to ask for them."""
    for name in directory.hidden():
        log.event(
            f"{name!r} is the name of the base and of an adapter: it means the base here. Ask for the adapter with its "
            f"version, such as '{name}@1', or store it under another name."
        )


def open_native(base: "Base", settings: "ServerSettings", choice: NativeChoice, log: "AccessLog") -> "Backend":
    """Load everything; runs beside the server, which says meanwhile that it is loading.

    Raises:
        HaoriError: The base cannot be served, or a pinned adapter is not there.
    """
    from haori.library import Library
    from haori.serve import AdapterDirectory, EmbedderLimits, EngineLimits, is_encoder, open_embedder, open_engine
    from haori.server import Backend

    directory = AdapterDirectory(Library(), base.reference(), base_names=[base.name], roots=choice.roots)
    tell_hidden(directory, log)
    directory.check_adapters(choice.pinned)

    def pinned() -> frozenset[str]:
        return directory.contents(choice.pinned)

    if is_encoder(base):
        longest = settings.max_prompt_tokens or base.context_length
        limits = EmbedderLimits(longest, choice.waiting, choice.adapter_bytes)
        embedder = open_embedder(base, directory.files, limits, weights=choice.weights, pinned=pinned)
        return Backend(embedder, directory, embedder, writes_text=False)
    engine = open_engine(
        base, directory.files,
        EngineLimits(
            base.context_length, running=settings.max_batch, waiting=choice.waiting, adapter_bytes=choice.adapter_bytes
        ),
        weights=choice.weights, cache_bytes=choice.cache_bytes, pinned=pinned, say=log.event,
    )  # fmt: skip
    return Backend(engine, directory)
