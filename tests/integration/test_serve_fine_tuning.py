"""Fine-tuning jobs by the official client, in strict mode: from a file to answers, stopped and gone on with."""

import csv
import io
import json
import math
import shutil
import tarfile
import threading
import time
from contextlib import contextmanager

import httpx
import openai
import pytest

from haori.bases import add_base, find_base
from haori.jobs.database.connection import open_database
from haori.jobs.queue.attempt import Pace
from haori.jobs.queue.worker import start_worker
from haori.library import Library
from haori.serve import AdapterDirectory
from haori.server.jobs_service import open_job_service
from tests.diffusion_pipelines import saved, stable_diffusion
from tests.encoder_models import build_tiny_encoder
from tests.server_samples import RepeatingEngine, served

HELLO = [{"role": "user", "content": "hello"}]


def rows(first, last):
    return [
        {"messages": [{"role": "user", "content": f"Is {i} even?"},
                      {"role": "assistant", "content": "no" if i % 2 else "yes"}]}
        for i in range(first, last)
    ]  # fmt: skip


def lines(found):
    return "".join(json.dumps(row) + "\n" for row in found).encode()


PAIRS = [{"input": {"messages": [{"role": "user", "content": f"Is {i} even?"}]},
          "preferred_output": [{"role": "assistant", "content": "yes"}],
          "non_preferred_output": [{"role": "assistant", "content": "who knows"}]} for i in range(8)]  # fmt: skip


@pytest.fixture
def base(tiny_base_folder, tmp_path):
    return find_base(str(shutil.copytree(tiny_base_folder, tmp_path / "tiny")))


@pytest.fixture
def server(tiny_tokenizer, tmp_path, base):
    jobs = open_job_service(open_database(), base)
    engine = RepeatingEngine(tiny_tokenizer)
    engine.base = base
    directory = AdapterDirectory(Library(), base.reference(), base_names=[base.name])
    with served(engine, directory, home=tmp_path, jobs=jobs) as running:
        yield running


@contextmanager
def worker():
    """A worker in a thread; its jobs are processes."""
    stop = threading.Event()
    pace = Pace(lease_s=30, heartbeat_s=1, poll_s=0.05, grace_s=30)
    database = open_database()
    thread = threading.Thread(target=start_worker, args=(database,), kwargs={"stop": stop.is_set, "pace": pace})
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)
        database.close()


def client_of(server, key="none"):
    url = f"{server.url}/v1"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, _strict_response_validation=True, timeout=60)


@pytest.fixture
def client(server):
    with client_of(server) as client:
        yield client


def upload(client, content, name="train.jsonl"):
    return client.files.create(file=(name, lines(content)), purpose="fine-tune").id


def until(client, job, *states, seconds=60):
    end = time.monotonic() + seconds
    while True:
        found = client.fine_tuning.jobs.retrieve(job)
        if found.status in states:
            return found
        assert time.monotonic() < end, found
        assert found.status in ("queued", "running"), found
        time.sleep(0.05)


def test_from_a_file_to_answers(client, server):
    training, validation = upload(client, rows(0, 24)), upload(client, rows(24, 34), "valid.jsonl")
    made = client.fine_tuning.jobs.create(
        model="tiny", training_file=training, validation_file=validation, suffix="even", seed=7,
        metadata={"team": "a"}, hyperparameters={"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 2},
        extra_body={"lora": {"rank": 3, "alpha": 6}, "recipe": {"training.patience": 9}},
    )  # fmt: skip
    assert (made.status, made.model, made.seed, made.fine_tuned_model) == ("queued", "tiny", 7, None)
    assert made.hyperparameters.n_epochs == 2
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"team": "a"})] == [made.id]
    assert not client.fine_tuning.jobs.list(metadata={"team": "b"}).data
    client.files.delete(training)  # the job has its copy
    with worker():
        done = until(client, made.id, "succeeded")
    name = done.fine_tuned_model
    assert name.startswith("ft:tiny:local:even:")
    assert done.trained_tokens > 0 and done.finished_at >= done.created_at and done.error is None
    assert "95% interval" in done.metadata["haori_evaluation"]
    _check_figures(client, done)
    _check_use(client, server, name, done)
    card = Library().get(server.service.jobs.names.find(name, "local").library_name).card
    assert (card.rank, card.alpha, card.seed) == (3, 6.0, 7)
    assert card.verification.passed and card.evaluations
    [made_on, twice] = [done.evaluation["metrics"]["perplexity"], card.evaluations[0].metrics["perplexity"]]
    assert made_on["difference_low"] == twice.difference_low
    _check_download(server, done)
    assert client.models.delete(name).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=name, messages=HELLO)
    assert name not in {model.id for model in client.models.list()}


