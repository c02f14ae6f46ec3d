"""The losses of training sessions against their formulas in float64 with autograd, on stock PEFT."""

import numpy as np
import pytest
import torch

from haori.bases import find_base
from haori.core.errors import HaoriError, InputError, TrainingError
from haori.jobs.tenants.losses import LOSSES
from haori.jobs.tenants.pool import TrainingPool
from haori.jobs.tenants.records import AdamParams, AdapterSpec, Datum
from tests.tenant_samples import ALL, Oracle, rows

LENGTHS = [7, 12, 7, 20]
SPEC = AdapterSpec(rank=4, seed=3, train_unembed=True)
CONFIGS = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.3},
    "cispo": {"clip_low_threshold": 0.5, "clip_high_threshold": 1.4},
    "gspo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
    "dro": {"beta": 0.3},
}


@pytest.fixture(scope="module")
def pool(tiny_base_folder):
    opened = TrainingPool(find_base(str(tiny_base_folder)), dtype="fp32")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def oracle(tiny_base_folder):
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        return Oracle(tiny_base_folder, SPEC)


@pytest.fixture
def tenant(pool, oracle):
    """A session whose B is not zero, with the oracle at the same factors."""
    pool.create("t", SPEC).result()
    tenant = pool._tenants["t"]
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for pair in tenant.factors.values():
            pair.b.copy_(0.05 * torch.randn(pair.b.shape, generator=draw))
    oracle.set(factors_of(tenant))
    oracle.peft.zero_grad()
    yield tenant
    pool.drop("t").result()


def factors_of(tenant):
    return {
        f"{name}.lora_{which}": value.detach().clone()
        for name, pair in tenant.factors.items()
        for which, value in (("A", pair.a), ("B", pair.b))
    }


def difference(tenant, expected):
    """Relative difference of all gradients together."""
    found = {
        f"{name}.lora_{which}": value
        for name, pair in tenant.gradients.items()
        for which, value in zip("AB", pair, strict=True)
    }
    assert found.keys() == expected.keys()
    error = sum(float((found[name] - value).square().sum()) for name, value in expected.items())
    return (error / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


def test_a_fresh_adapter_is_that_of_stock_peft(pool, oracle):
    pool.create("fresh", SPEC).result()
    found = factors_of(pool._tenants["fresh"])
    assert found.keys() == oracle.fresh.keys()
    assert "lm_head.lora_A" in found
    for name, value in found.items():
        assert torch.equal(value, oracle.fresh[name]), name
        assert value.any() == ("lora_A" in name)
    pool.drop("fresh").result()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_the_formula(pool, oracle, tenant, loss):
    data = rows(LENGTHS, seed=5, kind=loss)
    found = pool.forward_backward("t", data, loss, CONFIGS[loss]).result()
    total, scored = oracle.backward(data, loss, CONFIGS[loss])
    assert found.metrics["loss:sum"] == pytest.approx(total, rel=1e-5)
    for own, expected in zip(found.logprobs, scored, strict=True):
        assert own.dtype == np.float32
        np.testing.assert_allclose(own, expected, atol=1e-5)
    assert difference(tenant, oracle.gradients()) < 1e-5


def test_a_fault_of_a_tenth_is_found(pool, oracle, tenant):
    data = rows(LENGTHS, seed=5)
    pool.forward_backward("t", data, "cross_entropy").result()
    oracle.backward(data, "cross_entropy", {}, scale=1.1)
    assert difference(tenant, oracle.gradients()) > 0.05


def test_clips_act_on_some_tokens_and_not_on_others(pool, tenant):
    data = rows(LENGTHS, seed=5, kind="ppo")
    scored = pool.forward_backward("t", data, "ppo", CONFIGS["ppo"], forward_only=True).result().logprobs
    ratios = np.exp(np.concatenate(scored) - np.concatenate([datum.inputs["logprobs"] for datum in data]))
    inside = (ratios > 0.7) & (ratios < 1.3)
    assert 0.1 < inside.mean() < 0.9
    assert tenant.gradients is None  # forward_only adds nothing


def test_soft_targets(pool, oracle, tenant):
    data = rows([9, 5], seed=6, soft=3) + rows([9], seed=7)
    found = pool.forward_backward("t", data, "cross_entropy").result()
    total, _ = oracle.backward(data, "cross_entropy", {})
    assert [one.shape for one in found.logprobs] == [(9, 3), (5, 3), (9,)]
    assert found.metrics["loss:sum"] == pytest.approx(total, rel=1e-5)
    assert difference(tenant, oracle.gradients()) < 1e-5


def test_gradients_are_sums_over_calls_and_micro_batches(pool, oracle, tenant, monkeypatch):
    monkeypatch.setattr(pool, "_micro_batch_tokens", 16)
    first, second = rows(LENGTHS, seed=5), rows([30, 3], seed=8, kind="ppo")
    batches = pool.status().batches
    pool.forward_backward("t", first, "cross_entropy")
    pool.forward_backward("t", second, "importance_sampling").result()
    assert pool.status().batches - batches == 6
    oracle.backward(first, "cross_entropy", {})
    oracle.backward(second, "importance_sampling", {})
    assert difference(tenant, oracle.gradients()) < 1e-5


def test_steps_are_those_of_torch_adamw_on_the_gradients_of_the_formula(pool, oracle, tenant):
    params = [p for p in oracle.peft.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(params, lr=2e-3, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1)
    ours = AdamParams(learning_rate=2e-3, beta1=0.8, beta2=0.9, eps=1e-8, weight_decay=0.1, grad_clip_norm=1.5)
    start = factors_of(tenant)
    for step in range(3):
        data = rows(LENGTHS, seed=step)
        pool.forward_backward("t", data, "cross_entropy")
        metrics = pool.optim_step("t", ours).result()
        oracle.peft.zero_grad()
        oracle.backward(data, "cross_entropy", {})
        norm = torch.nn.utils.clip_grad_norm_(params, 1.5)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert norm > 1.5  # else nothing is clipped
        adam.step()
    expected, found = oracle.factors(), factors_of(tenant)
    error = sum(float((found[name] - value).square().sum()) for name, value in expected.items()) ** 0.5
    moved = sum(float((start[name] - value).square().sum()) for name, value in expected.items()) ** 0.5
    assert error < 0.01 * moved
    assert tenant.gradients is None


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ({"train_mlp": False}, set(ALL[:4])),
        ({"train_attn": False}, set(ALL[4:])),
        ({"train_attn": False, "train_unembed": True}, {*ALL[4:], "lm_head"}),
    ],
)
def test_only_what_was_asked_for_is_trained(pool, spec, parts):
    pool.create("p", AdapterSpec(rank=2, seed=0, **spec)).result()
    tenant = pool._tenants["p"]
    assert {name.rpartition(".")[2] for name in tenant.factors} == parts
    assert all(len(pair.a) == 2 and pair.scale == 16.0 for pair in tenant.factors.values())
    pool.drop("p").result()


