"""Sessions on disk: stock PEFT loads them, a resume is the undisturbed run to the bit, foreign adapters go on."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from haori.bases import find_base
from haori.core.errors import HaoriError, InputError, MismatchError
from haori.jobs.tenants.pool import TrainingPool
from haori.jobs.tenants.records import AdamParams, AdapterSpec
from haori.library import inspect_adapter
from tests.conftest import build_tiny_base
from tests.tenant_samples import ALL, rows

STEP = AdamParams(learning_rate=5e-3)


@pytest.fixture(scope="module")
def pool(tiny_base_folder):
    opened = TrainingPool(find_base(str(tiny_base_folder)), dtype="fp32")
    yield opened
    opened.close()


def train(pool, tenant, seeds):
    for seed in seeds:
        pool.forward_backward(tenant, rows([9, 14], seed=seed), "cross_entropy")
        pool.optim_step(tenant, STEP).result()


def factors(pool, tenant):
    return {
        (name, part): value.detach().clone()
        for name, pair in pool._tenants[tenant].factors.items()
        for part, value in (("a", pair.a), ("b", pair.b))
    }


def scored(pool, tenant, data):
    return pool.forward_backward(tenant, data, "cross_entropy", forward_only=True).result().logprobs


def stock_logprobs(base, folder, data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    found = []
    for datum in data:
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(datum.tokens)[None]).logits[0].double()
        targets = torch.from_numpy(datum.inputs["target_tokens"])[:, None]
        found.append(torch.log_softmax(logits, -1).gather(1, targets)[:, 0].numpy())
    return found


@pytest.mark.parametrize("unembed", [False, True])
def test_stock_peft_gives_the_same_logprobs(pool, tiny_base_folder, tmp_path, unembed):
    pool.create("s", AdapterSpec(rank=3, alpha=7, seed=1, train_unembed=unembed)).result()
    before = scored(pool, "s", rows([12], seed=9))
    train(pool, "s", range(3))
    data = rows([12, 20], seed=9)
    found = scored(pool, "s", data)
    folder = pool.save("s", tmp_path / "saved", optimizer=False).result()
    assert abs(found[0] - before[0]).max() > 0.02  # else there is nothing to compare
    for own, expected in zip(found, stock_logprobs(tiny_base_folder, folder, data), strict=True):
        assert abs(own - expected).max() < 1e-4
    assert not (folder / "optimizer.safetensors").exists()
    pool.drop("s").result()


def test_a_resume_is_the_undisturbed_run_to_the_bit(pool, tmp_path):
    pool.create("u", AdapterSpec(rank=4, seed=2)).result()
    train(pool, "u", range(2))
    pool.forward_backward("u", rows([7], seed=50), "cross_entropy").result()  # a gradient no step has applied
    pool.save("u", tmp_path / "half", optimizer=True).result()
    pool.optim_step("u", STEP).result()
    train(pool, "u", range(2, 4))
    assert pool.load("v", tmp_path / "half", optimizer=True).result() == AdapterSpec(rank=4, seed=2)
    assert pool.optim_step("v", STEP).result()["step"] == 3
    train(pool, "v", range(2, 4))
    undisturbed, resumed = factors(pool, "u"), factors(pool, "v")
    assert all(torch.equal(value, resumed[key]) for key, value in undisturbed.items())
    pool.load("v", tmp_path / "half").result()  # without the optimizer it is another run
    with pytest.raises(InputError, match="no gradients"):
        pool.optim_step("v", STEP).result()
    train(pool, "v", range(2, 4))
    assert not all(torch.equal(value, undisturbed[key]) for key, value in factors(pool, "v").items())
    for name in "uv":
        pool.drop(name).result()


def foreign(base, folder, **options):
    torch.manual_seed(0)
    made = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**made))
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.data.normal_(0, 0.1)
        model.save_pretrained(str(folder))
    return folder


PLAIN = {
    "plain": {},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"down_proj": 3}},
    "rslora": {"use_rslora": True},
    "few": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize("kind", PLAIN)
def test_a_foreign_lora_goes_on_and_comes_back(pool, tiny_base_folder, tmp_path, kind):
    folder = foreign(tiny_base_folder, tmp_path / "foreign", **PLAIN[kind])
    data = rows([10], seed=4)
    pool.load("f", folder).result()
    assert abs(scored(pool, "f", data)[0] - stock_logprobs(tiny_base_folder, folder, data)[0]).max() < 1e-4
    train(pool, "f", [1])
    again = pool.save("f", tmp_path / "again", optimizer=False).result()
    assert abs(scored(pool, "f", data)[0] - stock_logprobs(tiny_base_folder, again, data)[0]).max() < 1e-4
    assert inspect_adapter(again).ranks == inspect_adapter(folder).ranks
    pool.drop("f").result()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"use_dora": True}, "method dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3, 4]}, "trained tokens"),
        ({"bias": "lora_only", "lora_bias": True}, "biases"),
    ],
)
def test_other_kinds_are_refused_by_a_sentence(pool, tiny_base_folder, tmp_path, options, sentence):
    folder = foreign(tiny_base_folder, tmp_path / "foreign", **options)
    with pytest.raises(InputError, match=f"{sentence}.*plain LoRA"):
        pool.load("f", folder).result()
    assert "f" not in pool.status().tenants


def test_what_does_not_fit_is_refused_and_changes_nothing(pool, tiny_base_folder, tmp_path):
    pool.create("k", AdapterSpec(rank=2, seed=0)).result()
    kept = factors(pool, "k")
    saved = pool.save("k", tmp_path / "saved", optimizer=False).result()
    with pytest.raises(InputError, match="no optimizer state"):
        pool.load("k", saved, optimizer=True).result()
    with pytest.raises(InputError, match="rank 2, and the session rank 8"):
        pool.load("k", saved, AdapterSpec(rank=8)).result()
    with pytest.raises(HaoriError, match="is not a folder"):
        pool.load("k", tmp_path / "nowhere").result()
    session = json.loads((saved / "session.json").read_text())
    (saved / "session.json").write_text(json.dumps({**session, "base": "0123456789ab"}))
    with pytest.raises(MismatchError, match="trained over the base 0123456789ab"):
        pool.load("k", saved).result()
    wider = foreign(build_tiny_base(tmp_path / "deeper", layers=3), tmp_path / "wider")
    with pytest.raises(HaoriError, match=r"base has no module 'model\.layers\.2"):
        pool.load("k", wider).result()
    assert all(torch.equal(value, kept[key]) for key, value in factors(pool, "k").items())
    pool.drop("k").result()
