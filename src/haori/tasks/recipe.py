"""The recipe: every choice of a training run, in one strict document.

Read from YAML, overridden with `a.b=c`, printed as a JSON schema. `task` says which sections it has: each task has a
subclass of `Recipe`. A field may be `auto` until the run starts; `train` resolves it and writes the resolved recipe
into the run folder. The field descriptions are the documentation shown by `haori schema` and the user interface.
"""

import functools
import json
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, TypeAdapter, ValidationError, WrapValidator

from haori.core.errors import RecipeError, nearest
from haori.core.hashing import short
from haori.core.methods import Auto, LoraMethod, Method, Positive, Section
from haori.core.records import AdapterCard
from haori.data.section import DataSection
from haori.tasks.recipe_history import RECIPE_SCHEMA, migrate_recipe
from haori.tasks.registry import DEFAULT_TASK, TASKS, recipe_class

__all__ = [
    "Budgets",
    "KeptRecipe",
    "OptimizerSection",
    "Recipe",
    "ScheduleSection",
    "TokenTraining",
    "TrainingSection",
    "kept_recipe",
    "load_recipe",
    "recipe_from",
    "recipe_schema",
    "recipe_to_yaml",
]

_BOTH_ZERO = ": with A and B both zero both their gradients are zero, and nothing would ever be learnt"
_LOFTQ = ": it makes up for the rounding of a quantised base, which method.kind=qlora has"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
_IN_WORDS = {_NAME: "be of letters, digits, '.', '_' and '-' (at most 100, a letter or digit first)"}
_REASONS = {
    ("method.init", "zero", "lora"): _BOTH_ZERO,
    ("method.init", "zeros", "lora"): _BOTH_ZERO,
    ("method.init", "zero", "qlora"): _BOTH_ZERO,
    ("method.init", "zeros", "qlora"): _BOTH_ZERO,
    ("method.init", "loftq", "lora"): _LOFTQ,
}


class OptimizerSection(Section):
    """AdamW (Loshchilov & Hutter 2019) over the adapter's parameters."""

    lr: Auto | Annotated[float, Field(gt=0, lt=1)] = Field(default="auto", description="Peak learning rate.")
    weight_decay: float = Field(default=0.0, ge=0.0, description="Decoupled weight decay.")
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0, description="Decay of the gradient mean.")
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0, description="Decay of the gradient's square.")
    eps: float = Field(default=1e-8, gt=0.0, description="Added to the denominator.")
    max_grad_norm: float = Field(default=1.0, gt=0.0, description="Gradients are clipped to this norm.")


class ScheduleSection(Section):
    """Learning rate over time."""

    kind: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="Shape after warm-up.")
    warmup_ratio: float = Field(default=0.05, ge=0.0, lt=1.0, description="Share of steps spent warming up.")


class TrainingSection(Section):
    """How long, how large, how often."""

    epochs: Auto | Positive = Field(default="auto", description="Passes over the training data, at most.")
    max_steps: Positive | None = Field(default=None, description="Stop after this many optimizer steps.")
    seed: int = Field(default=0, ge=0, description="Seed of initialisation, order and dropout.")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(default="auto", description="Dtype of the base.")
    gradient_checkpointing: bool = Field(default=False, description="Recompute activations to save memory.")
    evaluations_per_epoch: Auto | Positive = Field(default="auto", description="How often validation loss is measured.")
    patience: Positive = Field(
        default=3, description="Stop after this many validations without improvement; the best is restored."
    )
    save_every: Positive | None = Field(
        default=None, description="Checkpoint every so many optimizer steps, besides one per epoch."
    )
    keep_checkpoints: Positive = Field(default=2, description="Checkpoints kept (the best is kept besides).")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Keep an average of the trained weights that decays by this factor a step, such as 0.99; it is "
        "what is validated and saved.",
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        default=(), description="Experiment trackers to report to."
    )

    def budgets(self) -> "Budgets":
        """Return what a step and a microbatch may hold, in the task's own unit of cost.

        Raises:
            NotImplementedError: The task's section does not say.
        """
        raise NotImplementedError

    def lighter(self, longest: int) -> "Lighter | None":
        """Return settings under which a microbatch takes less memory; None where there are none.

        Args:
            longest: Cost of the dearest row.
        """
        return None


