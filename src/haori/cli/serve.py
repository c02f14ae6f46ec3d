"""`haori serve`: a base and all its adapters, for OpenAI clients; for pictures, for those of the web UI too."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from haori.cli.serve_jobs import Jobs, TrainShare, open_training_api, running_jobs
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
from haori.cli.serve_pictures import (
    Lenient,
    PictureBatch,
    PictureCount,
    PictureDtype,
    PictureQueued,
    PictureSize,
    PictureSteps,
    check_used,
    picture_settings,
)
from haori.cli.serve_ray import RayAddress, RayChoice, RayReplicas, UseRay, open_on_ray, ray_choice

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.server import Access, AccessLog, Backend, ServerSettings

__all__ = ["serve"]

_DEFAULT_BASE = "smollm2-135m-instruct"
_FORMATS = ("json", "text")
_ENGINES = ("native", "vllm")

Bases = Annotated[
    list[str] | None,
    typer.Option(
        help="Base to serve, by default that of the library's adapters; twice, one for text and one image base."
    ),
]
Roots = Annotated[list[Path] | None, typer.Option(help="Folder that an admin may load adapters from; may be repeated.")]


def serve(
    context: typer.Context,
    base: Bases = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but 127.0.0.1 needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    adapter_root: Roots = None,
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
    picture_size: PictureSize = "2048x2048",
    picture_steps: PictureSteps = 150,
    picture_count: PictureCount = 16,
    picture_queue: PictureQueued = 64,
    picture_batch: PictureBatch = 4,
    picture_dtype: PictureDtype = None,
    lenient: Lenient = False,
    jobs: Jobs = False,
    train_share: TrainShare = 0.5,
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
    limits = picture_settings(picture_size, picture_steps, picture_count, picture_queue, lenient=lenient)
    with http.listen(host, port) as taken:
        found, drawing = _bases(base or [])
        check_used(context, text=drawing is not found, pictures=drawing is not None)
        log = http.AccessLog("json" if log_format == "json" else "text")
        settings = http.ServerSettings(
            max_tokens=max_tokens, max_prompt_tokens=max_prompt_tokens, max_batch=max_batch, drain_s=drain_seconds
        )
        with running_jobs(found, wanted=jobs) as running:
            service = http.Service(found, settings, log, drawing=drawing, picture_settings=limits, jobs=running)
            open_training_api(service, train_share, on_engine=engine == "native" and on_ray is None)
            server = http.RunningServer(http.create_app(service, access), service)
            _greet(found, drawing, host, taken.getsockname()[1], access)
            vllm = None if engine == "native" else (vllm_url or [], vllm_arg or [])
            make = partial(_open, found, settings, native, log, vllm, on_ray) if service.has_text else None
            draw = None if drawing is None else partial(http.open_pictures, service, picture_batch, picture_dtype)
            service.load(make, server.stop, draw)
            server.serve_on(taken)


def _check(log_format: str, engine: str, speaks_of_vllm: bool) -> None:
    from haori.core.errors import InputError

    if log_format not in _FORMATS:
        raise InputError(f"There is no log format {log_format!r}; allowed are {' and '.join(_FORMATS)}.")
    if engine not in _ENGINES:
        raise InputError(f"There is no engine {engine!r}; allowed are {' and '.join(_ENGINES)}.")
    if engine == "native" and speaks_of_vllm:
        raise InputError("--vllm-url and --vllm-arg are for --engine vllm; add that.")


def _open(
    base: "Base", settings: "ServerSettings", native: NativeChoice, log: "AccessLog",
    vllm: tuple[list[str], list[str]] | None, on_ray: RayChoice | None,
) -> "Backend":  # fmt: skip
    """Load what answers with text; runs beside the server."""
    if vllm is not None:
        return _open_vllm(base, native, settings, *vllm, log)
    if on_ray is not None:
        return open_on_ray(base, settings, native, log, on_ray)
    return open_native(base, settings, native, log)


def _open_vllm(
    base: "Base", native: NativeChoice, settings: "ServerSettings", urls: list[str], arguments: list[str],
    log: "AccessLog",
) -> "Backend":  # fmt: skip
    """Attach to vLLM servers, or start one; runs beside the server too."""
    from haori.library import Library
    from haori.serve import AdapterDirectory, EngineLimits
    from haori.serve.vllm import VllmChoice, open_vllm
    from haori.server import Backend

    library = Library()
    directory = AdapterDirectory(library, base.reference(), base_names=[base.name], roots=native.roots)
    tell_hidden(directory, log)
    fitting = [stored.card for stored in library.list() if stored.card.base.id == base.id]
    choice = VllmChoice(tuple(urls), tuple(arguments), max((card.rank or 0 for card in fitting), default=0))
    limits = EngineLimits(base.context_length, running=settings.max_batch, waiting=native.waiting)
    return Backend(open_vllm(base, directory.files, limits, choice, say=log.event), directory)


def _bases(specs: list[str]) -> "tuple[Base, Base | None]":
    """Find the bases that are asked for, or the one that every adapter of the library is for.

    Returns:
        The base that names the server, and the one that draws; with an image base alone, it is both.

    Raises:
        InputError: Two are for the same, or the adapters are for different bases.
    """
    from haori.bases import find_base
    from haori.core.errors import InputError

    found = [find_base(spec) for spec in specs] or [_default()]
    images = [base for base in found if base.pipeline is not None]
    texts = [_served(base) for base in found if base.pipeline is None]
    if len(images) > 1 or len(texts) > 1:
        kind, names = ("image", images) if len(images) > 1 else ("text", texts)
        raise InputError(
            f"{' and '.join(repr(base.name) for base in names)} are {kind} bases; one process serves one for text and "
            "one image base at most. Start a second on another --port."
        )
    drawing = images[0] if images else None
    if drawing is not None and texts and texts[0].name == drawing.name:
        raise InputError(f"Both bases are called {drawing.name!r}, so a request could not say which it means.")
    return (texts or images)[0], drawing


def _default() -> "Base":
    from haori.bases import find_base
    from haori.core.errors import InputError
    from haori.library import Library, base_of

    cards = {stored.card.base.id: stored.card for stored in Library().list()}
    if len(cards) > 1:
        names = ", ".join(sorted(card.base.name for card in cards.values()))
        raise InputError(f"The library has adapters of several bases: {names}; choose one with --base.")
    return base_of(next(iter(cards.values()))) if cards else find_base(_DEFAULT_BASE)


def _served(base: "Base") -> "Base":
    """Refuse a base of several components that is no pipeline."""
    from haori.core.records import MODEL_COMPONENT
    from haori.tasks.registry import check_components

    check_components(base, (MODEL_COMPONENT,), "`haori serve`")
    return base


def _folder(root: Path) -> Path:
    from haori.core.errors import InputError

    if not root.is_dir():
        raise InputError(f"There is no folder {str(root)!r} to load adapters from; give one that exists.")
    return root.resolve()


def _greet(base: "Base", drawing: "Base | None", host: str, port: int, access: "Access") -> None:
    """Say where the server is and how to call it."""
    from haori.cli.console import results
    from haori.serve import is_encoder

    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key = ' -H "Authorization: Bearer $HAORI_KEY"' if access.needs_key else ""
    route, asked = "chat/completions", '"messages": [{"role": "user", "content": "Hello!"}]'
    if drawing is base:
        route, asked = "images/generations", '"prompt": "a smiling cat"'
    elif is_encoder(base):
        route, asked = "embeddings", '"input": "Hello!"'
    body = f'{{"model": "{base.name}", {asked}}}'
    console = results()
    also = "" if drawing is None or drawing is base else f", [bold]{drawing.name}[/]"
    where = f"{address}/v1" + ("" if drawing is None else f" and {address}/sdapi/v1")
    whose = "and its adapters" if not also else "and their adapters"
    console.print(f"[bold]{base.name}[/]{also} {whose} at {where}; Ctrl-C ends the server.", soft_wrap=True)
    call = f"curl {address}/v1/{route}{key} -H 'Content-Type: application/json' -d '{body}'"
    console.print(call, soft_wrap=True, markup=False)
    console.file.flush()
