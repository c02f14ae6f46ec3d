"""What is known about a dataset of preferences once it was read."""

from typing import ClassVar

from pydantic import Field

from haori.data.report import DataReport
from haori.tasks.preference.reading import DROPPED

__all__ = ["PreferenceReport"]


class PreferenceReport(DataReport):
    """A dataset of preferences, ready for training, in figures; rows are pairs, or judged answers."""

    also_dropped: ClassVar[dict[str, str]] = DROPPED

    same_answers: int = Field(default=0, description="Rows dropped: the chosen answer is the rejected one.")
    prompts_differ: int = Field(default=0, description="Rows dropped: the two conversations part before an answer.")
    ties: int = Field(default=0, description="Pairs dropped: both answers have the same score.")
    alone: int = Field(default=0, description="Rows dropped: no other answer to the prompt has a score.")
    contradicted: int = Field(default=0, description="Rows dropped: the rejected answer's score is the higher one.")
    desirable: dict[str, int] = Field(
        default_factory=dict, description="Judged answers that are good, by split; empty for pairs."
    )
