"""`/v1/files` and `/v1/uploads` by the official client: what is kept, what is refused and how it is said."""

import hashlib
import json
import os
import threading
import time

import httpx
import openai
import pytest

from haori.jobs.database.connection import open_database
from haori.server import KeyStore
from haori.server.jobs_service import open_job_service
from tests.server_samples import RepeatingEngine, served

ROWS = [{"messages": [{"role": "user", "content": f"Is {i} even?"}, {"role": "assistant", "content": "yes"}]}
        for i in range(4)]  # fmt: skip


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def server(tiny_tokenizer, tmp_path):
    jobs = open_job_service(open_database(), max_file_bytes=6 << 20)
    with served(RepeatingEngine(tiny_tokenizer), home=tmp_path, jobs=jobs) as running:
        yield running


def client_of(server, key="none"):
    url = f"{server.url}/v1"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, _strict_response_validation=True, timeout=60)


@pytest.fixture
def client(server):
    with client_of(server) as client:
        yield client


def test_a_file_is_kept_listed_read_and_deleted(client, server):
    content = lines(ROWS)
    made = client.files.create(file=("../../etc/train.jsonl", content), purpose="fine-tune")
    assert (made.filename, made.bytes, made.purpose, made.status) == (
        "train.jsonl", len(content), "fine-tune", "processed",
    )  # fmt: skip
    assert made.summary["rows"] == 4
    assert client.files.wait_for_processing(made.id).id == made.id
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == content
    stored = server.service.jobs.files.find(made.id, "local")
    assert stored.sha256 == hashlib.sha256(content).hexdigest()
    more = [client.files.create(file=(f"{i}.txt", b"x"), purpose="user_data").id for i in range(3)]
    assert [file.id for file in client.files.list(limit=2)] == [*reversed(more), made.id]  # pages of two
    assert [file.id for file in client.files.list(order="asc", limit=1)] == [made.id, *more]
    assert [file.id for file in client.files.list(purpose="fine-tune")] == [made.id]
    place = server.service.jobs.files.path(stored)
    assert client.files.delete(made.id).deleted
    assert not place.exists()
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


def test_a_file_expires(client, server, monkeypatch):
    made = client.files.create(
        file=("a.txt", b"x"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert made.expires_at == made.created_at + 3600
    with pytest.raises(openai.BadRequestError, match="3,600 to 2,592,000"):
        client.files.create(
            file=("a.txt", b"x"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 60}
        )
    place = server.service.jobs.files.path(server.service.jobs.files.find(made.id, "local"))
    later = time.time() + 3601
    monkeypatch.setattr("haori.jobs.files.time.time", lambda: later)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    server.service.jobs.files.sweep()
    assert not place.exists()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, r"train.jsonl:2:messages.*last message must be"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, r"train.jsonl:2:messages\[0\].role.*wizard"),
        ({"messages": [{"role": "user", "content": 5}, ROWS[0]["messages"][1]]}, r"\[0\].content.*must be text"),
        ({"prompt": "a", "completion": "b"}, r"train.jsonl:2"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named(client, row, said):
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        client.files.create(file=("train.jsonl", lines([ROWS[0], row, ROWS[1]])), purpose="fine-tune")
    assert (caught.value.param, caught.value.code) == ("file", "invalid_file_format")
    assert "/" not in caught.value.message  # no folder of the server
    assert not client.files.list().data


def test_pairs_of_openai_and_others_are_read(client):
    pair = {
        "input": {"messages": [{"role": "user", "content": "Hello?"}], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [{"role": "assistant", "content": "Good morning."}],
        "non_preferred_output": [{"role": "assistant", "content": "What."}],
    }
    trl = {"prompt": "Hello?", "chosen": "Good morning.", "rejected": "What."}
    for row in (pair, trl):
        made = client.files.create(file=("pairs.jsonl", lines([row])), purpose="fine-tune")
        assert (made.summary["kind"], made.summary["rows"]) == ("preference", 1)
    assert client.files.create(file=("p.jsonl", lines([{"prompt": "a", "completion": "b"}])), purpose="fine-tune").id
    with pytest.raises(openai.BadRequestError, match=r"pairs.jsonl:1:input: an object must hold \"messages\""):
        client.files.create(file=("pairs.jsonl", lines([{**pair, "input": {"text": "a"}}])), purpose="fine-tune")


ROW = lines(ROWS[:1])
HOSTILE = {
    "nothing": b"",
    "blank lines": b"\n\n\n",
    "NUL": ROW + b'{"messages": "\0"}\n',
    "binary": bytes(range(256)) * 64,
    "UTF-16": ROW.decode().encode("utf-16"),
    "not UTF-8": ROW + b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}\n',
    "half a character": ROW + b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant"}]}\n',
    "deep lists": ROW + b'{"messages": ' + b"[" * 500_000 + b"]" * 500_000 + b"}\n",
    "deep objects": b'{"messages": ' + b'{"a":' * 300_000 + b"1" + b"}" * 300_000 + b"}\n",
    "a huge number": ROW + b'{"messages": ' + b"9" * 1_000_000 + b"}\n",
    "an infinite number": ROW + b'{"messages": [{"role": "user", "content": 1e999}]}\n',
    "not a number": ROW + b'{"messages": NaN}\n',
    "a key twice": ROW + b'{"messages": [], "messages": []}\n',
    "one line": b'{"text": "' + b"a" * (5 << 20) + b'"}\n',
    "an array": b"[" + ROW.strip() + b"]",
    "cut off": ROW[:-9],
    "a zip": b"PK\x03\x04" + os.urandom(2000),
    "many columns": b"".join(b'{"c%d": 1}\n' % i for i in range(20_000)),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_in_a_sentence_and_leaves_nothing(client, server, content):
    began = time.monotonic()
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("train.jsonl", content), purpose="fine-tune")
    assert time.monotonic() - began < 10
    assert "Traceback" not in caught.value.message and len(caught.value.message) < 1500
    assert caught.value.body["message"].startswith(("train.jsonl", "'train.jsonl'"))
    assert [path for path in server.service.jobs.files.folder.iterdir() if path.is_file()] == []
    assert server.service.jobs.files.list("local") == ([], False)


def test_a_mark_at_the_start_is_no_part_of_the_text(client):
    assert client.files.create(file=("a.jsonl", b"\xef\xbb\xbf" + ROW), purpose="fine-tune").summary["rows"] == 1


def endless(line, most):
    """A form whose file does not end before `most` bytes."""
    head = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    yield head + b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    sent = 0
    while sent < most:
        yield line
        sent += len(line)


def test_a_line_of_a_gigabyte_is_refused_while_it_is_read(server):
    jobs = server.service.jobs
    object.__setattr__(jobs, "max_file_bytes", 2 << 30)
    reply, refused = [], threading.Event()

    def stream():
        for piece in endless(b"a" * 65536, 1 << 30):
            if refused.is_set():
                return
            yield piece

    headers = {"content-type": "multipart/form-data; boundary=x"}
    began = time.monotonic()
    try:
        reply.append(httpx.post(f"{server.url}/v1/files", content=stream(), headers=headers, timeout=30))
    except httpx.WriteError:  # the server replied and closed while the client still sent
        reply.append(None)
    assert time.monotonic() - began < 15
    assert reply[0] is None or "longer than 4 MB" in reply[0].json()["error"]["message"]
    assert [path for path in jobs.files.folder.iterdir() if path.is_file()] == []


def test_too_large_a_file_is_refused(client):
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("a.bin", b"a" * ((6 << 20) + 1)), purpose="user_data")
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"--x\r\n\r\nabc\r\n--x--\r\n", "has no name"),
        (b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc', "has no end"),
        (b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n--x--\r\n', "'file' is missing"),
        (b"nonsense", "has no end"),
        (b'--x\r\nContent-Disposition: form-data; name="path"; filename="a"\r\n\r\nabc\r\n--x--', "no file 'path'"),
    ],
)
def test_a_broken_form_is_refused(server, body, said):
    headers = {"content-type": "multipart/form-data; boundary=x"}
    reply = httpx.post(f"{server.url}/v1/files", content=body, headers=headers)
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


