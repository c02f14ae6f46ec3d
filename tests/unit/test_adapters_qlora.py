"""QLoRA: the memory it saves, gradients through quantised layers, LoftQ, and what it refuses before loading."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from haori.adapters.insertion import Insertion
from haori.adapters.methods import behaviour_of, check_method, check_plan, insert_method
from haori.adapters.qlora import base_bytes
from haori.bases import find_base, linear_modules, load_model, load_skeleton, weight_bytes
from haori.core.errors import BaseError, InputError, MissingExtraError
from haori.core.methods import QloraMethod
from haori.core.quantization import Quantization

pytest.importorskip("bitsandbytes")

IDS = torch.arange(5, 25)[None]


def method(**settings: object) -> QloraMethod:
    return QloraMethod.model_validate({"kind": "qlora", "rank": 4, "alpha": 8.0, **settings})


def quantised(folder: Path, wanted: QloraMethod, dtype: str = "fp32"):
    quantization = Quantization(wanted.bits, wanted.double_quantization)
    return load_model(find_base(str(folder)), dtype=dtype, device="cpu", quantization=quantization)


def adapted(folder: Path, wanted: QloraMethod, dtype: str = "fp32"):
    model = quantised(folder, wanted, dtype)
    return insert_method(
        model, AutoTokenizer.from_pretrained(folder), wanted, linear_modules(load_skeleton(find_base(str(folder)))),
        Insertion(0, 10),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "share"), [({}, 0.26), ({"double_quantization": False}, 0.285), ({"bits": 8}, 0.53)]
)
def test_linear_weights_shrink_and_the_rest_stays_in_16_bits(tiny_base_folder: Path, settings, share: float):
    wanted = method(**settings)
    base = find_base(str(tiny_base_folder))
    model = quantised(tiny_base_folder, wanted, "bf16")
    before, after, label = base_bytes(load_skeleton(base), wanted, "bf16")
    assert str(wanted.bits) in label
    assert before == weight_bytes(load_model(base, dtype="bf16", device="cpu"))
    assert after == weight_bytes(model)
    kept = [p for p in model.parameters() if p.is_floating_point()]
    assert {p.dtype for p in kept} == {torch.bfloat16}
    rest = sum(2 * p.numel() for p in kept)
    assert (after - rest) / (before - rest) <= share
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_nf4_takes_at_most_35_percent_of_smollm2s_linear_weights():
    """SmolLM2-135M by its configuration: 106 of its 135 million weights are linear."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    before, after, _ = base_bytes(skeleton, method(), "bf16")
    linear = sum(skeleton.get_submodule(name).weight.numel() for name in linear_modules(skeleton))
    assert linear == 106_168_320
    assert (after - (before - 2 * linear)) / (2 * linear) <= 0.35


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_validation_leaves_later_gradients_alone(tiny_base_folder: Path, bits: int, dtype: str):
    """bitsandbytes repacks 4-bit weights at the first forward in eval mode, and would pass no gradient from then on."""
    model = adapted(tiny_base_folder, method(bits=bits), dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)

    def gradients() -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        model(IDS).logits.float().square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    first = gradients()
    assert len(first) == 2 * len(linear_modules(load_skeleton(find_base(str(tiny_base_folder)))))
    held = weight_bytes(model)
    model.eval()
    with torch.no_grad():
        model(IDS)
    again = gradients()
    assert len(again) == len(first)
    assert all(torch.equal(a, b) and bool(a.any()) for a, b in zip(first, again, strict=True))
    assert weight_bytes(model) == held


def test_loftq_begins_at_the_best_approximation_of_what_was_lost(tiny_base_folder: Path):
    from bitsandbytes.functional import dequantize_4bit

    whole = load_model(find_base(str(tiny_base_folder)), dtype="fp32", device="cpu")
    model = adapted(tiny_base_folder, method(init="loftq"))
    for name in linear_modules(whole):
        layer = model.get_base_model().get_submodule(name)
        weight = layer.get_base_layer().weight
        lost = whole.get_submodule(name).weight - dequantize_4bit(weight.data, weight.quant_state)
        left = lost - layer.get_delta_weight("default")
        # Eckart and Young: no matrix of rank 4 leaves less than the smaller singular values.
        best = torch.linalg.svdvals(lost)[4:].square().sum().sqrt()
        torch.testing.assert_close(left.norm(), best, rtol=1e-4, atol=1e-6)
        assert left.norm() < lost.norm()


