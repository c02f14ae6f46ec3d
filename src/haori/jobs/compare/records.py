"""The records of a comparison: what a run's process hands back, and the whole as `comparison.json` holds it."""

from typing import Literal

from pydantic import Field

from haori.core.methods import Method
from haori.core.records import BaseReference, DataReference, Record, RunRecord
from haori.evaluation import Forgetting
from haori.tasks.examination import TextLosses
from haori.tasks.recipe import KeptRecipe

__all__ = [
    "BaseMeasured",
    "Comparison",
    "Cost",
    "Difference",
    "Measured",
    "MeasuredRow",
    "MethodResult",
    "Plan",
    "Point",
    "Rate",
    "Score",
    "Trained",
]


class Plan(Record):
    """What is compared with what; `plan.json` in the comparison's folder, from which it is resumed."""

    recipe: KeptRecipe
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    test: str | None = Field(description="Data to score on; None takes the recipe's validation rows.")
    general: str | None = Field(description="The user's own general text.")
    lr_sweep: bool
    stamp: str = Field(description="When it was begun, UTC.")


class Point(Record):
    """One validation: epochs and optimizer steps done, loss (of text, nats per trained token)."""

    epoch: float
    step: int
    loss: float


class Trained(Record):
    """A finished training run."""

    run: RunRecord
    folder: str = Field(description="The run folder.")
    adapter: str | None = Field(description="Name in the comparison's library; None for full fine-tuning.")
    model: str | None = Field(description="Folder of a fully fine-tuned model.")
    lr: float
    dtype: str
    method: Method = Field(description="Every value resolved.")
    data: DataReference
    size_bytes: int = Field(description="Of the adapter's or model's weight files.")
    curve: tuple[Point, ...]


class MeasuredRow(Record):
    """One test row and what a model did on it."""

    origin: str
    reference: str | None
    tokens: int
    nll: float | None
    label: str | None
    text: str | None
    score: float | None = None
    scores: tuple[float, ...] | None = None


class Measured(Record):
    """One model on the test rows and the general text."""

    rows: tuple[MeasuredRow, ...]
    labels: tuple[str, ...]
    notes: tuple[str, ...]
    general: dict[str, TextLosses] = Field(description="By set: `shipped`, and `own` if a file was given.")


class BaseMeasured(Record):
    """The bare base, and what was found out about the data on the way."""

    base: BaseReference
    parameters: int
    test: DataReference
    rows: int = Field(default=0, description="Rows to score on.")
    measured: Measured | None = Field(description="None where a bare base has nothing to measure: no head yet.")
    notes: tuple[str, ...]
    machine: dict[str, str]


class Difference(Record):
    """A difference on the same rows, with its paired 95% interval."""

    value: float
    low: float | None
    high: float | None


class Score(Record):
    """A metric of a method: the mean over its seeds, with a 95% bootstrap interval over rows."""

    value: float
    low: float | None
    high: float | None
    each: tuple[float, ...] = Field(description="Per seed.")
    spread: float | None = Field(description="Standard deviation over seeds; None for one seed.")
    against: dict[str, Difference] = Field(default_factory=dict, description="Minus that of `base`, or of `full`.")


class Rate(Record):
    """One learning rate of the sweep; a run that failed has its sentence instead of a loss."""

    lr: float
    validation_loss: float | None
    error: str | None = None


class Cost(Record):
    """What training took. Means over seeds, except for the peak, which is the highest."""

    seconds: float = Field(description="In optimizer steps; loading, validation and proof are not counted.")
    tokens: float
    tokens_per_s: float
    peak_memory_bytes: int
    trainable_parameters: int
    total_parameters: int
    size_bytes: int
    steps: float
    epochs: float


class MethodResult(Record):
    """One method: finished runs, and the sentences of those that failed."""

    method: str
    seeds: tuple[int, ...] = Field(description="Seeds of the finished runs.")
    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    lr: float | None = None
    rates: tuple[Rate, ...] = Field(default=(), description="The sweep, in order of the rate.")
    scores: dict[str, Score] = Field(default_factory=dict)
    cost: Cost | None = None
    forgetting: dict[str, Forgetting] = Field(default_factory=dict)
    curves: tuple[tuple[Point, ...], ...] = Field(default=(), description="Validations, one series per seed.")


class Comparison(Record):
    """A whole comparison; the table, the page and this file show the same figures."""

    schema_version: Literal[1] = 1
    name: str
    recipe: KeptRecipe
    seeds: tuple[int, ...]
    base: BaseReference
    data: DataReference | None = Field(description="Trained on; None if no run finished.")
    test: DataReference
    test_rows: int
    methods: tuple[MethodResult, ...] = Field(description="The base first.")
    notes: tuple[str, ...]
    machine: dict[str, str]
    time: str

    @property
    def failed(self) -> tuple[str, ...]:
        """Return the methods of which a run failed."""
        return tuple(result.method for result in self.methods if result.errors)