def _check_figures(client, done):
    """Events, result file and checkpoints tell of the same steps."""
    events = list(client.fine_tuning.jobs.list_events(done.id, limit=3))
    assert len({event.id for event in events}) == len(events) > 5
    assert events[0].message == "The job succeeded."
    assert any("Against the base on the validation file: Perplexity" in event.message for event in events)
    figures = [event.data for event in events if event.type == "metrics"]
    table = list(csv.DictReader(io.StringIO(client.files.content(done.result_files[0]).read().decode())))
    assert list(table[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert [int(row["step"]) for row in table] == list(range(1, len(table) + 1))
    losses = {int(row["step"]): row for row in table}
    for data in figures:
        for key in ("train_loss", "valid_loss"):
            if key in data and data["step"]:
                assert float(losses[data["step"]][key]) == pytest.approx(data[key], rel=1e-5)
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(done.id, limit=1))
    steps = [checkpoint.step_number for checkpoint in checkpoints]
    assert steps == sorted(steps, reverse=True) and len(steps) >= 2
    for checkpoint in checkpoints:
        row = losses[checkpoint.step_number]
        assert checkpoint.metrics.valid_loss == pytest.approx(float(row["valid_loss"]), rel=1e-5)
        assert checkpoint.metrics.full_valid_mean_token_accuracy == float(row["valid_mean_token_accuracy"])


def _check_use(client, server, name, done):
    """The model and its checkpoints answer at once, alone and in a blend, with their own weights."""
    names = server.service.jobs.names
    listed = {model.id: model for model in client.models.list()}
    offered = [c.fine_tuned_model_checkpoint for c in client.fine_tuning.jobs.checkpoints.list(done.id)]
    assert set(listed) == {"tiny", name, *offered}  # and not by its name in the library
    assert listed[name].parent == "tiny"
    assert client.models.retrieve(name).id == name
    for asked in (name, *offered):
        reply = client.chat.completions.create(model=asked, messages=HELLO, max_tokens=2)
        assert reply.model == asked
        assert server.engine.seen[-1].adapters == ((names.find(asked, "local").adapter, 1.0),)
    assert len({names.find(asked, "local").adapter for asked in (name, *offered)}) == len(offered)
    client.completions.create(model=f"{offered[0]}:0.5", prompt="a", max_tokens=1)
    assert server.engine.seen[-1].adapters == ((names.find(offered[0], "local").adapter, 0.5),)


def _check_download(server, done):
    """The adapter, and the base with it, as stock files without places of this machine."""
    found = {}
    for form, weights in (("adapter", "adapter_model.safetensors"), ("merged", "model.safetensors")):
        reply = httpx.get(f"{server.url}/v1/fine_tuning/jobs/{done.id}/download", params={"form": form}, timeout=60)
        with tarfile.open(fileobj=io.BytesIO(reply.content)) as archive:
            found[form] = {name: archive.extractfile(name).read() for name in archive.getnames()}
        assert weights in found[form] and "card.json" not in found[form]
    stored = Library().get(server.service.jobs.names.find(done.fine_tuned_model, "local").library_name)
    held = (stored.path / "adapter_model.safetensors").read_bytes()
    assert found["adapter"]["adapter_model.safetensors"] == held


def test_an_estimate_and_rows_as_the_model_sees_them(client, server, tiny_tokenizer, monkeypatch):
    from haori.core.settings import settings

    monkeypatch.setenv("HAORI_PRICES", '{"*tiny": 2.0}')
    settings.cache_clear()
    training = upload(client, rows(0, 10))
    asked = {"model": "tiny", "training_file": training, "hyperparameters": {"n_epochs": 4}}
    found = httpx.post(f"{server.url}/v1/fine_tuning/estimate", json=asked).json()
    letters = sum(len(message["content"]) for row in rows(0, 10) for message in row["messages"])
    assert found["tokens"] == round(letters / 3.5) * 4
    assert found["price"] == pytest.approx(2.0 * found["tokens"] / 1e6, abs=1e-6)
    assert found["seconds_low"] < found["seconds"] < found["seconds_high"]
    assert not client.fine_tuning.jobs.list().data
    asked = {"model": "tiny", "training_file": training, "rows": 2}
    first, second = httpx.post(f"{server.url}/v1/fine_tuning/preview", json=asked).json()["data"]
    whole = "<|im_start|>user\nIs 1 even?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"
    assert second["text"].rstrip() == whole
    assert [span["text"] for span in second["trained_spans"]] == ["no<|im_end|>"]
    span = second["trained_spans"][0]
    trained = [place for place, label in enumerate(second["labels"]) if label != -100]
    assert trained == list(range(span["start"], span["end"]))
    assert first["origin"] == "train.jsonl:1"
    assert not first["too_long"]


def test_a_row_that_no_job_takes_is_shown_as_too_long(client, server):
    """This base reads 256 tokens, and a job leaves longer rows out."""
    short, long = rows(0, 2)
    long["messages"][0]["content"] = "even or odd " * 200
    training = upload(client, [short, long])
    for place in ("/v1/fine_tuning/preview", "/v1/fine-tunes/preview"):
        found = httpx.post(f"{server.url}{place}", json={"model": "tiny", "training_file": training}).json()
        shown = found.get("data") or found["rows"]
        assert [row["too_long"] for row in shown] == [False, True]
        assert len(shown[1]["input_ids"]) > 256
        assert found.get("max_seq_length", 256) == 256


def test_paused_resumed_and_cancelled_and_gone_on_from(client, server):
    training = upload(client, rows(0, 60))
    asked = {"model": "tiny", "training_file": training, "hyperparameters": {"n_epochs": 400, "batch_size": 4}}
    job = client.fine_tuning.jobs.create(**asked).id
    other = client.fine_tuning.jobs.create(**asked).id
    assert client.fine_tuning.jobs.cancel(other).status == "cancelled"
    with worker():
        until(client, job, "running")
        while client.fine_tuning.jobs.retrieve(job).estimated_finish is None:
            time.sleep(0.05)
        running = client.fine_tuning.jobs.retrieve(job)
        assert running.progress["of"] > running.progress["step"] > 0
        client.fine_tuning.jobs.pause(job)
        held = until(client, job, "queued")
        assert held.paused
        reached = max(event.data["step"] for event in client.fine_tuning.jobs.list_events(job, limit=1000)
                      if event.type == "metrics")  # fmt: skip
        client.fine_tuning.jobs.resume(job)
        until(client, job, "running")
        end = time.monotonic() + 40
        said = ""
        while "goes on from step" not in said and time.monotonic() < end:
            said = " ".join(event.message for event in client.fine_tuning.jobs.list_events(job, limit=1000))
            time.sleep(0.1)
        client.fine_tuning.jobs.cancel(job)
        assert until(client, job, "cancelled").fine_tuned_model is None
    step = int(said.partition("goes on from step ")[2].partition(".")[0])
    assert step >= reached > 0
    with pytest.raises(openai.BadRequestError, match="is cancelled"):
        client.fine_tuning.jobs.resume(job)
    assert [model.id for model in client.models.list()] == ["tiny"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "gpt-5"}, r"this server trains .*tiny.*HAORI_MODEL_ALIASES"),
        ({"model": "/etc/passwd"}, "'model' cannot be"),
        ({"model": "../tiny"}, "'model' cannot be"),
        ({"training_file": "file-abc"}, "no file 'file-abc'"),
        ({"method": {"type": "reinforcement", "reinforcement": {"grader": {"type": "python"}}}}, "graders"),
        ({"method": {"type": "magic"}}, "'magic' is not served"),
        ({"method": {"type": "dpo", "dpo": {}}}, "conversations, which the method 'dpo'"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "'wandb' is not served"),
        ({"hyperparameters": {"n_epochs": 0}}, "n_epochs"),
        ({"hyperparameters": {"n_epoch": 2}}, "did you mean 'n_epochs'"),
        ({"metadata": {str(i): "a" for i in range(17)}}, "metadata"),
        ({"suffix": "a" * 65}, "suffix"),
        ({"extra_body": {"lora": {"rnak": 2}}}, "'lora' has no key 'rnak'"),
        ({"extra_body": {"lora": {"rank": 0}}}, r"method\.rank"),
        ({"extra_body": {"recipe": {"data": {"path": "/etc/passwd"}}}}, "cannot set 'data.path'"),
        ({"extra_body": {"recipe": {"data.validation": "/etc/passwd"}}}, "cannot set 'data.validation'"),
        ({"extra_body": {"recipe": {"training": {"trackers": ["wandb"]}}}}, r"training\.trackers"),
        ({"extra_body": {"recipe": {"from": "/tmp/x"}}}, "cannot set 'from'"),
        ({"extra_body": {"recipe": {"method.kind": "full"}}}, r"method\.kind"),
        ({"extra_body": {"recipe": {"optimizer.rate": 1}}}, r"optimizer\.rate"),
    ],
)
def test_what_cannot_be_done_is_said_before_a_job_is_there(client, server, change, said):
    asked = {"model": "tiny", "training_file": upload(client, rows(0, 4)), **change}
    with pytest.raises(openai.APIStatusError, match=said) as caught:
        client.fine_tuning.jobs.create(**asked)
    assert caught.value.status_code in (400, 404)
    assert not client.fine_tuning.jobs.list().data
    kept = {path.name for path in server.service.jobs.store.folder.iterdir()}
    assert kept == {"files"}


