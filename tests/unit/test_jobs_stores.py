"""Files, uploads, names, webhooks and fine-tuning jobs in their database; on both databases."""

import json
import math
import time
from pathlib import Path

import pytest
from sqlalchemy import update

from haori.core.errors import InputError
from haori.core.settings import settings
from haori.jobs.database.connection import Database, open_database
from haori.jobs.database.tables import files, uploads
from haori.jobs.files import FileMissingError, FileStore
from haori.jobs.fine_tuning.recipe import Hyperparameters, Wanted
from haori.jobs.fine_tuning.service import FineTuning, Order
from haori.jobs.model_names import ModelMissingError, ModelName, ModelNames
from haori.jobs.queue.store import JobStore
from haori.jobs.quotas import QuotaError, Quotas
from haori.jobs.uploads import UploadStore
from haori.jobs.webhooks.store import WebhookMissingError, WebhookStore

ROWS = [{"messages": [{"role": "user", "content": f"Is {i} even?"}, {"role": "assistant", "content": "yes"}]}
        for i in range(4)]  # fmt: skip
CONTENT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
DONE = "fine_tuning.job.succeeded"


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'haori.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres")
    opened = open_database(url)
    yield opened
    opened.close()


@pytest.fixture
def store(database: Database) -> FileStore:
    return FileStore(database)


def keep(store: FileStore, owner: str = "a", *, content: bytes = CONTENT, purpose: str = "fine-tune", **more):
    with store.incoming("träin\0.jsonl", purpose, 1 << 40) as arriving:
        arriving.write(content)
        return store.keep(arriving, owner, **more)


def test_files_are_kept_listed_in_order_deleted_and_expire(store: FileStore):
    first, *others = [keep(store) for _ in range(4)]
    assert store.find(first.id, "a") == first and first.summary.rows == 4 and first.filename == "träin?.jsonl"
    assert store.path(first).read_bytes() == CONTENT
    with pytest.raises(FileMissingError):
        store.find(first.id, "b")
    with store.database.writing() as held:  # all of one instant: the ids tell them apart
        held.execute(update(files).values(created=first.created))
    page, more = store.list("a", limit=3, oldest_first=True)
    rest, none = store.list("a", after=page[-1].id, limit=3, oldest_first=True)
    assert (more, none) == (True, False)
    seen = [file.id for file in (*page, *rest)]
    assert seen == sorted(file.id for file in (first, *others))
    assert [file.id for file in store.list("a")[0]] == seen[::-1]
    store.delete(others[0].id, "a")
    assert not store.path(others[0]).exists() and len(store.list(None)[0]) == 3
    brief = keep(store, expires_s=3600)
    with store.database.writing() as held:
        held.execute(update(files).where(files.c.id == brief.id).values(expires=time.time() - 1))
    with pytest.raises(FileMissingError):
        store.find(brief.id, "a")
    store.sweep()
    assert not store.path(brief).exists() and store.path(first).exists()


def test_what_a_job_made_is_kept_once_and_limits_count_bytes(store: FileStore):
    made = [store.put("a", "file-1", "step_metrics.csv", "fine-tune-results", text) for text in (b"x" * 9, b"y")]
    assert made[0] == made[1] and store.path(made[0]).read_bytes() == b"x" * 9
    with pytest.raises(QuotaError, match="keeps 9 bytes"):
        keep(store, content=b"123", purpose="user_data", quotas=Quotas(bytes=11))
    keep(store, content=b"12", purpose="user_data", quotas=Quotas(bytes=11))
    assert sum(file.bytes for file in store.list("a")[0]) == 11
    assert {path.name for path in store.folder.iterdir()} == {file.id for file in store.list("a")[0]}


def test_an_upload_of_parts_becomes_a_file_once_and_ends(store: FileStore):
    parts = UploadStore(store)
    size = len(CONTENT)
    upload = parts.create("a", "t.jsonl", "fine-tune", "text/jsonl", size, most_bytes=1 << 40, expires_s=9000)
    made = []
    for piece in (CONTENT[:50], CONTENT[50:]):
        with parts.incoming(upload) as arriving:
            arriving.write(piece)
            made.append(parts.add_part(upload, arriving).id)
    with parts.incoming(upload) as arriving, pytest.raises(InputError, match="in 2 parts"):
        arriving.write(b"x")
        parts.add_part(upload, arriving)
    with pytest.raises(FileMissingError):
        parts.find(upload.id, "b")
    done, file = parts.complete(upload.id, "a", made)
    assert (done.status, done.file_id) == ("completed", file.id) and store.path(file).read_bytes() == CONTENT
    assert parts.complete(upload.id, "a", made) == (done, file)
    assert not list(parts.folder.iterdir())
    large = parts.create("a", "b", "user_data", "text/plain", 5 << 30, most_bytes=1 << 40)  # more than 32 bits
    assert parts.find(large.id, "a").bytes == 5 << 30
    assert parts.cancel(large.id, "a").status == "cancelled"
    late = parts.create("a", "c", "user_data", "text/plain", 5, most_bytes=9)
    with store.database.writing() as held:
        held.execute(update(uploads).where(uploads.c.id == late.id).values(expires=time.time() - 1))
    assert parts.find(late.id, "a").status == "expired"
    parts.sweep()


