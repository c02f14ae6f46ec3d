"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) through PEFT: dW = s P L Q, L diagonal, ranks taken away over time.

Importance of an entry is |w dL/dw|, smoothed, times the smoothed spread of that; a triplet (column of P, entry of L,
row of Q) scores the sum of its parts. After the warm-up the budget of all ranks together falls from the initial rank
to the final one as a cube, and the triplets of least score lose their entry of L:

    b(t) = b_T + (b_0 - b_T) (1 - (t - warmup) / (T - settle - warmup))^3

P and Q are kept near orthonormal by a penalty, the mean of ||P^T P - I|| and ||Q Q^T - I|| (Frobenius, not squared).
s is alpha divided by the initial rank, at every later rank too. PEFT adds the penalty to a loss that the model computes
itself; here the loss is computed from logits, so the behaviour supplies it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from haori.adapters.behaviour import Behaviour
from haori.adapters.insertion import Insertion, check_named, insert_config, saved_modules
from haori.core.errors import InputError
from haori.core.methods import AdaloraMethod

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["KERNELS_KEY", "AdaloraBehaviour", "behaviour", "check", "check_plan", "insert", "kernels_of"]

KERNELS_KEY = "haori_kernels"
"""Of a file's header: the kernels of adapted convolutions, which PEFT's flat P and Q do not tell, as JSON."""

