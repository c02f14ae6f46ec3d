"""Names of the modules of Flux.1 and Flux.2 as Black Forest Labs' code has them, and of XLabs's processors in it.

Sources: `src/flux/model.py` of github.com/black-forest-labs/flux and `src/flux2/model.py` of .../flux2 against the
conversion of checkpoints in diffusers 0.42 (`loaders/single_file_utils.py`), `src/flux/modules/layers.py` of
github.com/XLabs-AI/x-flux.

In the last modulation Black Forest Labs keep shift above scale and diffusers scale above shift.
"""

from collections.abc import Mapping

from haori.library.formats.block_map import BlockMap, Place

__all__ = ["FLUX1", "FLUX1_SHAPES", "FLUX2", "XLABS"]


def _stream(own: str, query: str, key: str, value: str, out: str, norm: str) -> Mapping[str, Place]:
    """Return the attention of one stream of a double block."""
    return {
        f"{own}_attn.qkv": Place((f"attn.{query}", f"attn.{key}", f"attn.{value}"), "equal"),
        f"{own}_attn.proj": Place((f"attn.{out}",)),
        f"{own}_attn.norm.query_norm": Place((f"attn.{norm}_q",)),
        f"{own}_attn.norm.key_norm": Place((f"attn.{norm}_k",)),
    }


_ATTENTION = {
    **_stream("img", "to_q", "to_k", "to_v", "to_out.0", "norm"),
    **_stream("txt", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added"),
}

_ENDS = {
    "img_in": Place(("x_embedder",)),
    "txt_in": Place(("context_embedder",)),
    "final_layer.linear": Place(("proj_out",)),
    "final_layer.adaLN_modulation.1": Place(("norm_out.linear",), "swapped"),
}


def _embedders(target: str, **kinds: str) -> Mapping[str, Place]:
    """Return the two layers of each embedding that the modulation is computed from."""
    return {
        f"{own}_in.{layer}": Place((f"{target}.{kind}.linear_{number}",))
        for own, kind in kinds.items()
        for number, layer in ((1, "in_layer"), (2, "out_layer"))
    }


FLUX1 = BlockMap(
    blocks={
        ("double_blocks", "transformer_blocks"): {
            **_ATTENTION,
            "img_mlp.0": Place(("ff.net.0.proj",)),
            "img_mlp.2": Place(("ff.net.2",)),
            "img_mod.lin": Place(("norm1.linear",)),
            "txt_mlp.0": Place(("ff_context.net.0.proj",)),
            "txt_mlp.2": Place(("ff_context.net.2",)),
            "txt_mod.lin": Place(("norm1_context.linear",)),
        },
        ("single_blocks", "single_transformer_blocks"): {
            "linear1": Place(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "hidden_and_rest"),
            "linear2": Place(("proj_out",)),
            "modulation.lin": Place(("norm.linear",)),
            "norm.query_norm": Place(("attn.norm_q",)),
            "norm.key_norm": Place(("attn.norm_k",)),
        },
    },
    others={
        **_ENDS,
        **_embedders("time_text_embed", time="timestep_embedder", guidance="guidance_embedder", vector="text_embedder"),
    },
)

FLUX1_SHAPES: Mapping[str, tuple[int, int]] = {
    "img_mlp.0": (4, 1),
    "img_mlp.2": (1, 4),
    "txt_mlp.0": (4, 1),
    "txt_mlp.2": (1, 4),
    "linear1": (7, 1),
    "linear2": (1, 5),
}
"""Outputs to inputs of the modules of Flux.1's blocks that have another ratio in Flux.2, by their names in the block.

Flux.1's MLP is 4 times as wide as its hidden states, at every size; that of Flux.2 is gated, and 3 times as wide.
"""

FLUX2 = BlockMap(
    blocks={
        ("double_blocks", "transformer_blocks"): {
            **_ATTENTION,
            "img_mlp.0": Place(("ff.linear_in",)),
            "img_mlp.2": Place(("ff.linear_out",)),
            "txt_mlp.0": Place(("ff_context.linear_in",)),
            "txt_mlp.2": Place(("ff_context.linear_out",)),
        },
        ("single_blocks", "single_transformer_blocks"): {
            "linear1": Place(("attn.to_qkv_mlp_proj",)),
            "linear2": Place(("attn.to_out",)),
            "norm.query_norm": Place(("attn.norm_q",)),
            "norm.key_norm": Place(("attn.norm_k",)),
        },
    },
    others={
        **_ENDS,
        **_embedders("time_guidance_embed", time="timestep_embedder", guidance="guidance_embedder"),
        "double_stream_modulation_img.lin": Place(("double_stream_modulation_img.linear",)),
        "double_stream_modulation_txt.lin": Place(("double_stream_modulation_txt.linear",)),
        "single_stream_modulation.lin": Place(("single_stream_modulation.linear",)),
    },
)

XLABS = BlockMap(
    blocks={
        ("double_blocks", "transformer_blocks"): {
            "processor.qkv_lora1": Place(("attn.to_q", "attn.to_k", "attn.to_v"), "equal"),
            "processor.proj_lora1": Place(("attn.to_out.0",)),
            "processor.qkv_lora2": Place(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "equal"),
            "processor.proj_lora2": Place(("attn.to_add_out",)),
        },
        ("single_blocks", "single_transformer_blocks"): {
            "processor.qkv_lora": Place(("attn.to_q", "attn.to_k", "attn.to_v"), "equal"),
            "processor.proj_lora": Place(("proj_out",)),
        },
    },
    others={},
)
