"""A server with the training API over a base, in this process or one of its own, and the wire as bytes."""

import io
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from typing import ClassVar

import httpx

from haori.bases import find_base
from haori.jobs.database.connection import open_database
from haori.jobs.model_names import ModelNames
from haori.library import Library
from haori.serve import AdapterDirectory, EngineLimits, open_engine
from haori.server.access import Access
from haori.server.access_log import AccessLog
from haori.server.app import create_app
from haori.server.contracts import Backend
from haori.server.keys import KeyStore
from haori.server.launch import RunningServer, listen
from haori.server.lifecycle import Service
from haori.server.owned_models import OwnedDirectory
from haori.server.settings import ServerSettings
from haori.server.tinker.opening import open_training


@contextmanager
def training_server(folder, *, port=0, waiting=1024):
    """Run a real server with the training API on loopback in a thread; yield its address and what its routes share."""
    base = find_base(str(folder))
    log = io.StringIO()
    service = Service(base, ServerSettings(drain_s=5.0), AccessLog("json", log))
    database = open_database()
    service.training = open_training(service, database)
    directory = AdapterDirectory(Library(), base.reference(), base_names=[base.name], roots=[])
    limits = EngineLimits(base.context_length, running=16, waiting=waiting, adapter_bytes=64 << 20)
    engine = open_engine(base, directory.files, limits, weights="fp32", cache_bytes=64 << 20)
    service.attach(Backend(engine, OwnedDirectory(directory, ModelNames(database))))
    taken = listen("127.0.0.1", port)
    server = RunningServer(create_app(service, Access(KeyStore(), "127.0.0.1")), service)
    thread = threading.Thread(target=server.serve_on, args=(taken,), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    service.log_text = log
    try:
        yield f"http://127.0.0.1:{taken.getsockname()[1]}", service
    finally:
        Wire.close_all()
        server.stop()
        thread.join(20)
        service.close()
        database.close()
        assert not thread.is_alive()


@contextmanager
def training_process(folder, port=0):
    """Run such a server as a process of its own; yield the process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.tinker_server", str(folder), str(port)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        Wire.close_all()
        if process.poll() is None:
            process.kill()
        process.communicate()


class Wire:
    """A client that speaks the wire by hand; the server's end closes it."""

    opened: ClassVar[list[httpx.Client]] = []

    def __init__(self, url, key=None, **headers):
        self.http = httpx.Client(
            base_url=f"{url}/api/v1", timeout=60, headers=headers | ({"X-API-Key": key} if key else {})
        )
        self.opened.append(self.http)

    @classmethod
    def close_all(cls):
        while cls.opened:
            cls.opened.pop().close()

    def post(self, address, body=None, *, expect=200, **given):
        answer = self.http.post(address, json=given if body is None else body)
        assert answer.status_code == expect, answer.text
        return answer.json()

    def get(self, path, *, expect=200):
        answer = self.http.get(path)
        assert answer.status_code == expect, answer.text
        return answer.json()

    def result(self, promise, *, expect=200):
        """Wait for a promise: JSON, or the bytes of protobuf."""
        while True:
            answer = self.http.post("/retrieve_future", json={"request_id": promise["request_id"]})
            assert answer.status_code == expect, answer.text
            if answer.headers["content-type"] == "application/x-protobuf":
                return answer.content
            found = answer.json()
            if found.get("type") != "try_again":
                return found

    def session(self):
        return self.post("/create_session", tags=[], sdk_version="0.38.0", type="create_session")["session_id"]

    def model(self, session, base, number=0, **lora):
        made = self.post(
            "/create_model", session_id=session, model_seq_id=number, base_model=base,
            lora_config={"rank": 4, "seed": 1, "train_unembed": False} | lora,
        )  # fmt: skip
        assert self.result(made).get("error") is None
        return f"{session}:train:{number}"

    def forward_backward(self, body, *, expect=200, **headers):
        answer = self.http.post(
            "/forward_backward", content=body, headers={"content-type": "application/x-protobuf"} | headers
        )
        assert answer.status_code == expect, answer.text
        return answer.json()


def main():
    import os
    from pathlib import Path

    from haori.jobs.sessions import checkpoints, run

    if pause := os.environ.get("HAORI_TEST_PAUSE_ADDED"):  # between the library and the promise, to be killed there

        def change(*_, **values):
            Path(pause).write_text(str(values))
            threading.Event().wait()

        checkpoints.CheckpointShelf.change = change
    run._SAVE_AFTER_REQUESTS = int(os.environ.get("HAORI_TEST_SAVE_AFTER_REQUESTS", run._SAVE_AFTER_REQUESTS))
    with training_server(Path(sys.argv[1]), port=int(sys.argv[2])) as (url, _):
        print(url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