def test_pairs_aliases_keys_and_repeated_requests(client, server, monkeypatch):
    from haori.core.settings import settings

    monkeypatch.setenv("HAORI_MODEL_ALIASES", '{"gpt-4o-mini-2024-07-18": "tiny"}')
    settings.cache_clear()
    pairs = upload(client, PAIRS, "pairs.jsonl")
    asked = {"model": "gpt-4o-mini-2024-07-18", "training_file": pairs, "extra_headers": {"Idempotency-Key": "k1"},
             "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": 1}}}}  # fmt: skip
    job = client.fine_tuning.jobs.create(**asked)
    assert client.fine_tuning.jobs.create(**asked).id == job.id
    recipe = server.service.jobs.store.find(job.id).spec["recipe"]
    assert (recipe["task"], recipe["loss"]["beta"], recipe["training"]["epochs"]) == ("preference", 0.3, 1)
    assert recipe["data"]["validation_share"] == 0.0
    assert job.method.dpo.hyperparameters.beta == 0.3
    with pytest.raises(openai.BadRequestError, match="pairs of answers"):
        client.fine_tuning.jobs.create(model="tiny", training_file=pairs)


def test_a_job_of_pairs(client, server):
    pairs = upload(client, PAIRS, "pairs.jsonl")
    asked = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": 1}}}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=pairs, method=asked, extra_body={"lora": {"r": 2}})
    with worker():
        done = until(client, job.id, "succeeded")
    assert done.method.type == "dpo" and done.method.dpo.hyperparameters.beta == 0.3
    card = Library().get(server.service.jobs.names.find(done.fine_tuned_model, "local").library_name).card
    assert (card.rank, card.task, card.verification.passed) == (2, "preference", True)
    table = list(csv.DictReader(io.StringIO(client.files.content(done.result_files[0]).read().decode())))
    assert float(table[0]["train_loss"]) == pytest.approx(math.log(2), abs=0.05)  # no preference before the first step
    assert {point.fine_tuning_job_id for point in client.fine_tuning.jobs.checkpoints.list(job.id)} == {job.id}
    client.chat.completions.create(model=done.fine_tuned_model, messages=HELLO, max_tokens=1)


