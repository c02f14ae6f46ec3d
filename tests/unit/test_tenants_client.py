"""The primitives of training in process, and the loop that the guide shows."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import haori
from haori.core.errors import HaoriError, InputError
from tests.tenant_samples import rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def client(tiny_base_folder):
    with haori.training_client(str(tiny_base_folder), rank=4, seed=0, dtype="fp32") as opened:
        yield opened


def weighted(client, datum):
    return -float((client.forward([datum]).logprobs[0] * datum.inputs["weights"]).sum())


def test_supervised_training_lowers_the_loss_of_the_answer_alone(client):
    datum = client.datum([{"role": "user", "content": "Is this review positive?"}], "positive")
    trained = datum.inputs["target_tokens"][datum.inputs["weights"] > 0]
    assert client.tokenizer.decode(trained) == "positive<|im_end|>"
    before = weighted(client, datum)
    for _ in range(5):
        output = client.forward_backward([datum])
        client.optim_step(learning_rate=1e-2)
    assert output.metrics["loss:sum"] < before
    assert weighted(client, datum) < before - 0.5


def test_samples_are_scored_as_they_were_drawn_and_follow_every_step(client):
    for _ in range(2):
        samples = client.sample("Is this", n=3, max_tokens=8, seed=5)
        assert len({sample.tokens for sample in samples}) == 3
        again = client.sample("Is this", n=3, max_tokens=8, seed=5)
        assert [sample.tokens for sample in again] == [sample.tokens for sample in samples]
        for sample, other in zip(samples, again, strict=True):  # other rows in a step round otherwise
            np.testing.assert_allclose(sample.logprobs, other.logprobs, atol=1e-5)
        data = [sample.datum(0.5) for sample in samples]
        for sample, datum, scored in zip(samples, data, client.forward(data).logprobs, strict=True):
            own = scored[len(sample.prompt) - 1 :]
            np.testing.assert_allclose(own, sample.logprobs, atol=1e-4)
            np.testing.assert_allclose(datum.inputs["logprobs"][len(sample.prompt) - 1 :], sample.logprobs, atol=1e-6)
            assert datum.inputs["advantages"].sum() == pytest.approx(0.5 * len(sample.tokens))
        client.forward_backward(data, "importance_sampling")
        client.optim_step(learning_rate=2e-2)
    changed = client.sample("Is this", n=3, max_tokens=8, seed=5)
    moved = [abs(a - b) for one, two in zip(changed, samples, strict=True)
             for a, b in zip(one.logprobs[:1], two.logprobs[:1], strict=True)]  # fmt: skip
    assert max(moved) > 1e-3


def test_a_custom_loss_gives_the_gradients_of_the_built_in_one(client):
    data = rows([9, 14], kind="ppo", seed=3)

    def dro(given, logprobs):
        total = torch.zeros(())
        for datum, logp in zip(given, logprobs, strict=True):
            away = logp - torch.from_numpy(datum.inputs["logprobs"])
            total = total - (logp * torch.from_numpy(datum.inputs["advantages"]) - 0.15 * away**2).sum()
        return total, {"rows": 2.0}

    figures = client.forward_backward_custom(data, dro)
    tenant = client._pool._tenants["session"]
    custom = torch.cat([part.flatten() for pair in tenant.gradients.values() for part in pair])
    tenant.gradients = None
    found = client.forward_backward(data, "dro", beta=0.3)
    built_in = torch.cat([part.flatten() for pair in tenant.gradients.values() for part in pair])
    tenant.gradients = None
    assert figures == {"rows": 2.0, "loss:sum": pytest.approx(found.metrics["loss:sum"], rel=1e-4)}
    assert (custom - built_in).norm() < 1e-4 * built_in.norm()
    with pytest.raises(InputError, match="must return a scalar tensor"):
        client.forward_backward_custom(data, lambda _data, _logprobs: 3.0)


def test_a_session_is_saved_and_goes_on(client, tiny_base_folder, tmp_path):
    client.forward_backward(rows([9]))
    client.optim_step()
    folder = client.save(tmp_path / "saved")
    before = client.forward(rows([12], seed=1)).logprobs[0]
    with haori.training_client(str(tiny_base_folder), rank=4, dtype="fp32") as other:
        assert other.load(folder, optimizer=True) == client.spec
        assert np.array_equal(other.forward(rows([12], seed=1)).logprobs[0], before)


def test_mistakes_are_sentences(client):
    with pytest.raises(InputError, match="'learning_rate' of the step"):
        client.optim_step(learning_rate=-1.0)
    with pytest.raises(InputError, match="'momentum' of the step"):
        client.optim_step(momentum=0.9)
    with pytest.raises(HaoriError, match="no setting 'clip'"):
        client.forward_backward(rows([9], kind="ppo"), "ppo", clip=0.2)


def test_the_example_is_a_loop_of_forty_lines_that_runs(tiny_base_folder, tmp_path, monkeypatch, capsys):
    script = ROOT / "examples/rl_format.py"
    code = script.read_text().split('"""', 2)[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), str(tiny_base_folder), "2"])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.count("reward 0.") == 2
    assert (tmp_path / "rl_format.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "rl_format" / "adapter_model.safetensors").exists()
