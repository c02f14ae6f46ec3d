"""The adapted linear layer: a frozen linear module with A, B and the rank factors of its heads.

Forward and backward are plain torch (the slow twin of the fused path, which asks for `factors`). Shapes: T tokens,
R rank, H heads.
"""

import math
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional

from haori.adapters.ard_lora.config import ArdLoraConfig
from haori.adapters.ard_lora.gates import amounts, gates, open_ranks, rho_of_rank
from haori.adapters.ard_lora.heads import HeadLayout

__all__ = ["ArdLoraLayer", "Linear", "gated"]


def gated(
    a: torch.Tensor, b: torch.Tensor, rho: torch.Tensor, start: int, layout: HeadLayout, *, learning: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply the gates into the factors; differentiable in all three.

    B' = B * G with G constant over the rows of a head, or A' = A * G over its columns. On a CPU the factors are cut to
    the gates that are open anywhere in the module: the rest adds nothing to result or gradient.

    Args:
        a: A [R, in].
        b: B [out, R].
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
        return (a.view(width, layout.heads, -1) * opened.T[:, :, None]).flatten(1), b
    return a, (b.view(layout.heads, -1, width) * opened[:, None, :]).flatten(0, 1)


class ArdLoraLayer(BaseTunerLayer):  # type: ignore[misc] # peft has no types
    """The parameters of ARD-LoRA on one linear module, by adapter name.

    `ard_rho` is absent once an adapter is pruned. `learning` says whether the rank factors receive gradients.
    """

    adapter_layer_names = ("lora_A", "lora_B", "ard_rho")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "layouts")

    def __init__(self, base_layer: nn.Linear) -> None:
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
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    def update_layer(self, name: str, config: ArdLoraConfig, layout: HeadLayout, rank: int | None) -> None:
        """Add the adapter `name`: pruned to `rank` if given, else open to r0 for every head."""
        width = rank or config.largest_rank
        self.r[name], self.lora_alpha[name], self.layouts[name] = config.r, config.lora_alpha, layout
        self.scaling[name] = config.lora_alpha / config.r
        self.lora_dropout[name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        first = nn.Linear(self.in_features, width, bias=False)
        second = nn.Linear(width, self.out_features, bias=False)
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
        """Return A' [R, in], B' [out, R] and the scale of y = W x + scale B' (A' x).

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
        first, second = self._parts(adapter)
        for part, weight in ((first, a[:width]), (second, b[:, :width])):
            part.weight = nn.Parameter(weight.clone(), requires_grad=part.weight.requires_grad)
        first.out_features = second.in_features = width
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
                result = result + functional.linear(functional.linear(dropped, a), b) * scale
        return result.to(dtype)

    def _base_weight(self) -> nn.Parameter:
        weight: nn.Parameter = self.get_base_layer().weight
        return weight

    def _parts(self, adapter: str) -> tuple[nn.Linear, nn.Linear]:
        return cast("nn.Linear", self.lora_A[adapter]), cast("nn.Linear", self.lora_B[adapter])


class Linear(nn.Module, ArdLoraLayer):
    """ARD-LoRA on an `nn.Linear`."""

    def __init__(
        self, base_layer: nn.Linear, name: str, config: ArdLoraConfig, layout: HeadLayout, rank: int | None
    ) -> None:
        super().__init__()
        ArdLoraLayer.__init__(self, base_layer)
        self._active_adapter = name
        self.update_layer(name, config, layout, rank)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return scale B' A' [out, in]."""
        a, b, scale = self.factors(adapter)
        # Some CPUs multiply 16-bit matrices slowly.
        wide = torch.float32 if a.device.type == "cpu" else a.dtype
        return ((b.to(wide) @ a.to(wide)) * scale).to(a.dtype)

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
        """Return W x plus what each active adapter adds; x [..., T, in]."""
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
        return "ard_lora." + super().__repr__()
