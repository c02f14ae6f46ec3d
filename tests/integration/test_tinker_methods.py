"""Every public method of the real SDK's clients: done right, or refused by a sentence, as the guide's table says."""

import json
from pathlib import Path

import pytest
import torch

from tests import tinker_record
from tests.conftest import build_tiny_base
from tests.tinker_server import training_server
from tests.tinker_venv import tinker_clients  # noqa: F401 - a fixture

SCRIPT = Path(__file__).parents[1] / "tinker_methods.py"
CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "AdminClient")
ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14]]
CUSTOM = """
import json, sys, urllib.request
from pathlib import Path
import tinker, torch
from tinker import types

url, folder, rows = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
service = tinker.ServiceClient(base_url=url)
trainer = service.create_lora_training_client(base_model="tiny", rank=4, seed=3, train_unembed=False).result()
rest = tinker.RestClient(base_url=url)
tensor = types.TensorData.from_torch
data = [types.Datum(model_input=types.ModelInput.from_ints(row[:-1]), loss_fn_inputs={
    "target_tokens": tensor(torch.tensor(row[1:])), "weights": tensor(torch.ones(len(row) - 1))}) for row in rows]

def files(name):
    found = rest.get_external_weights_urls(trainer.save_weights_external(name).result().path).result()
    (folder / name).mkdir()
    for file, address in found.urls.items():
        (folder / name / file).write_bytes(urllib.request.urlopen(address).read())

def preference(data, logprobs):  # not linear in the log-probabilities, and joins two rows
    chosen, rejected = (one.sum() for one in logprobs)
    loss = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)) + 0.02 * (logprobs[0] ** 2).sum()
    return loss, {"margin": float((chosen - rejected).detach())}

trainer.forward_backward(data, "cross_entropy").result()
trainer.optim_step(types.AdamParams(learning_rate=2e-2)).result()  # B is zero before, and A has no gradient
state = trainer.save_state("before").result().path
fresh = service.create_training_client_from_state(state).result()  # its optimizer takes a first step
files("before")
found = fresh.forward_backward_custom(data, preference).result().metrics
# With eps far above the gradient the first step of Adam is lr * g / (|g| + eps), from which g is known.
fresh.optim_step(types.AdamParams(learning_rate=1.0, eps=1.0, weight_decay=0.0)).result()
trainer = fresh
files("after")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def called(base, tmp_path_factory, tinker_clients):  # noqa: F811
    """Return what the script tells: the SDK's version, its public methods, and how each call ended."""
    from haori.core.settings import settings

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAORI_HOME", str(tmp_path_factory.mktemp("home")))
        patch.chdir(base.parent)  # the client looks for the tokenizer of a sampler's base by its name
        settings.cache_clear()
        with training_server(base) as (url, _):
            return json.loads(tinker_clients.run(SCRIPT, url, timeout_s=120).strip().splitlines()[-1])


@pytest.mark.parametrize("client", CLIENTS)
def test_every_method_of(client, called, request):
    ended = {name: dict(how) for name, how in called["ended"].items() if name.startswith(f"{client}.")}
    assert {name for name in called["public"] if name.startswith(f"{client}.")} == {
        name for name in ended if "(" not in name
    }, "a method of the SDK that the script does not call, or the other way round"
    for name, how in ended.items():
        assert how.pop("quick", True), f"{name} was tried again before it was refused"
        assert how["outcome"] in ("supported", "refused", "client"), f"{name} gave something wrong"
    tinker_record.check(request.node.name, called["sdk"], ended)


def test_a_loss_of_ones_own_has_the_gradient_of_float64(base, called, haori_home, tinker_clients, tmp_path, request):  # noqa: F811
    script = tmp_path / "custom.py"
    script.write_text(CUSTOM)
    with training_server(base) as (url, _):
        said = tinker_clients.run(script, url, tmp_path, json.dumps(ROWS))
    found = json.loads(said.strip().splitlines()[-1])
    loss, margin, expected = gradient_of(base, tmp_path / "before")
    assert found["loss:sum"] == pytest.approx(loss, rel=0.02)
    assert found["margin"] == pytest.approx(margin, abs=0.05)
    before, after = (weights(tmp_path / name) for name in ("before", "after"))
    assert before.keys() == after.keys() == expected.keys()
    step = {name: before[name] - after[name] for name in before}
    got = {name: one / (1 - one.abs()) for name, one in step.items()}
    mine, theirs = (torch.cat([one[name].flatten() for name in sorted(one)]) for one in (got, expected))
    assert theirs.norm() > 0.05
    assert torch.nn.functional.cosine_similarity(mine, theirs, dim=0) > 0.999
    assert float(mine.norm() / theirs.norm()) == pytest.approx(1, abs=0.02)
    for name, one in expected.items():
        assert float((got[name] - one).norm()) < 0.05 * float(one.norm()) + 0.005 * float(theirs.norm()), name
    calls = ("forward_backward_custom", "save_weights_external", "optim_step", "save_state")
    tinker_record.note(request.node.name, *(f"TrainingClient.{name}" for name in calls),
                       "RestClient.get_external_weights_urls")  # fmt: skip


def gradient_of(base, adapter):
    """Return loss, margin and gradients of the script's loss by stock PEFT and autograd, in float64."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(torch.bfloat16).to(torch.float64)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True, autocast_adapter_dtype=False)
    model = model.to(torch.float64)
    logprobs = []
    for row in ROWS:
        logits = model(torch.tensor([row[:-1]])).logits[0]  # T V
        logprobs.append(logits.log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0])
    chosen, rejected = (one.sum() for one in logprobs)
    loss = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)) + 0.02 * (logprobs[0] ** 2).sum()
    loss.backward()
    gradients = {
        name.replace(".default", ""): one.grad for name, one in model.named_parameters() if one.grad is not None
    }  # fmt: skip
    return loss.item(), (chosen - rejected).item(), gradients


def weights(folder):
    from safetensors.torch import load_file

    return {name: one.double() for name, one in load_file(folder / "adapter_model.safetensors").items()}
