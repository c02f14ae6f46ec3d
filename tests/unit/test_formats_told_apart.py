"""Each file is told by one format alone: the keys by which trainers' files are known, against every format there is."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from haori.library.formats.format import open_source
from haori.library.formats.registry import FORMATS, format_named, read_updates

CLIP = "text_model_encoder_layers_0_mlp_fc1"
CASES: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "sd-scripts, SD 1.5": ("kohya", "sd15", ("lora_unet_down_blocks_0_attentions_0_proj_in:4", f"lora_te_{CLIP}")),
    "sd-scripts, SDXL": ("kohya", "sdxl", ("lora_unet_input_blocks_4_1_proj_in", f"lora_te2_{CLIP}")),
    "OneTrainer, SDXL": ("kohya", "sdxl", ("lora_unet_up_blocks_0_attentions_0_proj_in", f"lora_te1_{CLIP}")),
    "text encoder of SD 1.5": ("kohya", "sd15", (f"lora_te_{CLIP}",)),
    "text encoders of SDXL": ("kohya", "sdxl", (f"lora_te1_{CLIP}", f"lora_te2_{CLIP}")),
    "LyCORIS's wrapper, UNet": ("kohya", None, ("lycoris_down_blocks_1_resnets_0_conv1",)),
    "sd-scripts, Flux": ("kohya-flux", "flux1", ("lora_unet_double_blocks_0_img_attn_proj", f"lora_te1_{CLIP}")),
    "Flux with T5": ("kohya-flux", None, (f"lora_te1_{CLIP}", "lora_te3_encoder_block_0_layer_0_SelfAttention_q")),
    "diffusers, UNet": ("diffusers", None, ("unet.mid_block.attentions.0.proj_in",)),
    "diffusers, UNet and text": (
        "diffusers", None, ("unet.mid_block.resnets.0.conv1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
    ),
    "diffusers, text": ("diffusers", None, ("text_encoder.text_model.encoder.layers.0.mlp.fc1",)),
    "diffusers, Flux": ("diffusers", "flux1", ("transformer.single_transformer_blocks.0.attn.to_q",)),
    "ComfyUI, UNet": ("comfyui", None, ("diffusion_model.middle_block.1.proj_in",)),
    "ComfyUI, Flux": ("comfyui", "flux1", ("diffusion_model.double_blocks.0.img_attn.proj",)),
    "OMI, SDXL": ("omi", None, ("unet.middle_block.1.proj_in", "clip_l.text_model.encoder.layers.0.mlp.fc1")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_format_reads_each_file(tmp_path: Path, name: str) -> None:
    expected, family, modules = CASES[name]
    tensors: dict[str, torch.Tensor] = {}
    for module in modules:
        own, _, dimensions = module.partition(":")
        kernel = (1, 1) if dimensions else ()
        tensors[f"{own}.lora_down.weight"] = torch.ones(2, 4, *kernel)
        tensors[f"{own}.lora_up.weight"] = torch.ones(8, 2, *kernel)
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    telling = {format_name for format_name in FORMATS if format_named(format_name).detect(open_source(path))}
    # OMI's names and diffusers' share prefixes: OMI, asked first, is told by names that diffusers has not.
    assert telling == {expected} | ({"diffusers"} if expected == "omi" else set())
    updates = read_updates(path)
    assert (updates.format, updates.family) == (expected, family)
    assert len(updates.modules) == len(modules)
