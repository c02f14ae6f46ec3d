"""The records that layers hand to one another and keep on disk: frozen, strict, serialised as JSON.

A record never holds a tensor or an open file, and says nothing about where it is stored.
"""

import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from haori.core.base_reference import (
    MODEL_COMPONENT,
    BaseReference,
    CheckpointHashes,
    Difference,
    Fingerprint,
    Record,
    only_component,
)
from haori.core.client_runs import ClientRun

__all__ = [
    "MODEL_COMPONENT",
    "AdapterCard",
    "Advice",
    "BaseReference",
    "Check",
    "CheckpointHashes",
    "ClientRun",
    "DataReference",
    "Difference",
    "Evaluation",
    "Fingerprint",
    "Head",
    "Metric",
    "Permissions",
    "Record",
    "RunRecord",
    "Verification",
    "now",
    "only_component",
]


def now() -> str:
    """Return the current time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Head(Record):
    """The head of a classifier: what it gives a score to, and the labels it chooses among."""

    kind: Literal["sequence_classification", "token_classification"] = Field(
        description="One score per label for a whole text, or for each of its tokens."
    )
    labels: tuple[str, ...] = Field(description="Names of the labels, in the order of the head's outputs.")
    multi_label: bool = Field(default=False, description="Each label holds or does not, apart from the others.")

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if len(self.labels) < (1 if self.multi_label else 2):
            raise ValueError("a head needs two labels to choose between, or one that holds or does not")
        if len(set(self.labels)) < len(self.labels) or not all(label.strip() for label in self.labels):
            raise ValueError("the labels of a head are different names, none of them blank")
        return self


class DataReference(Record):
    """A dataset that an adapter was trained or measured on."""

    source: str
    hash: str
    format: str
    rows: dict[str, int] = Field(description="Rows per split.")
    tokens: dict[str, int] = Field(default_factory=dict, description="Tokens per split.")
    trained_tokens: dict[str, int] = Field(default_factory=dict, description="Tokens with a label per split.")
    licence: str | None = None
    attribution: str | None = None


class Check(Record):
    """One item of a verification: what was checked, the measured figure, its limit."""

    name: str
    passed: bool
    detail: str
    value: float | None = None
    limit: float | None = None


class Verification(Record):
    """The proof of a saved adapter."""

    passed: bool
    checks: tuple[Check, ...]
    dtype: str
    time: str

    @property
    def failures(self) -> tuple[Check, ...]:
        """Return the checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)


class Metric(Record):
    """A figure with its 95% interval; `base` and `difference` when it was compared."""

    value: float
    low: float | None = None
    high: float | None = None
    base: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None


class Evaluation(Record):
    """The measured quality of an adapter on one dataset."""

    data: DataReference
    against: str | None = None
    metrics: dict[str, Metric]
    notes: tuple[str, ...] = ()
    time: str


class Advice(Record):
    """One next step after a run: what to do, why, and the command that does it."""

    action: str = Field(description="What to do, as a sentence.")
    reason: str = Field(description="Why, with the figures of the run.")
    changes: dict[str, int | float | str] = Field(
        default_factory=dict, description="Recipe keys with the values to give them."
    )
    command: str | None = Field(default=None, description="What to type; RUN stands for the run folder.")

    def command_in(self, run_folder: Path) -> str | None:
        """Return the command with the run folder in it, ready to be pasted into a shell."""
        if self.command is None:
            return None
        return self.command.replace("RUN/recipe.yaml", shlex.quote(str(run_folder / "recipe.yaml")))


class RunRecord(Record):
    """What a training run did, kept in its folder as `run.json`; what it processed is called tokens there."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True, validate_by_alias=True)

    name: str
    status: Literal["running", "finished", "stopped", "failed"]
    started: str
    ended: str | None = None
    steps: int = 0
    epochs: float = 0.0
    best_step: int | None = None
    best_epoch: int | None = None
    train_loss: float | None = None
    validation_loss: float | None = None
    initial_validation_loss: float | None = None
    cost: int = Field(default=0, alias="tokens", description="Processed in all, in the task's unit.")
    unit: str = Field(default="tokens", description="What the cost is measured in, in the plural.")
    seconds: float = 0.0
    peak_memory_bytes: int = Field(default=0, description="Of the first process.")
    processes: int = 1
    trainable_parameters: int = 0
    total_parameters: int = 0
    ranks: dict[str, int | tuple[int, ...]] = Field(
        default_factory=dict, description="Final rank by module, or by its heads, where the method learnt ranks."
    )
    adapter: str | None = Field(default=None, description="Library name with version, once stored.")
    model: str | None = Field(default=None, description="Folder of the model, once proved, after full fine-tuning.")
    diagnosis: tuple[str, ...] = ()
    advice: tuple[Advice, ...] = Field(default=(), description="What to try next, the most promising first.")


class Permissions(Record):
    """What an author permits others to do with an adapter, in the terms of Civitai's four questions."""

    no_credit: bool = Field(description="It may be used without crediting the author (allowNoCredit).")
    commercial_use: tuple[Literal["Image", "RentCivit", "Rent", "Sell"], ...] = Field(
        description="Sell generated images, run on Civitai's service, run on any service, sell it or merges of it."
    )
    derivatives: bool = Field(description="It may be changed or merged, and that shared (allowDerivatives).")
    different_licence: bool = Field(description="What is made of it may have other terms (allowDifferentLicense).")


