"""Together's own client against `/v1/fine-tunes`: a whole small job, and what is refused by name."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import httpx
import pytest

from haori.library import Library
from haori.server import KeyStore
from tests.client_folder import environment_of, finish, installed
from tests.integration.test_serve_fine_tuning import (  # noqa: F401 - fixtures
    base,
    client,
    client_of,
    lines,
    rows,
    server,
    until,
    upload,
    worker,
)

REQUIREMENTS = Path(__file__).parents[1] / "together-requirements.txt"
WHOLE_JOB = """
import hashlib, json, sys, time
from together import Together

url, key, folder = sys.argv[1:]
client = Together(base_url=url, api_key=key, max_retries=0, timeout=60)
training, validation = (client.files.upload(f"{folder}/{name}.jsonl", purpose="fine-tune")
                        for name in ("train", "valid"))
found = {"file": training.to_dict(), "files": [file.id for file in client.files.list().data]}
found["retrieved"] = client.files.retrieve(training.id).to_dict()
found["content"] = hashlib.sha256(client.files.content(training.id).read()).hexdigest()
asked = dict(training_file=training.id, validation_file=validation.id, model="tiny", n_epochs=2, n_evals=4,
             n_checkpoints=2, batch_size=8, learning_rate=2e-3, lora=True, lora_r=3, lora_alpha=6, lora_dropout=0.0,
             lora_trainable_modules="q_proj,v_proj", suffix="even", random_seed=7, warmup_ratio=0.1)
price = client.fine_tuning.estimate_price(training_file=training.id, validation_file=validation.id, model="tiny",
                                          n_epochs=2, n_evals=4)
preview = client.fine_tuning.preview(model="tiny", training_file=training.id, top_k=2)
found |= {"price": price.to_dict(), "preview": preview.to_dict(),
          "limits": client.fine_tuning.model_limits(model_name="tiny").to_dict()}
made = client.fine_tuning.create(**asked)
found["made"] = json.loads(made.model_dump_json())
end = time.monotonic() + 90
while (job := client.fine_tuning.retrieve(made.id)).status not in ("completed", "error", "cancelled"):
    assert time.monotonic() < end, job
    time.sleep(0.1)
found["done"] = json.loads(job.model_dump_json())
found["events"] = [event.to_dict() for event in client.fine_tuning.list_events(made.id).data]
found["metrics"] = client.fine_tuning.list_metrics(made.id).metrics
found["late"] = client.fine_tuning.list_metrics(made.id, global_step_from=2, resolution=1).metrics
found["checkpoints"] = [one.to_dict() for one in client.fine_tuning.list_checkpoints(made.id).data]
step = found["checkpoints"][-1]["step"]
for name, which in (("adapter", {"checkpoint": "adapter"}), ("merged", {"checkpoint": "merged"}),
                    ("step", {"checkpoint_step": step})):
    with client.fine_tuning.with_streaming_response.content(ft_id=made.id, **which) as reply:
        reply.stream_to_file(f"{folder}/{name}.tar")
hello = [{"role": "user", "content": "hello"}]
found["replies"] = {name: client.chat.completions.create(model=name, messages=hello, max_tokens=2).model
                    for name in (job.x_model_output_name, found["checkpoints"][-1]["path"])}
going_on = client.fine_tuning.create(training_file=training.id, from_checkpoint=f"{made.id}:{step}", suffix="more")
by_name = client.fine_tuning.create(training_file=training.id, from_checkpoint=job.x_model_output_name)
found["going_on"] = [json.loads(one.model_dump_json()) for one in (going_on, by_name)]
found["asked"] = [client.fine_tuning.cancel(one.id).status for one in (going_on, by_name)]
while "cancel_requested" in (states := [client.fine_tuning.retrieve(one.id).status for one in (going_on, by_name)]):
    assert time.monotonic() < end, states
    time.sleep(0.1)
found["cancelled"] = states
found["listed"] = [(one.id, one.status) for one in client.fine_tuning.list().data]
found["deleted"] = client.fine_tuning.delete(made.id).message
found["left"] = [one.id for one in client.fine_tuning.list().data]
found["file_deleted"] = client.files.delete(training.id).deleted
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def together():
    return installed("together", REQUIREMENTS)


def run(together, script, *arguments, timeout_s=120):
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=environment_of(together),
    )  # fmt: skip
    said = finish(process, timeout_s)
    return json.loads(said.strip().splitlines()[-1])


