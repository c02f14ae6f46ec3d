"""What a model's configuration says is trained as it says: the fused path equals stock PEFT, or steps aside."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from haori.adapters.fused import fuse
from haori.adapters.fused.modules import attention_stand_in

VOCABULARY, LENGTH = 97, 40
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROPE = {"rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 16, "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]
MULTIPLIERS = {
    "attention_multiplier": 0.5, "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 4.0,
}  # fmt: skip
CASES = {
    "llama-yarn": ("Llama", {"rope_parameters": ROPE | {"rope_type": "yarn"}}, 2),
    "llama-dynamic": ("Llama", {"rope_parameters": ROPE | {"rope_type": "dynamic"}}, 2),
    "llama-longrope": ("Llama", {"rope_parameters": LONG}, 2),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}, 2),
    "llama-dropout": ("Llama", {"attention_dropout": 0.3}, 0),
    "llama-both-ways": ("Llama", {"is_causal": False}, 0),
    "llama-unknown": ("Llama", {"attention_temperature": 2.0}, 0),
    "mistral-window": ("Mistral", {"sliding_window": 8}, 2),
    "qwen2-window-above": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, 2),
    "ministral-window": ("Ministral", {"sliding_window": 8, "head_dim": 8}, 2),
    "ministral3": (
        "Ministral3", {"rope_parameters": ROPE | {"rope_type": "yarn", "llama_4_scaling_beta": 0.5}, "head_dim": 8}, 0,
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}, 3),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 8, "attn_logit_softcapping": 0.5}, 0),
    "gemma3": ("Gemma3", {"head_dim": 8, "sliding_window": 8, "layer_types": MIXED}, 2),
    "granite": ("Granite", MULTIPLIERS, 2),
    "olmo-clamped": ("Olmo", {"clip_qkv": 0.05}, 0),
    "olmo2": ("Olmo2", {}, 0),
    "nemotron-half-rotated": ("Nemotron", {"head_dim": 8}, 0),
    "cohere": ("Cohere", {"logit_scale": 0.25}, 0),
    "helium": ("Helium", {"head_dim": 8}, 0),
    "starcoder2-dropout": ("Starcoder2", {"residual_dropout": 0.3, "sliding_window": 8}, 0),
    "seed-oss-dropout": ("SeedOss", {"residual_dropout": 0.3, "head_dim": 8}, 0),
    "gpt-oss-sinks": ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}, 0),
    "mixtral-window": ("Mixtral", {"num_local_experts": 2, "sliding_window": 8}, 2),
    "qwen2-moe": ("Qwen2Moe", {"num_experts": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 1}, 2),
    "phi3-longrope": ("Phi3", {}, 0),
}  # fmt: skip


def adapted(kind, options, **lora):
    torch.manual_seed(0)
    name = "Gemma3Text" if kind == "Gemma3" else kind
    base = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES | options))
    for name, parameter in base.named_parameters():
        if parameter.dim() > 1:  # of the start, attention hardly matters
            parameter.data.mul_(6.0 if "_proj" in name else 1.0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if kind == "Mixtral" else "all-linear"
    settings = {"r": 4, "target_modules": targets, "task_type": "CAUSAL_LM"} | lora
    model = get_peft_model(base, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def batch():
    """Rows that begin alike and are right-padded, with labels on the second half of each."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (3, LENGTH), generator=generator)
    ids[:, :15] = ids[0, :15]
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(3):
        end = LENGTH - 5 * row
        mask[row, end:] = 0
        labels[row, end:] = -100
        labels[row, : end // 2] = -100
    return ids, mask, labels


def losses(model, *, fused):
    """Loss of each label and all gradients."""
    ids, mask, labels = batch()
    torch.manual_seed(4)
    model.zero_grad()
    if fused:
        total, each = model(input_ids=ids, attention_mask=mask, use_cache=False, head_targets=labels[:, 1:])
    else:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        wanted = labels[:, 1:] != -100
        each = nn.functional.cross_entropy(logits[wanted], labels[:, 1:][wanted], reduction="none")
        total = each.sum()
    total.backward()
    return each.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_trained_as_stock(model, fused):
    if fused.report.fused.get("loss head"):
        each, found = losses(model, fused=True)
    else:
        each, found = losses(model, fused=False)
    fused.remove()
    stock, expected = losses(model, fused=False)
    torch.testing.assert_close(each, stock, rtol=1e-4, atol=1e-4)
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) < 1e-3 * max(float(gradient.norm()), 1e-2 * largest), name


@pytest.mark.parametrize("evaluating", [False, True], ids=["training", "evaluating"])
@pytest.mark.parametrize("name", CASES)
def test_every_configuration_is_trained_as_stock_does_it(name, evaluating):
    kind, options, blocks = CASES[name]
    model = adapted(kind, options)
    fused = fuse(model.eval() if evaluating else model)  # a dropout is not drawn when it is not training
    model.train()
    assert fused.report.fused.get("attention blocks", 0) == blocks, fused.report.sentence()
    assert_trained_as_stock(model, fused)


@pytest.mark.parametrize("activation", ["gelu_10", "silu", "gelu_pytorch_tanh"])
def test_an_activation_that_is_clamped_is_not_taken_for_the_plain_one(activation):
    model = adapted("Llama", {"hidden_act": activation})
    fused = fuse(model)
    assert fused.report.fused["MLPs"] == (0 if activation == "gelu_10" else 2)
    assert_trained_as_stock(model, fused)


def test_a_block_without_adapters_takes_part_in_the_mask():
    """The first block is not fused, so rows must not be laid out in a way that only fused blocks know."""
    model = adapted("Llama", {}, layers_to_transform=[1], target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    fused = fuse(model)
    assert fused.report.fused["attention blocks"] == 1
    assert not model.get_base_model().forward.shares_prefix
    assert_trained_as_stock(model, fused)


def test_attention_that_needs_no_mask_for_its_window_is_left_alone():
    model = adapted("Mistral", {"sliding_window": 8})
    config, attention = model.get_base_model().config, model.get_base_model().model.layers[0].self_attn
    assert attention_stand_in(attention, config).forward is not None
    config._attn_implementation_internal = "flash_attention_2"
    assert "flash_attention_2" in attention_stand_in(attention, config).reason


def test_a_head_whose_logits_are_changed_in_a_way_of_its_own_is_left_alone():
    model = adapted("Llama", {})
    stock = type(model.get_base_model()).forward

    def forward(self, *args, **kwargs):
        output = stock(self, *args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    base = model.get_base_model()
    base.forward = forward.__get__(base)
    assert "logits" in fuse(model).report.reasons["loss head"]
