"""Names of modules of the UNet and of CLIP's text encoders: diffusers' own, those with underscores, and Stability's.

Stability's code (sgm, and CompVis's before it) numbers the blocks of a UNet in one row, three a resolution: in
`input_blocks` two of a residual block with its attention, then the downsampling; in `output_blocks` three, the
upsampling in the third. diffusers nests them by resolution. Sources: `openaimodel.py` of
Stability-AI/generative-models, `unet_2d_condition.py` of diffusers.
"""

import re
from collections.abc import Mapping

from haori.library.formats.underscored_names import dotted

__all__ = ["CLIP_WORDS", "UNET_WORDS", "canonical_clip", "clip_module", "sgm_name", "unet_module"]

UNET_WORDS = frozenset({
    "down_blocks", "mid_block", "up_blocks", "attentions", "resnets", "downsamplers", "upsamplers",
    "transformer_blocks", "conv_in", "conv_out", "conv_norm_out", "conv", "conv1", "conv2", "conv_shortcut",
    "time_emb_proj", "norm", "norm1", "norm2", "norm3", "time_embedding", "add_embedding", "class_embedding",
    "linear_1", "linear_2", "cond_proj", "encoder_hid_proj", "proj_in", "proj_out", "proj", "attn1", "attn2",
    "to_q", "to_k", "to_v", "to_out", "ff", "net", "group_norm", "norm_q", "norm_k",
})  # fmt: skip
"""What modules of diffusers' UNet2DConditionModel are called."""

CLIP_WORDS = frozenset({
    "text_model", "embeddings", "token_embedding", "position_embedding", "encoder", "layers", "self_attn", "q_proj",
    "k_proj", "v_proj", "out_proj", "mlp", "fc1", "fc2", "layer_norm1", "layer_norm2", "final_layer_norm",
    "text_projection",
})  # fmt: skip
"""What modules of transformers' CLIPTextModel are called."""

_LAYERS = 2  # residual blocks a resolution, of every published UNet
_STEP = _LAYERS + 1
_SGM = re.compile(r"(input_blocks|middle_block|output_blocks)[_.](\d+)[_.](.+)")
_SGM_WHOLE: Mapping[str, str] = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_SGM_OF_RESNET: Mapping[str, str] = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_WHOLE_BY_UNDERSCORES = {name.replace(".", "_"): ours for name, ours in _SGM_WHOLE.items()}
_RESNET_BY_UNDERSCORES = {name.replace(".", "_"): ours for name, ours in _SGM_OF_RESNET.items()}
_RESNET_TO_SGM = {ours: name for name, ours in _SGM_OF_RESNET.items()}
_WHOLE_TO_SGM = {ours: name for name, ours in _SGM_WHOLE.items()}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


def unet_module(name: str) -> str | None:
    """Return diffusers' name of a UNet's module, given with underscores or dots in diffusers' or Stability's naming.

    None if a UNet has no such module.
    """
    if (whole := _WHOLE_BY_UNDERSCORES.get(name.replace(".", "_"))) is not None:
        return whole
    if found := _SGM.fullmatch(name):
        block, number, rest = found[1], int(found[2]), found[3].replace(".", "_")
        return _from_sgm(block, number, rest)
    plain = dotted(name, UNET_WORDS)
    return plain if plain is not None and not plain[0].isdecimal() else None


def sgm_name(module: str) -> str | None:
    """Return Stability's name, with dots, of a module named as diffusers does; None if theirs has no such module."""
    if module in _WHOLE_TO_SGM:
        return _WHOLE_TO_SGM[module]
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", module):
        place = next((n for n, ours in _MIDDLE.items() if ours == f"{found[1]}.{found[2]}"), None)
        rest = _RESNET_TO_SGM.get(found[3]) if found[1] == "resnets" else found[3]
        return None if place is None or rest is None else f"middle_block.{place}.{rest}"
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(downsamplers|upsamplers)\.0\.conv", module):
        block = int(found[2])
        if found[1] == "down":
            return f"input_blocks.{_STEP * block + _STEP}.0.op"
        return f"output_blocks.{_STEP * block + _LAYERS}.2.conv"  # SDXL's upsamplers all stand behind an attention
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", module):
        side, block, layer = found[1], int(found[2]), int(found[4])
        rest = _RESNET_TO_SGM.get(found[5]) if found[3] == "resnets" else found[5]
        if rest is None or layer >= (_LAYERS if side == "down" else _STEP):
            return None
        inner = 0 if found[3] == "resnets" else 1
        if side == "down":
            return f"input_blocks.{_STEP * block + layer + 1}.{inner}.{rest}"
        return f"output_blocks.{_STEP * block + layer}.{inner}.{rest}"
    return None


def clip_module(name: str) -> str | None:
    """Return transformers' name of a text encoder's module, given with underscores or dots; None if it has none."""
    found = dotted(name, CLIP_WORDS)
    return None if found is None else canonical_clip(found)


def canonical_clip(module: str) -> str:
    """Return the name with `text_model.`, which transformers 5 left out of CLIPTextModel and files keep.

    A T5 encoder's names begin with `encoder.block.`; they stay as they are.
    """
    if module.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")):
        return f"text_model.{module}"
    return module


def _from_sgm(block: str, number: int, rest: str) -> str | None:
    """Map `input_blocks` and their like, for which `rest` is `1_transformer_blocks_0_attn1_to_q`, `0_op` and so on."""
    if block == "middle_block":
        place = _MIDDLE.get(str(number))
        return None if place is None else _inside(f"mid_block.{place}", place.split(".")[0], rest)
    inner, _, rest = rest.partition("_")
    if block == "input_blocks":
        level, layer = divmod(number - 1, _STEP)
        if number < 1:
            return None
        if layer == _LAYERS:
            return f"down_blocks.{level}.downsamplers.0.conv" if (inner, rest) == ("0", "op") else None
        side = "down_blocks"
    else:
        level, layer = divmod(number, _STEP)
        if rest == "conv" and inner in {"1", "2"}:  # behind the attention, where there is one
            return f"up_blocks.{level}.upsamplers.0.conv" if layer == _LAYERS else None
        side = "up_blocks"
    kind = {"0": "resnets", "1": "attentions"}.get(inner)
    return None if kind is None else _inside(f"{side}.{level}.{kind}.{layer}", kind, rest)


def _inside(place: str, kind: str, rest: str) -> str | None:
    inner = _RESNET_BY_UNDERSCORES.get(rest) if kind == "resnets" else dotted(rest, UNET_WORDS)
    return None if inner is None else f"{place}.{inner}"
