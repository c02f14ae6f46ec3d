"""Requests as three versions of the tinker SDK sent them are answered as they were then (tests/tinker_recording.py)."""

import base64
import json
import time
from pathlib import Path

import httpx
import pytest

from haori.server.tinker.schema import message
from tests.conftest import build_tiny_base
from tests.tinker_server import training_server

RECORDED = sorted((Path(__file__).parents[1] / "fixtures" / "tinker").glob("[0-9]*.json"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


def sent(http, one, old, new):
    """Send a request again, in the session of now; a promise is asked for until it is kept."""
    body = base64.b64decode(one["body"]).replace(old, new)
    path = one["path"].replace(old.decode(), new.decode())
    for _ in range(100):
        answer = http.request(one["method"], path, content=body, headers={"content-type": one["type"]})
        if "json" not in answer.headers["content-type"] or answer.json().get("type") != "try_again":
            return answer
        time.sleep(0.05)
    raise AssertionError(f"{path} was never answered")


def test_there_are_recordings_of_three_versions():
    assert [place.stem for place in RECORDED] == ["0.25.0", "0.30.4", "0.38.0"]


@pytest.mark.parametrize("place", RECORDED, ids=lambda place: place.stem)
def test_requests_of_a_version_are_answered_as_they_were(place, base, haori_home):
    held = json.loads(place.read_text())
    old = new = held["session"].encode()
    losses, sequences = [], 0
    with training_server(base) as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        for one in held["requests"]:
            answer = sent(http, one, old, new)
            assert answer.status_code == one["status"], (one["path"], answer.text)
            assert answer.headers["content-type"] == one["answer_type"], one["path"]
            if one["keys"] is not None:
                assert sorted(answer.json()) == one["keys"], one["path"]
            if one["path"].endswith("create_session"):
                new = answer.json()["session_id"].encode()
                assert len(new) == len(old), "protobuf counts the bytes of an id"
            if "protobuf" in one["answer_type"]:
                output, samples = message("ForwardBackwardOutput"), message("SampleResponse")
                if b":train:" in base64.b64decode(one["body"]):
                    output.ParseFromString(answer.content)
                    losses.append(output.metrics["loss:sum"])
                else:
                    samples.ParseFromString(answer.content)
                    sequences += len(samples.sequences)
    assert losses[0] > losses[1] > losses[2], "two steps, and a forward at the end"
    assert sequences == 2
