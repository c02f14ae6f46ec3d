"""One vLLM server: its address, what it serves, and the four things that are asked of it.

Knows HTTP and vLLM's API; knows nothing about adapters' files, queues or other servers.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import HaoriError, InputError, UnavailableError
from haori.serve.vllm.wire import VllmChunk, read_chunk

if TYPE_CHECKING:
    import httpx

__all__ = ["ModelGoneError", "ServedModel", "Upstream"]

_CONNECT_S = 5.0
_LOAD_S = 120.0
_PROBE_S = 5.0
_MOST_WORDS = 600


class ModelGoneError(HaoriError):
    """The server does not know an adapter (any more): it was started anew."""


@dataclass(frozen=True)
class ServedModel:
    """The base that a vLLM server serves.

    Attributes:
        name: What it is asked for by.
        root: Where its files are, in the server's own words.
        context_length: Most tokens of prompt and answer together.
    """

    name: str
    root: str
    context_length: int


class Upstream:
    """A vLLM server at `url`. Every method runs on the loop that the client belongs to.

    Args:
        url: Its address, without `/v1`.
        client: Sends requests; without limits of its own.
    """

    def __init__(self, url: str, client: "httpx.AsyncClient") -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._client = client

    async def served(self) -> ServedModel:
        """Ask what it serves.

        Raises:
            UnavailableError: It cannot be reached.
            InputError: It serves no base, or more than one.
        """
        found = await self._json("GET", "/v1/models")
        try:
            bases = [entry for entry in found["data"] if entry.get("parent") is None]
            models = [ServedModel(str(e["id"]), str(e["root"]), int(e["max_model_len"])) for e in bases]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(f"The server at {self.url} does not answer like vLLM; give the address of one.") from None
        if len({model.root for model in models}) != 1:
            names = ", ".join(model.name for model in models) or "none"
            raise InputError(f"The vLLM server at {self.url} must serve exactly one base; it serves {names}.")
        return models[0]

    async def healthy(self) -> bool:
        """Say whether it answers and its engine lives."""
        import httpx

        with suppress(httpx.HTTPError):
            return (await self._client.get(f"{self.url}/health", timeout=_PROBE_S)).status_code == 200
        return False

    async def load(self, name: str, folder: Path) -> None:
        """Have it load the adapter in a folder under a name; one that is loaded under the name already stays.

        Raises:
            UnavailableError: It cannot be reached.
            InputError: It does not take the adapter.
            HaoriError: It does not load adapters at all, or does not see the folder.
        """
        status, words = await self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        if status == 200 or (status == 400 and "already been loaded" in words):
            return
        if status == 404 and words == "Not Found":
            raise HaoriError(
                f"The vLLM server at {self.url} does not load adapters; start it with --enable-lora and the "
                "environment variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=True."
            )
        if status == 404 or "No adapter found" in words:
            raise HaoriError(
                f"The vLLM server at {self.url} does not see the folder {str(folder)!r}; let it share HAORI_HOME with "
                "this server, under the same path."
            )
        if "max_lora_rank" in words:
            raise InputError(
                f"vLLM refuses the adapter: {words} Start it with a higher rank (--vllm-arg=--max-lora-rank=64, where "
                "haori starts it), or merge the adapter with `haori merge` and serve the merged model."
            )
        kind = InputError if status in (400, 500) else HaoriError
        raise kind(f"The vLLM server at {self.url} refuses the adapter ({status}): {words}")

    async def unload(self, name: str) -> None:
        """Have it forget an adapter; one that it does not know is no error.

        Raises:
            UnavailableError: It cannot be reached.
        """
        await self._post("/v1/unload_lora_adapter", {"lora_name": name})

    @asynccontextmanager
    async def completion(self, body: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[VllmChunk]]:
        """Begin an answer and yield its chunks; leaving the context closes the connection, which ends it in vLLM.

        Raises:
            ModelGoneError: The server does not know the adapter.
            InputError: It does not take the request.
            UnavailableError: It cannot be reached, or ended.
            HaoriError: It failed.
        """
        import httpx

        patience = httpx.Timeout(None, connect=_CONNECT_S)  # a first token may take as long as the queue is
        with _explained(self.url):
            async with self._client.stream("POST", f"{self.url}/v1/completions", json=body, timeout=patience) as reply:
                if reply.status_code != 200:
                    await reply.aread()
                    raise self._refusal(reply.status_code, _words(reply))
                async with aclosing(self._chunks(reply, body.get("logprobs"))) as chunks:
                    yield chunks

    async def _chunks(self, reply: "httpx.Response", tops: int | None) -> AsyncGenerator[VllmChunk, None]:
        async for line in reply.aiter_lines():
            if not line.startswith("data:"):
                continue  # empty lines between events, and comments that keep the connection alive
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            try:
                chunk = read_chunk(json.loads(data), tops=tops)
            except json.JSONDecodeError:
                raise UnavailableError(f"The vLLM server at {self.url} broke off in the middle; ask again.") from None
            if chunk.error is not None:
                raise self._refusal(chunk.error_status, chunk.error[:_MOST_WORDS])
            yield chunk

    def _refusal(self, status: int, words: str) -> HaoriError:
        if status == 404:
            return ModelGoneError(f"The vLLM server at {self.url} does not know the model: {words}")
        if status in (400, 413, 422):
            return InputError(f"vLLM refuses the request: {words}")
        if status in (401, 403):
            return HaoriError(
                f"The vLLM server at {self.url} asks for a key; give the one it was started with in VLLM_API_KEY."
            )
        if status in (429, 502, 503, 504):
            return UnavailableError(f"The vLLM server at {self.url} takes no requests now ({status}); ask again.")
        return HaoriError(f"The vLLM server at {self.url} failed ({status}): {words}")

    async def _json(self, method: str, path: str) -> Any:
        with _explained(self.url):
            reply = await self._client.request(method, f"{self.url}{path}", timeout=_PROBE_S)
        if reply.status_code != 200:
            raise self._refusal(reply.status_code, _words(reply))
        try:
            return reply.json()
        except ValueError:
            raise InputError(f"The server at {self.url} does not answer like vLLM; give the address of one.") from None

    async def _post(self, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
        with _explained(self.url):
            reply = await self._client.post(f"{self.url}{path}", json=body, timeout=_LOAD_S)
        if reply.status_code in (401, 403):
            raise self._refusal(reply.status_code, "")
        return reply.status_code, _words(reply)


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what httpx raises into an `UnavailableError`."""
    import httpx

    try:
        yield
    except (httpx.HTTPError, httpx.StreamError) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise UnavailableError(f"The vLLM server at {url} cannot be reached: {reason}.") from error


def _words(reply: "httpx.Response") -> str:
    """Return what a reply says went wrong: vLLM's sentence, or FastAPI's."""
    try:
        body = reply.json()
        error = body.get("error", body.get("detail", ""))
        words = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, AttributeError):
        words = reply.text
    return " ".join(words.split())[:_MOST_WORDS]
