"""Convolutions with frozen weights and adapters on them: y = W * x + bias + s B * (A * x), with * a convolution.

A has the kernel, stride and padding of W and R channels out; B is 1 x 1 (PEFT's layer, LoCon). Nothing is kept for a
frozen one; of an adapted one x and A * x. There is no gradient for W, and none for x where nothing before needs it.

A convolution of few places is mostly the reordering of its weight into the layout that oneDNN computes in. On a CPU in
bf16 the weight is therefore kept in that layout, and once more mirrored, with which the gradient of x is a convolution
too.
"""

from typing import Any

import torch
from torch import Tensor, nn

from haori.adapters.fused.diffusion.norm import channels_last, pictures, places, working_dtype

__all__ = ["Convolution", "why_not_convolution"]

_PACKED_ROWS = 256  # places of a batch, up to which a packed weight is worth its memory


def why_not_convolution(layer: Any) -> str | None:
    """Return why a convolution, adapted or not, cannot run fused, or None if it can."""
    from peft.tuners.lora.layer import Conv2d as LoraConv2d
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = layer
    if isinstance(layer, BaseTunerLayer):
        owned: Any = layer
        if owned.merged or owned.disable_adapters or len(owned.active_adapters) != 1:
            return "its adapter is merged, switched off, or not the only one"
        name = owned.active_adapters[0]
        if not isinstance(layer, LoraConv2d) or owned.lora_variant.get(name) is not None:
            return f"{type(layer).__name__} with this method has no fused form"
        if getattr(owned.lora_dropout[name], "p", 0.0) > 0:
            return "its adapter has dropout"
        if owned.lora_bias.get(name):
            return "its B has a bias"
        base = layer.get_base_layer()
    if type(base) is not nn.Conv2d:
        return f"{type(base).__name__} is not a plain convolution"
    if base.padding_mode != "zeros" or isinstance(base.padding, str) or base.groups != 1:
        return "its padding or its groups have no fused form"
    if any(parameter.requires_grad for parameter in base.parameters()):
        return "its own weights are trained"
    return None