_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class AdaloraBehaviour(Behaviour):
    """Penalty, budget and ranks of AdaLoRA.

    While training goes on every rank keeps its parameters, since one that was taken away may come back; the masks
    are kept here. PEFT would cut them off whenever it saves.

    Args:
        model: The PeftModel with AdaLoRA in it.
        orthogonality: Weight of the penalty.
    """

    def __init__(self, model: torch.nn.Module, orthogonality: float) -> None:
        super().__init__(model)
        peft_model: Any = model
        self.orthogonality = orthogonality
        self.tuner = peft_model.base_model
        self.config = peft_model.peft_config["default"]
        self.rows = [p for name, p in model.named_parameters() if ".lora_A." in name]  # Q, each [R, in]
        self.columns = [p for name, p in model.named_parameters() if ".lora_B." in name]  # P, each [out, R]
        self.kept: dict[str, list[bool]] = {
            name: [True] * len(parameter)
            for name, parameter in self.tuner.model.named_parameters()
            if ".lora_E." in name
        }

    def penalty(self) -> torch.Tensor | None:
        """Return the weighted mean distance of P^T P and Q Q^T from the identity."""
        if not self.orthogonality:
            return None
        grams = [q @ q.T for q in self.rows] + [p.T @ p for p in self.columns]
        distances = [torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams]
        return self.orthogonality * torch.stack(distances).mean()

    def settled(self, step: int) -> bool:
        """Say whether the ranks are final."""
        return bool(step >= self.config.total_step - self.config.tfinal)

    def after_step(self, step: int) -> None:
        """Score the triplets and take ranks away, as PEFT does."""
        self.config.rank_pattern = self.kept
        self.tuner.update_and_allocate(step)
        self.kept, self.config.rank_pattern = self.config.rank_pattern, None

    def state(self) -> dict[str, torch.Tensor]:
        """Return the masks and the smoothed scores."""
        state = {f"kept.{name}": torch.tensor(mask) for name, mask in self.kept.items()}
        for score in _SCORES:
            state |= {f"{score}.{name}": value for name, value in getattr(self.tuner.rankallocator, score).items()}
        return state

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned."""
        found: dict[str, dict[str, torch.Tensor]] = {part: {} for part in ("kept", *_SCORES)}
        device = self.rows[0].device
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            found[part][name] = tensor.to(device)
        self.kept = {name: mask.tolist() for name, mask in found["kept"].items()}
        for score in _SCORES:
            setattr(self.tuner.rankallocator, score, found[score])

    def finish(self) -> None:
        """Cut off the ranks that were taken away; what is left computes the same.

        PEFT rounds the factors to the base's dtype when it cuts, here as on loading, and computes in fp32 after that.
        """
        from peft.tuners.tuners_utils import cast_adapter_dtype

        self.config.rank_pattern = self.kept
        self.tuner.resize_modules_by_rank_pattern(self.kept, "default")
        cast_adapter_dtype(self.model, adapter_name="default")

    def ranks(self) -> dict[str, int | list[int]]:
        """Return the rank of each module."""
        return {name.partition(".lora_E.")[0]: sum(mask) for name, mask in self.kept.items()}


def check(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", method: AdaloraMethod, targets: Sequence[str]
) -> None:
    """Check names and classes of modules against a base; see `check_method`."""
    from transformers.pytorch_utils import Conv1D

    check_named(model, tokenizer, method, targets)
    if method.trainable_tokens:
        raise InputError("PEFT's AdaLoRA does not train single tokens; leave method.trainable_tokens empty.")
    for name in targets:
        module = model.get_submodule(name)
        if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, Conv1D)):
            raise InputError(
                f"AdaLoRA is not defined for {name!r}, a {type(module).__name__}; take that module out of "
                "method.target, or use method.kind=lora."
            )


def check_plan(model: "PreTrainedModel", method: AdaloraMethod, targets: Sequence[str], steps: int) -> None:
    """Check ranks and schedule, once they are numbers.

    Raises:
        InputError: The initial rank is not above the final one, or there are too few steps for the schedule.
    """
    assert method.rank != "auto" and method.initial_rank != "auto"
    if method.initial_rank <= method.rank:
        raise InputError(
            f"AdaLoRA takes ranks away: method.initial_rank ({method.initial_rank}) must be larger than method.rank "
            f"({method.rank})."
        )
    warmup, settle = _schedule(method, steps)
    # The first step only scores; the last of the budget's steps needs a score from before it.
    if steps - settle - warmup < 1 or steps - settle < 2:
        raise InputError(
            f"{steps} optimizer steps are too few for AdaLoRA's schedule ({warmup} of warm-up, {settle} to settle): "
            "none is left to take ranks away in. Train for more epochs, with smaller training.batch_tokens, or lower "
            "method.warmup and method.settle."
        )


def insert(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    method: AdaloraMethod,
    targets: Sequence[str],
    insertion: Insertion,
) -> "PeftModel":
    """Freeze `model` and insert P, L and Q, with L at zero; see `insert_method`."""
    from peft import AdaLoraConfig

    check_plan(model, method, targets, insertion.steps)
    warmup, settle = _schedule(method, insertion.steps)
    config = AdaLoraConfig(
        init_r=method.initial_rank,
        target_r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=0.0 if method.dropout == "auto" else method.dropout,
        tinit=warmup,
        tfinal=settle,
        deltaT=method.interval,
        total_step=insertion.steps,
        orth_reg_weight=method.orthogonality,
        target_modules=list(targets),
        modules_to_save=saved_modules(model, method),
        task_type=insertion.task_type,
    )
    peft_model = insert_config(model, config, insertion.seed)
    for name, parameter in peft_model.named_parameters():
        # Over a base in 16 bits PEFT makes the divisor of the scale trainable by mistake, and never saves it.
        if ".ranknum." in name:
            parameter.requires_grad_(False)
    return peft_model


def behaviour(model: torch.nn.Module, method: AdaloraMethod, steps: int) -> AdaloraBehaviour:
    """Return the penalty and the budget of AdaLoRA; see `behaviour_of`."""
    return AdaloraBehaviour(model, method.orthogonality)


def kernels_of(model: torch.nn.Module) -> dict[str, list[int]]:
    """Return the kernel of each convolution that PEFT's AdaLoRA adapts in a model, by its name."""
    from peft.tuners.adalora.layer import SVDConv2d

    return {
        name: list(module.get_base_layer().kernel_size)
        for name, module in model.named_modules()
        if isinstance(module, SVDConv2d)
    }


def _schedule(method: AdaloraMethod, steps: int) -> tuple[int, int]:
    """Return the steps of warm-up and of settling."""
    return round(method.warmup * steps), round(method.settle * steps)