def test_a_whole_job_by_togethers_client(together, server, tmp_path):  # noqa: F811
    key = KeyStore(tmp_path / "keys.json").create("acme", scopes=["infer", "train"], owner="acme").secret
    sent = {"train": rows(0, 24), "valid": rows(24, 34)}
    for name, content in sent.items():
        (tmp_path / f"{name}.jsonl").write_bytes(lines(content))
    with worker():
        found = run(together, WHOLE_JOB, server.url, key, tmp_path)
    check_files(found, tmp_path)
    check_before(found)
    made, done = found["made"], found["done"]
    assert (made["status"], made["training_type"]["lora_r"], made["n_evals"]) == ("queued", 3, 4)
    assert done["status"] == "completed", done["error"]
    assert (done["learning_rate"], done["warmup_ratio"], done["batch_size"]) == (0.002, 0.1, 8)
    assert done["training_type"]["lora_trainable_modules"] == "q_proj,v_proj"
    assert done["model_output_name"].startswith("ft:tiny:acme:even:")
    assert done["total_steps"] == done["steps_completed"] > 2
    assert list(found["replies"]) == list(found["replies"].values())
    check_told(found, done)
    check_archives(tmp_path)
    first, second = found["going_on"]
    assert (first["from_checkpoint"], second["from_checkpoint"]) == (
        f"{made['id']}:{found['checkpoints'][-1]['step']}", done["model_output_name"],
    )  # fmt: skip
    assert set(found["asked"]) <= {"cancelled", "cancel_requested"}, "the worker may have begun the first"
    assert found["cancelled"] == ["cancelled", "cancelled"]
    of_jobs = [(second["id"], "cancelled"), (first["id"], "cancelled"), (made["id"], "completed")]
    assert [tuple(one) for one in found["listed"]] == of_jobs
    assert found["left"] == [second["id"], first["id"]]
    assert made["id"] in found["deleted"]
    assert found["file_deleted"]
    assert not server.service.jobs.names.list("acme"), "with the job go its models"
    assert not (server.service.jobs.store.folder / made["id"]).exists()
    assert not Library().list()


def check_files(found, folder):
    """What was sent has arrived as it was, as a file that both APIs know."""
    import hashlib

    content = (folder / "train.jsonl").read_bytes()
    assert found["content"] == hashlib.sha256(content).hexdigest()
    assert found["file"]["filename"] == "train.jsonl" and found["file"]["bytes"] == len(content)
    assert found["retrieved"]["FileType"] == "jsonl" and found["retrieved"]["processing_status"] == "COMPLETED"
    assert found["file"]["id"] in found["files"] and len(found["files"]) == 2
    assert found["file"]["id"].startswith("file-")


def check_before(found):
    """Limits, price and preview speak of the same rows."""
    letters = sum(len(message["content"]) for row in rows(0, 24) for message in row["messages"])
    measured = sum(len(message["content"]) for row in rows(24, 34) for message in row["messages"])
    price = found["price"]
    assert price["estimation_available"] and price["allowed_to_proceed"]
    assert price["estimated_train_token_count"] == round(letters / 3.5) * 2
    assert price["estimated_eval_token_count"] == round(measured / 3.5) * 4
    row = found["preview"]["rows"][1]
    assert found["preview"]["dataset_format"] == "conversation"
    assert "".join(row["tokens"]).rstrip() == (
        "<|im_start|>user\nIs 1 even?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"
    )
    [[begin, end]] = row["trained_spans"]
    trained = [place for place, label in enumerate(row["labels"]) if label != -100]
    assert trained == list(range(begin, end)) and row["num_trained_tokens"] == end - begin
    assert "".join(row["tokens"][begin:end]) == "no<|im_end|>"
    assert found["limits"]["max_seq_length_sft"] == 256
    assert not found["limits"]["supports_full_training"]


def check_told(found, done):
    """Events, metrics and checkpoints tell of one run."""
    types = [event["type"] for event in found["events"]]
    assert types[0] == "job_start" and types[-1] == "job_complete"
    assert types.index("training_start") < types.index("checkpoint_save") < types.index("training_complete")
    assert any("Against the base on the validation file" in event["message"] for event in found["events"])
    assert {event["object"] for event in found["events"]} == {"fine-tune-event"}
    losses = {one["global_step"]: one["eval_loss"] for one in found["metrics"] if "eval_loss" in one}
    assert len(losses) == 1 + 4, "once before training, and as often as was asked"
    assert all(one["global_step"] >= 2 for one in found["late"])
    assert sum("train_loss" in one for one in found["late"]) <= 1
    steps = [one["step"] for one in found["checkpoints"]]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] == done["total_steps"]
    assert len(steps) == 2, "so many were asked for, of the four that validations save"
    assert sum(one["checkpoint_type"].startswith("Final") for one in found["checkpoints"]) == 1