class Convolution:
    """A convolution that takes the place of a layer's, adapted or not.

    Args:
        layer: nn.Conv2d, or PEFT's layer on one, to which `why_not_convolution` has no objection.
    """

    def __init__(self, layer: Any) -> None:
        self.adapted = layer if hasattr(layer, "get_base_layer") else None
        self.base: nn.Conv2d = layer.get_base_layer() if self.adapted is not None else layer
        self.packed: dict[bool, tuple[Any, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Return the layer's output [B, O, H', W'] for x [B, C, H, W], differentiable in x and the adapter."""
        a = b = None
        if self.adapted is not None:
            name = self.adapted.active_adapters[0]
            a, b = self.adapted.lora_A[name].weight, self.adapted.lora_B[name].weight
        y: Tensor = _Convolution.apply(x, self, a, b)  # type: ignore[no-untyped-call]
        return y

    @property
    def scale(self) -> float:
        """What B is multiplied by."""
        assert self.adapted is not None
        return float(self.adapted.scaling[self.adapted.active_adapters[0]])

    def dtype(self, x: Tensor) -> torch.dtype:
        """Return the dtype to compute in: autocast's, or the weight's."""
        return working_dtype(x) if torch.is_autocast_enabled(x.device.type) else self.base.weight.dtype

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the convolution of x with a weight of this layer's kernel."""
        base = self.base
        return torch.ops.aten.convolution(  # type: ignore[no-any-return]
            x, weight, bias, base.stride, base.padding, base.dilation, False, [0, 0], base.groups
        )

    def gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, *, of_input: bool, of_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of x and weight of `convolve`."""
        base = self.base
        dx, dw, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, base.stride, base.padding, base.dilation, False, [0, 0], base.groups,
            [of_input, of_weight, False],
        )  # fmt: skip
        return dx, dw

    def frozen(self, x: Tensor) -> Tensor:
        """Return W * x + bias."""
        weight, bias = self.base.weight.detach(), self.base.bias
        bias = None if bias is None else bias.detach().to(x.dtype)
        if self._is_pointwise:
            flat = places(x)
            rows = weight.to(x.dtype).flatten(1).T  # [C, O]
            y = torch.matmul(flat, rows) if bias is None else torch.addmm(bias, flat.flatten(0, 1), rows)
            return pictures(y.view(*flat.shape[:2], -1), x)
        if self._packs(x):
            return self._run_packed(x, bias, mirrored=False)
        return self.convolve(x, weight.to(x.dtype), bias)

    def frozen_back(self, grad: Tensor, like: Tensor) -> Tensor:
        """Return the gradient of x for `frozen`; x had the shape of `like`."""
        weight = self.base.weight.detach()
        if self._is_pointwise:
            return pictures(torch.matmul(places(grad), weight.to(grad.dtype).flatten(1)), like)
        if self._packs(grad) and self._keeps_size:
            return self._run_packed(grad, None, mirrored=True)
        dx, _ = self.gradients(grad, like, weight.to(grad.dtype), of_input=True, of_weight=False)
        assert dx is not None
        return dx

    @property
    def _is_pointwise(self) -> bool:
        base = self.base
        return base.kernel_size == (1, 1) and base.stride == (1, 1) and base.padding == (0, 0)

    @property
    def _keeps_size(self) -> bool:
        """Whether the gradient of x is a convolution of the same kind."""
        base = self.base
        odd = all(2 * p == k - 1 for p, k in zip(base.padding, base.kernel_size, strict=True))  # type: ignore[operator]
        return odd and base.stride == (1, 1) and base.dilation == (1, 1)

    def _packs(self, x: Tensor) -> bool:
        rows = x.shape[0] * x.shape[2] * x.shape[3]
        fits = x.device.type == "cpu" and x.dtype == torch.bfloat16 and rows <= _PACKED_ROWS
        return fits and torch._C._has_mkldnn

    def _run_packed(self, x: Tensor, bias: Tensor | None, *, mirrored: bool) -> Tensor:
        base, weight = self.base, self.base.weight
        geometry: tuple[Any, ...] = (list(base.padding), list(base.stride), list(base.dilation), base.groups)
        stamp = (weight.data_ptr(), weight._version)
        kept = self.packed.get(mirrored)
        if kept is None or kept[0] != stamp:
            dense = weight.detach().to(x.dtype)
            if mirrored:
                dense = dense.flip(2, 3).transpose(0, 1).contiguous()
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
            packed = reorder(dense.to_mkldnn(), *geometry, list(x.shape))
            kept = self.packed[mirrored] = (stamp, packed)
        return torch.ops.mkldnn._convolution_pointwise(x, kept[1], bias, *geometry, "none", [], "")  # type: ignore[no-any-return]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, convolution: Convolution, a: Tensor | None, b: Tensor | None) -> Tensor:
        ctx.x_dtype, ctx.convolution = x.dtype, convolution
        ctx.dtype = dtype = convolution.dtype(x)
        x = channels_last(x, dtype)
        ctx.shape = x.shape
        with torch.autocast(x.device.type, enabled=False):
            y = convolution.frozen(x)
            if a is None or b is None:
                return y
            xa = places(convolution.convolve(x, a.to(dtype)).contiguous(memory_format=torch.channels_last))  # [B, P, R]
            outer = (b.flatten(1) * convolution.scale).to(dtype)  # [O, R], with s
            y = y.contiguous(memory_format=torch.channels_last)
            places(y).flatten(0, 1).addmm_(xa.flatten(0, 1), outer.T)
        ctx.save_for_backward(x, xa, a, outer)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        convolution: Convolution = ctx.convolution
        dtype = ctx.dtype
        d = channels_last(grad, dtype)
        dx = da = db = None
        saved = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            like = torch.empty(ctx.shape, dtype=dtype, device=grad.device, memory_format=torch.channels_last)
            if ctx.needs_input_grad[0]:
                dx = convolution.frozen_back(d, like)
            if saved:
                x, xa, a, outer = saved
                rows = places(d).flatten(0, 1)  # [N, O]
                db = (rows.T @ xa.flatten(0, 1)).mul_(convolution.scale).view(*outer.shape, 1, 1)
                back = pictures((rows @ outer).view(d.shape[0], -1, outer.shape[1]), d)
                of_x, da = convolution.gradients(back, x, a.to(dtype), of_input=dx is not None, of_weight=True)
                if dx is not None and of_x is not None:
                    dx = dx.add_(of_x)
        return None if dx is None else dx.to(ctx.x_dtype), None, da, db