def test_a_base_that_writes_no_text_is_refused_before_a_job_is_there(client, server, tmp_path):
    add_base(str(build_tiny_encoder(tmp_path / "reader")), name="reader")
    add_base(str(saved(stable_diffusion(), tmp_path / "painter")), name="painter")
    training = upload(client, rows(0, 4))
    for model, what in (
        ("reader", "a BertModel"), ("painter", r"an image base \(StableDiffusionPipeline\)"),
        ("all-minilm-l6-v2", "an encoder"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=f"'model' cannot be '{model}': it is {what}") as caught:
            client.fine_tuning.jobs.create(model=model, training_file=training)
        assert (caught.value.param, caught.value.code) == ("model", "model_not_available")
    with pytest.raises(openai.BadRequestError, match="this server trains smollm2-135m-instruct, tiny, and") as caught:
        client.fine_tuning.jobs.create(model="gpt-5", training_file=training)
    assert caught.value.param == "model"
    assert not client.fine_tuning.jobs.list().data


def test_what_others_serve_and_this_does_not_is_told(client, server):
    with pytest.raises(openai.NotFoundError, match="--owner"):
        client.fine_tuning.checkpoints.permissions.create("ft:tiny:a::b:ckpt-step-1", project_ids=["p"])
    with pytest.raises(openai.NotFoundError, match="Graders are not served"):
        client.fine_tuning.alpha.graders.run(grader={"type": "python", "source": "", "name": "a"}, model_sample="a")
