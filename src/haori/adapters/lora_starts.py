"""Starts of LoRA other than A random and B zero, by PEFT's own initialisations.

    pissa       A and B are the top singular vectors of W (Meng et al. 2024, arXiv 2404.02948); W loses that part
    olora       B and A are the leading part of W = Q R (Buyukakyuz 2024, arXiv 2406.01775); W loses that part
    eva         A holds singular vectors of the layer's inputs, ranks go where they explain most (Paischer et al. 2024,
                arXiv 2410.07170); B is zero
    orthogonal  A and B are random and not zero, with B A = 0

PiSSA and OLoRA train A and B over the residual W0 = W - s B0 A0. An adapter over a changed base is of no use to anyone
else, so at the end it becomes a plain LoRA of rank 2r over the untouched W, without loss:

    W0 + s B A = W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from haori.adapters.low_rank import LowRankBehaviour
from haori.core.errors import InputError, TrainingError
from haori.core.methods import LoraMethod, QloraMethod

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = [
    "RESIDUAL_STARTS",
    "ResidualBehaviour",
    "check_rank",
    "check_start",
    "eva_options",
    "eva_tokens",
    "start_from_inputs",
    "too_few_tokens",
]

RESIDUAL_STARTS = ("pissa", "olora")
_EVA_LIMIT_BATCHES = 400
_EVA_SPREAD = 2.0  # PEFT's default rho: a module gets at most twice the rank


class ResidualBehaviour(LowRankBehaviour):
    """Trains A and B over the residual base; `finish` turns them into a LoRA of rank 2r over the base itself.

    Args:
        model: The model as inserted, with A0 and B0 in it.
        lr_ratio: As in LoRA+.
    """

    def __init__(self, model: torch.nn.Module, lr_ratio: float) -> None:
        super().__init__(model, lr_ratio)
        self.initial = {
            name: (layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone())
            for name, layer in _lora_layers(model)
        }

    @torch.no_grad()
    def finish(self) -> None:
        """Give the base its own weights back and double the rank of every adapter."""
        model: Any = self.model
        config = model.peft_config["default"]
        _double(config)
        for name, layer in _lora_layers(model):
            a0, b0 = self.initial[name]  # R in, out R
            a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
            scale, rank, alpha = layer.scaling["default"], layer.r["default"], layer.lora_alpha["default"]
            self.give_back(layer, scale * b0 @ a0)
            layer.update_layer("default", 2 * rank, alpha * _alpha_factor(config), config=config)
            # Put in place, not copied: over a base in 16 bits PEFT makes the new factors in 16 bits too.
            layer.lora_A["default"].weight.data = torch.cat([a, a0])
            layer.lora_B["default"].weight.data = torch.cat([b, -b0], dim=1)

    def give_back(self, layer: Any, taken: torch.Tensor) -> None:
        """Add what the start took from a layer's weight, [out, in], to it again."""
        base = layer.get_base_layer().weight
        base.data += (taken.T if layer.fan_in_fan_out else taken).to(base.dtype)


def check_start(model: "PreTrainedModel", method: LoraMethod, targets: Sequence[str]) -> None:
    """Check a start against the modules it is asked for.

    Raises:
        InputError: PEFT has no such start for a class of module.
    """
    from transformers.pytorch_utils import Conv1D

    if method.init == "default":
        return
    allowed = (torch.nn.Linear,) if method.init == "olora" else (torch.nn.Linear, Conv1D)
    for name in targets:
        module = model.get_submodule(name)
        if not isinstance(module, allowed):
            raise InputError(
                f"The start {method.init!r} is not defined for {name!r}, a {type(module).__name__}; take that module "
                "out of method.target, or leave method.init at 'default'."
            )


