"""The recipe: every choice of a training run, in one strict document.

Read from YAML, overridden with `a.b=c`, printed as a JSON schema. A field may be `auto` until the run starts;
`train` resolves it and writes the resolved recipe into the run folder. The field descriptions here are the
documentation shown by `haori schema` and the user interface.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, WrapValidator

from haori.core.errors import RecipeError, nearest
from haori.core.methods import METHODS, Auto, LoraMethod, Method, Positive, Section
from haori.core.recipe_history import RECIPE_SCHEMA, migrate_recipe

__all__ = [
    "Columns",
    "DataSection",
    "KeptRecipe",
    "OptimizerSection",
    "Recipe",
    "ScheduleSection",
    "TrainingSection",
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


class Columns(Section):
    """Which columns hold what, for data in no known format."""

    prompt: str | None = Field(default=None, description="Column with what the user says.")
    completion: str | None = Field(default=None, description="Column with what the model should answer.")
    system: str | None = Field(default=None, description="Column with the system message.")
    text: str | None = Field(default=None, description="Column with plain text to continue.")
    messages: str | None = Field(default=None, description="Column with a list of {role, content}.")


class DataSection(Section):
    """The data and how to read it."""

    path: str = Field(description="File, folder, or dataset id on the hub.")
    format: Literal["auto", "messages", "alpaca", "sharegpt", "prompt-completion", "query-response", "text"] = Field(
        default="auto", description="Row format; `auto` detects it from the column names."
    )
    columns: Columns | None = Field(default=None, description="Column mapping for anything else.")
    split: str = Field(default="train", description="Split to train on of a folder or hub dataset that has several.")
    revision: str | None = Field(default=None, description="Revision of a hub dataset.")
    validation: str | None = Field(
        default=None, description="Separate file or folder to validate on; a validation split is found."
    )
    validation_share: float = Field(
        default=0.1, ge=0.0, le=0.5,
        description="Share of rows held out for validation when there are none apart; chosen by row hash.",
    )  # fmt: skip
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
    max_rows: Positive | None = Field(default=None, description="Read at most this many rows.")
    licence: str | None = Field(default=None, description="Licence of the data (SPDX id).")
    attribution: str | None = Field(default=None, description="Whom to credit for the data.")


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
    batch_tokens: Auto | Positive = Field(default="auto", description="Tokens of one optimizer step, padding included.")
    micro_batch_tokens: Auto | Positive = Field(
        default="auto", description="Tokens of one forward pass; steps larger than this accumulate gradients."
    )
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
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        default=(), description="Experiment trackers to report to."
    )


class Recipe(Section):
    """Everything a training run is made from."""

    schema_version: int = Field(
        default=RECIPE_SCHEMA, ge=1, le=RECIPE_SCHEMA,
        description="Version of these keys, written by Haori so that later ones can read the recipe.",
    )  # fmt: skip
    name: str = Field(description="Name of the adapter in the library.", pattern=_NAME)
    base: str = Field(description="Base model: catalogue name, registered name, folder, hub id or GGUF file.")
    revision: str | None = Field(default=None, description="Revision of a hub base.")
    task: Literal["causal_lm"] = Field(default="causal_lm", description="What is learnt.")
    data: DataSection
    method: Method = Field(default_factory=LoraMethod)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    training: TrainingSection = Field(default_factory=TrainingSection)


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
    try:
        return Recipe.model_validate_json(json.dumps(merged))
    except ValidationError as error:
        raise RecipeError(_sentence(error)) from None


def recipe_to_yaml(recipe: Recipe) -> str:
    """Write a recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _kept(value: Any, _validate: object) -> Recipe:
    return value if isinstance(value, Recipe) else recipe_from(value)


KeptRecipe = Annotated[Recipe, WrapValidator(_kept)]
"""A recipe in a file that later versions read, as a field of a record."""


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe."""
    return Recipe.model_json_schema()


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


def _sentence(error: ValidationError) -> str:
    """Say the first problem of a validation error, with its dotted key, in one sentence."""
    problems = error.errors(include_url=False)
    # An unknown key explains more than the missing one that it was meant to be.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    given = problem.get("input")
    if problem["type"] == "union_tag_invalid":
        kind = problem["input"].get("kind")
        hint = nearest(str(kind), METHODS) or "there is no such method."
        return f"The recipe's 'method.kind' cannot be {kind!r}; it is one of {', '.join(METHODS)}; {hint}"
    kind, names = _place(problem)
    dotted = ".".join(names)
    if problem["type"] == "extra_forbidden":
        section = _section_at(names[:-1], kind or "lora")
        hint = nearest(names[-1], section) or f"allowed are {', '.join(sorted(section))}."
        where = f" for the method {kind!r}" if kind else ""
        return f"The recipe has no key {dotted!r}{where}; {hint}"
    if problem["type"] == "missing":
        return f"The recipe needs the key {dotted!r}."
    rules = list(dict.fromkeys(_rule(p) for p in problems if _place(p) == (kind, names)))
    allowed = "; or ".join([rules[0], *(rule.removeprefix("be ") for rule in rules[1:])])
    reason = _REASONS.get((dotted, str(given).lower(), kind or ""), "")
    return f"The recipe's {dotted!r} cannot be {given!r}{reason}; it should {allowed}."


def _rule(problem: Any) -> str:
    """Return what a value should do, as the rest of a sentence: "be a valid integer"."""
    if problem["type"] == "string_pattern_mismatch":
        pattern = problem["ctx"]["pattern"]
        return _IN_WORDS.get(pattern, f"match the pattern {pattern}")
    text = str(problem["msg"]).removeprefix("Value error, ").rstrip(".")
    _, should, rule = text.partition(" should ")
    return rule if should else f"be another: {text}"


def _place(problem: Any) -> tuple[str | None, list[str]]:
    """Return the kind of method that a problem is in, if any, and its key without pydantic's names of branches."""
    path = [str(part) for part in problem["loc"]]
    kind = path.pop(1) if path[0] == "method" and len(path) > 1 else None  # the tag of the union
    branches = ("constrained-", "function-", "literal[", "tuple[", "str", "int", "float")
    return kind, [part for part in path if not part.startswith(branches)]


def _section_at(path: Sequence[str], kind: str) -> list[str]:
    """Return the keys allowed at a path of a recipe whose method is `kind`."""
    model: type[BaseModel] = Recipe
    if path and path[0] == "method":
        return list(METHODS[kind].model_fields)
    for part in path:
        field = model.model_fields.get(part)
        found = [t for t in (Columns, DataSection, OptimizerSection, ScheduleSection, TrainingSection)
                 if field is not None and t.__name__ in str(field.annotation)]  # fmt: skip
        if not found:
            break
        model = found[0]
    return list(model.model_fields)


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}" if mark is not None else ""
    return f"{getattr(error, 'problem', None) or 'it cannot be parsed'}{where}"
