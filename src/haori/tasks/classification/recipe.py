"""The recipe of classification."""

from typing import Annotated, Literal

from pydantic import Field

from haori.core.methods import Auto, Positive, Section
from haori.data.section import DataSection
from haori.tasks.recipe import Recipe, TokenTraining

__all__ = ["RECIPE", "ClassificationColumns", "ClassificationData", "ClassificationLoss", "ClassificationRecipe"]

_Weight = Annotated[float, Field(gt=0)]


class ClassificationColumns(Section):
    """Which columns hold what, where their names do not tell."""

    text: str | None = Field(default=None, description="Column with the text.")
    text_pair: str | None = Field(default=None, description="Column with the second text of a pair.")
    label: str | None = Field(default=None, description="Column with the label, or with a list of labels.")
    labels: tuple[str, ...] | None = Field(
        default=None, description="Columns that are labels themselves, with 1 where the label holds and 0 where not."
    )
    tokens: str | None = Field(default=None, description="Column with the words of a text as a list.")
    tags: str | None = Field(default=None, description="Column with a label for each of the words.")


class ClassificationData(DataSection):
    """Texts with labels, and how to read them."""

    problem: Literal["auto", "single_label", "multi_label", "token"] = Field(
        default="auto",
        description="One label per text, several, or one per word; `auto` sees it from the columns and their values.",
    )
    columns: ClassificationColumns | None = Field(default=None, description="Column mapping.")
    labels: Auto | tuple[str, ...] = Field(
        default="auto",
        description="Names of the labels in the order of the head's outputs; `auto` takes those of the training rows. "
        "Where rows hold numbers, the names that the numbers stand for, from 0.",
    )
    label_separator: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="What stands between the labels of a row that has several in one text, such as `;`."
    )
    max_length: Auto | Positive = Field(
        default="auto", description="Longest row in tokens; `auto` is 512 or what the base reads, if shorter."
    )
    too_long: Literal["truncate", "drop", "error"] = Field(
        default="truncate", description="What happens to longer rows; always counted."
    )


class ClassificationLoss(Section):
    """What counts how much."""

    class_weights: Literal["none", "balanced"] | dict[str, _Weight] = Field(
        default="none",
        description="Weight of a label's loss: all alike, `balanced` (rare labels more, by the training rows), or a "
        "number per label.",
    )


class ClassificationRecipe(Recipe):
    """Everything a training run is made from that teaches a model to classify."""

    task: Literal["classification"] = Field(default="classification", description="What is learnt.")
    data: ClassificationData
    loss: ClassificationLoss = Field(default_factory=ClassificationLoss)
    training: TokenTraining = Field(default_factory=TokenTraining)


RECIPE = ClassificationRecipe
