"""ARD-LoRA against stock PEFT: equal to LoRA at its start rank, equal per head to the formula, equal once exported."""

import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from haori.adapters.ard_lora import ArdLoraConfig, ArdLoraLayer, to_lora
from haori.adapters.ard_lora.gates import rho_of_rank
from haori.bases import find_base
from haori.library import Library, attach, import_adapter, merge_adapter
from tests.library_samples import PROBES, run, save_stock, stock_logits

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 4


def fresh(base, config, dtype=torch.float32):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        return get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), config).eval()


def ard(base, dtype=torch.float32, **options):
    options = {"r": RANK, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    return fresh(base, ArdLoraConfig(**options), dtype)


def lora(base, dtype=torch.float32):
    config = LoraConfig(r=RANK, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    return fresh(base, config, dtype)


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, ArdLoraLayer)}


def fill(model, *, ranks=None, seed=0):
    """Give every parameter a value, and every head a rank, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model).values():
        for part in (layer.lora_A, layer.lora_B):
            weight = part["default"].weight
            weight.data = torch.randn(weight.shape, generator=generator) * 0.1
        if ranks is not None:
            rho = layer.ard_rho["default"]
            chosen = ranks(rho.numel(), generator)
            rho.data = torch.tensor([rho_of_rank(float(rank), RANK) for rank in chosen])
    return model


def whole(heads, generator):
    return torch.randint(1, 2 * RANK + 1, (heads,), generator=generator)


def soft(heads, generator):
    return torch.rand(heads, generator=generator) * (2 * RANK - 1) + 1


def twins(base, dtype=torch.float32):
    """Return ARD-LoRA with its ranks at rest, and stock LoRA with the same A and B."""
    ours, stock = fill(ard(base, dtype)), lora(base, dtype)
    for name, layer in layers(ours).items():
        twin = stock.get_submodule(name)
        layer.learning = False
        for part, cut in (("lora_A", (slice(RANK),)), ("lora_B", (slice(None), slice(RANK)))):
            getattr(twin, part)["default"].weight.data = getattr(layer, part)["default"].weight.data[cut].clone()
    return ours, stock


def close(x, y, digits):
    """Compare up to rounding, relative to the largest value."""
    return float((x - y).detach().abs().max()) <= digits * float(y.detach().abs().max())


def loss_of(model, probe=0):
    ids = torch.tensor([PROBES[probe]])
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_start_rank_it_is_lora(dtype, autocast, tiny_base_folder):
    ours, stock = twins(tiny_base_folder, dtype)
    digits = 1e-5 if dtype is torch.float32 and not autocast else 2e-2
    for model in (ours, stock):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss_of(model).backward()
    for name, layer in layers(ours).items():
        twin = stock.get_submodule(name)
        a, b = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
        assert b[:, :RANK].abs().max() > 0
        assert close(a[:RANK], twin.lora_A["default"].weight.grad, digits) and not a[RANK:].any()
        assert close(b[:, :RANK], twin.lora_B["default"].weight.grad, digits) and not b[:, RANK:].any()
        assert not layer.ard_rho["default"].grad.any()
    assert all(close(x, y, digits) for x, y in zip(run(ours), run(stock), strict=True))


def test_five_steps_at_rest_are_those_of_lora(tiny_base_folder):
    ours, stock = twins(tiny_base_folder)
    started = {
        name: (layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone())
        for name, layer in layers(ours).items()
    }
    for model in (ours, stock):
        trained = [p for name, p in model.named_parameters() if p.requires_grad and "ard_rho" not in name]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
        for step in range(5):
            loss_of(model, step % 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, layer in layers(ours).items():
        twin = stock.get_submodule(name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert close(a[:RANK], twin.lora_A["default"].weight, 1e-4)
        assert close(b[:, :RANK], twin.lora_B["default"].weight, 1e-4)
        assert torch.equal(a[RANK:], started[name][0][RANK:]) and torch.equal(b[:, RANK:], started[name][1][:, RANK:])


def by_the_formula(layer, x):
    """Compute W x + s B_h diag(g_h) A x head by head; for o_proj each head is a block of inputs."""
    a, b, rho = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.ard_rho["default"]
    index = torch.arange(1, 2 * RANK + 1)
    parts = []
    for head, amount in enumerate(RANK * functional.softplus(rho)):
        g = torch.where(index == 1, 1.0, (amount - index + 1).clamp(0, 1))
        if layer.layouts["default"].side == "columns":
            block = slice(head * x.shape[-1] // len(rho), (head + 1) * x.shape[-1] // len(rho))
            parts.append((x[:, block] @ a[:, block].T * g) @ b.T)
        else:
            block = slice(head * len(b) // len(rho), (head + 1) * len(b) // len(rho))
            parts.append((x @ a.T * g) @ b[block].T)
    added = sum(parts) if layer.layouts["default"].side == "columns" else torch.cat(parts, 1)
    return functional.linear(x, layer.base_layer.weight) + layer.scaling["default"] * added


@pytest.mark.parametrize("ranks", [whole, soft])
def test_output_and_gradients_follow_the_formula_head_by_head(ranks, tiny_base_folder):
    for name, layer in layers(fill(ard(tiny_base_folder), ranks=ranks)).items():
        trained = [layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.ard_rho["default"]]
        expected = {"q_proj": 4, "o_proj": 4, "k_proj": 2, "v_proj": 2}.get(name.rpartition(".")[2], 1)
        assert trained[2].numel() == expected  # 4 heads over 2 key-value heads
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1))
        weights = torch.randn(5, layer.out_features, generator=torch.Generator().manual_seed(2))
        y, theirs = layer(x), by_the_formula(layer, x)
        assert close(y, theirs, 1e-4)
        for ours, other in zip(*(torch.autograd.grad((o * weights).sum(), trained) for o in (y, theirs)), strict=True):
            # At whole ranks the gate is at a corner, where its derivative is a matter of rounding.
            if ranks is soft or ours.ndim == 2:
                assert close(ours, other, 1e-3)


@pytest.mark.parametrize("ranks", [whole, soft])
@pytest.mark.parametrize("pruned", [False, True])
def test_saved_and_loaded_it_is_the_same(pruned, ranks, tiny_base_folder, tmp_path):
    model = fill(ard(tiny_base_folder), ranks=ranks)
    before = run(model)
    if pruned:
        model.base_model.prune()
    assert all(torch.equal(x, y) for x, y in zip(run(model), before, strict=True))  # pruning loses nothing
    folder = save_stock(model, tmp_path / "a")
    assert all(torch.equal(x, y) for x, y in zip(stock_logits(tiny_base_folder, folder), before, strict=True))
    rho = [key for key in load_file(folder / "adapter_model.safetensors") if "rho" in key]
    assert len(rho) == (0 if pruned else 14)


def test_pruning_shrinks_the_factors_to_the_largest_head(tiny_base_folder):
    model = fill(ard(tiny_base_folder), ranks=whole)
    expected = {n: [round(RANK * float(functional.softplus(r))) for r in m.ard_rho["default"].detach()]
                for n, m in layers(model).items()}  # fmt: skip
    ranks = model.base_model.prune()
    config = model.peft_config["default"]
    assert {f"base_model.model.{name}": found for name, found in ranks.items()} == expected
    assert config.rank_pattern == {name: max(found) for name, found in ranks.items()}
    for name, layer in layers(model).items():
        a, b, _ = layer.factors("default")
        assert a.shape[0] == b.shape[1] == max(expected[name])


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("ranks", [whole, soft])
def test_as_plain_lora_it_is_the_same(ranks, pruned, tiny_base_folder, tmp_path):
    model = fill(ard(tiny_base_folder), ranks=ranks)
    before = run(model)
    if pruned:
        model.base_model.prune()
    folder = save_stock(model, tmp_path / "a")
    for source in (folder, model):
        config, tensors = to_lora(source)
        stock = fresh(tiny_base_folder, config)
        loaded = set_peft_model_state_dict(stock, tensors)
        assert not loaded.unexpected_keys and not [k for k in loaded.missing_keys if "lora" in k]
        for x, y in zip(run(stock), before, strict=True):
            assert torch.allclose(x, y, atol=1e-6)


def test_merging_and_taking_back(tiny_base_folder):
    model = fill(ard(tiny_base_folder), ranks=soft)
    live = run(model)
    with model.disable_adapter():
        base = run(model)
    model.merge_adapter()
    assert max(float((x - y).abs().max()) for x, y in zip(run(model), live, strict=True)) < 1e-5
    model.unmerge_adapter()
    assert max(float((x - y).abs().max()) for x, y in zip(run(model), live, strict=True)) < 1e-5
    assert max(float((x - y).abs().max()) for x, y in zip(base, live, strict=True)) > 1e-2


def test_two_adapters_and_deleting_one(tiny_base_folder):
    model = fill(ard(tiny_base_folder), ranks=soft)
    first = run(model)
    model.add_adapter("other", ArdLoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("other")
    with model.disable_adapter():
        base = run(model)
    assert all(torch.equal(x, y) for x, y in zip(run(model), base, strict=True))  # its B is zero
    model.set_adapter("default")
    model.delete_adapter("other")
    assert all(torch.equal(x, y) for x, y in zip(run(model), first, strict=True))


_STOCK = """
import sys
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, folder, probe = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
assert not [name for name in sys.modules if name.startswith("haori")]
with torch.no_grad():
    ids = torch.tensor([[int(i) for i in probe.split(",")]])
    torch.save(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -8:], folder + "/logits.pt")
