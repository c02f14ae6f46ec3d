"""The adapted layers: a frozen linear module or convolution with A, B and the rank factors of its heads.

Forward and backward are plain torch (the slow twin of the fused path, which asks for `factors`). On a convolution A has
its kernel, stride and padding and R channels out, and B is 1 x 1, as in PEFT's LoRA (LoCon); its channels are no heads,
so it is one. Shapes: T tokens, R rank, H heads, k kernel.
"""

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional

from haori.adapters.ard_lora.config import ArdLoraConfig
from haori.adapters.ard_lora.gates import amounts, gates, open_ranks, rho_of_rank
from haori.adapters.ard_lora.heads import HeadLayout

__all__ = ["ArdLoraLayer", "Conv2d", "Linear", "gated"]


def gated(
    a: torch.Tensor, b: torch.Tensor, rho: torch.Tensor, start: int, layout: HeadLayout, *, learning: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply the gates into the factors; differentiable in all three.

    B' = B * G with G constant over the rows of a head, or A' = A * G over its columns. On a CPU the factors are cut to
    the gates that are open anywhere in the module: the rest adds nothing to result or gradient.

    Args:
        a: A [R, in], or [R, in, k, k] of a convolution.
        b: B [out, R], or [out, R, 1, 1].
        rho: Rank factors before softplus [H].
        start: r0.
        layout: The heads.
        learning: Whether rho receives a gradient; otherwise it receives zeros.
    """
    if not learning:
        rho = rho.detach() + 0.0 * rho  # several processes expect a gradient for every trained parameter
    amount = amounts(rho, start)  # [H]
    # Elsewhere, asking for the number would make the device wait.
    width = math.ceil(float(amount.detach().max())) if amount.device.type == "cpu" else a.shape[0]
    opened = gates(amount, width).to(a.dtype)  # [H, R]
    a, b = a[:width], b[:, :width]
    if layout.side == "columns":
        return (a.reshape(width, layout.heads, -1) * opened.T[:, :, None]).reshape(a.shape), b
    return a, (b.reshape(layout.heads, -1, width) * opened[:, None, :]).reshape(b.shape)


class ArdLoraLayer(BaseTunerLayer):  # type: ignore[misc] # peft has no types
    """The parameters of ARD-LoRA on one module, by adapter name, and all that layers of both kinds have in common.

    `ard_rho` is absent once an adapter is pruned. `learning` says whether the rank factors receive gradients.
    """

    adapter_layer_names = ("lora_A", "lora_B", "ard_rho")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "layouts")

    def __init__(
        self, base_layer: nn.Module, name: str, config: ArdLoraConfig, layout: HeadLayout, rank: int | None
    ) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.layouts: dict[str, HeadLayout] = {}
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.ard_rho = nn.ParameterDict()
        self.learning = True
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self._active_adapter = name
        self.update_layer(name, config, layout, rank)

    def new_parts(self, width: int) -> tuple[Any, Any]:
        """Return fresh modules for A and B of this rank."""
        raise NotImplementedError

    def multiplied(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return B (A x), by convolution where the layer is one."""
        raise NotImplementedError

    def update_layer(self, name: str, config: ArdLoraConfig, layout: HeadLayout, rank: int | None) -> None:
        """Add the adapter `name`: pruned to `rank` if given, else open to r0 for every head."""
        width = rank or config.largest_rank
        self.r[name], self.lora_alpha[name], self.layouts[name] = config.r, config.lora_alpha, layout
        self.scaling[name] = config.lora_alpha / config.r
        self.lora_dropout[name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        first, second = self.new_parts(width)
        nn.init.kaiming_uniform_(first.weight, a=math.sqrt(5))
        nn.init.zeros_(second.weight)
        self.lora_A[name], self.lora_B[name] = first, second
        if rank is None:
            self.ard_rho[name] = nn.Parameter(torch.full((layout.heads,), rho_of_rank(config.r, config.r)))
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter, as PEFT does, without rounding the rank factors to the base's 16 bits."""
        rho = self.ard_rho.get(adapter_name)
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if rho is not None:
            self.ard_rho[adapter_name] = nn.Parameter(
                rho.detach().to(self.ard_rho[adapter_name].device), requires_grad=rho.requires_grad
            )

    def factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return A' [R, in], B' [out, R] (of a convolution with its kernel) and the scale of y = W x + scale B' (A' x).

        They are differentiable in A, B and rho, and hold as many rank indices as are open.
        """
        a, b = (part.weight for part in self._parts(adapter))
        if adapter in self.ard_rho:
            rho, layout = self.ard_rho[adapter], self.layouts[adapter]
            a, b = gated(a, b, rho, self.r[adapter], layout, learning=self.learning)
        return a, b, self.scaling[adapter]

    def head_ranks(self, adapter: str) -> list[int]:
        """Return the present rank of each head of an adapter that is not pruned."""
        return open_ranks(self.ard_rho[adapter], self.r[adapter])

    @torch.no_grad()
    def prune(self, adapter: str) -> list[int]:
        """Multiply the gates into the factors, drop what is closed, and return the rank of each head.

        What the layer computes stays the same.
        """
        ranks = self.head_ranks(adapter)
        a, b, _ = self.factors(adapter)
        width = max(ranks)
        before = self._parts(adapter)
        after = self.new_parts(width)
        for old, new, weight in zip(before, after, (a[:width], b[:, :width]), strict=True):
            new.weight = nn.Parameter(weight.clone(), requires_grad=old.weight.requires_grad)
        self.lora_A[adapter], self.lora_B[adapter] = after
        del self.ard_rho[adapter]
        return ranks

    def _adapted(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Return `result` plus what each active adapter adds, as PEFT's LoRA does and in the dtype of `result`."""
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                a, b, scale = self.factors(adapter)
                x = self._cast_input_dtype(x, a.dtype)
                dropped = self.lora_dropout[adapter](x)
                result = result + self.multiplied(dropped, a, b) * scale
        return result.to(dtype)

    def _base(self) -> Any:
        return self.get_base_layer()

    def _base_weight(self) -> nn.Parameter:
        weight: nn.Parameter = self._base().weight
        return weight

    def _parts(self, adapter: str) -> tuple[Any, Any]:
        return self.lora_A[adapter], self.lora_B[adapter]

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return scale B' A' in the shape of the base weight."""
        a, b, scale = self.factors(adapter)
        # Some CPUs multiply 16-bit matrices slowly.
        wide = torch.float32 if a.device.type == "cpu" else a.dtype
        delta = (b.flatten(1).to(wide) @ a.flatten(1).to(wide)) * scale
        return delta.to(a.dtype).reshape(self._base_weight().shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight.

        Args:
            safe_merge: Refuse weights that would not be finite, leaving the base as it was.
            adapter_names: Which; by default those that are active.

        Raises:
            ValueError: A merged weight would be NaN or infinite.
        """
        weight = self._base_weight()
        for adapter in check_adapters_to_merge(self, adapter_names) or ():
            if adapter not in self.lora_A:
                continue
            delta = self.get_delta_weight(adapter).to(weight.dtype)
            if safe_merge and not torch.isfinite(weight.data + delta).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            weight.data += delta
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Subtract the merged adapters from the base weight."""
        weight = self._base_weight()
        while self.merged_adapters:
            weight.data -= self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return W x plus what each active adapter adds; x [..., T, in], or [B, in, height, width] of pixels."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        return self._adapted(x, result)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether dW says all that the adapter does."""
        return True

    def __repr__(self) -> str:
        return f"ard_lora.{super().__repr__()}"


class Linear(ArdLoraLayer, nn.Module):
    """ARD-LoRA on an `nn.Linear`."""

    def __init__(
        self, base_layer: nn.Linear, name: str, config: ArdLoraConfig, layout: HeadLayout, rank: int | None
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        ArdLoraLayer.__init__(self, base_layer, name, config, layout, rank)

    def new_parts(self, width: int) -> tuple[Any, Any]:
        """Return fresh linear modules for A and B."""
        return nn.Linear(self.in_features, width, bias=False), nn.Linear(width, self.out_features, bias=False)

    def multiplied(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return B (A x)."""
        return functional.linear(functional.linear(x, a), b)


class Conv2d(ArdLoraLayer, nn.Module):
    """ARD-LoRA on an `nn.Conv2d` of one group, without dilation."""

    def __init__(
        self, base_layer: nn.Conv2d, name: str, config: ArdLoraConfig, layout: HeadLayout, rank: int | None
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base_layer.in_channels, base_layer.out_channels
        ArdLoraLayer.__init__(self, base_layer, name, config, layout, rank)

    def new_parts(self, width: int) -> tuple[Any, Any]:
        """Return fresh convolutions for A, with the kernel, and B, which is 1 x 1."""
        base = self._base()
        first = nn.Conv2d(self.in_features, width, base.kernel_size, base.stride, base.padding, bias=False)
        return first, nn.Conv2d(width, self.out_features, 1, bias=False)

    def multiplied(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return B * (A * x)."""
        base = self._base()
        return functional.conv2d(functional.conv2d(x, a, stride=base.stride, padding=base.padding), b)
