"""The peer of sl_loop.py: the same few routes over stock PEFT, which computes each row alone, with torch's AdamW.

    python stock_server.py BASE DTYPE    prints its address; DTYPE is float32 or bfloat16, of the frozen base

Answers are computed when they are asked for, so a promise is kept by the time it is given.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any, ClassVar

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from haori.bases import find_base
from haori.jobs.tenants.records import LossOutput
from haori.server.tinker.encoding import write_loss_output
from haori.server.tinker.schema import message

_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Stock:
    """One adapter over one base."""

    def __init__(self, base: str, dtype: str) -> None:
        self.folder = find_base(base).path
        self.base = AutoModelForCausalLM.from_pretrained(self.folder, dtype=getattr(torch, dtype))
        self.model: Any = None
        self.optimizer: Any = None

    def create(self, rank: int) -> None:
        """Begin an adapter; of an earlier one nothing is left."""
        if self.model is not None:
            self.base = self.model.unload()
        config = LoraConfig(r=rank, lora_alpha=32, target_modules=_TARGETS, task_type="CAUSAL_LM")
        self.model = get_peft_model(self.base, config, autocast_adapter_dtype=True)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], weight_decay=0.0)

    def forward_backward(self, body: bytes) -> bytes:
        """Add the gradients of the summed cross-entropy, row by row."""
        sent = message("ForwardBackwardRequest")
        sent.ParseFromString(body)
        rows, total = [], 0.0
        for datum in sent.data:
            ids = np.concatenate([np.frombuffer(c.encoded_text.tokens, "<i4") for c in datum.model_input])
            given = datum.loss_fn_inputs
            targets = torch.from_numpy(np.frombuffer(given["target_tokens"].dense, "<i8").copy())
            weights = torch.from_numpy(np.frombuffer(given["weights"].dense, "<f4").copy())
            logits = self.model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0]
            logp = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
            loss = -(logp * weights).sum()
            loss.backward()
            total += float(loss.detach())
            rows.append(logp.detach().numpy())
        return write_loss_output(LossOutput(rows, {"loss:sum": total}))

    def step(self, params: dict[str, Any]) -> None:
        """Apply the gradients."""
        for group in self.optimizer.param_groups:
            group.update(lr=params["learning_rate"], betas=(params["beta1"], params["beta2"]), eps=params["eps"])
        self.optimizer.step()
        self.optimizer.zero_grad()


class _Routes(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stock: ClassVar[Stock]
    lock: ClassVar[Lock] = Lock()
    promised: ClassVar[dict[str, tuple[str, bytes]]] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        name = self.path.partition("/api/v1/")[2]
        if name == "retrieve_future":
            kind, answer = self.promised.pop(json.loads(body)["request_id"])
            self._reply(answer, kind)
            return
        with self.lock:
            self._answer(name, body)

    def _answer(self, name: str, body: bytes) -> None:
        given = {} if name == "forward_backward" else json.loads(body or b"{}")
        model = "s:train:0"
        if name == "client/config":
            self._json({"pjwt_auth_enabled": False, "parallel_fwdbwd_chunks": False})
        elif name == "client/dynamic_config":
            self._json({"refresh_interval_sec": 300})
        elif name == "create_session":
            self._json({"type": "create_session", "session_id": "s"})
        elif name == "session_heartbeat":
            self._json({"type": "session_heartbeat"})
        elif name == "telemetry":
            self._json({"status": "accepted"})
        elif name == "create_model":
            self.stock.create(given["lora_config"]["rank"])
            model = f"{given['session_id']}:train:{given['model_seq_id']}"
            self._promise({"type": "create_model", "model_id": model})
        elif name == "get_info":
            data = {"arch": "llama", "model_name": "stock", "tokenizer_id": str(self.stock.folder)}
            self._json({"type": "get_info", "model_id": given["model_id"], "is_lora": True, "model_data": data})
        elif name == "forward_backward":
            self._promise(self.stock.forward_backward(body))
        elif name == "optim_step":
            self.stock.step(given["adam_params"])
            self._promise({"metrics": {}})
        elif name in ("save_weights", "save_weights_for_sampler"):  # the loop's last act; nothing is timed there
            self._promise({"type": name, "path": f"tinker://{given['model_id']}/weights/{given['path']}"})
        else:
            self._reply(b'{"detail": "not here"}', "application/json", 404)

    def _promise(self, answer: "dict[str, Any] | bytes") -> None:
        identity = f"r{len(self.promised)}-{id(answer)}"
        if isinstance(answer, bytes):
            self.promised[identity] = ("application/x-protobuf", answer)
        else:
            self.promised[identity] = ("application/json", json.dumps(answer).encode())
        self._json({"request_id": identity})

    def _json(self, answer: dict[str, Any]) -> None:
        self._reply(json.dumps(answer).encode(), "application/json")

    def _reply(self, body: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Write nothing."""


if __name__ == "__main__":
    _Routes.stock = Stock(*sys.argv[1:3])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Routes)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
