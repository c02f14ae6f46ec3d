"""What the training runs of a client did to an adapter: counted with its weights, and kept on its card."""

from typing import Any

from pydantic import Field

from haori.core.base_reference import Record

__all__ = ["FRESH", "ClientRun"]

FRESH = "fresh"


class ClientRun(Record):
    """What one run did to an adapter, as of a checkpoint; one that went on from another follows it."""

    run: str | None = Field(default=None, description="Its id; None for a session in process.")
    metadata: dict[str, Any] | None = Field(
        default=None, description="What the client said of it; kept of the latest run alone."
    )
    started_from: str = Field(
        default=FRESH, description="`fresh`, the path of a checkpoint, `library:NAME@VERSION`, or `files`."
    )
    parent: str | None = Field(default=None, description="Id of the library adapter that it started from.")
    steps: int = Field(default=0, description="Steps of the optimizer that were applied.")
    losses: dict[str, int] = Field(default_factory=dict, description="Calls whose gradients were added, by loss.")
    rows: int = Field(default=0, description="Rows of these calls.")
    tokens: int = Field(default=0, description="Their tokens.")
    data_hash: str | None = Field(
        default=None, description="Hash of these rows in their order, with their losses; None for no rows."
    )
    last_loss: str | None = Field(default=None, description="The loss of the last of these calls.")
    last_figures: dict[str, float] = Field(
        default_factory=dict, description="What that call gave, such as loss:sum, with its rows and tokens."
    )
    optimizer: dict[str, float] = Field(default_factory=dict, description="AdamW's settings in the last step.")
    checkpoint: str | None = Field(default=None, description="Path of the checkpoint.")
    request: int | None = Field(default=None, description="Number of the request that saved it, in its run.")
    saved: str | None = Field(default=None, description="When, as ISO 8601.")
