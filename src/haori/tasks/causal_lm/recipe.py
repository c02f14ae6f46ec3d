"""The recipe of text generation."""

from typing import Literal

from pydantic import Field

from haori.data.section import TextSection
from haori.tasks.recipe import Recipe, TokenTraining

__all__ = ["RECIPE", "CausalLmRecipe"]


class CausalLmRecipe(Recipe):
    """Everything a training run is made from that teaches a model to write text."""

    task: Literal["causal_lm"] = Field(default="causal_lm", description="What is learnt.")
    data: TextSection
    training: TokenTraining = Field(default_factory=TokenTraining)


RECIPE = CausalLmRecipe
