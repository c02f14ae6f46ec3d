"""`haori serve`: one base and all its adapters, for OpenAI clients."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from haori.cli.serve_native import (
    MEMORY,
    AdapterMemory,
    KvMemory,
    NativeChoice,
    Pins,
    Weights,
    check_native,
    open_native,
    tell_hidden,
)
from haori.cli.serve_ray import RayAddress, RayReplicas, UseRay, open_on_ray, ray_choice

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.server import Access, AccessLog, Backend, ServerSettings

__all__ = ["serve"]

_DEFAULT_BASE = "smollm2-135m-instruct"
_FORMATS = ("json", "text")
_ENGINES = ("native", "vllm")


def serve(
    base: Annotated[str | None, typer.Option(help="Base to serve; by default that of the library's adapters.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but 127.0.0.1 needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    adapter_root: Annotated[
        list[Path] | None, typer.Option(help="Folder that an admin may load adapters from; may be repeated.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer a request may ask for.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prompt.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 32,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused (429).")] = 512,
    kv_memory: KvMemory = MEMORY,
    adapter_memory: AdapterMemory = MEMORY,
    pin: Pins = None,
    weights: Weights = "auto",
    engine: Annotated[str, typer.Option(help="What computes: native (a CPU will do), or vllm (GPUs).")] = "native",
    vllm_url: Annotated[list[str] | None, typer.Option(help="vLLM server to use; without one it is started.")] = None,
    vllm_arg: Annotated[list[str] | None, typer.Option(help="Argument for it, such as --max-loras=32.")] = None,
    ray: UseRay = False,
    replicas: RayReplicas = None,
    ray_address: RayAddress = None,
    drain_seconds: Annotated[float, typer.Option(min=0.0, help="Longest wait for running requests at the end.")] = 30.0,
    log_format: Annotated[str, typer.Option(help="Lines on standard error: json or text.")] = "json",
) -> None:
    """Serve a base and its adapters to OpenAI clients; Ctrl-C ends it when running requests have ended."""
    from haori import server as http

    _check(log_format, engine, bool(vllm_url or vllm_arg))
    check_native(engine, kv_memory, adapter_memory, weights, bool(pin))
    on_ray = ray_choice(ray, replicas, ray_address, engine)
    roots = tuple(_folder(root) for root in adapter_root or [])
    kv_bytes, adapter_bytes = http.parse_size(kv_memory), http.parse_size(adapter_memory)
    native = NativeChoice(roots, max_queue, kv_bytes, adapter_bytes, weights, tuple(pin or []))
    access = http.Access(http.KeyStore(), host)
    with http.listen(host, port) as taken:
        found = _base(base)
        log = http.AccessLog("json" if log_format == "json" else "text")
        settings = http.ServerSettings(
            max_tokens=max_tokens, max_prompt_tokens=max_prompt_tokens, max_batch=max_batch, drain_s=drain_seconds
        )
        service = http.Service(found, settings, log)
        server = http.RunningServer(http.create_app(service, access), service)
        _greet(found, host, taken.getsockname()[1], access)

        def make() -> "Backend":
            if engine == "vllm":
                return _open_vllm(found, roots, settings, max_queue, vllm_url or [], vllm_arg or [], log)
            if on_ray is not None:
                return open_on_ray(found, settings, native, log, on_ray)
            return open_native(found, settings, native, log)

        service.load(make, on_failure=server.stop)
        server.serve_on(taken)


def _check(log_format: str, engine: str, speaks_of_vllm: bool) -> None:
    from haori.core.errors import InputError

    if log_format not in _FORMATS:
        raise InputError(f"There is no log format {log_format!r}; allowed are {' and '.join(_FORMATS)}.")
    if engine not in _ENGINES:
        raise InputError(f"There is no engine {engine!r}; allowed are {' and '.join(_ENGINES)}.")
    if engine == "native" and speaks_of_vllm:
        raise InputError("--vllm-url and --vllm-arg are for --engine vllm; add that.")


def _open_vllm(
    base: "Base", roots: tuple[Path, ...], settings: "ServerSettings", waiting: int, urls: list[str],
    arguments: list[str], log: "AccessLog",
) -> "Backend":  # fmt: skip
    """Attach to vLLM servers, or start one; runs beside the server too."""
    from haori.library import Library
    from haori.serve import AdapterDirectory, EngineLimits
    from haori.serve.vllm import VllmChoice, open_vllm
    from haori.server import Backend

    library = Library()
    directory = AdapterDirectory(library, base.reference(), base_names=[base.name], roots=roots)
    tell_hidden(directory, log)
    fitting = [stored.card for stored in library.list() if stored.card.base.id == base.id]
    choice = VllmChoice(tuple(urls), tuple(arguments), max((card.rank or 0 for card in fitting), default=0))
    limits = EngineLimits(base.context_length, running=settings.max_batch, waiting=waiting)
    return Backend(open_vllm(base, directory.files, limits, choice, say=log.event), directory)


def _base(spec: str | None) -> "Base":
    """Find the base that is asked for, or the one that every adapter of the library is for.

    Raises:
        InputError: The adapters are for different bases.
    """
    from haori.bases import find_base
    from haori.core.errors import InputError
    from haori.library import Library, base_of

    if spec is not None:
        return _served(find_base(spec))
    cards = {stored.card.base.id: stored.card for stored in Library().list()}
    if len(cards) > 1:
        names = ", ".join(sorted(card.base.name for card in cards.values()))
        raise InputError(f"The library has adapters of several bases: {names}; choose one with --base.")
    return _served(base_of(next(iter(cards.values()))) if cards else find_base(_DEFAULT_BASE))


def _served(base: "Base") -> "Base":
    """Refuse a base of several components: what is served is one model that reads or writes text."""
    from haori.core.records import MODEL_COMPONENT
    from haori.tasks.registry import check_components

    check_components(base, (MODEL_COMPONENT,), "`haori serve`")
    return base


def _folder(root: Path) -> Path:
    from haori.core.errors import InputError

    if not root.is_dir():
        raise InputError(f"There is no folder {str(root)!r} to load adapters from; give one that exists.")
    return root.resolve()


def _greet(base: "Base", host: str, port: int, access: "Access") -> None:
    """Say where the server is and how to call it."""
    from haori.cli.console import results
    from haori.serve import is_encoder

    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key = ' -H "Authorization: Bearer $HAORI_KEY"' if access.needs_key else ""
    route, asked = "chat/completions", '"messages": [{"role": "user", "content": "Hello!"}]'
    if is_encoder(base):
        route, asked = "embeddings", '"input": "Hello!"'
    body = f'{{"model": "{base.name}", {asked}}}'
    console = results()
    console.print(f"[bold]{base.name}[/] and its adapters at {address}/v1; Ctrl-C ends the server.", soft_wrap=True)
    call = f"curl {address}/v1/{route}{key} -H 'Content-Type: application/json' -d '{body}'"
    console.print(call, soft_wrap=True, markup=False)
    console.file.flush()
