"""Jobs submitted to a server that trains and answers at the same time, and what training costs those who wait.

    submit_p95_ms        of POST /v1/fine_tuning/jobs, while a worker trains and two clients chat
    serving_p95_ratio    95th percentile of answers while a training session trains, over the same without it

A real `haori serve --jobs` in a process of its own, with its worker beside it; clients over HTTP.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

__all__ = ["server", "submit"]

_CLIENTS = 2
_ANSWER_TOKENS = 16
_STEPS = 5  # of training, at least, while answers are timed
_ROWS, _ROW_TOKENS = 4, 128
_SHARE = "0.5"


def submit(home: Path, base: str, *, jobs: int, answers: int) -> dict[str, Any]:
    """Measure.

    Args:
        home: A new folder.
        base: A base's name.
        jobs: Submitted jobs.
        answers: Answers that are timed with and without training.
    """
    with server(home, base) as url, httpx.Client(base_url=url, timeout=300) as client:
        _answers(url, base, _CLIENTS)
        alone = _answers(url, base, answers)
        with _training_session(client, base) as steps:
            before, beside = steps(), []
            while len(beside) < answers or steps() - before < _STEPS:
                beside += _answers(url, base, 2 * _CLIENTS)
            meanwhile = steps() - before
        ask = {"model": base, "training_file": _upload(client), "hyperparameters": {"n_epochs": 50}}
        first = _submitted(client, ask)
        _until(lambda: _status(client, first) == "running", 300, "the first job runs")
        with _chatting(url, base):
            times = _submissions(client, ask, jobs)
        state = _status(client, first)
        for job in client.get("/v1/fine_tuning/jobs", params={"limit": 100}).json()["data"]:
            client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    if state != "running":
        raise SystemExit(f"No job ran while jobs were submitted: the first one was {state}.")
    return {
        "base": base, "jobs": jobs, "submit_ms": {"median": _at(times, 0.5), "p95": _at(times, 0.95)},
        "submit_p95_ms": _at(times, 0.95), "train_share": float(_SHARE), "steps_meanwhile": meanwhile,
        "answer_s": {name: {"median": _at(found, 0.5), "p95": _at(found, 0.95)}
                     for name, found in (("alone", alone), ("beside_training", beside))},
        "serving_p95_ratio": round(_at(beside, 0.95) / _at(alone, 0.95), 2),
    }  # fmt: skip


def _answers(url: str, base: str, count: int) -> list[float]:
    """Return the seconds that each of some answers took, asked for by a few clients at once."""

    def ask(number: int) -> float:
        body = {"model": base, "messages": [{"role": "user", "content": f"What is {number} plus {number}?"}],
                "max_tokens": _ANSWER_TOKENS, "temperature": 0}  # fmt: skip
        started = time.perf_counter()
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).raise_for_status()
        return time.perf_counter() - started

    with ThreadPoolExecutor(_CLIENTS) as clients:
        return list(clients.map(ask, range(count)))


@contextmanager
def _chatting(url: str, base: str) -> Iterator[None]:
    """Let clients chat without a pause."""
    done = threading.Event()

    def chat() -> None:
        while not done.is_set():
            _answers(url, base, _CLIENTS)

    thread = threading.Thread(target=chat, daemon=True)
    thread.start()
    yield
    done.set()
    thread.join(120)


def _submissions(client: httpx.Client, ask: dict[str, Any], count: int) -> list[float]:
    times = []
    for _ in range(count):
        started = time.perf_counter()
        _submitted(client, ask)
        times.append((time.perf_counter() - started) * 1000)
    return times


def _submitted(client: httpx.Client, ask: dict[str, Any]) -> str:
    return str(client.post("/v1/fine_tuning/jobs", json=ask).raise_for_status().json()["id"])


def _status(client: httpx.Client, job: str) -> str:
    return str(client.get(f"/v1/fine_tuning/jobs/{job}").raise_for_status().json()["status"])


def _upload(client: httpx.Client) -> str:
    turns = [(f"Say the number {number}.", f"The number is {number}.") for number in range(200)]
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in turns
    ]
    content = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    sent = {"file": ("numbers.jsonl", content)}
    return str(
        client.post("/v1/files", files=sent, data={"purpose": "fine-tune"}).raise_for_status().json()["id"]
    )  # fmt: skip


@contextmanager
def _training_session(client: httpx.Client, base: str) -> Iterator[Callable[[], int]]:
    """Train a session over the training API without a pause; yields what counts its steps."""
    asked = {"type": "create_session", "tags": [], "sdk_version": "0.38.0"}
    session = client.post("/api/v1/create_session", json=asked).raise_for_status().json()["session_id"]
    made = {"session_id": session, "model_seq_id": 1, "base_model": base, "lora_config": {"rank": 16}}
    made["lora_config"]["train_unembed"] = False
    model = _result(client, client.post("/api/v1/create_model", json={**made, "type": "create_model"}))["model_id"]
    done, steps = threading.Event(), [0]

    def train() -> None:
        number = 1
        while not done.is_set():
            body = _forward_backward(model, number)
            headers = {"content-type": "application/x-protobuf"}
            _wait(client, client.post("/api/v1/forward_backward", content=body, headers=headers))
            step = {"model_id": model, "seq_id": number + 1, "adam_params": {"learning_rate": 1e-4}}
            _result(client, client.post("/api/v1/optim_step", json={**step, "type": "optim_step"}))
            number += 2
            steps[0] += 1

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    _until(lambda: steps[0] > 1, 300, "the session trains")
    yield lambda: steps[0]
    done.set()
    thread.join(120)


def _forward_backward(model: str, seq_id: int) -> bytes:
    from haori.server.tinker.schema import message

    sent = message("ForwardBackwardRequest")
    sent.model_id, sent.seq_id, sent.loss_fn = model, seq_id, "cross_entropy"
    numbers = np.random.default_rng(seq_id).integers(100, 40_000, (_ROWS, _ROW_TOKENS + 1))
    for row in numbers:
        datum = sent.data.add()
        datum.model_input.add().encoded_text.tokens = row[:-1].astype(np.int32).tobytes()
        given = (("target_tokens", row[1:].astype(np.int64), 2), ("weights", np.ones(_ROW_TOKENS, np.float32), 1))
        for name, values, dtype in given:
            tensor = datum.loss_fn_inputs[name]
            tensor.dense, tensor.dtype = values.tobytes(), dtype
            tensor.shape.append(_ROW_TOKENS)
    return bytes(sent.SerializeToString())


def _wait(client: httpx.Client, promised: httpx.Response) -> httpx.Response:
    asked = {"request_id": promised.raise_for_status().json()["request_id"]}
    while True:
        reply = client.post("/api/v1/retrieve_future", json=asked).raise_for_status()
        if "json" not in reply.headers["content-type"] or reply.json().get("type") != "try_again":
            return reply


def _result(client: httpx.Client, promised: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = _wait(client, promised).json()
    if "error" in found:
        raise SystemExit(f"The training session failed: {found['error']}")
    return found


@contextmanager
def server(home: Path, base: str) -> Iterator[str]:
    """Run `haori serve --jobs` with a workspace of its own; yields its address once it answers."""
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "haori.cli.app", "serve", "--jobs", "--base", base, "--port", "0"]
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--train-share", _SHARE], stdout=subprocess.PIPE, stderr=log,
            env={**os.environ, "HAORI_WORKSPACE": str(home)}, text=True,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        found = re.search(r"http://[\w.:]+\d", process.stdout.readline())
        if found is None:
            raise SystemExit(f"The server did not start:\n{(home / 'server.log').read_text()}")
        url = found[0].removesuffix("/v1")
        _until(lambda: httpx.get(f"{url}/health").status_code == 200, 300, "the server answers")
        yield url
    finally:
        process.terminate()
        try:
            process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _until(true: Callable[[], bool], seconds: float, what: str) -> None:
    ends = time.monotonic() + seconds
    while not true():
        if time.monotonic() > ends:
            raise SystemExit(f"After {seconds:g} s it was still not so that {what}.")
        time.sleep(0.2)


def _at(times: list[float], share: float) -> float:
    return round(float(np.quantile(times, share)), 3)