def check_archives(folder):
    kinds = {"adapter": "adapter_model.safetensors", "merged": "model.safetensors", "step": "adapter_model.safetensors"}
    held = {}
    for name, weights in kinds.items():
        with tarfile.open(fileobj=io.BytesIO((folder / f"{name}.tar").read_bytes())) as archive:
            assert "card.json" not in archive.getnames()
            held[name] = archive.extractfile(weights).read()
    assert held["step"] != held["merged"]


REFUSED = [
    ({"training_type": {"type": "Full"}}, "adapters are trained; use Lora"),
    ({"wandb_key": "secret"}, "'wandb_key' is not supported"),
    ({"hf_output_repo_name": "a/b"}, "'hf_output_repo_name' is not supported"),
    ({"from_hf_model": "a/b"}, "'from_hf_model' is not supported"),
    ({"gradient_accumulation_steps": 4}, "'gradient_accumulation_steps' is not supported"),
    ({"early_stopping_min_delta": 0.1}, "'early_stopping_min_delta' is not supported"),
    ({"early_stopping_enabled": True}, "'early_stopping_enabled' needs a 'validation_file'"),
    ({"lr_scheduler": {"lr_scheduler_type": "cosine", "lr_scheduler_args": {"min_lr_ratio": 0.1}}}, "min_lr_ratio"),
    ({"lr_scheduler": {"lr_scheduler_type": "cosine", "lr_scheduler_args": {"num_cycles": 2.0}}}, "num_cycles"),
    ({"multimodal_params": {"train_vision": True}}, "train_vision"),
    ({"training_method": {"method": "dpo", "simpo_gamma": 0.5}}, "simpo_gamma"),
    ({"training_method": {"method": "grpo"}}, "use sft or dpo"),
    ({"training_method": {"method": "dpo"}}, "conversations, which the method 'dpo'"),
    ({"n_evals": 3}, "there is no 'validation_file'"),
    ({"from_checkpoint": "ftjob-1"}, "give one of them"),
    ({"model": None}, "give one of them"),
    ({"model": None, "from_checkpoint": "ftjob-1:3"}, "There is no job 'ftjob-1'"),
    ({"model": None, "from_checkpoint": "ft:tiny:local::a1:3"}, "There is no model"),
    ({"n_epoch": 3}, "did you mean 'n_epochs'"),
    ({"model": "/etc/passwd"}, "'model' cannot be"),
    ({"training_type": {"type": "Lora", "lora_r": 0}}, "lora_r"),
    ({"learning_rate": 0}, "learning_rate"),
    ({"max_grad_norm": 0}, "max_grad_norm"),
]


def test_what_cannot_be_done_is_refused_by_name(client, server):  # noqa: F811
    training = upload(client, rows(0, 4))
    for change, said in REFUSED:
        asked = {"model": "tiny", "training_file": training, "n_epochs": 1} | change
        sent = {name: value for name, value in asked.items() if value is not None}
        reply = httpx.post(f"{server.url}/v1/fine-tunes", json=sent)
        assert reply.status_code in (400, 404), (change, reply.text)
        assert said in reply.json()["error"]["message"], (change, reply.text)
    assert not client.fine_tuning.jobs.list().data


def test_what_changes_nothing_is_taken_and_the_rest_becomes_the_recipe(client, server):  # noqa: F811
    training, validation = upload(client, rows(0, 12)), upload(client, rows(12, 16), "valid.jsonl")
    silent = {
        "packing": True, "gradient_accumulation_steps": 1, "batch_size": "max", "early_stopping_enabled": False,
        "lr_scheduler": {"lr_scheduler_type": "linear", "lr_scheduler_args": {"min_lr_ratio": 0.0}},
        "training_method": {"method": "sft", "train_on_inputs": True}, "multimodal_params": {"train_vision": False},
    }  # fmt: skip
    asked = {"model": "tiny", "training_file": training, "validation_file": validation, "n_epochs": 3, "n_evals": 4,
             "n_checkpoints": 5, "max_grad_norm": 0.5, "weight_decay": 0.01, "max_seq_length": 64}  # fmt: skip
    made = httpx.post(f"{server.url}/v1/fine-tunes", json=asked | silent).json()
    recipe = server.service.jobs.store.find(made["id"]).spec["recipe"]
    assert (recipe["training"]["epochs"], recipe["training"]["evaluations_per_epoch"]) == (3, 2)
    assert (recipe["training"]["keep_checkpoints"], recipe["training"]["patience"]) == (5, 1_000_000)
    assert (recipe["optimizer"]["max_grad_norm"], recipe["optimizer"]["weight_decay"]) == (0.5, 0.01)
    assert (recipe["schedule"]["kind"], recipe["data"]["train_on"]) == ("linear", "all")
    assert (recipe["data"]["max_length"], recipe["data"]["too_long"]) == (64, "truncate")
    assert made["training_type"] is None and made["training_method"] == {"method": "sft", "train_on_inputs": True}
    stops = {"early_stopping_enabled": True, "early_stopping_patience": 4}
    again = httpx.post(f"{server.url}/v1/fine-tunes", json=asked | stops).json()
    assert server.service.jobs.store.find(again["id"]).spec["recipe"]["training"]["patience"] == 4
    assert client.fine_tuning.jobs.retrieve(again["id"]).status == "queued"  # the same job by the other API
    assert httpx.delete(f"{server.url}/v1/fine-tunes/{again['id']}").status_code == 400  # not before it has ended
    paused = httpx.post(f"{server.url}/v1/fine_tuning/jobs/{again['id']}/pause")
    assert paused.status_code == 200
    assert httpx.get(f"{server.url}/v1/fine-tunes/{again['id']}").json()["status"] == "pending"