def test_a_loss_that_is_not_finite_changes_nothing(pool, tenant):
    before = factors_of(tenant)
    pool.forward_backward("t", rows(LENGTHS), "cross_entropy").result()
    kept = {name: (a.clone(), b.clone()) for name, (a, b) in tenant.gradients.items()}
    broken = rows([6, 6], kind="ppo")
    broken[1].inputs["logprobs"][3] = -200.0  # a ratio beyond fp32
    broken[1].inputs["advantages"][:] = 1.0
    with pytest.raises(TrainingError, match="row 1 of 't' is not finite, so nothing was added"):
        pool.forward_backward("t", broken, "importance_sampling").result()
    for name, pair in tenant.gradients.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, kept[name], strict=True))
    assert all(torch.equal(value, before[name]) for name, value in factors_of(tenant).items())


def spoilt(**inputs):
    datum = rows([5], kind=inputs.pop("kind", "cross_entropy"))[0]
    made = {**datum.inputs, **inputs}
    return [Datum(made.pop("tokens", datum.tokens), {name: value for name, value in made.items() if value is not None})]


@pytest.mark.parametrize(
    ("data", "loss", "config", "sentence"),
    [
        (spoilt(), "stable_reinforce", {}, "no published formula.*loss_fn='importance_sampling'"),
        (spoilt(), "ppoo", {}, "no loss 'ppoo'; did you mean 'ppo'"),
        (spoilt(kind="ppo"), "ppo", {"clip": 1.0}, "no setting 'clip'; its settings are: clip_low_threshold"),
        (spoilt(kind="ppo"), "ppo", {"clip_low_threshold": 2.0}, "may not be above the high one"),
        (spoilt(kind="ppo"), "ppo", {"clip_low_threshold": "low"}, "give a number"),
        (spoilt(kind="dro"), "dro", {}, "needs the setting 'beta'"),
        (spoilt(weights=None), "cross_entropy", {}, "Row 0 .* lacks 'weights'"),
        (spoilt(target_tokens=None), "cross_entropy", {}, "Row 0 .* lacks 'target_tokens'"),
        (spoilt(mask=np.ones(5)), "cross_entropy", {}, "holds 'mask', which the loss 'cross_entropy' does not read"),
        (spoilt(weights=np.ones(4)), "cross_entropy", {}, r"'weights' of shape \[4\]"),
        (spoilt(weights=np.full(5, np.nan)), "cross_entropy", {}, "NaN or infinity in 'weights'"),
        (spoilt(tokens=np.full(5, 4000)), "cross_entropy", {}, "token 4000 in 'tokens'"),
        (spoilt(tokens=np.full(5, 0.5)), "cross_entropy", {}, "give token ids"),
        (rows([300]), "cross_entropy", {}, "300 tokens; the base reads 256 at most"),
        ([], "cross_entropy", {}, "has no rows"),
        (spoilt(kind="gspo", sequence_ratio_mask=np.zeros(5)), "gspo", {}, "zeros only"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_refused_by_a_sentence(pool, tenant, data, loss, config, sentence):
    with pytest.raises(InputError, match=sentence):
        pool.forward_backward("t", data, loss, config).result()
    assert tenant.gradients is None


def test_sessions_are_refused_by_sentences(pool, tenant):
    with pytest.raises(InputError, match="'t' already"):
        pool.create("t", SPEC).result()
    with pytest.raises(InputError, match="would train nothing"):
        pool.create("n", AdapterSpec(rank=2, train_mlp=False, train_attn=False)).result()
    with pytest.raises(InputError, match="no training session 'n'"):
        pool.forward_backward("n", rows([5]), "cross_entropy").result()
    with pytest.raises(InputError, match="no gradients to apply"):
        pool.optim_step("t", AdamParams()).result()


def test_a_closed_pool_says_so(tiny_base_folder):
    pool = TrainingPool(find_base(str(tiny_base_folder)), dtype="fp32")
    pool.close()
    with pytest.raises(HaoriError, match="closed"):
        pool.create("t", SPEC).result()
