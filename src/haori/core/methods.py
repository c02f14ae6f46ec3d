"""The method of a recipe: one section per `kind`, chosen by a tag.

Each section lists what its method can be told and nothing else, so that a key that a method does not know is an
error. What the sections mean in PEFT is told by `adapters`, one file per method.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "METHODS",
    "AdaloraMethod",
    "AdaptedMethod",
    "ArdLoraMethod",
    "Auto",
    "DoraMethod",
    "FullMethod",
    "HeadMethod",
    "LoraMethod",
    "LowRankMethod",
    "Method",
    "PeftMethod",
    "Positive",
    "QloraMethod",
    "Section",
]

Auto = Literal["auto"]
Positive = Annotated[int, Field(ge=1)]
_PositiveNumber = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A table of the recipe: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class AdaptedMethod(Section):
    """What every method that inserts adapters can be told about where."""

    target: str | tuple[str, ...] = Field(
        default="all-linear",
        description="`all-linear`, `attention`, a module name or regular expression, or a list of them.",
    )
    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(), description="Numbers of the transformer layers to adapt, from 0; none given means all."
    )
    modules_to_save: tuple[str, ...] = Field(default=(), description="Modules trained in full and saved.")
    trainable_tokens: tuple[str, ...] = Field(
        default=(), description="Tokens whose embeddings are trained (each a single token of the base)."
    )
    train_norms: bool = Field(default=False, description="Train the normalisation layers (LayerNorm, RMSNorm) too.")


class LowRankMethod(AdaptedMethod):
    """What the methods of the form s B A share."""

    rank: Auto | Positive = Field(default="auto", description="Rank of A and B.")
    alpha: Auto | _PositiveNumber = Field(default="auto", description="Strength of the update.")
    dropout: Auto | _Share = Field(
        default="auto", description="Dropout on the adapter's input; `auto` is what the task chooses, or else 0."
    )
    rslora: bool = Field(default=False, description="Scale by alpha/sqrt(rank) (Kalajdzievski 2023).")
    lr_ratio: _PositiveNumber = Field(
        default=1.0, description="Learning rate of B divided by that of A; 16 is LoRA+ (Hayou et al. 2024)."
    )
    rank_pattern: dict[str, Positive] = Field(
        default_factory=dict, description="Other ranks for modules whose name ends in, or matches, the key."
    )
    alpha_pattern: dict[str, _PositiveNumber] = Field(
        default_factory=dict, description="Other alphas for modules whose name ends in, or matches, the key."
    )
    bias: Literal["none", "adapted", "all"] = Field(
        default="none", description="Biases trained beside: none, those of adapted layers, or all."
    )


class LoraMethod(LowRankMethod):
    """LoRA (Hu et al. 2021): y = W x + s B A x, with s = alpha/rank, or alpha/sqrt(rank) for rsLoRA."""

    kind: Literal["lora"] = Field(default="lora", description="LoRA.")
    init: Literal["default", "pissa", "olora", "eva", "orthogonal"] = Field(
        default="default", description="How A and B begin; `default` is A random and B zero."
    )


class DoraMethod(LowRankMethod):
    """DoRA (Liu et al. 2024): magnitude and direction of each output row are trained apart."""

    kind: Literal["dora"] = Field(description="DoRA.")


class AdaloraMethod(AdaptedMethod):
    """AdaLoRA (Zhang et al. 2023): dW = P L Q, with ranks taken from modules that need them least."""

    kind: Literal["adalora"] = Field(description="AdaLoRA.")
    rank: Auto | Positive = Field(default="auto", description="Mean rank that remains at the end.")
    initial_rank: Auto | Positive = Field(default="auto", description="Rank at the start; `auto` is 1.5 times rank.")
    alpha: Auto | _PositiveNumber = Field(
        default="auto", description="Strength of the update; the scale is alpha/initial_rank."
    )
    dropout: Auto | _Share = Field(
        default="auto", description="Dropout on the adapter's input; `auto` is what the task chooses, or else 0."
    )
    warmup: float = Field(default=0.1, ge=0.0, lt=1.0, description="Share of the steps before ranks are taken away.")
    settle: float = Field(default=0.3, ge=0.0, lt=1.0, description="Share of the steps at the end with fixed ranks.")
    interval: Positive = Field(default=1, description="Steps between two changes of the ranks.")
    orthogonality: float = Field(default=0.5, ge=0.0, description="Weight of the orthogonality penalty.")


class ArdLoraMethod(AdaptedMethod):
    """ARD-LoRA (arXiv 2506.18267): ranks learnt per layer and attention head, under a sparsity penalty."""

    kind: Literal["ard_lora"] = Field(description="ARD-LoRA.")
    rank: Auto | Positive = Field(default="auto", description="Rank r0 at the start; the largest is twice that.")
    alpha: Auto | _PositiveNumber = Field(default="auto", description="Strength of the update.")
    dropout: Auto | _Share = Field(
        default="auto", description="Dropout on the adapter's input; `auto` is what the task chooses, or else 0."
    )
    per_head: bool = Field(default=True, description="A rank per attention head, not only per module.")
    sparsity: float = Field(default=0.01, ge=0.0, description="Weight of the penalty on ranks.")
    variation: float = Field(default=0.1, ge=0.0, description="Weight, within the penalty, of changes per step.")
    gate_lr: _PositiveNumber = Field(default=0.03, description="Learning rate of the rank factors.")
    warmup: float = Field(default=0.1, ge=0.0, lt=1.0, description="Share of the steps before ranks move.")
    settle: float = Field(default=0.3, ge=0.0, lt=1.0, description="Share of the steps at the end with fixed ranks.")


class QloraMethod(LowRankMethod):
    """QLoRA (Dettmers et al. 2023): LoRA over a base held in 4 or 8 bits."""

    kind: Literal["qlora"] = Field(description="QLoRA.")
    bits: Literal[4, 8] = Field(default=4, description="Bits of a base weight: 4 (NF4) or 8 (LLM.int8).")
    double_quantization: bool = Field(default=True, description="Quantise the scales of 4-bit blocks too.")
    init: Literal["default", "loftq"] = Field(
        default="default", description="How A and B begin; `loftq` makes up for the quantisation error."
    )


class FullMethod(Section):
    """Full fine-tuning: every weight of the base is trained. For comparison with the adapters."""

    kind: Literal["full"] = Field(description="Full fine-tuning.")
    weights: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="Number format the weights are kept in; `auto` is fp32, or bf16 if training.dtype is set to it.",
    )


class HeadMethod(Section):
    """The head of a classifier alone, over the frozen base. What an adapter adds is seen beside it."""

    kind: Literal["head"] = Field(description="The head alone.")
    modules_to_save: tuple[str, ...] = Field(
        default=(), description="Modules trained in full and saved; those of the head are added."
    )


class PeftMethod(AdaptedMethod):
    """Any other method of PEFT, by the name of its type, with its own options."""

    kind: Literal["peft"] = Field(description="A method of PEFT by name.")
    type: str = Field(description="PEFT's name of the method, such as IA3, LOHA, LOKR, OFT or VERA.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of its configuration, as in PEFT.")


Method = Annotated[
    LoraMethod | DoraMethod | AdaloraMethod | ArdLoraMethod | QloraMethod | FullMethod | HeadMethod | PeftMethod,
    Field(discriminator="kind"),
]

METHODS: dict[str, type[Section]] = {
    "lora": LoraMethod,
    "dora": DoraMethod,
    "adalora": AdaloraMethod,
    "ard_lora": ArdLoraMethod,
    "qlora": QloraMethod,
    "full": FullMethod,
    "head": HeadMethod,
    "peft": PeftMethod,
}
