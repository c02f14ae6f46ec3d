"""What the library stores, reloads, exports and merges against stock PEFT and transformers alone."""

import json
import warnings

import pytest

from haori.bases import find_base
from haori.library import Library, attach, compare_logits, import_adapter, live_probe_logits, merge_adapter
from haori.library.merge import MERGE_RECORD
from tests.library_samples import PROBES, run, save_stock, stock_logits, stock_model

_TARGETS = ["q_proj", "v_proj"]


def _configs():
    import peft

    def lora(**options):
        return peft.LoraConfig(**{"r": 4, "target_modules": _TARGETS, "task_type": "CAUSAL_LM", **options})

    return {
        "lora": lora(),
        "rslora": lora(use_rslora=True, target_modules="all-linear"),
        "patterns": lora(rank_pattern={"v_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 32}),
        "regex": lora(target_modules=r".*layers\.1\..*_proj"),
        "dora": lora(use_dora=True, target_modules="all-linear"),
        "head": lora(modules_to_save=["lm_head"]),
        "norms": lora(modules_to_save=["input_layernorm"]),
        "tokens": lora(trainable_token_indices=[3, 4]),
        "embedding": lora(target_modules=[*_TARGETS, "embed_tokens"]),
        "pissa": lora(init_lora_weights="pissa"),
        "no task": lora(task_type=None),
        "loha": peft.LoHaConfig(target_modules=_TARGETS, r=4, task_type="CAUSAL_LM"),
        "lokr": peft.LoKrConfig(target_modules=_TARGETS, r=4, task_type="CAUSAL_LM"),
        "ia3": peft.IA3Config(target_modules=_TARGETS, feedforward_modules=[], task_type="CAUSAL_LM"),
        "vera": peft.VeraConfig(target_modules=["q_proj"], r=4, task_type="CAUSAL_LM"),
        "oft": peft.OFTConfig(target_modules=_TARGETS, oft_block_size=8, task_type="CAUSAL_LM"),
        "vblora": peft.VBLoRAConfig(target_modules=["q_proj"], r=4, vector_length=8, num_vectors=16),
        "adalora": peft.AdaLoraConfig(target_modules=_TARGETS, total_step=10, init_r=4, target_r=2),
        "token delta": peft.TrainableTokensConfig(token_indices=[1, 2, 3], task_type="CAUSAL_LM"),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    }


_NAMES = (
    "lora", "rslora", "patterns", "regex", "dora", "head", "norms", "tokens", "embedding", "pissa", "no task", "loha",
    "lokr", "ia3", "vera", "oft", "vblora", "adalora", "token delta", "prefix",
)  # fmt: skip
_MERGED = ("lora", "rslora", "patterns", "dora", "head", "tokens", "embedding", "lokr")


def saved(kind, base_folder, tmp_path):
    model = stock_model(base_folder, _configs()[kind])
    return save_stock(model, tmp_path / "stock"), run(model)


def difference(first, second) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", _NAMES)
def test_stock_adapters_go_in_and_out_unchanged(kind, tiny_base_folder, tmp_path):
    folder, expected = saved(kind, tiny_base_folder, tmp_path)
    base = find_base(str(tiny_base_folder))
    stored = import_adapter(folder, base, name="stock", dtype="fp32")
    assert stored.card.origin == "added" and stored.card.verification.passed
    reloaded = live_probe_logits(attach(base, stored.path, dtype="fp32"), PROBES)
    assert difference(reloaded, expected) == 0.0
    out = Library().export("stock", tmp_path / "out")
    assert difference(stock_logits(tiny_base_folder, out), expected) == 0.0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", _MERGED)
def test_merged_folders_compute_what_the_adapter_does(kind, dtype, tiny_base_folder, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, expected = saved(kind, tiny_base_folder, tmp_path)
    (folder / "chat_template.jinja").write_text("{{ 'my own template' }}")
    merged = merge_adapter(find_base(str(tiny_base_folder)), folder, tmp_path / "merged", dtype=dtype)
    assert merged.verification.passed and merged.verification.dtype == dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(merged.path).eval()
    assert model.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert compare_logits(expected, run(model.float())).rms < {"bf16": 0.02, "fp16": 0.003}[dtype]
    assert AutoTokenizer.from_pretrained(merged.path).chat_template == "{{ 'my own template' }}"
    record = json.loads((merged.path / MERGE_RECORD).read_text())
    assert record["verification"]["passed"] and record["base"]["fingerprint"]["structure"].startswith("sha256:")
    assert not list(merged.path.glob("adapter_*"))


def test_auto_keeps_the_16_bit_dtype_of_the_base(tiny_base_folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype="float16").save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny_base_folder).save_pretrained(half)
    folder, _ = saved("lora", tiny_base_folder, tmp_path)
    assert merge_adapter(find_base(str(half)), folder, tmp_path / "a").verification.dtype == "fp16"
    assert merge_adapter(find_base(str(tiny_base_folder)), folder, tmp_path / "b").verification.dtype == "bf16"