class Combination(Record):
    """How an adapter was made from others, or from two checkpoints."""

    kind: Literal["blend", "resize", "extract"]
    method: str = Field(default="linear", description="How changes were blended: linear, ties, dare, knots-ties, ...")
    weights: dict[str, float] = Field(default_factory=dict, description="Weight of each parent, by its id.")
    rank: int | None = Field(default=None, description="Rank that was asked for; None where the result is exact.")
    density: float | None = Field(default=None, description="Share of values that TIES or DARE kept.")
    seed: int | None = Field(default=None, description="Seed of what DARE dropped.")
    energy: float = Field(default=1.0, description="Share of the squared norm of all changes that was kept.")
    energy_median: float = Field(default=1.0, description="Its median over modules.")
    energy_least: float = Field(default=1.0, description="Its least over modules.")
    tuned: str | None = Field(default=None, description="The checkpoint that it was extracted from.")
    left_out: int = Field(default=0, description="Tensors that changed and that a LoRA cannot represent.")


def _is_empty(value: Any) -> bool:
    return not value


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


class AdapterCard(Record):
    """What the library knows about one adapter, kept beside its PEFT files as `card.json`."""

    model_config = ConfigDict(serialize_by_alias=True)

    schema_version: Literal[1] = 1
    id: str = Field(description="Hash of the adapter's files.")
    names: tuple[str, ...] = Field(default=(), description="Names with versions, e.g. support@2.")
    origin: Literal["trained", "added", "combined"]
    created: str
    base: BaseReference
    components: tuple[str, ...] = Field(
        default=(MODEL_COMPONENT,), min_length=1, exclude_if=lambda names: names == (MODEL_COMPONENT,),
        description="Components of the base that it changes.",
    )  # fmt: skip
    task: str = Field(default="causal_lm", description="What was learnt, as the recipe calls it.")
    head: Head | None = Field(default=None, description="The head of a classifier, with its labels.")
    method: str = Field(description="lora, dora, ... as PEFT spells it, in lower case.")
    rank: int | None = None
    alpha: float | None = None
    target_modules: tuple[str, ...] = ()
    trainable_parameters: int = 0
    size_bytes: int = 0
    data: tuple[DataReference, ...] = ()
    recipe_data: Annotated[dict[str, Any] | None, BeforeValidator(_plain)] = Field(
        default=None, alias="recipe", description="The recipe with every value resolved, as it was written."
    )
    run: RunRecord | None = None
    client_runs: tuple[ClientRun, ...] = Field(
        default=(), exclude_if=_is_empty, description="The runs of training clients that made it, in their order."
    )
    verification: Verification | None = None
    evaluations: tuple[Evaluation, ...] = ()
    template_hash: str | None = Field(default=None, description="Hash of the chat template used in training.")
    licence: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    seed: int | None = None
    parents: tuple[str, ...] = Field(default=(), description="Ids of the adapters this one was made from.")
    combination: Combination | None = Field(
        default=None, exclude_if=lambda made: made is None, description="How it was made from its parents."
    )
    description: str | None = None
    tags: tuple[str, ...] = Field(default=(), description="Tags of the author's model card.")
    stated_bases: tuple[str, ...] = Field(default=(), description="Bases that the author's model card names.")
    format: str = Field(
        default="peft", exclude_if=lambda name: name == "peft", description="Format of the stored files, by its name."
    )
    trigger_words: tuple[str, ...] = Field(
        default=(), exclude_if=_is_empty, description="Words that call up in a prompt what was learnt."
    )
    recommended_strength: float | None = Field(
        default=None, exclude_if=lambda strength: strength is None,
        description="The strength to use it at, as its maker or its training says.",
    )  # fmt: skip
    file_hashes: dict[str, str] = Field(
        default_factory=dict, exclude_if=_is_empty,
        description="Hashes of the weight file as model sites know it: sha256, autov1, autov2, autov3.",
    )  # fmt: skip
    file_metadata: dict[str, str] = Field(
        default_factory=dict, exclude_if=_is_empty, description="What the trainer wrote into the file's header."
    )
    downloaded_from: str | None = Field(
        default=None, exclude_if=lambda source: source is None, description="Where the files came from, if fetched."
    )
    permissions: Permissions | None = Field(
        default=None, exclude_if=lambda given: given is None, description="What its author permits, as Civitai asks it."
    )

    @model_validator(mode="after")
    def _check_components(self) -> Self:
        lacking = sorted(set(self.components) - set(self.base.components))
        if lacking and self.base.components:
            raise ValueError(
                f"the adapter changes the component {lacking[0]!r}, and its base has {', '.join(self.base.components)}"
            )
        return self

    @property
    def system(self) -> str | None:
        """Return the system message it was trained with in rows that had none."""
        data: Any = (self.recipe_data or {}).get("data")
        system = data.get("system") if isinstance(data, dict) else None
        return system if isinstance(system, str) else None

    @property
    def control_tokens(self) -> Literal["text", "allow"]:
        """Return how control tokens in messages were read in training."""
        data: Any = (self.recipe_data or {}).get("data")
        return "allow" if isinstance(data, dict) and data.get("control_tokens") == "allow" else "text"

    @property
    def method_kind(self) -> str | None:
        """Return the method as the recipe calls it, such as `qlora`; None for an adapter made elsewhere."""
        method: Any = (self.recipe_data or {}).get("method")
        kind = method.get("kind") if isinstance(method, dict) else None
        return kind if isinstance(kind, str) else None
