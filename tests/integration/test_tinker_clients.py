"""The real clients against the training API: the tinker SDK, and tinker-cookbook's loops as they are shipped."""

import json
from pathlib import Path

import pytest

from tests.conftest import build_tiny_base
from tests.tinker_server import training_server
from tests.tinker_venv import tinker_clients  # noqa: F401 - a fixture

RECIPES = Path(__file__).parents[1] / "tinker_recipes.py"
MODEL = "Qwen/Qwen3-4B-Instruct-2507"  # a name that the cookbook knows; an alias here
SDK = """
import json, sys
import tinker, torch
from tinker import types

url = sys.argv[1]
service = tinker.ServiceClient(base_url=url)
trainer = service.create_lora_training_client(base_model="tiny", rank=4, seed=3).result()
ids = types.ModelInput.from_ints
tensor = types.TensorData.from_torch
data = [types.Datum(model_input=ids([5, 6, 7, 8, 9]), loss_fn_inputs={
    "target_tokens": tensor(torch.tensor([6, 7, 8, 9, 10])), "weights": tensor(torch.ones(5))})] * 3
losses = []
for step in range(4):
    done = trainer.forward_backward(data, "cross_entropy")
    trainer.optim_step(types.AdamParams(learning_rate=5e-3)).result()
    losses.append(done.result().metrics["loss:sum"])

def negative_sum(data, logprobs):
    loss = -sum(one.sum() for one in logprobs)
    return loss, {"mine": float(loss.detach())}

custom = trainer.forward_backward_custom(data, negative_sum).result().metrics
trainer.optim_step(types.AdamParams(learning_rate=5e-3)).result()
path = trainer.save_state("one").result().path
again = service.create_training_client_from_state_with_optimizer(path).result()
compared = [client.forward(data, "cross_entropy").result().metrics["loss:sum"] for client in (trainer, again)]
sampler = trainer.save_weights_and_get_sampling_client().result()
greedy = types.SamplingParams(max_tokens=5, temperature=0, stop=[])
tokens = [one.tokens for one in sampler.sample(ids([5, 6]), 2, greedy).result().sequences]
scored = sampler.compute_logprobs(ids([5, 6, 7, 8, 9, 10])).result()
forward = trainer.forward(data[:1], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data
print(json.dumps({"losses": losses, "custom": custom, "compared": compared, "tokens": tokens, "scored": scored[1:],
                  "forward": list(map(float, forward))}))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = build_tiny_base(tmp_path_factory.mktemp("base") / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return folder


@pytest.fixture
def url(base, haori_home, monkeypatch):
    from haori.core.settings import settings

    monkeypatch.setenv("HAORI_MODEL_ALIASES", json.dumps({MODEL: "tiny"}))
    settings.cache_clear()
    with training_server(base) as (address, _):
        yield address


def test_the_sdk_trains_saves_resumes_and_samples_what_it_trains(tinker_clients, url, tmp_path):  # noqa: F811
    script = tmp_path / "sdk.py"
    script.write_text(SDK)
    said = json.loads(tinker_clients.run(script, url).strip().splitlines()[-1])
    assert said["losses"][3] < said["losses"][0] - 5
    assert said["custom"]["loss:sum"] == pytest.approx(said["custom"]["surrogate_loss:sum"], rel=1e-5)
    assert said["compared"][0] == said["compared"][1], "a resumed run is the same to the bit"
    assert said["tokens"][0] == said["tokens"][1]
    # Training holds the base in bfloat16 and this engine in fp32; the adapter itself changes these by several nats.
    assert said["scored"] == pytest.approx(said["forward"], abs=0.03), "it samples what it trains"


@pytest.fixture
def named_tokenizer(base, tmp_path, monkeypatch):
    """Run what follows where the base's tokenizer is found by the model's name."""
    place = tmp_path / MODEL
    place.parent.mkdir()
    place.symlink_to(base)
    monkeypatch.chdir(tmp_path)


def loop(clients, name, url, folder, *more):
    given = (f"model_name={MODEL}", f"base_url={url}", "batch_size=8", "lora_rank=4", f"log_path={folder}")
    clients.run(RECIPES, name, *given, *more)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("named_tokenizer")
def test_the_cookbooks_supervised_loop_runs_as_it_is_and_learns(tinker_clients, url, tmp_path):  # noqa: F811
    steps = loop(tinker_clients, "sl_loop", url, tmp_path / "sl", "learning_rate=5e-3", "save_every=2")
    losses = [step["train_mean_nll"] for step in steps if "train_mean_nll" in step]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.3
    saved = (tmp_path / "sl" / "checkpoints.jsonl").read_text()
    assert "/weights/000002" in saved
    assert "/sampler_weights/final" in saved


@pytest.mark.usefixtures("named_tokenizer")
def test_the_cookbooks_rl_loop_runs_as_it_is(tinker_clients, url, tmp_path):  # noqa: F811
    options = ("group_size=2", "max_tokens=8", "max_steps=2", "save_every=1", "loss_fn=importance_sampling")
    steps = loop(tinker_clients, "rl_loop", url, tmp_path / "rl", *options)
    assert [step["progress/batch"] for step in steps if "progress/batch" in step] == [0, 1]
    assert "/sampler_weights/final" in (tmp_path / "rl" / "checkpoints.jsonl").read_text()
