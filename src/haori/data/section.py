"""The data section of a recipe: which files, what is held out, and for text which columns and what carries loss."""

from typing import Literal

from pydantic import Field

from haori.core.methods import Auto, Positive, Section

__all__ = ["Columns", "DataSection", "TextSection"]


class Columns(Section):
    """Which columns hold what, for data in no known format."""

    prompt: str | None = Field(default=None, description="Column with what the user says.")
    completion: str | None = Field(default=None, description="Column with what the model should answer.")
    system: str | None = Field(default=None, description="Column with the system message.")
    text: str | None = Field(default=None, description="Column with plain text to continue.")
    messages: str | None = Field(default=None, description="Column with a list of {role, content}.")


class DataSection(Section):
    """Which data a task learns from, and what is held out."""

    path: str = Field(description="File, folder, or dataset id on the hub.")
    split: str = Field(default="train", description="Split to train on of a folder or hub dataset that has several.")
    revision: str | None = Field(default=None, description="Revision of a hub dataset.")
    validation: str | None = Field(
        default=None, description="Separate file or folder to validate on; a validation split is found."
    )
    validation_share: float = Field(
        default=0.1, ge=0.0, le=0.5,
        description="Share of rows held out for validation when there are none apart; chosen by row hash.",
    )  # fmt: skip
    max_rows: Positive | None = Field(default=None, description="Read at most this many rows.")
    licence: str | None = Field(default=None, description="Licence of the data (SPDX id).")
    attribution: str | None = Field(default=None, description="Whom to credit for the data.")


class TextSection(DataSection):
    """Data of conversations or plain text, and how to read it."""

    format: Literal["auto", "messages", "alpaca", "sharegpt", "prompt-completion", "query-response", "text"] = Field(
        default="auto", description="Row format; `auto` detects it from the column names."
    )
    columns: Columns | None = Field(default=None, description="Column mapping for anything else.")
    system: str | None = Field(default=None, description="System message for rows that have none.")
    train_on: Literal["assistant", "all"] = Field(
        default="assistant", description="Which tokens carry loss: the assistant's, or all."
    )
    control_tokens: Literal["text", "allow"] = Field(
        default="text",
        description="A control token (such as an end-of-turn) in a message is read as text, or allowed to be one.",
    )
    max_length: Auto | Positive = Field(
        default="auto", description="Longest row in tokens; `auto` is 2048 or the base's context, if shorter."
    )
    too_long: Literal["drop", "truncate", "error"] = Field(
        default="drop", description="What happens to longer rows; always counted."
    )