@pytest.mark.parametrize("rslora", [False, True])
def test_loftq_ends_as_an_adapter_of_the_base_itself(tiny_base_folder: Path, rslora: bool):
    wanted = method(init="loftq", rslora=rslora)
    model = adapted(tiny_base_folder, wanted)
    behaviour = behaviour_of(model, wanted, 10)
    start = {n: m.get_delta_weight("default").detach() for n, m in model.named_modules() if hasattr(m, "lora_A")}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    end = {n: m.get_delta_weight("default").detach() for n, m in model.named_modules() if hasattr(m, "lora_A")}
    behaviour.finish()
    for name, before in start.items():
        layer = model.get_submodule(name)
        assert layer.r["default"] == 8
        torch.testing.assert_close(layer.get_delta_weight("default"), end[name] - before, rtol=1e-4, atol=1e-6)


def test_loftq_reads_files_that_leave_out_the_inner_models_name(tmp_path: Path, tiny_base_folder: Path):
    from safetensors.torch import load_file, save_file

    from tests.conftest import build_tiny_base

    base = build_tiny_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    short = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(short, base / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = (adapted(folder, method(init="loftq")) for folder in (base, tiny_base_folder))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def refusal(folder: Path, wanted: QloraMethod) -> str:
    skeleton = load_skeleton(find_base(str(folder)))
    with pytest.raises((InputError, MissingExtraError)) as caught:
        check_method(skeleton, AutoTokenizer.from_pretrained(folder), wanted, linear_modules(skeleton))
    return str(caught.value)


def test_misfits_are_sentences_before_weights_are_loaded(tiny_base_folder: Path):
    said = refusal(tiny_base_folder, method(modules_to_save=("down_proj",)))
    assert "'down_proj' is held in 4 bits" in said
    assert "method.bits to 4" in refusal(tiny_base_folder, method(init="loftq", bits=8))
    skeleton = load_skeleton(find_base(str(tiny_base_folder)))
    check_plan(skeleton, method(init="loftq", rank=32), linear_modules(skeleton), 10)
    with pytest.raises(InputError, match=r"has only 32 of them; method\.rank cannot be 48"):
        check_plan(skeleton, method(init="loftq", rank=48), linear_modules(skeleton), 10)


def test_without_bitsandbytes_the_install_line_is_named(tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # what Python itself keeps for a module that is not there
    said = refusal(tiny_base_folder, method())
    assert "pip install 'haori[quantization]'" in said
    with pytest.raises(MissingExtraError):
        quantised(tiny_base_folder, method())


def gpt2(folder: Path, tokenizer) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_gpt2s_transposed_layers_are_quantised_and_trained_but_have_no_loftq(tmp_path: Path, tiny_tokenizer):
    base = gpt2(tmp_path / "gpt2", tiny_tokenizer)
    found = find_base(str(base))
    before, after, _ = base_bytes(load_skeleton(found), method(), "bf16")
    model = quantised(base, method(), "bf16")
    assert weight_bytes(model) == after < before
    whole = load_model(found, dtype="fp32", device="cpu")
    exact = whole(IDS).logits
    assert (model(IDS).logits.float() - exact).std() < 0.5 * exact.std()
    adapted(base, method())(IDS).logits.float().square().mean().backward()
    assert "not defined for 'transformer.h.0.attn.c_attn', a Conv1D" in refusal(base, method(init="loftq"))


def test_a_base_that_is_stored_quantised_is_not_quantised_again(tmp_path: Path, tiny_base_folder: Path):
    model = quantised(tiny_base_folder, method())
    model.save_pretrained(tmp_path / "stored")
    AutoTokenizer.from_pretrained(tiny_base_folder).save_pretrained(tmp_path / "stored")
    with pytest.raises(BaseError, match="is stored quantised"):
        quantised(tmp_path / "stored", method())
