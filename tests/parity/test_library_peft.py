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


_SHARED = {
    "rows of both": {"trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [7, 8]}},
    "rows of the head": {"trainable_token_indices": {"lm_head": [7, 8]}},
    "rows, tied": {"trainable_token_indices": [3, 4], "ensure_weight_tying": True},
    "head saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "embedding saved, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "both adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "both adapted, tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "replicated layers": {"layer_replication": [[0, 2], [0, 2], [1, 2]]},
}


@pytest.mark.parametrize("kind", _SHARED)
def test_weights_that_were_shared_are_apart_in_a_merged_model_where_they_differ(kind, tiny_base_folder, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    options = {"r": 4, "target_modules": _TARGETS, "task_type": "CAUSAL_LM", **_SHARED[kind]}
    model = stock_model(tiny_base_folder, peft.LoraConfig(**options), scale=0.3)
    folder, expected = save_stock(model, tmp_path / "stock"), run(model)
    merged = merge_adapter(find_base(str(tiny_base_folder)), folder, tmp_path / "merged", dtype="fp16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = AutoModelForCausalLM.from_pretrained(merged.path, dtype="float32").eval()
    assert compare_logits(expected, run(written)).rms < 2e-3
    tied = written.lm_head.weight is written.model.embed_tokens.weight
    assert (
        tied
        == written.config.tie_word_embeddings
        == (kind in {"rows, tied", "embedding saved, tied", "replicated layers"})
    )
    assert written.config.num_hidden_layers == (5 if kind == "replicated layers" else 2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_start_that_is_drawn_at_random_is_refused_and_peft_s_conversion_accepted(dtype, tiny_base_folder, tmp_path):
    import peft

    from haori.library import verify_adapter

    config = peft.LoraConfig(r=4, target_modules=_TARGETS, init_lora_weights="pissa_niter_2", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = stock_model(tiny_base_folder, config, scale=0.0)
        model.peft_config["default"].init_lora_weights = True  # PEFT's own advice for saving the start
        save_stock(model, tmp_path / "start")
        model.peft_config["default"].init_lora_weights = "pissa_niter_2"
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * parameter.data.std()
    expected = run(model)
    base = find_base(str(tiny_base_folder))
    found = verify_adapter(base, save_stock(model, tmp_path / "random"), dtype=dtype)
    assert [check.name for check in found.failures] == ["repeat"]
    assert "path_initial_model_for_weight_conversion" in found.failures[0].detail
    converted = tmp_path / "converted"
    model.save_pretrained(converted, path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert verify_adapter(base, converted, dtype=dtype).passed
    assert difference(stock_logits(tiny_base_folder, converted), expected) < 1e-4