"""


def test_from_the_library_it_leaves_as_plain_lora(tiny_base_folder, tmp_path):
    model = fill(ard(tiny_base_folder, modules_to_save=["model.norm"]), ranks=whole)
    model.get_submodule("base_model.model.model.norm").modules_to_save["default"].weight.data *= 1.1
    model.base_model.prune()
    expected = run(model)
    base = find_base(str(tiny_base_folder))
    stored = import_adapter(save_stock(model, tmp_path / "a"), base, name="ranks", dtype="fp32")
    assert stored.card.verification.passed
    checks = {check.name: check.detail for check in stored.card.verification.checks}
    assert "15 of 15 modules changed" in checks["delta"]
    assert torch.equal(run(attach(base, stored.path, dtype="fp32"))[0], expected[0])
    out = Library().export("ranks", tmp_path / "out")
    code = [sys.executable, "-W", "ignore", "-c", _STOCK, str(tiny_base_folder), str(out)]
    subprocess.run([*code, ",".join(map(str, PROBES[0]))], check=True, capture_output=True)
    assert torch.allclose(torch.load(out / "logits.pt"), expected[0], atol=1e-6)


def test_from_the_library_it_merges(tiny_base_folder, tmp_path):
    model = fill(ard(tiny_base_folder), ranks=whole)
    model.base_model.prune()
    merged = merge_adapter(find_base(str(tiny_base_folder)), save_stock(model, tmp_path / "a"), tmp_path / "merged")
    assert merged.verification.passed


@pytest.mark.parametrize("ranks", [whole, soft])
def test_the_fused_path_computes_the_same(ranks, tiny_base_folder):
    from haori.adapters.fused import fuse

    model = fill(ard(tiny_base_folder), ranks=ranks).train()
    found = []
    for fused in (None, fuse):
        path = fused(model) if fused else None
        loss = loss_of(model)
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
        if path is not None:
            assert path.report.fused["linear layers"] == 14
            path.remove()
    (slow, expected), (fast, gradients) = found
    assert torch.allclose(slow, fast, rtol=1e-5) and expected.keys() == gradients.keys()
    assert all(close(gradients[name], expected[name], 1e-3) for name in expected if ranks is soft or "rho" not in name)
