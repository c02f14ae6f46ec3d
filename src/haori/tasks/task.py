"""What a task is: everything that training, proof, evaluation and the library must know of what is learnt.

The loop, preparation, plan, sweep, compare and the proof know only these protocols. A task is one folder beside this
file, with one line in `registry.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from haori.core.errors import InputError
from haori.core.records import MODEL_COMPONENT

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import Tensor, nn

    from haori.bases import Base
    from haori.core.quantization import Quantization
    from haori.core.records import AdapterCard, DataReference, Head
    from haori.data.report import Leaks
    from haori.library.proof.logits import Probe
    from haori.metrics.statistics import Statistic
    from haori.tasks.examination import AnsweredRow, Examination, MeasureOptions, TextLosses
    from haori.tasks.recipe import Recipe

__all__ = ["Choice", "GeneralWords", "LossSum", "Objective", "Observer", "Size", "Split", "Task"]


class Choice(NamedTuple):
    """One resolved value: dotted key, value, and why."""

    key: str
    value: int | float | str
    reason: str


class GeneralWords(NamedTuple):
    """What is said of `general_losses` before and after training, in tables and figures."""

    column: str = "forgot, nats/token"
    figure: str = "Forgetting: rise of the loss on {}"
    axis: str = "nats per token, after minus before"
    parts: str = "Forgetting by kind of text"
    sentence: str = "forgot {} instead of {} nats per token of general text"
    note: str = "Forgetting is the rise of the loss on general text, in nats per token, after training minus before."
    sets: tuple[str, str] = ("general text", "your own general text")
    passages: str = "passages"


@dataclass(frozen=True, slots=True)
class Size:
    """How much a batch holds.

    Attributes:
        count: Things that carry loss and that a step's loss is divided by: tokens, rows, pairs, latents.
        cost: What was processed, in the unit that batches are budgeted in: tokens, pixels, residues.
    """

    count: int
    cost: int


@dataclass(frozen=True, slots=True)
class LossSum:
    """The summed loss of a batch.

    Attributes:
        total: [] with its graph.
        count: Things that carry loss; the loop divides by those of the whole optimizer step.
        each: [n] loss of each of them, detached.
        row_of: [n] the row each belongs to, as an index into the batch's `rows`.
        also: Further sums over the batch, such as pairs ranked right; a validation reports them divided by the count.
    """

    total: "Tensor"
    count: int
    each: "Tensor"
    row_of: "Tensor"
    also: "Mapping[str, Tensor]" = field(default_factory=dict)


class Batch(Protocol):
    """Rows collated for the model; what else it holds is the task's own business."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Return the numbers of its rows."""


class Objective(Protocol):
    """Batches of one split and their losses.

    Methods other than `begin` change nothing; `batch` may draw random numbers, which a checkpoint keeps the state of.
    """

    @property
    def costs(self) -> Sequence[int]:
        """Return what each row costs, in the task's unit; a batch costs rows x the dearest of them."""

    @property
    def separable(self) -> bool:
        """Say whether the loss of a batch is the sum of its rows' own losses, so that a batch may be taken apart."""

    def begin(self, model: "nn.Module") -> None:
        """Prepare for the first step, with the model as it will be trained; computes what must be known of it.

        A plan measures time and memory of a batch without it.
        """

    def batch(self, rows: Sequence[int], device: "str | Any") -> Any:
        """Collate rows into a batch on `device`."""

    def blank(self, batch: Any) -> Any:
        """Return the same batch with nothing in it that counts: for a process that has no rows of its own."""

    def size(self, batch: Any) -> Size:
        """Return how much a batch holds."""

    def loss(self, model: "nn.Module", batch: Any) -> LossSum:
        """Run the model, wrapped or not, and sum its loss over what counts."""

    def part(self, batch: Any, places: Sequence[int]) -> Any:
        """Return the rows at these places of a batch as one; only asked for where `separable` is true."""

    def inputs(self, batch: Any) -> "Mapping[str, Tensor]":
        """Return the arguments of the model's forward, without targets."""

    def origins(self, rows: Sequence[int]) -> list[str]:
        """Return where rows come from, as file:row."""


class Observer(Protocol):
    """Looks at the model while it trains; random numbers and training flags are put back after it."""

    def __call__(self, model: "nn.Module", step: int, epoch: float) -> None:
        """Look at the model after optimizer step `step`; at 0 it is as the base, whatever the method."""


