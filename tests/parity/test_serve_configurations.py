"""Whatever a configuration says, a base that is served computes what transformers computes, natively or slowly."""

import json

import pytest
import torch
import transformers

from haori.bases import find_base
from haori.core.settings import settings
from haori.serve.engine.runner import Run
from haori.serve.engine.scheduler import EngineLimits
from haori.serve.models.llama_config import long_probe_tokens, why_not_config
from haori.serve.models.llama_plan import why_not_llama
from haori.serve.models.reference_runner import ReferenceRunner
from haori.serve.opening import open_runner

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 160, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LIMITS = EngineLimits(context_length=160, running=4, waiting=4)
LENGTH = 120
FIXED = {"rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 40}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
LLAMA3 = FIXED | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {
    "rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 40, "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
}  # fmt: skip
YARN4 = FIXED | {"rope_type": "yarn", "llama_4_scaling_beta": 0.5}

NATIVE = {
    "llama": ("Llama", {}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": FIXED | {"rope_type": "yarn"}}),
    "llama-unused-window": ("Llama", {"sliding_window": None, "unsloth_fixed": True, "use_mrope": False}),
    "mistral-no-window": ("Mistral", {"sliding_window": None}),
    "mistral-window-beyond-context": ("Mistral", {"sliding_window": 160}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window-in-no-layer": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 1]}),
    "ministral": ("Ministral", {"head_dim": 8, "layer_types": ["full_attention"] * 2, "sliding_window": 160}),
    "seed-oss": ("SeedOss", {"head_dim": 8}),
}
SLOW = {
    "mistral-window": ("Mistral", {"sliding_window": 16}, "looks back 16 tokens"),
    "mistral-window-near-context": ("Mistral", {"sliding_window": 100}, "looks back 100 tokens"),
    "qwen2-window-above": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "looks back 8 tokens",
    ),
    "qwen3-window": (
        "Qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "looks back 8 tokens",
    ),
    "ministral": ("Ministral", {"sliding_window": 8, "head_dim": 8}, "looks back 8 tokens"),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}, "no rotary angles"),
    "llama-dynamic": ("Llama", {"rope_parameters": DYNAMIC}, "change with length"),
    "llama-longrope": ("Llama", {"rope_parameters": LONG}, "change with length"),
    "llama-unknown": ("Llama", {"attention_temperature": 2.0}, "attention_temperature"),
    "llama-unknown-on": ("Llama", {"use_attention_gate": True}, "use_attention_gate"),
    "ministral3": ("Ministral3", {"rope_parameters": YARN4, "head_dim": 8}, "llama_4_scaling_beta"),
    "granite": ("Granite", {"residual_multiplier": 0.5, "logits_scaling": 4.0}, "multiplier"),
    "olmo": ("Olmo", {"clip_qkv": 0.5}, "clip_qkv"),
    "gemma": ("Gemma", {"head_dim": 8}, "embedding or its head"),
    "cohere": ("Cohere", {}, "parts of their own"),
    "helium": ("Helium", {"head_dim": 8}, "logits are off"),
    "qwen2-moe": ("Qwen2Moe", {"num_experts": 4, "moe_intermediate_size": 16}, "MLP"),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 16}, "MLP"),
}  # fmt: skip


