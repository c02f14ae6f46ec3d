"""The model with ARD-LoRA layers in it, as PEFT builds and loads it."""

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from haori.adapters.ard_lora.config import ArdLoraConfig
from haori.adapters.ard_lora.heads import head_layout
from haori.adapters.ard_lora.layer import ArdLoraLayer, Conv2d, Linear
from haori.core.errors import InputError, MismatchError

__all__ = ["ArdLoraModel", "require_adaptable"]


def require_adaptable(name: str, module: nn.Module) -> nn.Linear | nn.Conv2d:
    """Return `module` if ARD-LoRA can adapt it.

    Embeddings and GPT-2's Conv1D have no rows by head; quantised layers could not be merged. Of a convolution with
    groups or dilation PEFT's LoRA, as which the adapter is exported, computes something else.

    Raises:
        InputError: It is neither a linear layer nor a plain convolution in 16 or 32 bits.
    """
    kind = type(module).__name__
    if isinstance(module, nn.Conv2d) and module.weight.is_floating_point():
        if module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros":
            return module
        kind = f"{kind} with groups, dilation or padding of its own"
    quantised = type(module).__module__.startswith("bitsandbytes")
    # MultiheadAttention uses the weight of this one and never calls it.
    if isinstance(module, nn.Linear) and kind != "NonDynamicallyQuantizableLinear":
        if not quantised and module.weight.is_floating_point():
            return module
        kind = f"quantised {kind}"
    raise InputError(
        f"ARD-LoRA adapts linear layers and plain convolutions in 16 or 32 bits, which {name!r} ({kind}) is not; leave "
        "it out of the target (`attention` names the modules with heads), or use the method lora or qlora."
    )


class ArdLoraModel(BaseTuner):  # type: ignore[misc] # peft has no types
    """PEFT's view of the method: which layer replaces which, and how a stored adapter is read."""

    prefix = "lora_"
    tuner_layer_cls = ArdLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def prune(self, adapter: str = "default") -> dict[str, list[int]]:
        """Bring an adapter into its final form: ranks in the configuration, gates in the factors; see `Linear.prune`.

        Returns:
            The rank of each head by module name.
        """
        config: ArdLoraConfig = self.peft_config[adapter]
        if config.head_ranks is None:
            layers = ((name, module) for name, module in self.model.named_modules() if isinstance(module, ArdLoraLayer))
            config.head_ranks = {name: layer.prune(adapter) for name, layer in layers if adapter in layer.lora_A}
            config.rank_pattern = {name: max(ranks) for name, ranks in config.head_ranks.items()}
        return config.head_ranks

    def _create_and_replace(
        self,
        peft_config: ArdLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        module = require_adaptable(current_key, base_layer)
        layout = head_layout(self.model, current_key, module, per_head=peft_config.per_head)
        rank = None
        if peft_config.head_ranks is not None:
            if current_key not in peft_config.head_ranks:
                raise MismatchError(f"The ARD-LoRA adapter holds no ranks for {current_key!r}, which it adapts.")
            rank = max(peft_config.head_ranks[current_key])
        if isinstance(target, ArdLoraLayer):
            target.update_layer(adapter_name, peft_config, layout, rank)
            return
        kind = Conv2d if isinstance(module, nn.Conv2d) else Linear
        layer = kind(cast("Any", target), adapter_name, peft_config, layout, rank)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: ArdLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        # PEFT reports missing keys by the prefix, which these do not have.
        for name in model.state_dict():
            if name.endswith(f".ard_rho.{adapter_name}") and name not in remapped:
                raise MismatchError(f"The ARD-LoRA adapter lacks the tensor {name!r}, and is not pruned.")
        return remapped
