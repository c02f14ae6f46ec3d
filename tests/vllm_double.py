"""A small server that speaks as vLLM 0.32 does: routes, status codes, sentences, error shapes and chunks.

What it says comes from a real tiny model with stock PEFT, so an answer through it is right only if the adapter that it
was given is. Sentences and shapes are those of vllm/entrypoints/openai/{models,completion} and serve/lora.
"""

import asyncio
import json
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from peft import PeftModel
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from transformers import AutoModelForCausalLM, AutoTokenizer

from haori.server import listen


class Load(BaseModel):
    lora_name: str
    lora_path: str
    load_inplace: bool = False


class Unload(BaseModel):
    lora_name: str
    lora_int_id: int | None = None


class Double:
    """One server; it keeps its address through `stop` and `start`, and then has forgotten its adapters, as vLLM has.

    Attributes:
        seen: Bodies of the requests for completions.
        loads: Names in the order of loading.
        left: Ids of answers whose client went away.
        failing: What the next answers fail with, in the middle of the stream.
        step_s: Time for a token.
    """

    def __init__(self, folder: Path, *, rank: int = 16, name: str | None = None, key: str | None = None) -> None:
        self.folder, self.rank, self.key = folder, rank, key
        self.name = name or str(folder)
        self.step_s = 0.0
        self.lora = True
        self.root = str(folder)
        self.max_model_len = 256
        self.seen: list[dict[str, Any]] = []
        self.loads: list[str] = []
        self.left: list[str] = []
        self.failing: list[str] = []
        self.adapters: dict[str, Any] = {}
        self.paths: dict[str, str] = {}
        self._lock = threading.Lock()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._base = AutoModelForCausalLM.from_pretrained(folder).eval()
        self._server: uvicorn.Server | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        taken = listen("127.0.0.1", self.port)
        self.port = taken.getsockname()[1]
        self.adapters.clear()
        self.paths.clear()
        config = uvicorn.Config(
            self._app(), log_config=None, log_level="error", timeout_graceful_shutdown=0, lifespan="off"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([taken],), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    def stop(self) -> None:
        """End at once, in the middle of whatever goes on."""
        if self._server is not None:
            self._server.should_exit = self._server.force_exit = True
            for connection in list(self._server.server_state.connections):
                self._server.servers[0].get_loop().call_soon_threadsafe(connection.transport.abort)
            self._thread.join(10)
            self._server = None

    def _app(self) -> FastAPI:
        app = FastAPI()
        app.add_exception_handler(HTTPException, _plain_error)
        app.add_exception_handler(RequestValidationError, _invalid)

        @app.middleware("http")
        async def authenticate(request: Request, go_on: Any) -> Response:
            given = request.headers.get("authorization")
            if self.key and request.url.path.startswith("/v1") and given != f"Bearer {self.key}":
                return JSONResponse({"error": "Unauthorized"}, status_code=401)
            return await go_on(request)

        @app.get("/health")
        async def health() -> Response:
            return Response(status_code=200)

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            cards = [_card(self.name, root=self.root, parent=None, max_model_len=self.max_model_len)]
            cards += [_card(n, root=p, parent=self.name, max_model_len=None) for n, p in self.paths.items()]
            return {"object": "list", "data": cards}

        if self.lora:
            app.post("/v1/load_lora_adapter")(self.load)
            app.post("/v1/unload_lora_adapter")(self.unload)
        app.post("/v1/completions")(self.complete)
        return app

    async def load(self, body: Load) -> Response:
        name = body.lora_name
        if name == self.name:
            return _error(400, f"The lora adapter '{name}' conflicts with a served base model.", "InvalidUserInput")
        if name in self.adapters and not body.load_inplace:
            return _error(
                400, f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
                "set 'load_inplace' to True.", "InvalidUserInput",
            )  # fmt: skip
        folder = Path(body.lora_path)
        if not (folder / "adapter_config.json").is_file():
            return _error(404, f"Loading lora {name} failed: No adapter found for {folder}", "NotFoundError")
        config = json.loads((folder / "adapter_config.json").read_text())
        refused = []
        if config.get("use_dora"):
            refused.append("vLLM does not yet support DoRA.")
        if config.get("modules_to_save"):
            refused.append("vLLM only supports modules_to_save being either None")
        if config["r"] > self.rank:
            refused.append(f"LoRA rank {config['r']} is greater than max_lora_rank {self.rank}.")
        if refused:
            return _error(500, f"Call to add_lora method failed: {' '.join(refused)}", "InternalServerError")
        with self._lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = AutoModelForCausalLM.from_pretrained(self.folder)
            self.adapters[name] = PeftModel.from_pretrained(base, folder).eval()
        self.paths[name] = body.lora_path
        self.loads.append(name)
        return Response(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, body: Unload) -> Response:
        if body.lora_name not in self.adapters:
            return _error(404, f"The lora adapter '{body.lora_name}' cannot be found.", "NotFoundError")
        del self.adapters[body.lora_name], self.paths[body.lora_name]
        return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        model = body["model"]
        if model != self.name and model not in self.adapters:
            sentence = f"The model `{model}` does not exist. Valid aliases: {self.name}."
            return _error(404, sentence, "NotFoundError", "model")
        assert body["stream"] and body["return_token_ids"]
        self.seen.append(body)
        return StreamingResponse(
            self._stream(body, self.adapters.get(model, self._base)), media_type="text/event-stream"
        )

    async def _stream(self, body: dict[str, Any], model: Any) -> Any:
        head = {"id": f"cmpl-{len(self.seen)}", "object": "text_completion", "created": 1, "model": body["model"]}
        tokens = list(body["prompt"])
        draw = torch.Generator().manual_seed(body.get("seed", 0))
        ends = {*body["stop_token_ids"], *(() if body["ignore_eos"] else (self._tokenizer.eos_token_id,))}
        finish, text = None, ""
        done = False
        try:
            yield ": keep-alive\n\n"
            if any(not 0 <= int(token) < self._base.config.vocab_size for token in body.get("logit_bias", {})):
                sentence = f"token_id(s) {list(body['logit_bias'])} in logit_bias contain out-of-vocab token ids."
                yield _event(_body(400, sentence, "BadRequestError", "logit_bias"))  # late, as vLLM says it
                yield "data: [DONE]\n\n"
                return
            while finish is None:
                await asyncio.sleep(self.step_s)
                if self.failing and len(tokens) > len(body["prompt"]):
                    sentence = self.failing.pop()
                    yield _event(_body(500, sentence, "InternalServerError"))
                    break
                token, logprobs = self._next(model, tokens, body, draw)
                tokens.append(token)
                count = len(tokens) - len(body["prompt"])
                text += self._tokenizer.decode([token], skip_special_tokens=True)
                if (token in ends and count > body["min_tokens"]) or any(stop in text for stop in body["stop"]):
                    finish = "stop"
                elif count >= body["max_tokens"]:
                    finish = "length"
                choice = {
                    "index": 0, "text": self._tokenizer.decode([token], skip_special_tokens=True), "logprobs": logprobs,
                    "finish_reason": finish, "stop_reason": None, "token_ids": [token],
                    "prompt_token_ids": body["prompt"] if count == 1 else None,
                }  # fmt: skip
                yield _event({**head, "choices": [choice]})
            if finish and body["stream_options"]["include_usage"]:
                usage = {
                    "prompt_tokens": len(body["prompt"]), "total_tokens": len(tokens),
                    "completion_tokens": len(tokens) - len(body["prompt"]),
                    "prompt_tokens_details": {"cached_tokens": 3},
                }  # fmt: skip
                yield _event({**head, "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
            done = True
        finally:
            if not done:
                self.left.append(head["id"])

    def _next(self, model: Any, tokens: list[int], body: dict[str, Any], draw: torch.Generator) -> Any:
        with self._lock, torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1].float()
        table = logits.log_softmax(-1)  # before temperature, as vLLM's raw_logprobs
        for token, bias in body.get("logit_bias", {}).items():
            logits[int(token)] += bias
        if body["temperature"] == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / body["temperature"]).softmax(-1), 1, generator=draw))
        if (wanted := body.get("logprobs")) is None:
            return token, None
        assert body["return_tokens_as_token_ids"]
        named = dict.fromkeys([token, *table.topk(wanted).indices.tolist()]) if wanted else {token: None}
        tops = {f"token_id:{other}": float(table[other]) for other in named}
        return token, {
            "text_offset": [0], "token_logprobs": [float(table[token])], "tokens": [f"token_id:{token}"],
            "top_logprobs": [tops],
        }  # fmt: skip


@contextmanager
def double(folder: Path, **options: Any) -> Any:
    running = Double(folder, **options)
    try:
        yield running
    finally:
        running.stop()


def _card(name: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 1, "owned_by": "vllm", "permission": [], **fields}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _body(status: int, message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def _error(status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> JSONResponse:
    return JSONResponse(_body(status, message, kind, param), status_code=status)


async def _plain_error(request: Request, error: Any) -> JSONResponse:
    return _error(error.status_code, str(error.detail), str(error.detail))


async def _invalid(request: Request, error: Any) -> JSONResponse:
    return _error(400, f"{len(error.errors())} validation error(s)", "Bad Request")
