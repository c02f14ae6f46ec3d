"""Sets the weights of a stock encoder so that it computes the linear code of patches, without training.

Strided convolutions gather each patch; residual branches are set to 0. What is not linear in the encoder is its last
normalisation and SiLU: beside each code and its negative, a group of the normalisation holds a large constant and its
negative, so that its scale is that of the constant, whatever the picture; and silu(x) - silu(-x) = x.
"""

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from latents import CHANNELS, PATCH, PatchCode
from torch import nn

__all__ = ["set_encoder"]

CONSTANT = 128.0
LOG_VARIANCE = -12.0  # of the posterior: a deviation of 0.0025, nothing beside codes of deviation 0.4 to 1.5


@torch.no_grad()
def set_encoder(model: AutoencoderKL, code: PatchCode) -> None:
    """Make `model.encode(x).latent_dist.mode()` the code of `x`, to a part in ten thousand."""
    encoder = model.encoder
    for module in encoder.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
    first, second, third = encoder.down_blocks
    _clear(encoder.conv_in, first.downsamplers[0].conv, second.downsamplers[0].conv)
    _clear(second.resnets[0].conv_shortcut, third.resnets[0].conv_shortcut, encoder.conv_out, model.quant_conv)
    for colour in range(3):
        encoder.conv_in.weight[colour, colour, 1, 1] = 1
        for down in range(2):
            for right in range(2):
                first.downsamplers[0].conv.weight[4 * colour + 2 * down + right, colour, down, right] = 1
    for channel in range(12):
        second.resnets[0].conv_shortcut.weight[channel, channel] = 1
    # row 2 ky + dy of a patch is row ky of the second kernel, of the channels of row dy of the first
    weights = (code.basis * code.scale).T.view(CHANNELS, 3, PATCH // 2, 2, PATCH // 2, 2)
    gathered = weights.permute(0, 1, 3, 5, 2, 4).reshape(CHANNELS, 12, PATCH // 2, PATCH // 2)
    second.downsamplers[0].conv.weight[:CHANNELS, :12, :2, :2] = gathered
    second.downsamplers[0].conv.bias[:CHANNELS] = -(code.mean @ code.basis) * code.scale
    _pass_the_end(model)


def _pass_the_end(model: AutoencoderKL) -> None:
    """Carry the codes through the last normalisation and SiLU, and give the posterior its variance."""
    encoder, norm = model.encoder, model.encoder.conv_norm_out
    size = norm.num_channels // norm.num_groups
    widen = encoder.down_blocks[2].resnets[0].conv_shortcut
    for channel in range(CHANNELS):
        start = channel * size
        widen.weight[start, channel] = 1
        widen.weight[start + 1, channel] = -1
        widen.bias[start + 2], widen.bias[start + 3] = CONSTANT, -CONSTANT
        encoder.conv_out.weight[channel, start, 1, 1] = 1
        encoder.conv_out.weight[channel, start + 1, 1, 1] = -1
        model.quant_conv.weight[channel, channel] = 1
    norm.weight.fill_(CONSTANT * (2 / size) ** 0.5)
    norm.bias.zero_()
    model.quant_conv.bias[CHANNELS:] = LOG_VARIANCE


def _clear(*convolutions: nn.Conv2d) -> None:
    for convolution in convolutions:
        convolution.weight.zero_()
        convolution.bias.zero_()