def test_names_answer_once_their_job_has_succeeded(database: Database):
    names, jobs = ModelNames(database), JobStore(database)
    job = jobs.submit("fine_tune", {}, owner="a")
    early = ModelName(name="ft:b:a::1", owner="a", library_name="ft-1", base="b", job_id=job.id, created=1.5)
    names.put([early])
    stored = early.model_copy(update={"adapter": "c" * 64, "library_name": "ft-1@1"})
    point = stored.model_copy(update={"name": f"{early.name}:ckpt-step-3", "step": 3, "adapter": "d" * 64})
    for found in ([], [stored, point], [stored, point]):  # twice, as a second attempt does
        names.put(found or [early])
        assert names.list("a") == []
        with pytest.raises(ModelMissingError):
            names.find(early.name, "a")
    assert {claim.name for claim in names.claims(["d" * 64], [])} == {point.name}
    assert {claim.name for claim in names.claims([""], ["ft-1@7"])} == set()
    jobs.finish(jobs.claim("w"), {})
    assert names.list("a") == [stored, point] and names.find(point.name, "a") == point
    assert names.list("b") == []
    names.delete(point.name, "a")
    assert names.all() == [stored]
    names.drop_of(job.id)
    assert names.all() == []


def test_endpoints_and_deliveries(database: Database, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HAORI_WEBHOOK_HOSTS", '["hooks.example.org"]')
    settings.cache_clear()
    hooks, jobs = WebhookStore(database), JobStore(database)
    made = hooks.create("a", "n", "https://hooks.example.org/", [DONE])
    assert hooks.find(made.id, "a") == made and hooks.list("a") == [made] and hooks.list("b") == []
    with pytest.raises(WebhookMissingError):
        hooks.find(made.id, "b")
    assert hooks.change(made.id, "a", name="m").name == "m"
    both = hooks.rotate(made.id, "a", keep_old=True)
    assert both.signing[1] == made.secret and len(both.signing) == 2
    for owner in ("a", "b"):
        jobs.submit("fine_tune", {}, owner=owner)
        jobs.finish(jobs.claim("w"), {})
    assert [hooks.gather(), hooks.gather()] == [1, 0]
    [delivery] = hooks.due()
    assert delivery.event["type"] == DONE and delivery.webhook_id == made.id
    assert list(hooks.due()) == []  # claimed, for now
    hooks.settle(delivery, "The reply was 500.")
    [waiting] = hooks.deliveries_of(made.id)
    assert waiting.error == "The reply was 500." and waiting.next_at > time.time() and waiting.delivered is None
    hooks.settle(waiting, None)
    [heard] = hooks.deliveries_of(made.id)
    assert heard.delivered is not None and heard.next_at is None
    hooks.delete(made.id, "a")
    assert hooks.list("a") == [] and list(hooks.deliveries_of(made.id)) == []


def test_a_fine_tuning_job_is_made_once_listed_by_metadata_and_limited(store: FileStore, tiny_base_folder: Path):
    from haori.bases import find_base

    base = find_base(str(tiny_base_folder))
    tuning = FineTuning(JobStore(store.database), store, ModelNames(store.database), base)
    file = keep(store)

    def order(key: str, **metadata: str) -> Order:
        wanted = Wanted(name="", base="", hyperparameters=Hyperparameters(n_epochs=2))
        return Order(wanted, base.name, file.id, key=key, request={"metadata": metadata})

    first = tuning.create(order("k1", team="x\0y"), "a")
    assert tuning.create(order("k1", team="x\0y"), "a") == first
    second = tuning.create(order("k2", team="z"), "a")
    assert [job.id for job in tuning.list("a", after=None, limit=1)[0]] == [second.id]
    assert [job.id for job in tuning.list("a", after=None, limit=5, metadata={"team": "x\0y"})[0]] == [first.id]
    with pytest.raises(QuotaError, match="2 unfinished jobs"):
        tuning.create(order("k3"), "a", quotas=Quotas(jobs=2))
    assert len(tuning.names.all()) == 2
    assert {path.name for path in tuning.store.folder.iterdir()} == {"files", first.id, second.id}
    assert (first.folder / "data" / "training.jsonl").read_bytes() == CONTENT


def test_text_that_cannot_be_kept_is_the_callers_mistake_and_events_are_kept_without_it(database: Database):
    if not database.is_sqlite:
        with pytest.raises(InputError, match="cannot be kept") as caught:
            FileStore(database).find("a\0", "a")
        assert "postgres" not in str(caught.value)
        uploading = UploadStore(FileStore(database))
        with pytest.raises(InputError, match="cannot be kept"):
            uploading.create("a", "n", "user_data", "m" * 300, 5, most_bytes=9)
    with pytest.raises(InputError, match="cannot be kept"):
        ModelNames(database).find("\ud800", "a")
    jobs = JobStore(database)
    job = jobs.submit("train", {"text": "a\0b"})
    jobs.add_event(job.id, "info", "message", "a\0b\ud800", {"text": "\0"})
    [event] = jobs.events(job.id)
    assert (event.message, event.data) == ("a\ufffdb?", {"text": "\0"})
    assert jobs.find(job.id).spec == {"text": "a\0b"}
    jobs.add_event(job.id, "info", "metrics", "loss nan", {"values": {"loss": math.nan, "lr": [1.5, math.inf]}})
    assert jobs.events(job.id)[-1].data == {"values": {"loss": None, "lr": [1.5, None]}}
