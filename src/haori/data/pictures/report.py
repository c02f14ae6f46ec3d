"""What is known of a set of pictures once it was read: every picture that was listed is accounted for.

`read == rows in all splits + the sum of dropped`.
"""

from pydantic import Field

from haori.core.records import DataReference, Record

__all__ = ["BucketCount", "PictureReport"]


class BucketCount(Record):
    """How many pictures are trained on at one size."""

    width: int
    height: int
    pictures: int


class PictureReport(Record):
    """A set of pictures in figures. Splits are `train`, `validation` and, where there are any, `regularisation`."""

    source: str
    layout: str
    hash: str = Field(description="Hash of pictures, captions and splits, in order.")
    read: int = Field(description="Pictures that the source lists.")
    rows: dict[str, int] = Field(description="Pictures per split.")
    steps: int = Field(default=0, description="Pictures in an epoch, with repeats.")
    dropped: dict[str, int] = Field(default_factory=dict, description="Pictures left out, by reason.")
    changed: dict[str, int] = Field(default_factory=dict, description="Pictures of which something was changed.")
    buckets: tuple[BucketCount, ...] = ()
    captions: dict[str, int] = Field(default_factory=dict, description="Counts of what a user should know of captions.")
    cut: tuple[str, ...] = Field(default=(), description="Captions that are too long, with what is cut off.")
    refused: bool = False
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    licence: str | None = None
    attribution: str | None = None

    def reference(self) -> DataReference:
        """Return the short form that cards and runs keep."""
        return DataReference(
            source=self.source,
            hash=self.hash,
            format=self.layout,
            rows=self.rows,
            licence=self.licence,
            attribution=self.attribution,
        )