class Split(Protocol):
    """Rows that are read, cleaned, hashed and split; the parts are sized and hold what the objective takes."""

    @property
    def train(self) -> Any:
        """Return the training rows."""

    @property
    def validation(self) -> Any:
        """Return the rows held out; it may be empty."""

    @property
    def notes(self) -> Sequence[str]:
        """Return what a user should know of the reading, as sentences: rows dropped, text changed."""

    @property
    def refused(self) -> bool:
        """Say whether nothing can be trained on these rows (only after a check that goes on after broken rows)."""

    def reference(self) -> "DataReference":
        """Return the short form that cards and runs keep."""

    def table(self) -> "RenderableType":
        """Return the whole report, for a terminal."""


class Task(Protocol):
    """What is learnt. `recipe` is always of the task's own class; before `resolve` it may hold `auto` values.

    A task inherits from this class; what has a default here it need not say.
    """

    kind: str
    """The name in recipes."""
    title: str
    """What it is for people, in lower case: text generation."""
    components: tuple[str, ...] = (MODEL_COMPONENT,)
    """Components of a base that it works with; a base that is one model by default."""
    rows_title: str = "rows"
    """What people call its rows, in the plural."""
    example: str = "smollm2-135m-instruct"
    """A base that it works with, for messages."""
    unit: str
    """What costs are measured in, in the plural: tokens, pixels, residues."""
    loss_unit: str = ""
    """What a loss is measured in, for plots and tables, such as nats per trained token; empty where it has no name."""
    general: GeneralWords = GeneralWords()
    """How what `general_losses` measures is called."""
    counted: str
    """Name of the count in `metrics.jsonl`: trained_tokens, rows, pairs."""

    @property
    def loss_label(self) -> str:
        """Return the loss with its unit, for the axis of a plot."""
        return f"loss ({self.loss_unit})" if self.loss_unit else "loss"

    def peft_type(self, recipe: Any) -> str | None:
        """Return PEFT's `task_type`."""

    def check(self, recipe: Any, base: "Base") -> None:
        """Refuse what cannot be trained, before data or weights are read.

        Raises:
            HaoriError: The base is of another kind, or keys do not go together.
        """

    def head(self, recipe: Any) -> "Head | None":
        """Return the output head that the model gets; None, the default, keeps the base's own.

        Before `resolve` the labels may not be known: any head with the right module names will do then.
        """
        return None

    def processor(self, base: "Base", recipe: Any) -> Any:
        """Return what turns rows into model inputs: the base's tokenizer by default."""
        from haori.bases import load_tokenizer

        return load_tokenizer(base)

    def skeleton(self, base: "Base", recipe: Any) -> "nn.Module":
        """Return the modules that can be adapted, without weights; the base with the task's head by default."""
        from haori.bases import load_skeleton

        found: nn.Module = load_skeleton(base, head=self.head(recipe))
        return found

    def target(self, recipe: Any, base: "Base") -> str | tuple[str, ...]:
        """Return what of the skeleton is adapted, as `resolve_targets` takes it; `method.target` by default."""
        found: str | tuple[str, ...] = recipe.method.target
        return found

    def model(
        self, base: "Base", recipe: Any, *, dtype: str, device: str, quantization: "Quantization | None"
    ) -> "nn.Module":
        """Load what is trained, frozen and in evaluation mode; the base with the task's head by default."""
        from haori.bases import load_model

        found: nn.Module = load_model(
            base, dtype=dtype, device=device, quantization=quantization, head=self.head(recipe),
            head_seed=recipe.training.seed,
        )  # fmt: skip
        return found

    def ready(self, recipe: Any, base: "Base", processor: Any, split: Any, device: str) -> None:
        """Compute what rows need of parts of the base that are not trained, before the model is loaded.

        Pictures are turned into latents and captions into embeddings here, so that the models that do it need not be
        in memory while others train. It may take long, shows its progress, and does again only what is not known yet.
        """
        return

    def rate(self, recipe: Any, parameter: str) -> float:
        """Return the factor on the learning rate of a parameter by its name; 1 by default."""
        return 1.0

    def measured_training(self, split: Any, processor: Any, recipe: Any) -> "Objective | None":
        """Return training rows to be measured at each validation in just the way of the validation rows.

        For losses that are noisy in training, which a validation is not: the means of the steps would tell little of
        over-fitting. None, the default, compares with the means of the steps.
        """
        return None

    def observer(self, recipe: Any, base: "Base", processor: Any, split: Any, folder: Path) -> "Observer | None":
        """Return what looks at the model after a validation, such as sample pictures; None, the default, if nothing.

        Args:
            recipe: Resolved.
            base: What is trained on.
            processor: From `processor`.
            split: From `rows`.
            folder: Of the run, to write into.
        """
        return None

    def rows(self, recipe: Any, base: "Base", processor: Any, *, tolerant: bool = False) -> Split:
        """Read, clean, hash and split the data.

        Args:
            recipe: Its data section says what to read.
            base: With its context length.
            processor: From `processor`.
            tolerant: Go on after broken rows and report them, for `haori data check`.

        Raises:
            DataError: It cannot be found, read or trained on.
        """

    def show(self, rows: Any, processor: Any, count: int) -> "list[RenderableType]":
        """Return the first `count` rows of a part of the split as the model sees them, what is trained marked."""

    def resolve(self, recipe: Any, split: Any, base: "Base", device: str) -> "tuple[Recipe, tuple[Choice, ...]]":
        """Replace the task's own `auto` values, budgets of batches among them."""

    def objective(self, rows: Any, processor: Any, recipe: Any) -> Objective:
        """Return batches and losses of a part of the split."""

    def measured(self, rows: Any, processor: Any, recipe: Any) -> Objective:
        """Return losses of a part of the split as a validation measures them; as in training by default."""
        return self.objective(rows, processor, recipe)

    def probes(self, processor: Any, recipe: Any, split: Any) -> "list[Probe]":
        """Return a few model inputs on which reload, merge and export are compared."""

    def rendering(self, processor: Any, recipe: Any, split: Any) -> tuple[list[int], list[int]] | None:
        """Return one row as it is trained on and as inference would render it; None, the default, where none is."""
        return None

    def write_files(self, folder: Path, processor: Any, recipe: Any, split: Any) -> None:
        """Write what belongs beside the adapter's weights, such as a chat template; nothing by default."""
        return

    def check_out(self, recipe: Any) -> None:
        """Refuse to write the adapter as a stock PEFT folder at the end, where it will hold what that has no place for.

        Raises:
            RecipeError: It will.
        """
        return

    def next_command(self, adapter: str) -> str:
        """Return the command that a user would run next with a trained adapter; `haori chat` by default."""
        return f"haori chat {adapter}"

    def card(self, processor: Any, recipe: Any) -> dict[str, Any]:
        """Return the fields of the adapter's card that only the task knows; none by default."""
        return {}

    def read(self, section: Any) -> "tuple[Sequence[Any], DataReference, tuple[str, ...]]":
        """Read rows to measure on, as the task's data section says; with what a user should know of the reading.

        Raises:
            DataError: They cannot be found or read.
        """

    def held_out(self, split: Any) -> Sequence[Any]:
        """Return the validation rows of a split, as `read` gives rows."""

    def as_trained(self, rows: Sequence[Any], card: "AdapterCard") -> "tuple[Sequence[Any], tuple[str, ...]]":
        """Return rows to measure an adapter on, asked as it was trained, and what was changed; unchanged by default."""
        return rows, ()

    def seen(self, folder: Path, rows: Sequence[Any]) -> list[str] | None:
        """Return the origins of rows that the adapter in `folder` was trained on; None, the default, if not known."""
        return None

    def leaks(self, rows: Sequence[Any], split: Any) -> "Leaks | None":
        """Look for rows to measure on among the training rows, word for word or nearly; None, the default, if not."""
        return None

    def options(self, section: Any) -> "MeasureOptions":
        """Return how rows of a data section are measured; the usual way by default."""
        from haori.tasks.examination import USUAL

        return USUAL

    def examine(
        self, model: "nn.Module", processor: Any, rows: Sequence[Any], options: "MeasureOptions"
    ) -> "Examination":
        """Make rows ready to be measured.

        Args:
            model: One of the systems, to look at; nothing is computed with it yet.
            processor: From `processor`, with what the adapter brings of its own.
            rows: From `read` or `held_out`.
            options: What to measure.

        Raises:
            InputError, DataError: No row can be measured, or the options do not fit the rows.
        """

    def general_losses(self, model: "nn.Module", processor: Any, own: str | None) -> "dict[str, TextLosses]":
        """Measure how likely a model finds text that has nothing to do with the task, to see what training forgot.

        Args:
            model: Plain or with adapters.
            processor: Of the task.
            own: Text of the user's, a file or folder, to measure besides.

        Returns:
            Losses by the name of the text; nothing, the default, for a task without likelihoods of text.
        """
        return {}

    def check_general(self, own: str | None) -> None:
        """Check general text of the user's before anything is loaded.

        Raises:
            InputError: It has no meaning for the task, which is the default, or cannot be read.
        """
        if own is not None:
            raise InputError(
                f"--general has no meaning for the task {self.kind}: its model has no likelihoods of text."
            )

    def statistics(self, rows: "Sequence[AnsweredRow]", labels: Sequence[str]) -> "dict[str, Statistic]":
        """Return the metrics that rows with answers allow, as statistics over them, the most telling first."""
