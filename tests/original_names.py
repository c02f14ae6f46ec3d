"""Single-file checkpoints in the names of the original code, written from tiny pipelines of diffusers.

The names follow the map that diffusers publishes for its way back (convert_diffusers_to_original_stable_diffusion).
"""

import re
from pathlib import Path
from typing import Any

_RESNET = [
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection"),
]  # fmt: skip
_TOP = [
    ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
    ("conv_norm_out", "out.0"), ("conv_in", "input_blocks.0.0"), ("conv_out", "out.2"),
    ("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"),
    ("mid_block.attentions.0", "middle_block.1"), ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.resnets.1", "middle_block.2"),
]  # fmt: skip
_VAE_ATTENTION = [("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")]
_OPEN_CLIP = [
    ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
]  # fmt: skip


def unet_name(key: str, resnets: int, levels: int) -> str:
    """Return the original name of a weight of a UNet with so many resnets per level and levels."""
    for ours, theirs in _TOP:
        if key.startswith(f"{ours}."):
            return _in_resnet(theirs + key[len(ours) :])
    found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key)
    assert found is not None, key
    way, level, part, at, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if way == "down":
        block = 1 + level * (resnets + 1) + at
        if part == "downsamplers":
            return f"input_blocks.{(level + 1) * (resnets + 1)}.0.op.{rest.removeprefix('conv.')}"
        return _in_resnet(f"input_blocks.{block}.{0 if part == 'resnets' else 1}.{rest}")
    block = level * (resnets + 1) + at
    if part == "upsamplers":
        place = 2 if level else 1  # behind the attention, where the level has any
        return f"output_blocks.{level * (resnets + 1) + resnets}.{place}.{rest}"
    return _in_resnet(f"output_blocks.{block}.{0 if part == 'resnets' else 1}.{rest}")


def _in_resnet(name: str) -> str:
    for ours, theirs in _RESNET:
        name = re.sub(rf"(blocks\.\d+\.0|middle_block\.[02])\.{ours}\.", rf"\1.{theirs}.", name)
    return name


def vae_name(key: str, levels: int) -> str:
    """Return the original name of a weight of an autoencoder."""
    key = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions.0" in key:
        key = key.replace("mid_block.attentions.0", "mid.attn_1")
        for ours, theirs in _VAE_ATTENTION:
            key = key.replace(f".{ours}.", f".{theirs}.")
    return key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def open_clip(weights: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return the weights of a text encoder as OpenCLIP stores them, q, k and v of a layer in one."""
    import torch

    found: dict[str, Any] = {}
    for key, value in weights.items():
        name = key.removeprefix("text_model.")
        layer = re.match(r"encoder\.layers\.(\d+)\.(.*)", name)
        if name == "text_projection.weight":
            found["text_projection"] = value.T.contiguous()
        elif layer is None:
            name = name.replace("embeddings.token_embedding", "token_embedding")
            name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
            found[name.replace("final_layer_norm", "ln_final")] = value
        elif "q_proj" in layer[2]:
            three = [weights[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            kind = "in_proj_" + layer[2].rpartition(".")[2]
            found[f"transformer.resblocks.{layer[1]}.attn.{kind}"] = torch.cat(three)
        elif not re.search(r"[kv]_proj", layer[2]):
            rest = layer[2]
            for ours, theirs in _OPEN_CLIP:
                rest = rest.replace(ours, theirs)
            found[f"transformer.resblocks.{layer[1]}.{rest}"] = value
    return {f"{prefix}{name}": value for name, value in found.items()}


def clip(weights: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return the weights of a text encoder as CLIP's own checkpoints hold them."""
    return {f"{prefix}text_model.{key.removeprefix('text_model.')}": value for key, value in weights.items()}


def checkpoint(pipeline: Any, kind: str) -> dict[str, Any]:
    """Return a pipeline's weights under the original names: kind sd15, sd2 or sdxl."""
    config, found = pipeline.unet.config, {}
    for key, value in pipeline.unet.state_dict().items():
        name = unet_name(key, config.layers_per_block, len(config.block_out_channels))
        found[f"model.diffusion_model.{name}"] = value
    levels = len(pipeline.vae.config.block_out_channels)
    for key, value in pipeline.vae.state_dict().items():
        name = vae_name(key, levels)
        convolved = "mid.attn_1" in name and value.dim() == 2  # its attention was of convolutions
        found[f"first_stage_model.{name}"] = value[:, :, None, None] if convolved else value
    first = pipeline.text_encoder.state_dict()
    if kind == "sd15":
        found |= clip(first, "cond_stage_model.transformer.")
    if kind == "sd2":
        found |= open_clip(first, "cond_stage_model.model.")
    if kind == "sdxl":
        found |= clip(first, "conditioner.embedders.0.transformer.")
        found |= open_clip(pipeline.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
    return {name: value.contiguous() for name, value in found.items()}


def write_checkpoint(path: Path, weights: dict[str, Any], **metadata: str) -> Path:
    """Write weights as safetensors."""
    from safetensors.torch import save_file

    save_file(weights, path, metadata or None)
    return path
