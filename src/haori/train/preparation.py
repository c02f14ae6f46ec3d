"""Everything a run needs before the first step, checked in the order of cost: names, base, targets, data."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from haori.core.errors import BaseError, MissingExtraError, RecipeError
from haori.core.recipe import Recipe
from haori.train.auto import Choice, DataFacts, resolve

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from haori.bases import Base
    from haori.data import TextData

__all__ = ["Prepared", "adapted_model", "prepare"]


class Prepared(NamedTuple):
    """A run that may start."""

    recipe: Recipe
    choices: tuple[Choice, ...]
    base: "Base"
    tokenizer: "PreTrainedTokenizerBase"
    data: "TextData"
    targets: tuple[str, ...]
    device: str


def prepare(recipe: Recipe) -> Prepared:
    """Find the base, check the targets against its structure, load the data, and resolve `auto` values.

    Raises:
        HaoriError: Anything that would make the run fail or be worthless.
    """
    from haori.adapters.lora import check_lora
    from haori.bases import choose_dtype, default_device, find_base, load_skeleton, load_tokenizer, resolve_targets
    from haori.data import load_text

    device = default_device()
    if recipe.training.dtype == "fp16" and device == "cpu":
        raise RecipeError("'training.dtype' cannot be 'fp16' on a CPU; use bf16, fp32 or auto.")
    _check_trackers(recipe)
    base = find_base(recipe.base, revision=recipe.revision)
    if base.quantization:
        raise BaseError(
            f"The base {base.name!r} is quantised ({base.quantization}); train on its 16- or 32-bit weights."
        )
    if not base.fingerprint.architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise BaseError(
            f"The base {base.name!r} is a {base.fingerprint.architecture}; the task causal_lm needs a model that "
            "generates text, such as smollm2-135m-instruct."
        )
    skeleton = load_skeleton(base)
    targets = tuple(resolve_targets(skeleton, recipe.method.target))
    tokenizer = load_tokenizer(base)
    check_lora(skeleton, tokenizer, recipe.method)
    data = load_text(recipe.data, tokenizer, context_length=base.context_length)
    lengths = list(data.train["length"])
    facts = DataFacts(
        rows=len(lengths),
        mean_tokens=sum(lengths) / len(lengths),
        longest_tokens=max([*lengths, *data.validation["length"]]),
        max_length=min(2048, base.context_length),
    )
    dtype = choose_dtype(recipe.training.dtype, device)
    if recipe.training.dtype == "auto" and (recipe.method.modules_to_save or recipe.method.trainable_tokens):
        # PEFT keeps these in the base's dtype, and AdamW's small steps would be rounded away in 16 bits.
        dtype = dtype._replace(name="fp32", reason="modules and tokens trained in full need 32 bits")
    resolved, choices = resolve(recipe, facts, base.parameters, device, (dtype.name, dtype.reason))
    return Prepared(resolved, choices, base, tokenizer, data, targets, device)


def adapted_model(prepared: Prepared, device: str) -> "PeftModel":
    """Load the base with fresh adapters inserted, as the recipe says."""
    from haori.adapters.lora import insert_lora
    from haori.bases import load_model

    recipe = prepared.recipe
    base = load_model(prepared.base, dtype=recipe.training.dtype, device=device)
    model = insert_lora(base, prepared.tokenizer, recipe.method, prepared.targets, seed=recipe.training.seed)
    if recipe.training.gradient_checkpointing:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    return model


def _check_trackers(recipe: Recipe) -> None:
    for tracker in recipe.training.trackers:
        if find_spec(tracker) is None:
            raise MissingExtraError(f"The tracker {tracker!r} is not installed; run `pip install {tracker}`.")
