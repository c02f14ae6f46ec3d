"""Names of the UNet's and CLIP's modules against the real architectures of SDXL and SD 1.5, and diffusers' own map."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from haori.library.formats.underscored_names import dotted, underscored
from haori.library.formats.unet_names import CLIP_WORDS, UNET_WORDS, clip_module, sgm_name, unet_module

# The configuration of stabilityai/stable-diffusion-xl-base-1.0, unet/config.json.
SDXL: dict[str, Any] = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}  # fmt: skip
SD15: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def weighted(request: pytest.FixtureRequest) -> tuple[str, list[tuple[str, str]]]:
    """Names and kinds of all modules of the real UNet that have a weight."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(**(SDXL if request.param == "sdxl" else SD15))
    modules = [(name, type(module).__name__) for name, module in model.named_modules() if hasattr(module, "weight")]
    return request.param, modules


def test_every_module_of_a_unet_is_found_by_its_name_with_underscores(
    weighted: tuple[str, list[tuple[str, str]]],
) -> None:
    family, modules = weighted
    layers = [name for name, kind in modules if kind in {"Linear", "Conv2d"} and ".attentions." in name]
    assert len(layers) == {"sdxl": 722, "sd15": 192}[family]
    for name, _ in modules:
        assert unet_module(underscored(name)) == name
        assert unet_module(name) == name


def test_every_module_of_sdxl_has_the_name_that_diffusers_maps_back(
    weighted: tuple[str, list[tuple[str, str]]],
) -> None:
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    family, modules = weighted
    if family != "sdxl":
        return
    own = {name: sgm_name(name) for name, _ in modules}
    assert None not in own.values() and len(set(own.values())) == len(modules)
    for name, sgm in own.items():
        assert unet_module(str(sgm)) == unet_module(underscored(str(sgm))) == name
    theirs = _maybe_map_sgm_blocks_to_diffusers(
        {f"lora_unet_{underscored(str(sgm))}": None for name, sgm in own.items() if ".attentions." in name},
        SimpleNamespace(layers_per_block=2),
    )
    blocks = {"input_blocks": "down_blocks", "middle_block": "mid_block", "output_blocks": "up_blocks"}
    mapped = {re.sub("|".join(blocks), lambda found: blocks[found[0]], key) for key in theirs}
    assert mapped == {f"lora_unet_{underscored(name)}" for name in own if ".attentions." in name}


@pytest.mark.parametrize(
    ("sgm", "name"),
    [
        # Lines of sd-scripts' own conversion map of SDXL's UNet (library/sdxl_model_util.py)
        ("input_blocks_0_0", "conv_in"),
        ("input_blocks_1_0_in_layers_2", "down_blocks.0.resnets.0.conv1"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks_4_0_skip_connection", "down_blocks.1.resnets.0.conv_shortcut"),
        ("input_blocks_8_1_proj_out", "down_blocks.2.attentions.1.proj_out"),
        ("middle_block_0_emb_layers_1", "mid_block.resnets.0.time_emb_proj"),
        ("middle_block_1_transformer_blocks_9_ff_net_2", "mid_block.attentions.0.transformer_blocks.9.ff.net.2"),
        ("middle_block_2_out_layers_3", "mid_block.resnets.1.conv2"),
        ("output_blocks_0_1_transformer_blocks_3_norm1", "up_blocks.0.attentions.0.transformer_blocks.3.norm1"),
        ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_5_2_conv", "up_blocks.1.upsamplers.0.conv"),
        ("output_blocks_8_0_out_layers_0", "up_blocks.2.resnets.2.norm2"),
        ("time_embed_2", "time_embedding.linear_2"),
        ("label_emb_0_0", "add_embedding.linear_1"),
        ("out_2", "conv_out"),
        # CompVis's Stable Diffusion 1, which has no attention beside its first upsampling
        ("output_blocks_2_1_conv", "up_blocks.0.upsamplers.0.conv"),
        ("input_blocks_10_0_in_layers_2", "down_blocks.3.resnets.0.conv1"),
    ],
)  # fmt: skip
def test_names_of_stability(sgm: str, name: str) -> None:
    assert unet_module(sgm) == name


@pytest.mark.parametrize(
    "name",
    [
        "double_blocks_0_img_attn_qkv", "input_blocks_3_1_proj_in", "input_blocks_1_0_op", "middle_block_3_norm",
        "output_blocks_0_2_conv", "down_blocks_0_attentions_0_gate", "0_0", "", "transformer_blocks_",
    ],
)  # fmt: skip
def test_what_no_unet_has_is_no_name(name: str) -> None:
    assert unet_module(name) is None


@pytest.mark.parametrize(("layers", "projection", "count"), [(12, False, 72), (32, True, 192)])
def test_every_module_of_clip_is_found(layers: int, projection: bool, count: int) -> None:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2)
    with torch.device("meta"):
        model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    names = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    inside = [name for name in names if name.endswith(("_proj", ".fc1", ".fc2"))]
    assert len(inside) == count  # 72 + 192 are the 264 of SDXL
    for name in names:
        canonical = name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"
        assert clip_module(underscored(name)) == clip_module(underscored(canonical)) == canonical


def test_words_are_told_apart_by_the_longest() -> None:
    assert dotted("attn1_to_out_0", UNET_WORDS) == "attn1.to_out.0"
    assert dotted("proj_out", UNET_WORDS) == "proj_out" and dotted("net_0_proj", UNET_WORDS) == "net.0.proj"
    assert dotted("encoder_layers_0_layer_norm1", CLIP_WORDS) == "encoder.layers.0.layer_norm1"
    assert dotted("proj_sideways", UNET_WORDS) is None
