"""PEFT folders in and out of the neutral form, against what stock PEFT itself adds to each weight."""

import json
import warnings
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from haori.core.errors import FileFormatError, InputError
from haori.library.formats.peft import FORMAT
from haori.library.formats.registry import read_updates
from haori.library.updates import AdapterUpdates, ModuleUpdate

_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )).eval()  # fmt: skip


def llama_with_biases():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
    )).eval()  # fmt: skip


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32, num_labels=3,
    )).eval()  # fmt: skip


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(6, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 6, 1)
        self.line = nn.Conv1d(6, 8, 3)
        self.linear = nn.Linear(8, 12)

    def forward(self, x):
        return self.linear(self.line(self.point(self.first(x)).flatten(2)).mean(-1))


def moved(model, config):
    """Insert a method with stock PEFT and move every value that it trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, deepcopy(config)).eval()  # which a test may then change
    numbers = torch.Generator().manual_seed(7)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=numbers) * 0.2
    return adapted


def saved(adapted, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    return folder


def merged_differences(build, adapted):
    """Return by how much PEFT's merge changes each parameter, in float64."""
    before = {name: value.double() for name, value in build().state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = adapted.double().merge_and_unload()
    return {name: value.double() - before[name] for name, value in merged.state_dict().items() if name in before}


def lora(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": _ALL, **options})


CASES = {
    "lora": (llama, lora()),
    "rslora": (llama, lora(use_rslora=True)),
    "patterns": (
        llama,
        lora(
            rank_pattern={"v_proj": 2, r"layers\.1\..*k_proj": 3},
            alpha_pattern={"q_proj": 5, "1.self_attn.o_proj": 0.5},
        ),
    ),
    "rslora patterns": (llama, lora(use_rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 5})),
    "dora": (llama, lora(use_dora=True)),
    "lora bias": (llama_with_biases, lora(lora_bias=True)),
    "embedding": (llama, lora(target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "dora embedding": (llama, lora(target_modules=["q_proj", "embed_tokens"], use_dora=True)),
    "gpt2": (gpt2, lora(target_modules=["c_attn", "c_proj", "c_fc"])),
    "gpt2 dora": (gpt2, lora(target_modules=["c_attn", "c_proj"], use_dora=True)),
    "bert head": (bert, lora(target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")),
    "convolutions": (Convolutions, lora(target_modules=["first", "point", "line", "linear"])),
    "conv dora": (Convolutions, lora(target_modules=["first", "point", "linear"], use_dora=True)),
    "loha": (llama, LoHaConfig(r=3, alpha=5, target_modules=_ALL, rank_pattern={"v_proj": 2})),
    "loha conv": (Convolutions, LoHaConfig(r=2, alpha=3, target_modules=["first", "point", "linear"])),
    "loha tucker": (
        Convolutions,
        LoHaConfig(r=2, alpha=3, target_modules=["first", "linear"], use_effective_conv2d=True),
    ),
    "lokr": (llama, LoKrConfig(r=3, alpha=5, target_modules=_ALL, alpha_pattern={"v_proj": 2})),
    "lokr both": (llama, LoKrConfig(r=1, alpha=5, target_modules=["gate_proj", "q_proj"], decompose_both=True)),
    "lokr full": (llama, LoKrConfig(r=64, alpha=5, target_modules=["q_proj", "down_proj"])),
    "lokr conv": (Convolutions, LoKrConfig(r=1, alpha=3, target_modules=["first", "linear"])),
    "lokr tucker": (
        Convolutions,
        LoKrConfig(r=1, alpha=3, target_modules=["first", "linear"], use_effective_conv2d=True),
    ),
    "adalora": (
        llama,
        AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=["q_proj", "up_proj"]),
    ),
    "adalora gpt2": (
        gpt2,
        AdaLoraConfig(
            init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=["c_attn"], fan_in_fan_out=True
        ),
    ),
}
# The file does not tell the kernel of the convolution, which PEFT's layout for whole factors has.
_NOT_WRITTEN = {"lokr conv"}


def changes(updates: AdapterUpdates, weights):
    return {
        name: update.change(weights[f"{name.removeprefix('model.')}.weight"].double())
        for name, update in updates.modules.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_what_stock_peft_adds(case, tmp_path):
    build, config = CASES[case]
    adapted = moved(build(), config)
    folder = saved(adapted, tmp_path / "peft")
    updates = read_updates(folder)
    assert updates.format == "peft" and updates.components == ("model",)
    expected = merged_differences(build, adapted)
    weights = build().state_dict()
    found = changes(updates, weights)
    touched = {name for name, value in expected.items() if value.abs().max() > 0}
    assert touched  # or there would be nothing to compare
    seen = set()
    for name, change in found.items():
        key = f"{name.removeprefix('model.')}.weight"
        scale = expected[key].abs().max()
        assert scale > 1e-3
        assert (change - expected[key]).abs().max() <= 1e-6 * max(1.0, scale), name
        seen.add(key)
        bias = updates.modules[name].bias
        if bias is not None:
            assert (bias.double() - expected[f"{name.removeprefix('model.')}.bias"]).abs().max() < 1e-6
            seen.add(f"{name.removeprefix('model.')}.bias")
    whole = {name.removeprefix("model.") for name in updates.extra}
    assert touched - seen <= whole
    for name, tensor in updates.extra.items():
        key = name.removeprefix("model.").replace(".base_layer.", ".")
        value = tensor.double() - weights[key].double()
        if key not in seen:
            assert (value - expected[key]).abs().max() < 1e-6


@pytest.mark.parametrize("case", [case for case in CASES if case not in _NOT_WRITTEN])
def test_what_is_written_loads_in_stock_peft_and_adds_the_same(case, tmp_path):
    build, config = CASES[case]
    adapted = moved(build(), config)
    updates = read_updates(saved(adapted, tmp_path / "peft"))
    FORMAT.write(updates, tmp_path / "out")
    expected = merged_differences(build, adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(build(), tmp_path / "out").eval()
    found = merged_differences(build, loaded)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-6 * max(1.0, value.abs().max()), name
    again = read_updates(tmp_path / "out")
    assert again.modules.keys() == updates.modules.keys() and again.extra.keys() == updates.extra.keys()


def test_every_name_in_the_patterns_is_one_module(tmp_path):
    build, config = CASES["patterns"]
    FORMAT.write(read_updates(saved(moved(build(), config), tmp_path / "peft")), tmp_path / "out")
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert written["rank_pattern"]["model.layers.0.self_attn.v_proj"] == 2
    assert written["rank_pattern"]["model.layers.1.self_attn.k_proj"] == 3
    assert len(written["target_modules"]) == 14 and "model.layers.1.mlp.up_proj" in written["target_modules"]


def test_a_name_that_ends_another_takes_no_rank_from_it(tmp_path):
    def update(rank):
        return ModuleUpdate("lora", {"A": torch.randn(rank, 8), "B": torch.randn(12, rank)}, float(rank))

    names = {"model.linear": update(2), "model.inner.linear": update(3), "model.other": update(4), "model.x": update(3)}
    FORMAT.write(AdapterUpdates(names), tmp_path / "out")
    again = read_updates(tmp_path / "out")
    assert {name: u.rank for name, u in again.modules.items()} == {name: u.rank for name, u in names.items()}


def test_adalora_with_ranks_taken_away(tmp_path):
    adapted = moved(llama(), CASES["adalora"][1])
    pattern = {}
    for name, module in adapted.base_model.model.named_modules():
        if hasattr(module, "lora_E") and "default" in module.lora_E:
            pattern[f"{name}.lora_E.default"] = [True, False, True, True]
            module.lora_E["default"].data[1] = 0.0
    adapted.peft_config["default"].rank_pattern = pattern
    folder = saved(adapted, tmp_path / "peft")
    updates = read_updates(folder)
    assert updates.ranks == (3,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(llama(), folder).eval()
    expected = merged_differences(llama, loaded)
    for name, change in changes(updates, llama().state_dict()).items():
        assert (change - expected[f"{name.removeprefix('model.')}.weight"]).abs().max() < 1e-6


def test_a_rank_learnt_by_ard_lora(tmp_path):
    from haori.adapters.ard_lora import ArdLoraConfig

    adapted = moved(llama(), ArdLoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    updates = read_updates(saved(adapted, tmp_path / "peft"))
    expected = merged_differences(llama, adapted)
    found = changes(updates, llama().state_dict())
    assert len(found) == 4
    for name, change in found.items():
        value = expected[f"{name.removeprefix('model.')}.weight"]
        assert value.abs().max() > 1e-3 and (change - value).abs().max() < 1e-6


def test_a_weight_file_alone_is_read_with_scale_one_or_its_alphas(tmp_path):
    tensors = load_file(saved(moved(llama(), lora()), tmp_path / "peft") / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "alone.safetensors")
    alone = read_updates(tmp_path / "alone.safetensors")
    name = "model.model.layers.1.mlp.up_proj"
    a, b = (tensors[f"base_model.{name}.lora_{which}.weight"].double() for which in "AB")
    assert torch.equal(alone.modules[name].delta(), b @ a)
    save_file({**tensors, f"base_model.{name}.alpha": torch.tensor(3.0)}, tmp_path / "alphas.safetensors")
    assert torch.allclose(read_updates(tmp_path / "alphas.safetensors").modules[name].delta(), b @ a * 0.75)
    beside = read_updates(tmp_path / "peft/adapter_model.safetensors")  # its configuration stands beside it
    assert torch.allclose(beside.modules[name].delta(), b @ a * 1.5)


def test_the_layers_of_gpt2_are_told_by_the_base_or_refused(tmp_path):
    updates = read_updates(saved(moved(gpt2(), CASES["gpt2"][1]), tmp_path / "peft"))
    told = AdapterUpdates(updates.modules)
    with pytest.raises(InputError, match="kept transposed in GPT-2 and not in other models; give the base"):
        FORMAT.write(told, tmp_path / "out")
    FORMAT.write(told, tmp_path / "gpt2", base_config={"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    FORMAT.write(told, tmp_path / "other", base_config={"model_type": "gpt_bigcode"})
    first, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("gpt2", "other"))
    key = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    assert first[key].shape == (4, 32) and other[key].shape == (4, 96)


REFUSED = {
    "vera": (
        lambda: VeraConfig(r=4, target_modules=["q_proj"]),
        "method vera; what it adds to a weight cannot be told",
    ),
    "ia3": (lambda: IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "method ia3; what it adds"),
    "prefix": (lambda: PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "method prefix_tuning"),
    "tokens": (lambda: lora(trainable_token_indices=[1, 2]), "rows of an embedding as they are"),
    "replicated": (lambda: lora(layer_replication=[[0, 2], [1, 2]]), "repeats layers of the base"),
    "pissa": (lambda: lora(init_lora_weights="pissa"), "its start 'pissa' had changed"),
    "biases": (lambda: lora(bias="lora_only"), "holds the trained bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_file_does_not_tell_is_refused(case, tmp_path):
    config, message = REFUSED[case]
    folder = saved(moved(llama_with_biases(), config()), tmp_path / "peft")
    with pytest.raises(FileFormatError, match=message):
        read_updates(folder)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)


@pytest.mark.parametrize(
    ("target", "message"),
    [("attention", "a part of PyTorch's own attention"), ("grouped", r"the shape .* of its lora_B.weight has another")],
)
def test_layers_whose_change_is_no_product_are_refused(target, message, tmp_path):
    folder = saved(moved(Attention(), lora(target_modules=[target])), tmp_path / "peft")
    with pytest.raises(FileFormatError, match=message):
        read_updates(folder)


def test_a_key_that_is_no_part_is_named(tmp_path):
    folder = saved(moved(llama(), lora()), tmp_path / "peft")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    for added, message in (
        ({f"{key}.lora_C.weight": torch.zeros(2)}, "lora_C.weight', which is no part of a lora adapter"),
        ({f"{key}.alpha": torch.ones(())}, "q_proj.alpha', which is no part"),
        ({f"{key}.lora_magnitude_vector": torch.ones(32)}, "differ on whether .* has a magnitude"),
        (
            {f"{key}.lora_A.weight": torch.ones(4, 31), f"{key}.lora_B.weight": torch.ones(32)},
            "another; correct 'r'|fewer",
        ),
    ):
        save_file({**tensors, **added}, path)
        with pytest.raises(FileFormatError, match=message):
            read_updates(folder)
    del tensors[f"{key}.lora_B.weight"]
    save_file(tensors, path)
    with pytest.raises(FileFormatError, match=r"holds of .*q_proj' A, which is no whole update"):
        read_updates(folder)


def test_what_a_folder_cannot_hold_is_refused(tmp_path):
    a, b = torch.randn(2, 8), torch.randn(12, 2)
    plain = ModuleUpdate("lora", {"A": a, "B": b}, 2.0)
    dora = ModuleUpdate("lora", {"A": a, "B": b}, 2.0, magnitude=torch.ones(12))
    by_input = ModuleUpdate("lora", {"A": a, "B": b}, 2.0, magnitude=torch.ones(1, 8))
    diff = ModuleUpdate("diff", {"diff": torch.randn(12, 8)})
    odd = ModuleUpdate("lokr", {"w1": torch.randn(6, 3), "w2": torch.randn(2, 4)})
    for modules, message in (
        ({}, "changes nothing"),
        ({"model.a": plain, "model.b": dora}, "on all modules of an adapter or on none"),
        ({"model.a": by_input}, r"magnitude of 'a' is of shape \[1, 8\]"),
        ({"model.a": diff}, "whole differences .* have no place in it"),
        ({"model.a": odd}, "splits all weights by one number"),
    ):
        with pytest.raises(InputError, match=message):
            FORMAT.write(AdapterUpdates(modules), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"no place for 'model\.vectors'"):
        FORMAT.write(AdapterUpdates({"model.a": plain}, extra={"model.vectors": a}), tmp_path / "out")


@settings(max_examples=60)
@given(data=st.data())
def test_a_round_trip_through_a_folder_changes_no_update(data, tmp_path_factory):
    draw = data.draw
    kind = draw(st.sampled_from(["lora", "dora", "bias", "rslora", "loha", "conv", "tucker"]))
    alphas = st.one_of(st.none(), st.floats(0.015625, 64, width=32))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def values(*shape):
        return torch.randn(shape, generator=numbers)

    modules = {}
    names = ["model.layers.1.q", "model.layers.11.q", "model.x.layers.1.q", "model.embed_tokens", "model.a-b.c"]
    for name in draw(st.lists(st.sampled_from(names), min_size=1, unique=True)):
        rank, out, inputs = (draw(st.integers(1, most)) for most in (5, 9, 9))
        alpha, kernel = draw(alphas), (3, 1) if kind in {"conv", "tucker"} and "embed" not in name else ()
        factors = {"A": values(rank, inputs, *kernel), "B": values(out, rank, *[1] * len(kernel))}
        more = {}
        if kind == "tucker" and kernel:
            factors = {
                "A": values(rank, inputs, 1, 1),
                "B": values(out, rank, 1, 1),
                "mid": values(rank, rank, *kernel),
            }
        if kind == "loha":
            factors = {"w1_a": values(out, rank), "w1_b": values(rank, inputs), "w2_a": values(out, rank)}
            factors["w2_b"] = values(rank, inputs)
        if kind == "dora":
            more["magnitude"] = values(1, inputs) if "embed" in name else values(out)
        if kind == "bias" and "embed" not in name:
            more["bias"] = values(out) if draw(st.booleans()) else None
        modules[name] = ModuleUpdate("loha" if kind == "loha" else "lora", factors, alpha, kind == "rslora", **more)
    biased = any(update.bias is not None for update in modules.values())
    if biased:
        modules.pop("model.embed_tokens", None)
    folder = tmp_path_factory.mktemp("peft") / "out"
    FORMAT.write(AdapterUpdates(modules), folder)
    again = read_updates(folder)
    assert again.modules.keys() == modules.keys()
    for name, update in modules.items():
        found, expected = again.modules[name], update.delta()
        assert (found.delta() - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max())
        if update.magnitude is not None:
            assert torch.equal(found.magnitude, update.magnitude)
        if biased:
            bias = torch.zeros(1) if update.bias is None else update.bias
            assert (found.bias - bias).abs().max() < 1e-5
