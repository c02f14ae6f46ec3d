"""The recipe of preference learning."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from haori.core.methods import Auto, Positive, Section
from haori.data.section import DataSection
from haori.tasks.recipe import Recipe, TokenTraining

__all__ = [
    "RECIPE",
    "DpoLoss",
    "HingeLoss",
    "IpoLoss",
    "KtoLoss",
    "OrpoLoss",
    "PreferenceColumns",
    "PreferenceData",
    "PreferenceLoss",
    "PreferenceRecipe",
    "SimpoLoss",
]

_Beta = Annotated[float, Field(gt=0.0)]
_Reference = Literal["base", "start"]
_REFERENCE = (
    "What log-ratios are taken against, where the run goes on from an adapter (`from`): that adapter as it was (start) "
    "or the base without it. A fresh run starts as the base, so both are the same."
)


class PreferenceColumns(Section):
    """Which columns hold what, for data in no known format."""

    prompt: str | None = Field(default=None, description="Column with the prompt: text, or a list of messages.")
    system: str | None = Field(default=None, description="Column with the system message.")
    chosen: str | None = Field(default=None, description="Column with the better answer or conversation.")
    rejected: str | None = Field(default=None, description="Column with the worse answer or conversation.")
    completion: str | None = Field(default=None, description="Column with a single answer.")
    label: str | None = Field(default=None, description="Column that says whether the single answer is good.")
    score: str | None = Field(default=None, description="Column with the score of the single answer.")
    completions: str | None = Field(default=None, description="Column with a list of answers.")
    scores: str | None = Field(default=None, description="Column with a list of their scores.")


class PreferenceData(DataSection):
    """Answers of which one is preferred, and how to read them."""

    format: Literal["auto", "pairs", "rated", "judged"] = Field(
        default="auto",
        description="Row format; `auto` detects it from the column names: a chosen and a rejected answer (pairs), "
        "answers with scores (rated), or answers that are good or not (judged).",
    )
    columns: PreferenceColumns | None = Field(default=None, description="Column mapping for anything else.")
    system: str | None = Field(default=None, description="System message for rows that have none.")
    rated_pairs: Literal["best-worst", "all"] = Field(
        default="best-worst",
        description="Which pairs a prompt with several scored answers gives: its best with its worst, or all.",
    )
    control_tokens: Literal["text", "allow"] = Field(
        default="text",
        description="A control token (such as an end-of-turn) in a message is read as text, or allowed to be one.",
    )
    max_length: Auto | Positive = Field(
        default="auto",
        description="Longest prompt with an answer in tokens; `auto` is 2048 or the base's context, if shorter.",
    )
    too_long: Literal["drop", "error"] = Field(
        default="drop", description="What happens to pairs with a longer answer; always counted."
    )


class DpoLoss(Section):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    kind: Literal["dpo"] = Field(description="Logistic loss of the difference of log-ratios.")
    beta: _Beta = Field(default=0.1, description="Strength of the pull towards the reference.")
    label_smoothing: float = Field(
        default=0.0, ge=0.0, lt=0.5, description="Assumed share of pairs whose labels are swapped."
    )
    reference: _Reference = Field(default="start", description=_REFERENCE)


class IpoLoss(Section):
    """Identity preference optimisation (Azar et al. 2023)."""

    kind: Literal["ipo"] = Field(description="Squared distance of the mean log-ratios' difference from 1/(2 beta).")
    beta: _Beta = Field(default=0.1, description="Strength of the pull towards the reference (the paper's tau).")
    reference: _Reference = Field(default="start", description=_REFERENCE)


class HingeLoss(Section):
    """Hinge loss of DPO's margin (Liu et al. 2023)."""

    kind: Literal["hinge"] = Field(description="Loss that ends where the margin is reached.")
    beta: _Beta = Field(default=0.1, description="Reciprocal of the margin of log-ratios.")
    reference: _Reference = Field(default="start", description=_REFERENCE)


class OrpoLoss(Section):
    """Odds ratio preference optimisation (Hong et al. 2024)."""

    kind: Literal["orpo"] = Field(description="Loss of the chosen answer plus that of an odds ratio; no reference.")
    beta: _Beta = Field(default=0.1, description="Weight of the odds ratio (the paper's lambda).")


class SimpoLoss(Section):
    """Simple preference optimisation (Meng et al. 2024)."""

    kind: Literal["simpo"] = Field(description="Logistic loss of mean log-probabilities with a margin; no reference.")
    beta: _Beta = Field(default=2.0, description="Scale of the mean log-probability.")
    gamma: float = Field(default=1.0, ge=0.0, description="Margin that the chosen answer's reward is to have.")


class KtoLoss(Section):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024)."""

    kind: Literal["kto"] = Field(description="Loss of answers that are judged one by one; pairs are taken apart.")
    beta: _Beta = Field(default=0.1, description="Strength of the pull towards the reference.")
    desirable_weight: float = Field(default=1.0, gt=0.0, description="Weight of good answers.")
    undesirable_weight: float = Field(default=1.0, gt=0.0, description="Weight of bad answers.")
    reference: _Reference = Field(default="start", description=_REFERENCE)


PreferenceLoss = Annotated[DpoLoss | IpoLoss | HingeLoss | OrpoLoss | SimpoLoss | KtoLoss, Field(discriminator="kind")]


class PreferenceRecipe(Recipe):
    """Everything a training run is made from that teaches a model which answers are preferred."""

    task: Literal["preference"] = Field(default="preference", description="What is learnt.")
    data: PreferenceData
    loss: PreferenceLoss = Field(default_factory=lambda: DpoLoss(kind="dpo"))
    training: TokenTraining = Field(default_factory=TokenTraining)

    @field_validator("loss", mode="before")
    @classmethod
    def _usual_loss(cls, given: Any) -> Any:
        """Take a loss without a kind for DPO."""
        return {"kind": "dpo", **given} if isinstance(given, dict) else given


RECIPE = PreferenceRecipe
