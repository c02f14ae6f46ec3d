"""What a version of the tinker SDK sends: recorded once into tests/fixtures/tinker, and sent again in tests.

    pip install --no-deps --target FOLDER "tinker==0.30.4"
    python -m tests.tinker_recording FOLDER tests/fixtures/tinker/0.30.4.json

The first call puts the version beside the other packages of tests/tinker-requirements.txt; the second runs `SCRIPT` by
it against a server here. Every id that a server makes holds the session's, which is replaced when it is sent again.
"""

import base64
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tests.tinker_server import training_server

SCRIPT = """
import sys
import tinker, torch
from tinker import types

service = tinker.ServiceClient(base_url=sys.argv[1])
service.get_server_capabilities()
trainer = service.create_lora_training_client(base_model="tiny", rank=4, seed=3)
trainer = trainer.result() if hasattr(trainer, "result") else trainer
ids, tensor = types.ModelInput.from_ints, types.TensorData.from_torch
data = [types.Datum(model_input=ids([5, 6, 7, 8, 9]), loss_fn_inputs={
    "target_tokens": tensor(torch.tensor([6, 7, 8, 9, 10])), "weights": tensor(torch.ones(5))})] * 2
for step in range(2):
    done = trainer.forward_backward(data, "cross_entropy")
    trainer.optim_step(types.AdamParams(learning_rate=5e-3)).result()
    done.result()
trainer.forward(data, "cross_entropy").result()
path = trainer.save_state("one").result().path
sampler = trainer.save_weights_and_get_sampling_client("final")
sampled = sampler.sample(ids([5, 6]), 2, types.SamplingParams(max_tokens=3, seed=1)).result()
assert len(sampled.sequences) == 2
print("done", path)
"""
SESSION = re.compile(rb'"session_id": ?"([^"]+)"')


class Recorder:
    """An ASGI app around another that keeps what was sent and what came back."""

    def __init__(self, app):
        self.app, self.kept, self.lock = app, [], threading.Lock()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, answer, seen = [], [], {}

        async def heard():
            message = await receive()
            body.append(message.get("body", b""))
            return message

        async def said(message):
            if message["type"] == "http.response.start":
                seen.update(status=message["status"], headers=dict(message["headers"]))
            else:
                answer.append(message.get("body", b""))
            await send(message)

        headers = dict(scope["headers"])
        await self.app(scope, heard, said)
        with self.lock:
            self.kept.append({
                "method": scope["method"], "path": scope["path"], "type": headers.get(b"content-type", b"").decode(),
                "body": b"".join(body), "status": seen["status"],
                "answer_type": seen["headers"].get(b"content-type", b"").decode(), "answer": b"".join(answer),
            })  # fmt: skip


def record(packages, base):
    """Run the script by a version's packages; return what was sent, without what is sent by the clock."""
    import haori.server.launch as launch

    real, recorders = launch.RunningServer.__init__, []

    def wrapped(self, app, service):
        recorders.append(Recorder(app))
        real(self, recorders[0], service)

    launch.RunningServer.__init__ = wrapped
    try:
        with training_server(base) as (url, _):
            script = Path(base).with_name("script.py")
            script.write_text(SCRIPT)
            environment = {
                **os.environ, "PYTHONPATH": os.pathsep.join(packages), "TINKER_TELEMETRY": "0",
                "TINKER_API_KEY": "tml-local", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
            }  # fmt: skip
            subprocess.run([sys.executable, str(script), url], env=environment, check=True, timeout=120)
    finally:
        launch.RunningServer.__init__ = real
    kept = [one for one in recorders[0].kept if not one["path"].endswith(("telemetry", "session_heartbeat"))]
    session = next(SESSION.search(one["answer"])[1] for one in kept if one["path"].endswith("create_session"))
    return {
        "session": session.decode(),
        "requests": [
            {**{name: one[name] for name in ("method", "path", "type", "status", "answer_type")},
             "body": base64.b64encode(one["body"]).decode(),
             "keys": sorted(json.loads(one["answer"])) if "json" in one["answer_type"] else None}
            for one in kept if not _waits(one)
        ],
    }  # fmt: skip


def _waits(one):
    return "json" in one["answer_type"] and json.loads(one["answer"]).get("type") == "try_again"


def main():
    from tests.conftest import build_tiny_base

    packages, place = sys.argv[1].split(os.pathsep), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HAORI_HOME"] = f"{folder}/home"
        held = record(packages, build_tiny_base(Path(folder) / "tiny"))
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
