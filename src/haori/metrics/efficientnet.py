"""EfficientNet-Lite0, up to its pooled features.

Tan and Le, "EfficientNet" (ICML 2019); the Lite variant has no squeeze-and-excitation and ReLU6 throughout. Parameters
are named as in the checkpoints converted from TensorFlow, whose "same" padding is kept: at stride 2 the odd pixel of
padding goes to the right and to the bottom.
"""

from torch import Tensor, nn

__all__ = ["FEATURES", "INPUT_SIZE", "EfficientNetLite0"]

FEATURES = 1280
INPUT_SIZE = 224
_EPSILON = 1e-3

# (blocks, kernel, stride of the first, expansion, channels out)
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _SameConv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow pads inputs of even size."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels_in, channels_out, kernel, stride, groups=groups, bias=False)
        total = kernel - stride
        before = total // 2
        self.around = (before, total - before, before, total - before)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, self.around))


class _Block(nn.Module):
    """An inverted bottleneck: widen, convolve each channel, narrow; added to its input where the shapes agree."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels_in * expansion
        if expansion > 1:
            self._expand_conv = _SameConv(channels_in, wide, 1)
            self._bn0 = nn.BatchNorm2d(wide, eps=_EPSILON)
        self._depthwise_conv = _SameConv(wide, wide, kernel, stride, groups=wide)
        self._bn1 = nn.BatchNorm2d(wide, eps=_EPSILON)
        self._project_conv = _SameConv(wide, channels_out, 1)
        self._bn2 = nn.BatchNorm2d(channels_out, eps=_EPSILON)
        self.widens = expansion > 1
        self.adds = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        wide = nn.functional.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        wide = nn.functional.relu6(self._bn1(self._depthwise_conv(wide)))
        narrow: Tensor = self._bn2(self._project_conv(wide))
        return narrow + x if self.adds else narrow


class EfficientNetLite0(nn.Module):
    """Pictures [n, 3, 224, 224] in -1..1 to features [n, 1280], the mean over the last map."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv(3, 32, 3, 2)
        self._bn0 = nn.BatchNorm2d(32, eps=_EPSILON)
        blocks, channels = [], 32
        for count, kernel, stride, expansion, wide in _STAGES:
            for place in range(count):
                blocks.append(_Block(channels, wide, kernel, stride if place == 0 else 1, expansion))
                channels = wide
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _SameConv(channels, FEATURES, 1)
        self._bn1 = nn.BatchNorm2d(FEATURES, eps=_EPSILON)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the pooled features [n, 1280]."""
        x = nn.functional.relu6(self._bn0(self._conv_stem(pictures)))
        for block in self._blocks:
            x = block(x)
        return nn.functional.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
