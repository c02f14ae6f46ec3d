"""Opens vLLM servers for serving a base: attaches to those that run, or starts one, and puts the engine in front.

That a server serves this very base is checked by content where its files can be seen from here.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import HaoriError, InputError, MismatchError, MissingExtraError, UnavailableError
from haori.core.settings import settings
from haori.serve.engine.scheduler import EngineLimits
from haori.serve.vllm.conversion import VllmCopies, allowed_rank
from haori.serve.vllm.engine import VllmEngine
from haori.serve.vllm.loop import LoopThread
from haori.serve.vllm.process import VllmProcess
from haori.serve.vllm.registry import LoadedAdapters
from haori.serve.vllm.routing import Server
from haori.serve.vllm.servers import VllmServers
from haori.serve.vllm.upstream import ServedModel, Upstream

if TYPE_CHECKING:
    import httpx

    from haori.bases import Base
    from haori.library import AdapterFiles
    from haori.serve.models.base_files import BaseFiles

__all__ = ["VllmChoice", "open_vllm"]

_ADAPTERS_AT_ONCE = 16
_ADAPTERS_LOADED = 64
_LEAST_RANK = 16
_ATTACH_S = 30.0
_START_S = 1800.0  # a large base from a slow disk, with its kernels compiled
_POLL_EVERY_S = 0.25
_SCHEMES = ("http://", "https://")


@dataclass(frozen=True)
class VllmChoice:
    """Which vLLM servers to use.

    Attributes:
        urls: Addresses of servers that run; without any, one is started.
        arguments: Further arguments for the one that is started, as `vllm serve` takes them.
        largest_rank: The largest rank of an adapter so far, which the one that is started has double the room for, so
            that two of them can be blended.
    """

    urls: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    largest_rank: int = 0


def open_vllm(
    base: "Base",
    files_of: "Callable[[str], AdapterFiles]",
    limits: EngineLimits,
    choice: VllmChoice,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> VllmEngine:
    """Attach to vLLM servers, or start one, and return the engine in front of them.

    Args:
        base: The base.
        files_of: Finds an adapter's files by its content id.
        limits: What the engine takes on; its context length is lowered to the servers'.
        choice: Which servers.
        say: Takes sentences for people.

    Raises:
        InputError: An address is none, the base is quantised in a way that is not known here, or arguments are wrong.
        MismatchError: A server serves another base.
        MissingExtraError: httpx, or vLLM where it is to be started, is not installed.
        UnavailableError: A server cannot be reached.
        HaoriError: vLLM ended while it started.
    """
    from haori.bases import load_tokenizer

    _check_choice(choice)
    tensors, stops, vocabulary = _inspect(base, tokenizer := load_tokenizer(base))
    root = settings().cache / "vllm"
    with ExitStack() as stack:
        loop = LoopThread("haori-vllm")
        stack.callback(loop.close)
        process: VllmProcess | None = None
        rank: int | None = None
        if not choice.urls:
            process, rank = _start(base, limits, choice, root, say)
            stack.callback(process.close)
        key = process.key if process else os.environ.get("VLLM_API_KEY")
        client = loop.run(_client(key))
        stack.callback(lambda: loop.run(client.aclose()))
        urls = (process.url,) if process else choice.urls
        servers = [_server(url, client, loop, process) for url in urls]
        for server in servers:
            _check_base(base, server, say)
        copies = VllmCopies(root / base.id, files_of, tensors, rank)
        longest = min(base.context_length, limits.context_length, *(server.model.context_length for server in servers))
        return VllmEngine(
            base, tokenizer, VllmServers(servers, say), loop, copies,
            stop_tokens=stops, limits=replace(limits, context_length=longest), vocabulary=vocabulary,
            ending=stack.pop_all().close,
        )  # fmt: skip


def _check_choice(choice: VllmChoice) -> None:
    try:
        import httpx  # noqa: F401 - only whether it is there
    except ImportError:
        raise MissingExtraError(
            "Serving through vLLM needs httpx; install it with `pip install 'haori[vllm]'`."
        ) from None
    if choice.urls and choice.arguments:
        raise InputError(
            "--vllm-arg is for a vLLM that is started here; give it to the servers of --vllm-url yourself."
        )
    for url in choice.urls:
        if not url.startswith(_SCHEMES):
            raise InputError(f"{url!r} is no address of a vLLM server; give one such as http://127.0.0.1:8001.")
    if len(set(choice.urls)) != len(choice.urls):
        raise InputError("The same --vllm-url was given twice; give each server once.")


def _inspect(base: "Base", tokenizer: Any) -> "tuple[BaseFiles, frozenset[int], int]":
    """Return what is known of a base without its weights: its linear layers, end tokens, and number of token ids.

    Raises:
        BaseError: transformers does not know it, or it generates no text.
    """
    from torch import nn
    from transformers import GenerationConfig

    from haori.bases import end_tokens, load_skeleton, stop_tokens
    from haori.core.errors import BaseError
    from haori.serve.models.base_files import BaseFiles

    model: Any = load_skeleton(base)
    if not model.can_generate():
        raise BaseError(f"The base {base.name!r} is an encoder and generates no text; serve it with --engine native.")
    if (base.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(base.path)
    head = model.get_output_embeddings()
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    stops = frozenset(stop_tokens(end_tokens(model), tokenizer))
    return BaseFiles(base.path, linears), stops, int(head.weight.shape[0])


def _start(
    base: "Base", limits: EngineLimits, choice: VllmChoice, root: Path, say: Callable[[str], None]
) -> tuple[VllmProcess, int]:
    """Start a server; return it with the largest rank that it takes."""
    rank = allowed_rank(max(2 * choice.largest_rank, _LEAST_RANK))
    options = {
        "--served-model-name": base.name,
        "--max-lora-rank": str(rank),
        "--max-loras": str(_ADAPTERS_AT_ONCE),
        "--max-cpu-loras": str(_ADAPTERS_LOADED),
        "--max-num-seqs": str(limits.running),
        "--generation-config": "vllm",  # what is in the base's file is said with every request
        "--enable-prompt-tokens-details": "",
    }
    process = VllmProcess(base, root / f"server-{os.getpid()}.log", options=options, extra=choice.arguments)
    rank = int(_given(choice.arguments, "--max-lora-rank") or rank)
    say(
        f"vLLM is started at {process.url} for adapters up to rank {rank}, {_ADAPTERS_AT_ONCE} at once; it may take "
        f"minutes, and writes to {str(process.log)!r}."
    )
    return process, rank


def _given(arguments: Sequence[str], name: str) -> str | None:
    """Return the value of an argument, given as `--a=1` or `--a 1`."""
    found = None
    for index, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if key.replace("_", "-") == name:
            found = value if equals else next(iter(arguments[index + 1 : index + 2]), None)
    if found is not None and not found.isdigit():
        raise InputError(f"{name} cannot be {found!r}; give a number.")
    return found


async def _client(key: str | None) -> "httpx.AsyncClient":
    """Return a client without limits: how much is under way is decided elsewhere."""
    import httpx

    unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(limits=unlimited, headers=headers, trust_env=False)


def _server(url: str, client: "httpx.AsyncClient", loop: LoopThread, process: VllmProcess | None) -> Server:
    upstream = Upstream(url, client)
    model = _wait_for(upstream, loop, process)
    return Server(upstream, model, LoadedAdapters(upstream, _ADAPTERS_LOADED), process)


def _wait_for(upstream: Upstream, loop: LoopThread, process: VllmProcess | None) -> ServedModel:
    """Wait until a server says what it serves."""
    end = time.monotonic() + (_START_S if process else _ATTACH_S)
    while True:
        try:
            return loop.run(upstream.served())
        except UnavailableError as error:
            if process is not None and not process.running:
                raise process.ended() from None
            if time.monotonic() > end:
                raise UnavailableError(f"{error} Start it, or take its --vllm-url away.") from None
        time.sleep(_POLL_EVERY_S)


def _check_base(base: "Base", server: Server, say: Callable[[str], None]) -> None:
    """Refuse a server of another base, as far as that can be seen from here.

    Raises:
        MismatchError: It serves another one.
    """
    from haori.bases import fingerprint_folder
    from haori.bases.folder import read_model_folder

    if server.process is not None:
        return
    url, root = server.upstream.url, Path(server.model.root)
    if not root.is_absolute() or not root.is_dir():
        say(
            f"What the vLLM server at {url} serves, {server.model.root!r}, cannot be seen from here; that it is the "
            f"base {base.name!r} is taken on trust."
        )
        return
    try:
        found = fingerprint_folder(read_model_folder(root))
    except HaoriError as error:
        raise MismatchError(f"What the vLLM server at {url} serves cannot be checked: {error}") from None
    if base.fingerprint.compare(found) != "same":
        raise MismatchError(
            f"The vLLM server at {url} serves {server.model.root!r}, which is not the base {base.name!r} "
            f"({base.fingerprint.compare(found)}); start it with {str(base.path)!r}."
        )
