"""What llama.cpp calls the weights of a text model, by the class of the model, and in which order it keeps their rows.

Data only. llama.cpp turns the heads of Llama's kin from two halves to neighbouring pairs (`rotated`), because its
rotary embedding pairs neighbours; and keeps what GPT-2 has as [in, out] as [out, in] (`transposed`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["FAMILIES", "Family"]

_SPLIT = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
_LLAMA = {
    **_SPLIT, "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_PHI3 = {
    "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_STARCODER2 = {**_SPLIT, "attn_output": "self_attn.o_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
_GPT2 = {"attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}


@dataclass(frozen=True)
class Family:
    """How one class of models is kept.

    Attributes:
        architecture: llama.cpp's name of it.
        names: Module within a layer by its name after `blk.N.`.
        layer: What is before the module, with the number of the layer.
        embedding: The module of `token_embd`; `output` is `lm_head` always.
        rotated: The rows of q and k are in another order.
        transposed: The weights in its layers are kept as [in, out] by transformers.
        tied: Embedding and output are one weight where the configuration does not say.
    """

    architecture: str
    names: Mapping[str, str] = field(default_factory=lambda: _LLAMA)
    layer: str = "model.layers.{}."
    embedding: str = "model.embed_tokens"
    rotated: bool = False
    transposed: bool = False
    tied: bool = False


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", rotated=True),
    "MistralForCausalLM": Family("llama", rotated=True),
    "SmolLM3ForCausalLM": Family("smollm3", rotated=True, tied=True),
    "GraniteForCausalLM": Family("granite", rotated=True),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "GemmaForCausalLM": Family("gemma", tied=True),
    "Gemma2ForCausalLM": Family("gemma2", tied=True),
    "Gemma3ForCausalLM": Family("gemma3", tied=True),
    "CohereForCausalLM": Family("command-r", tied=True),
    "Cohere2ForCausalLM": Family("cohere2", tied=True),
    "Olmo2ForCausalLM": Family("olmo2"),
    "StableLmForCausalLM": Family("stablelm"),
    "Phi3ForCausalLM": Family("phi3", _PHI3),
    "Starcoder2ForCausalLM": Family("starcoder2", _STARCODER2, tied=True),
    "GPT2LMHeadModel": Family("gpt2", _GPT2, "transformer.h.{}.", "transformer.wte", transposed=True, tied=True),
}
"""By the class that a model's configuration names; of classes with one architecture the first is read."""