def test_an_estimate_says_when_an_account_has_to_wait(server, tmp_path):  # noqa: F811
    key = KeyStore(tmp_path / "keys.json").create("few", scopes=["train"], owner="few", max_job_tokens=10).secret
    with client_of(server, key) as mine:
        training = upload(mine, rows(0, 12))
    asked = {"model": "tiny", "training_file": training, "n_epochs": 1}
    headers = {"authorization": f"Bearer {key}"}
    found = httpx.post(f"{server.url}/v1/fine-tunes/estimate-price", json=asked, headers=headers).json()
    assert not found["allowed_to_proceed"] and "may train 10 in 30 days" in found["reason"]
    assert found["user_limit"] == 10


def test_an_upload_is_taken_from_its_signature_alone_and_once(server, tmp_path):  # noqa: F811
    key = KeyStore(tmp_path / "keys.json").create("acme", scopes=["train"], owner="acme").secret
    headers = {"authorization": f"Bearer {key}"}
    content, url = lines(rows(0, 3)), f"{server.url}/v1/files"

    def begin(**fields):
        form = {
            name: (None, value) for name, value in {"purpose": "fine-tune", "file_name": "a.jsonl", **fields}.items()
        }
        return httpx.post(url, files=form, headers=headers, follow_redirects=False)

    begun = begin()
    place, identity = begun.headers["location"], begun.headers["x-together-file-id"]
    assert begun.status_code == 302 and place.startswith(server.url)
    for wrong in (place[:-1], place.partition("?")[0], place.replace(identity, f"upload_{'0' * 24}")):
        assert httpx.put(wrong, content=content).status_code == 404
    done = f"{url}/{identity}/preprocess"
    assert "Nothing has been sent" in httpx.post(done, headers=headers).json()["error"]["message"]
    assert httpx.put(place, content=content).status_code == 200
    assert httpx.put(place, content=content).status_code == 400, "one address is for one content"
    assert httpx.post(done).status_code == 401
    file = httpx.post(done, headers=headers).json()
    assert httpx.post(done, headers=headers).json()["id"] == file["id"], "asked again, it is the same"
    assert httpx.put(place, content=content).status_code == 400
    other = begin(checksum="0" * 64)
    refused = httpx.put(other.headers["location"], content=content)
    assert refused.status_code == 400 and "was announced" in refused.json()["error"]["message"]
    for fields, said in (
        ({"checksum": "abc"}, "SHA-256"), ({"file_type": "parquet"}, "'file_type' cannot be 'parquet'"),
        ({"purpose": "eval"}, "'purpose' cannot be 'eval'"), ({"path": "/etc"}, "no field 'path'"),
    ):  # fmt: skip
        assert said in begin(**fields).json()["error"]["message"]
    broken = begin()
    httpx.put(broken.headers["location"], content=b'{"messages": 3}\n')
    said = httpx.post(f"{url}/{broken.headers['x-together-file-id']}/preprocess", headers=headers).json()["error"]
    assert said["code"] == "invalid_file_format" and "a.jsonl" in said["message"]
    assert server.service.jobs.max_body_bytes(httpx.URL(place).path) > server.service.jobs.max_file_bytes


def test_what_together_has_and_this_does_not_is_told(server):  # noqa: F811
    for path in ("/v1/fine-tunes/ftjob-1/download-tokenized-dataset", "/v1/fine-tunes/a/b/c"):
        reply = httpx.get(server.url + path)
        assert reply.status_code == 404 and "is not served here" in reply.json()["error"]["message"]
