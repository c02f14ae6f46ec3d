"""Tiny models and random adapters for the tests of serving."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from haori.serve.adapters.reading import AdapterWeights, ModuleUpdate
from haori.serve.models.llama_plan import LlamaPlan, plan_llama, why_not_llama
from haori.serve.models.llama_runner import LlamaRunner
from haori.serve.models.llama_weights import lay_out_llama
from haori.serve.models.reference_runner import ReferenceRunner

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 300,
}  # fmt: skip
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama-untied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False, "attention_bias": True}),
    "llama-wide": (LlamaConfig, LlamaForCausalLM, {"hidden_size": 48, "head_dim": 80, "num_attention_heads": 12}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 16, "sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 12}),
}
CACHE = 64 << 20


def build(kind, seed=0, dtype=torch.float32):
    config, model, options = KINDS[kind]
    torch.manual_seed(seed)
    built = model(config(**{**SIZES, **options})).eval().requires_grad_(False)
    for name, value in built.named_parameters():  # zeros and ones would hide a mistake
        if value.dim() == 1:
            value.add_(0.1 * torch.randn_like(value))
        else:
            value.mul_(4.0)
        assert torch.isfinite(value).all(), name
    return built.to(dtype)


def linears(model):
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def random_adapter(model, name, seed, *, ranks=(4,), only=("proj",), dora=False, bias=False, norms=False, tokens=()):
    draw = torch.Generator().manual_seed(seed)
    updates = {}
    for number, (module, (out, width)) in enumerate(linears(model).items()):
        if any(part in module for part in only):
            rank = ranks[number % len(ranks)]
            updates[module] = ModuleUpdate(
                torch.randn(rank, width, generator=draw) * 0.3,
                torch.randn(rank, out, generator=draw) * 0.3,
                1 + 0.3 * torch.randn(out, generator=draw) if dora else None,
                0.3 * torch.randn(out, generator=draw) if bias else None,
            )
    vectors = {
        key: 0.3 * torch.randn(value.shape, generator=draw)
        for key, value in model.named_parameters()
        if norms and key.endswith("norm.weight")
    }
    rows = {}
    if tokens:
        change = torch.randn(len(tokens), model.config.hidden_size, generator=draw) * 0.3
        rows = {"model.embed_tokens.weight": (torch.tensor(tokens), change)}
    return AdapterWeights(name, updates, vectors, rows, 0)


def zoo(model):
    """One adapter of each kind; several share a layout."""
    return [
        *(random_adapter(model, f"plain{i}", i) for i in range(4)),
        random_adapter(model, "narrow", 10, ranks=(2,), only=("q_proj", "v_proj")),
        random_adapter(model, "uneven", 11, ranks=(1, 3, 5, 2)),
        random_adapter(model, "dora", 12, dora=True),
        random_adapter(model, "biased", 13, bias=True),
        random_adapter(model, "norms", 14, norms=True, only=("o_proj",)),
        random_adapter(model, "tokens", 15, tokens=(5, 9), only=("down_proj",)),
    ]


def runners(kind, adapters=zoo, dtype=torch.float32, kernels=None, device="cpu"):
    """Return the fast runner and the slow one over the same model and adapters."""
    slow = ReferenceRunner(build(kind, dtype=dtype), cache_bytes=CACHE)
    model = build(kind, dtype=dtype)
    made = adapters(model)
    assert why_not_llama(model) is None
    tensors = {name: value.to(device) for name, value in model.named_parameters(remove_duplicate=False)}
    plan = LlamaPlan.model_validate_json(plan_llama(model).model_dump_json())
    form = "fp32" if dtype == torch.float32 else "bf16"
    weights = lay_out_llama(plan, tensors.__getitem__, form, dtype, 300)
    fast = LlamaRunner(weights, cache_bytes=CACHE, kernels=kernels)
    for adapter in made:
        for runner in (fast, slow):
            runner.bank.put(runner.bank.prepare(adapter))
    return fast, slow