def write(folder, name, options):
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES | options))
    for value in model.parameters():  # of the start, all logits are nearly the same
        value.data.mul_(4.0 if value.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    return folder


def stock_logits(folder, length=LENGTH):
    """All logits of the first tokens by transformers alone, [T V]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt(length)])).logits[0]


def prompt(length=LENGTH):
    return [(29 * i + i // 7) % 96 for i in range(length)]


def served_logits(opened, start=LENGTH - 6):
    """Logits of the last tokens from a runner: a prompt in two pieces, then token by token."""
    tokens, place = prompt(), opened.runner.cache.open(LENGTH)
    opened.runner.step([Run(place, 0, tokens[:50], (), wants_logits=False)])
    found = [opened.runner.step([Run(place, 50, tokens[50:start], ())])[0]]
    for number in range(start, LENGTH):
        found.append(opened.runner.step([Run(place, number, tokens[number : number + 1], ())])[0])
    return torch.stack(found).float()


def assert_served_as_stock(opened, folder):
    found, expected = served_logits(opened), stock_logits(folder)[LENGTH - 7 :]
    assert float((found - expected).abs().max()) < 1e-3 * float(expected.std()), opened.slow_because


@pytest.mark.parametrize("name", NATIVE)
def test_what_is_honoured_is_served_natively(name, tmp_path):
    kind, options = NATIVE[name]
    base = find_base(str(write(tmp_path / "base", kind, options)))
    for _ in range(2):  # the second from what was remembered
        opened = open_runner(base, LIMITS, weights="fp32", cache_bytes=8 << 20)
        assert opened.slow_because is None
        assert_served_as_stock(opened, base.path)


@pytest.mark.parametrize("name", SLOW)
def test_what_is_not_honoured_makes_the_fast_runner_step_aside(name, tmp_path):
    kind, options, reason = SLOW[name]
    base = find_base(str(write(tmp_path / "base", kind, options)))
    for _ in range(2):
        opened = open_runner(base, LIMITS, weights="fp32", cache_bytes=8 << 20)
        assert isinstance(opened.runner, ReferenceRunner)
        assert reason in opened.slow_because
        assert_served_as_stock(opened, base.path)


@pytest.mark.parametrize("name", ["mistral-window", "mistral-window-near-context", "ministral3"])
def test_a_long_probe_shows_what_nobody_foresaw(name, tmp_path, monkeypatch):
    """The fast runner is kept from a model by its logits alone, even if its entry were taken for harmless."""
    monkeypatch.setattr("haori.serve.models.llama_plan.why_not_config", lambda _: None)
    kind, options, _ = SLOW[name]
    base = find_base(str(write(tmp_path / "base", kind, options)))
    opened = open_runner(base, LIMITS, weights="fp32", cache_bytes=8 << 20)
    assert "logits are off" in opened.slow_because
    assert_served_as_stock(opened, base.path)


def test_what_was_remembered_by_shorter_probes_is_found_out_again(tmp_path):
    base = find_base(str(write(tmp_path / "base", "Llama", {})))
    open_runner(base, LIMITS, weights="fp32", cache_bytes=8 << 20)
    [place] = (settings().cache / "remembered").glob("llama-fp32-*.json")
    document = json.loads(place.read_text())
    for old in ({**document, "probes": 1}, {key: value for key, value in document.items() if key != "probes"}):
        place.write_text(json.dumps({**old, "end_tokens": [95]}))
        assert open_runner(base, LIMITS, weights="fp32", cache_bytes=8 << 20).end_tokens == (2,)
        assert json.loads(place.read_text()) == document


def test_a_usual_model_gets_no_long_probe_and_one_with_a_late_beginning_does():
    def reach(name, **options):
        config = getattr(transformers, f"{name}Config")(**options)
        return long_probe_tokens(config)

    assert reach("Llama") == reach("Qwen2") == reach("Qwen3") == reach("SmolLM3") == 0
    assert reach("Mistral", sliding_window=None) == 0
    assert reach("Mistral", sliding_window=4096, max_position_embeddings=8192) == 4097
    assert reach("Llama", rope_parameters=LLAMA3 | {"original_max_position_embeddings": 512}) == 513


def test_entries_of_well_known_bases_are_known():
    """As in the published config.json of SmolLM2 and Qwen2.5."""
    smollm2 = {
        "is_llama_config": True, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "pretraining_tp": 1, "torch_dtype": "bfloat16", "transformers.js_config": {"kv_cache_dtype": {"fp16": "f"}},
    }  # fmt: skip
    assert why_not_config(transformers.LlamaConfig.from_dict(SIZES | smollm2)) is None
    qwen = {"max_window_layers": 21, "use_mrope": False, "use_sliding_window": False, "sliding_window": 32768}
    assert why_not_config(transformers.Qwen2Config.from_dict(SIZES | qwen)) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m.lm_head, "bias", torch.nn.Parameter(torch.ones(96))), "its head"),
        (lambda m: setattr(m.model.layers[1].self_attn, "sinks", torch.nn.Parameter(torch.ones(4))), "attention has"),
        (lambda m: setattr(m.model.layers[1].mlp, "limit", torch.nn.Parameter(torch.ones(4))), "MLP has parts"),
        (lambda m: setattr(m.model.layers[1].self_attn, "is_causal", False), "not causal"),
        (lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.1), "layers differ"),
        (lambda m: setattr(m.model.layers[1].input_layernorm, "variance_epsilon", 0.1), "one epsilon"),
        (lambda m: setattr(m.model, "embed_scale", torch.nn.Parameter(torch.ones(1))), "its parts"),
        (lambda m: m.model.rotary_emb.register_buffer("inv_freq", m.model.rotary_emb.inv_freq[:2]), "part of each"),
    ],
)  # fmt: skip
def test_a_part_more_or_another_value_in_one_layer_rules_a_model_out(change, reason):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    assert why_not_llama(model) is None
    change(model)
    assert reason in (why_not_llama(model) or "")


def test_a_model_that_looks_ahead_is_not_taken_for_a_llama():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, is_causal=False))
    assert why_not_llama(model) == "its configuration says is_causal: False"