class TokenTraining(TrainingSection):
    """How long, how large, how often, for tasks whose rows are sequences of tokens."""

    batch_tokens: Auto | Positive = Field(default="auto", description="Tokens of one optimizer step, padding included.")
    micro_batch_tokens: Auto | Positive = Field(
        default="auto", description="Tokens of one forward pass; steps larger than this accumulate gradients."
    )

    def budgets(self) -> "Budgets":
        """Return the budgets in tokens, padding included; both must be resolved."""
        assert self.batch_tokens != "auto" and self.micro_batch_tokens != "auto"
        return Budgets(self.batch_tokens, self.micro_batch_tokens)

    def lighter(self, longest: int) -> "Lighter":
        """Return half the microbatch, or where it is hardly more than the longest row, shorter rows."""
        micro = self.budgets().microbatch
        smaller = max(micro // 2, longest)
        if smaller <= 0.8 * micro:
            return Lighter(f"training.micro_batch_tokens={smaller}", smaller / micro)
        shorter = max(longest // 2, 1)
        return Lighter(f"data.max_length={shorter} with training.micro_batch_tokens={shorter}", shorter / micro)


class Lighter(NamedTuple):
    """Settings, and the share of a microbatch's memory that is still needed with them."""

    settings: str
    share: float


class Budgets(NamedTuple):
    """Most cost of one optimizer step and of one microbatch: tokens, pixels or residues, padding included."""

    step: int
    microbatch: int


class Recipe(Section):
    """What every training run is made from; each task adds its own sections (`tasks/<task>/recipe.py`)."""

    model_config = ConfigDict(serialize_by_alias=True)

    schema_version: int = Field(
        default=RECIPE_SCHEMA, ge=1, le=RECIPE_SCHEMA,
        description="Version of these keys, written by Haori so that later ones can read the recipe.",
    )  # fmt: skip
    name: str = Field(description="Name of the adapter in the library.", pattern=_NAME)
    base: str = Field(description="Base: catalogue name, registered name, folder, hub id, GGUF file or checkpoint.")
    revision: str | None = Field(default=None, description="Revision of a hub base.")
    task: str = Field(description="What is learnt.")
    from_: str | None = Field(
        default=None, alias="from",
        description="Adapter to go on from, at its rank and targets: a name in the library, or a PEFT folder.",
    )  # fmt: skip
    data: SerializeAsAny[DataSection]
    method: Method = Field(default_factory=LoraMethod)
    optimizer: SerializeAsAny[OptimizerSection] = Field(default_factory=OptimizerSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    training: SerializeAsAny[TrainingSection] = Field(default_factory=TrainingSection)


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-4 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML and apply `a.b=c` overrides.

    Raises:
        RecipeError: The file is missing or not YAML, a key is unknown, or a value is not allowed.
    """
    if not path.is_file():
        raise RecipeError(f"There is no recipe file {str(path)!r}.")
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except UnicodeDecodeError:
        raise RecipeError(f"{str(path)!r} is not UTF-8 text; a recipe is a YAML file.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{str(path)!r} is not valid YAML: {_one_line(error)}.") from None
    if not isinstance(document, dict):
        raise RecipeError(f"{str(path)!r} must hold a table of keys such as name, base and data.")
    return recipe_from(document, overrides)


def recipe_from(document: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Build a recipe from plain data and `a.b=c` overrides; values are YAML scalars or lists.

    Raises:
        RecipeError: A key is unknown (the nearest known one is named) or a value is not allowed.
    """
    merged = migrate_recipe(json.loads(json.dumps(document, default=str)))
    for override in overrides:
        _apply(merged, override)
    method = merged.get("method")
    if isinstance(method, dict):
        method.setdefault("kind", "lora")
    task = merged.setdefault("task", DEFAULT_TASK)
    if not isinstance(task, str) or task not in TASKS:
        hint = nearest(str(task), TASKS) or "there is no such task."
        raise RecipeError(f"The recipe's 'task' cannot be {task!r}; it is one of {', '.join(TASKS)}; {hint}")
    kind = recipe_class(task)
    try:
        return kind.model_validate_json(json.dumps(merged))
    except ValidationError as error:
        raise RecipeError(_sentence(error, kind)) from None


def recipe_to_yaml(recipe: Recipe) -> str:
    """Write a recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _kept(value: Any, _validate: object) -> Recipe:
    return value if isinstance(value, Recipe) else recipe_from(value)


KeptRecipe = Annotated[SerializeAsAny[Recipe], WrapValidator(_kept)]
"""A recipe in a file that later versions read, as a field of a record."""


def kept_recipe(card: AdapterCard) -> Recipe | None:
    """Return the recipe on a card in today's keys; a card is read without it, since it may be older than the code.

    Raises:
        RecipeError: It has a key or value that is not known here.
    """
    if card.recipe_data is None:
        return None
    try:
        return recipe_from(card.recipe_data)
    except RecipeError as error:
        label = card.names[-1] if card.names else short(card.id)
        raise RecipeError(f"The recipe kept with the adapter {label!r} cannot be used here: {error}") from None


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes: a union told apart by `task`."""
    kinds: Any = [recipe_class(task) for task in TASKS]
    if len(kinds) == 1:
        return dict(kinds[0].model_json_schema())
    union: Any = functools.reduce(operator.or_, kinds)
    adapter: Any = TypeAdapter(Annotated[union, Field(discriminator="task")])
    return dict(adapter.json_schema())


def _apply(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"The override {override!r} must look like optimizer.lr=1e-4.")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        raise RecipeError(f"The value in the override {override!r} is not valid YAML.") from None
    *parents, last = key.strip().split(".")
    place = document
    for parent in parents:
        child = place.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RecipeError(f"In the override {override!r}, {parent!r} is a value and has no keys of its own.")
        place = child
    place[last] = value


def _sentence(error: ValidationError, recipe: type[Recipe]) -> str:
    """Say the first problem of a validation error, with its dotted key, in one sentence."""
    problems = error.errors(include_url=False)
    # An unknown key explains more than the missing one that it was meant to be.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    given = problem.get("input")
    if problem["type"] == "union_tag_invalid":
        key = str(problem["loc"][0])
        kind, kinds = given.get("kind"), list(_kinds(recipe, key))
        hint = nearest(str(kind), kinds) or f"there is no such {key}."
        return f"The recipe's '{key}.kind' cannot be {kind!r}; it is one of {', '.join(kinds)}; {hint}"
    kind, names = _key_of(problem, recipe)
    dotted = ".".join(names)
    if problem["type"] == "extra_forbidden":
        section = _keys_at(recipe, names[:-1], kind)
        hint = nearest(names[-1], section) or f"allowed are {', '.join(sorted(section))}."
        where = f" for the {names[0]} {kind!r}" if kind else _of_task(recipe)
        return f"The recipe has no key {dotted!r}{where}; {hint}"
    if problem["type"] == "missing":
        return f"The recipe needs the key {dotted!r}{_of_task(recipe)}."
    rules = list(dict.fromkeys(_rule(p) for p in problems if _key_of(p, recipe) == (kind, names)))
    allowed = "; or ".join([rules[0], *(rule.removeprefix("be ") for rule in rules[1:])])
    reason = _REASONS.get((dotted, str(given).lower(), kind or ""), "")
    return f"The recipe's {dotted!r} cannot be {given!r}{reason}; it should {allowed}."


def _of_task(recipe: type[Recipe]) -> str:
    """Name the task where it is not the usual one."""
    task = recipe.model_fields["task"].default
    return "" if task == DEFAULT_TASK else f" for the task {task!r}"


def _rule(problem: Any) -> str:
    """Return what a value should do, as the rest of a sentence: "be a valid integer"."""
    if problem["type"] == "string_pattern_mismatch":
        pattern = problem["ctx"]["pattern"]
        return _IN_WORDS.get(pattern, f"match the pattern {pattern}")
    text = str(problem["msg"]).removeprefix("Value error, ").rstrip(".")
    _, should, rule = text.partition(" should ")
    return rule if should else f"be another: {text}"


def _key_of(problem: Any, recipe: type[Recipe]) -> tuple[str | None, list[str]]:
    """Return the kind of tagged section that a problem is in, if any, and its key without pydantic's branch names."""
    path = [str(part) for part in problem["loc"]]
    kind = path.pop(1) if len(path) > 1 and path[1] in _kinds(recipe, path[0]) else None
    branches = ("constrained-", "function-", "literal[", "tuple[", "str", "int", "float")
    return kind, [part for part in path if not part.startswith(branches)]


def _kinds(recipe: type[Recipe], key: str) -> dict[str, type[BaseModel]]:
    """Return the sections that a key takes by their `kind`; none for a key whose section has no kinds."""
    field = recipe.model_fields.get(key)
    if field is None or field.discriminator != "kind":
        return {}
    return {get_args(model.model_fields["kind"].annotation)[0]: model for model in _models(field.annotation)}


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the records that a type is made of, such as those of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _keys_at(recipe: type[Recipe], path: Sequence[str], kind: str | None) -> list[str]:
    """Return the keys allowed at a path of a recipe; `kind` chooses among the sections of the first part."""
    model: type[BaseModel] = recipe
    for place, part in enumerate(path):
        field = next((f for name, f in model.model_fields.items() if part in (f.alias, name)), None)
        found = _models(field.annotation) if field is not None else []
        if place == 0 and kind is not None:
            found = [_kinds(recipe, part)[kind]]
        if not found:
            break
        model = found[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}" if mark is not None else ""
    return f"{getattr(error, 'problem', None) or 'it cannot be parsed'}{where}"