def test_an_upload_in_parts(client, server):
    content = lines(ROWS)
    upload = client.uploads.create(
        bytes=len(content), filename="train.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )
    assert upload.status == "pending"
    second = client.uploads.parts.create(upload.id, data=content[100:])
    first = client.uploads.parts.create(upload.id, data=content[:100])
    with pytest.raises(openai.BadRequestError, match="together"):
        client.uploads.complete(upload.id, part_ids=[first.id])
    with pytest.raises(openai.BadRequestError, match="MD5"):
        client.uploads.complete(upload.id, part_ids=[first.id, second.id], md5="0" * 32)
    with pytest.raises(openai.BadRequestError, match="too many"):
        client.uploads.parts.create(upload.id, data=b"more")
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    done = client.uploads.complete(upload.id, part_ids=[first.id, second.id], md5=digest)
    assert (done.status, done.file.summary["rows"]) == ("completed", 4)
    assert client.files.content(done.file.id).read() == content
    assert client.uploads.complete(upload.id, part_ids=[first.id, second.id]).file.id == done.file.id
    assert list(server.service.jobs.uploads.folder.iterdir()) == []


def test_an_upload_is_cancelled_or_expires(client, server, monkeypatch):
    asked = {"bytes": 5, "filename": "a.txt", "mime_type": "text/plain", "purpose": "user_data"}
    upload = client.uploads.create(**asked)
    client.uploads.parts.create(upload.id, data=b"abc")
    assert client.uploads.cancel(upload.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="is cancelled"):
        client.uploads.parts.create(upload.id, data=b"ab")
    other = client.uploads.create(**asked)
    client.uploads.parts.create(other.id, data=b"abc")
    later = time.time() + 3601
    monkeypatch.setattr("haori.jobs.uploads.time.time", lambda: later)
    with pytest.raises(openai.BadRequestError, match="is expired"):
        client.uploads.complete(other.id, part_ids=["part_x"])
    server.service.jobs.uploads.sweep()
    assert list(server.service.jobs.uploads.folder.iterdir()) == []


def test_quotas_and_scopes(client, server, tmp_path):
    keys = KeyStore(tmp_path / "keys.json")
    small = keys.create("small", scopes=["train"], max_file_bytes=1000).secret
    reader = keys.create("reader").secret
    with client_of(server, small) as mine:
        with pytest.raises(openai.APIStatusError) as caught:
            mine.files.create(file=("a", b"a" * 1001), purpose="user_data")
        assert caught.value.status_code == 413
        mine.files.create(file=("a", b"a" * 600), purpose="user_data")
        with pytest.raises(openai.RateLimitError, match="delete some"):
            mine.files.create(file=("a", b"a" * 600), purpose="user_data")
    with client_of(server, reader) as other, pytest.raises(openai.PermissionDeniedError, match="not for training"):
        other.files.list()
