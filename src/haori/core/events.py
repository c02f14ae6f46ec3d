"""What work reports while it runs: typed events, which displays, logs, trackers and other processes subscribe to.

    Started     a run, comparison or sweep has its folder and begins
    Progress    an optimizer step is done
    Measured    a validation is done
    Saved       a checkpoint, adapter or model lies on disk
    Warned      something the user should know, which does not end the work
    Said        a plain line for the user
    Finished    it came to its end, or was stopped by a signal
    Failed      it ended with an error

Work takes one `EventSink` and calls it; who listens, it does not know. An event is one JSON object, told apart by
`kind`, and is what a child process sends its parent. A reader of this version passes over kinds and fields that a later
one adds. What is wrong before the work has a folder is raised and not reported.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from haori.core.records import Record, RunRecord

__all__ = [
    "Event",
    "EventReader",
    "EventSink",
    "Failed",
    "Figures",
    "Finished",
    "Measured",
    "Progress",
    "Said",
    "Saved",
    "Started",
    "Warned",
    "discard",
    "fan_out",
    "reporting_failure",
]

Figures = dict[str, int | float]
"""Figures by name; units are in the names or the descriptions."""


class _Event(Record):
    """What every event has; a figure that is not finite is a string in its JSON, which other languages can read."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    job: str | None = Field(
        default=None, description="The child process that reported it, of several that one command runs; else null."
    )


class Started(_Event):
    """Work has its folder and begins, or goes on from a checkpoint."""

    kind: Literal["started"] = "started"
    work: Literal["run", "comparison", "sweep"] = Field(default="run", description="What began.")
    folder: str = Field(description="Its folder.")
    name: str = Field(description="Name in the recipe.")
    task: str = Field(description="What is learnt, as the recipe calls it.")
    step: int = Field(default=0, description="Optimizer steps done before, of a run that is resumed.")
    total_steps: int | None = Field(default=None, description="Optimizer steps at most; null unless it is a run.")
    unit: str | None = Field(default=None, description="What is processed and counted, tokens say; null as above.")


class Progress(_Event):
    """An optimizer step is done."""

    kind: Literal["progress"] = "progress"
    step: int = Field(description="Optimizer steps done.")
    total_steps: int = Field(description="Optimizer steps at most.")
    epoch: float = Field(description="Epochs done.")
    loss: float = Field(description="Mean loss of the step over all that carries loss; of text in nats per token.")
    rate_per_s: float = Field(description="How much was processed in a second, in `unit`.")
    unit: str = Field(description="What `rate_per_s` counts, tokens say.")
    peak_memory_bytes: int = Field(description="Highest memory so far of the first process.")
    values: Figures = Field(
        default_factory=dict, description="Further figures of the step as in metrics.jsonl: lr, grad_norm, seconds."
    )


class Measured(_Event):
    """A validation is done; the one at step 0 comes before training."""

    kind: Literal["measured"] = "measured"
    step: int = Field(description="Optimizer steps done.")
    epoch: float = Field(description="Epochs done.")
    values: Figures = Field(
        description="Means over the validation rows: loss, further ones of the task such as accuracy; and train_loss, "
        "the mean loss of the training steps since the validation before."
    )


class Saved(_Event):
    """Something lies whole on disk."""

    kind: Literal["saved"] = "saved"
    what: Literal["checkpoint", "adapter", "model"] = Field(description="What was saved; the latter two end training.")
    path: str = Field(description="Its folder.")
    step: int = Field(description="Optimizer steps whose weights it holds.")


class Warned(_Event):
    """Something the user should know, which does not end the work."""

    kind: Literal["warned"] = "warned"
    text: str


class Said(_Event):
    """A line for the user."""

    kind: Literal["said"] = "said"
    text: str


class Finished(_Event):
    """Work came to its end or, as `signal` says, was stopped and can be resumed."""

    kind: Literal["finished"] = "finished"
    folder: str = Field(description="Its folder.")
    record: RunRecord | None = Field(default=None, description="What a run did; null of a comparison or sweep.")
    adapter: str | None = Field(default=None, description="Library name with version, of a run that stored one.")
    signal: int | None = Field(default=None, description="Number of the signal that stopped it.")


class Failed(_Event):
    """Work ended with an error, which is raised as well."""

    kind: Literal["failed"] = "failed"
    text: str = Field(description="What went wrong, as a sentence.")
    error: str = Field(description="Class of the error, in haori.core.errors where it was foreseen.")


Event = Started | Progress | Measured | Saved | Warned | Said | Finished | Failed

EventSink = Callable[[Event], None]
"""Takes events one by one, in the thread that does the work: it should return at once."""

_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


class EventReader:
    """Reads events from JSON lines; `skipped` counts, by kind, those that this version cannot read."""

    def __init__(self) -> None:
        self.skipped: Counter[str] = Counter()

    def read(self, line: str | bytes) -> Event | None:
        """Return the event of a line; None if it is of a kind, or in a form, that this version does not know.

        Raises:
            ValueError: The line is no event at all.
        """
        document: Any = json.loads(line)
        if not isinstance(document, dict) or not isinstance(document.get("kind"), str):
            raise ValueError("an event is a JSON object with a kind")  # noqa: TRY004 - as json raises
        try:
            return _EVENT.validate_python(document, extra="ignore")
        except ValidationError:
            self.skipped[document["kind"]] += 1
            return None


def discard(_: Event) -> None:
    """Listen to nothing."""


def fan_out(*sinks: EventSink) -> EventSink:
    """Return a sink that hands each event to all of `sinks`.

    A sink that raises does not end the work: its failure is printed once, on standard error, and it gets no further
    event. KeyboardInterrupt and SystemExit, which ask for the end, pass.
    """
    listening = list(sinks)

    def emit(event: Event) -> None:
        for sink in tuple(listening):
            try:
                sink(event)
            except Exception as error:  # noqa: BLE001 - whatever a listener does wrong, the work goes on
                listening[:] = [other for other in listening if other is not sink]
                name = getattr(sink, "__qualname__", type(sink).__name__)
                reason = f"{type(error).__name__}: {error}".rstrip(".: ")
                print(f"Warning: {name} failed ({reason}) and gets no further events.", file=sys.stderr)

    return emit


@contextmanager
def reporting_failure(on_event: EventSink) -> Iterator[None]:
    """Report whatever ends the block with an error, and let it pass."""
    try:
        yield
    except BaseException as error:
        text = " ".join(str(error).split()) or f"It ended with {type(error).__name__}."
        on_event(Failed(text=text, error=type(error).__name__))
        raise
