"""Names of the modules of Z-Image and Qwen-Image, and of the T5 encoder that goes with Flux.1.

Sources: `z_image_to_diffusers` of github.com/comfyanonymous/ComfyUI (`comfy/utils.py`), whose names are those of
Z-Image's own code, against the conversion of checkpoints in diffusers 0.42; `QwenImageTransformer2DModel` of diffusers,
whose names all tools share; `T5EncoderModel` of transformers.
"""

from collections.abc import Mapping

from haori.library.formats.block_map import BlockMap, Place
from haori.library.formats.underscored_names import dotted

__all__ = ["QWEN_IMAGE", "Z_IMAGE", "t5_module"]


def _same(*names: str) -> Mapping[str, Place]:
    return {name: Place((name,)) for name in names}


_Z_IMAGE_BLOCK = {
    "attention.qkv": Place(("attention.to_q", "attention.to_k", "attention.to_v"), "equal"),
    "attention.out": Place(("attention.to_out.0",)),
    "attention.q_norm": Place(("attention.norm_q",)),
    "attention.k_norm": Place(("attention.norm_k",)),
    **_same("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"),
    **_same("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"),
}

Z_IMAGE = BlockMap(
    blocks={(name, name): _Z_IMAGE_BLOCK for name in ("layers", "noise_refiner", "context_refiner", "siglip_refiner")},
    others={
        "x_embedder": Place(("all_x_embedder.2-1",)),
        "final_layer.linear": Place(("all_final_layer.2-1.linear",)),
        "final_layer.adaLN_modulation.1": Place(("all_final_layer.2-1.adaLN_modulation.1",)),
        **_same("cap_embedder.0", "cap_embedder.1", "siglip_embedder.0", "siglip_embedder.1"),
        **_same("t_embedder.mlp.0", "t_embedder.mlp.2"),
    },
)

QWEN_IMAGE = BlockMap(
    blocks={
        ("transformer_blocks", "transformer_blocks"): _same(
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
            "attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k",
            "img_mod.1", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mod.1", "txt_mlp.net.0.proj", "txt_mlp.net.2",
        ),
    },
    others=_same(
        "img_in", "txt_in", "txt_norm", "proj_out", "norm_out.linear",
        "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2",
    ),
)  # fmt: skip

_T5_WORDS = frozenset({
    "encoder", "block", "layer", "SelfAttention", "q", "k", "v", "o", "relative_attention_bias", "DenseReluDense",
    "wi", "wi_0", "wi_1", "wo", "layer_norm", "final_layer_norm", "embed_tokens", "shared",
})  # fmt: skip


def t5_module(name: str) -> str | None:
    """Return the name of a T5 encoder's module, given with underscores or dots; None if it has none of that name."""
    if not name.startswith(("encoder.block.", "encoder_block_", "encoder.final", "encoder_final", "shared")):
        return None
    return dotted(name, _T5_WORDS)