def check_rank(model: "PreTrainedModel", method: LoraMethod | QloraMethod, targets: Sequence[str]) -> None:
    """Check the resolved ranks of a start.

    Raises:
        InputError: A rank is odd for `orthogonal`, or larger than the matrices that a start takes from.
    """
    if method.init == "default" or method.rank == "auto":
        return
    ranks = [method.rank, *method.rank_pattern.values()]
    odd = [rank for rank in ranks if rank % 2]
    if method.init == "orthogonal" and odd:
        raise InputError(f"The start 'orthogonal' needs even ranks; {odd[0]} is odd.")
    if method.init in {*RESIDUAL_STARTS, "eva", "loftq"}:
        least = min(targets, key=lambda name: min(_shape(model, name)))
        limit = min(_shape(model, least))
        if max(ranks) > limit:
            raise InputError(
                f"The start {method.init!r} takes directions from the base's matrices, and {least!r} has only {limit} "
                f"of them; method.rank cannot be {max(ranks)}."
            )


def eva_options(method: LoraMethod) -> dict[str, Any]:
    """Return the fields of LoraConfig that EVA needs."""
    from peft import EvaConfig

    return {"eva_config": EvaConfig(rho=_EVA_SPREAD)}


def eva_tokens(method: LoraMethod) -> int:
    """Return how many tokens a microbatch must hold for EVA: as many as directions are looked for."""
    assert method.rank != "auto"
    return round(max([method.rank, *method.rank_pattern.values()]) * _EVA_SPREAD)


def too_few_tokens(wanted: int) -> str:
    """Say that no microbatch holds the tokens EVA needs, and what to do."""
    return (
        f"The start 'eva' looks for {wanted} directions and needs a microbatch of at least {wanted} tokens; raise "
        "training.batch_tokens and training.micro_batch_tokens, or lower method.rank."
    )


def start_from_inputs(model: "PeftModel", batches: "Iterable[Mapping[str, torch.Tensor]]", wanted: int) -> None:
    """Set A to the leading directions of the inputs of each module over training batches, and redistribute ranks.

    Raises:
        InputError: A batch never holds as many tokens as directions are wanted.
        TrainingError: The directions still change after 400 batches.
    """
    from peft.tuners.lora.eva import initialize_lora_eva_weights
    from peft.tuners.tuners_utils import cast_adapter_dtype

    usable = [batch for batch in batches if int(batch["attention_mask"].sum()) >= wanted]
    if not usable:
        raise InputError(too_few_tokens(wanted))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.distributed is initialized.*")
        initialize_lora_eva_weights(model, _Limited(usable), gather_distributed_inputs=False, show_progress_bar=False)
    cast_adapter_dtype(model, adapter_name="default")  # PEFT builds the layers with new ranks in the base's dtype


class _Limited:
    """Batches that PEFT goes through again and again until its directions stand still; here, not for ever."""

    def __init__(self, batches: "Sequence[Mapping[str, torch.Tensor]]") -> None:
        self.batches = batches
        self.given = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> "Iterator[Mapping[str, torch.Tensor]]":
        for batch in self.batches:
            self.given += 1
            if self.given > _EVA_LIMIT_BATCHES:
                raise TrainingError(
                    f"The start 'eva' found no stable directions in {_EVA_LIMIT_BATCHES} batches; lower method.rank, "
                    "or leave method.init at 'default'."
                )
            yield dict(batch)


def _double(config: Any) -> None:
    """Make a configuration describe the doubled adapter at the same scale."""
    factor = _alpha_factor(config)
    config.r *= 2
    config.lora_alpha *= factor
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: alpha * factor for key, alpha in config.alpha_pattern.items()}
    config.init_lora_weights = True


def _alpha_factor(config: Any) -> float:
    """Return the factor on alpha that keeps the scale, alpha/rank or alpha/sqrt(rank), when the rank doubles."""
    return float(2**0.5) if config.use_rslora else 2.0


def _lora_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _shape(model: "PreTrainedModel", name: str) -> tuple[int, ...]:
    weight: Any = model.get_submodule(name).weight
    return tuple(weight.shape)
