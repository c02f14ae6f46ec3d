"""Chooses what a recipe for pictures leaves as `auto`, by rules a person can read, each with its reason.

rank, alpha  by the preset, 16 and 16 without one: at a scale of 1 a strength of 1.0 is what was trained
lr           1e-4 for bases of 0.3B parameters and more, as sd-scripts, ai-toolkit and diffusers have it; 1e-3 for
             smaller ones; a tenth of it for full fine-tuning, ten times for LoKr, which trains few numbers
batch        a tenth of the pictures, 1 to 8; a third, at most 16, where they are no larger than 128 x 128; one picture
             at a time from a million pixels on
epochs       so many that 1,500 to 3,000 pictures are seen, by the preset (five times as many by a small base),
             10 to 500
word_lr      5e-4 for new words
noise        even timesteps, or logit-normal for flow matching (Esser et al. 2024)
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from haori.adapters.learning_rates import rate_factor
from haori.core.methods import AdaloraMethod, PeftMethod
from haori.tasks.task import Choice
from haori.tasks.text_to_image.words import telling_rows

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.bases.diffusion import PipelineProcessor
    from haori.data.pictures import PictureSplit
    from haori.tasks.text_to_image.recipe import TextToImageRecipe

__all__ = ["PRESETS", "Preset", "preset_of", "resolve_choices"]

_SMALL_PARAMETERS = 0.3e9
_WORD_LR = 5e-4
_SMALL_SEEN = 5  # which starts farther from anything
_LARGE_PIXELS = 1_000_000
_SMALL_PIXELS = 17_000  # 128 x 128, with the little that tells sizes of equal area apart
_FEW_NUMBERS = frozenset({"LOKR"})
_DOUBLE_RANK = frozenset({"sdxl"})  # 32 and 16 in sd-scripts


class Preset(NamedTuple):
    """What guides give for a purpose.

    Attributes:
        rank: Of the update.
        alpha: Its strength; the scale is alpha/rank.
        seen: Pictures that training sees, repeats and epochs counted.
        why: For the reason of the choices.
    """

    rank: int
    alpha: float
    seen: int
    why: str


PRESETS = {
    "none": Preset(16, 16.0, 2000, "usual for pictures"),
    "style": Preset(16, 16.0, 3000, "preset style: many looks of one kind, seen often"),
    "character": Preset(32, 16.0, 2000, "preset character: room for details, at half the scale against stiffness"),
    "concept": Preset(8, 8.0, 1500, "preset concept: little room, so that the rest of the base stays"),
}


def preset_of(name: str, family: str) -> Preset:
    """Return a preset for the bases of a family."""
    preset = PRESETS[name]
    if family not in _DOUBLE_RANK:
        return preset
    return preset._replace(rank=2 * preset.rank, why=f"{preset.why}; twice the rank for SDXL")


def resolve_choices(
    recipe: "TextToImageRecipe",
    split: "PictureSplit",
    base: "Base",
    processor: "PipelineProcessor",
    device: str,
) -> "tuple[TextToImageRecipe, tuple[Choice, ...]]":
    """Return the recipe with the task's `auto` values replaced, and the choices made.

    Args:
        recipe: As the user gave it.
        split: The pictures.
        base: The pipeline.
        processor: Its family and noise.
        device: `cpu` or `cuda`.
    """
    choices: list[Choice] = []

    def choose(section: str, given: Any, **values: tuple[Any, str]) -> Any:
        changes = {}
        for key, (value, reason) in values.items():
            if getattr(given, key, None) == "auto":
                changes[key] = value
                choices.append(Choice(f"{section}.{key}", value, reason))
        return given.model_copy(update=changes)

    preset = preset_of(recipe.preset, processor.family.name)
    small = base.parameters < _SMALL_PARAMETERS
    method = choose("method", recipe.method, rank=(preset.rank, preset.why))
    if (rank := getattr(method, "rank", None)) is not None:
        first = math.ceil(1.5 * rank)
        method = choose("method", method, initial_rank=(first, "1.5 times the rank that remains"))
        scale, divisor = preset.alpha / preset.rank, _divisor(method)
        alpha = float(f"{scale * divisor:.4g}")
        method = choose("method", method, alpha=(alpha, f"scale {scale:g} at strength 1.0 ({preset.why})"))
    optimizer = choose("optimizer", recipe.optimizer, lr=_rate(method, small=small))
    if recipe.training.text_encoder:
        half = (optimizer.lr / 2, "half of the denoiser's: text encoders forget sooner")
        optimizer = choose("optimizer", optimizer, text_encoder_lr=half)
    if recipe.words:
        why = "usual for textual inversion (Gal et al. 2022, as diffusers has it)"
        optimizer = choose("optimizer", optimizer, word_lr=(_WORD_LR, why))
    data = choose("data", recipe.data, resolution=(processor.family.native_size, "what the base was made for"))
    pictures = sum(row.repeats for row in split.train)
    most = max(row.bucket[0] * row.bucket[1] for row in (*split.train, *split.validation)) + len(split.train)
    training = choose("training", recipe.training, picture_pixels=(most, "the largest picture"))
    batch = _batch_size(pictures, most)
    training = choose("training", training, batch_size=batch, epochs=_epochs(pictures, preset, small=small))
    training = choose("training", training, micro_batch_size=_micro_batch(training.batch_size, most, device))
    noise = choose("noise", recipe.noise, timesteps=_timesteps(processor))
    samples = recipe.samples
    if samples.prompts == "auto":
        samples = samples.model_copy(update={"prompts": _prompts(recipe, split)})
        choices.append(Choice("samples.prompts", " | ".join(samples.prompts), "captions of the data"))
    update = {"method": method, "optimizer": optimizer, "data": data, "training": training, "noise": noise}
    return recipe.model_copy(update={**update, "samples": samples}), tuple(choices)


def _divisor(method: Any) -> float:
    """Return what alpha is divided by to give the scale."""
    if isinstance(method, AdaloraMethod):
        return float(method.initial_rank)
    rank = float(method.rank)
    return math.sqrt(rank) if getattr(method, "rslora", False) else rank


def _rate(method: Any, *, small: bool) -> tuple[float, str]:
    lr, reason = (1e-3, "a small base") if small else (1e-4, "usual for pictures")
    factor, why = rate_factor(method)
    if isinstance(method, PeftMethod) and method.type.upper() in _FEW_NUMBERS:
        factor, why = 10.0, f"; ten times LoRA's, since {method.type.upper()} trains few numbers"
    return float(f"{lr * factor:.3g}"), f"{reason}{why}"


def _batch_size(pictures: int, pixels: int) -> tuple[int, str]:
    if pixels >= _LARGE_PIXELS:
        return 1, "one picture at a time, as they are large"
    if pixels <= _SMALL_PIXELS:
        return min(
            16, max(1, round(pictures / 3))
        ), f"a third of the {pictures} pictures, at most 16, as they are small"
    return min(8, max(1, round(pictures / 10))), f"a tenth of the {pictures} pictures, at most 8"


def _micro_batch(batch_size: int, pixels: int, device: str) -> tuple[int, str]:
    limit = max(1, (512 if device == "cpu" else 1536) ** 2 // pixels)
    return min(batch_size, limit), "as many at once as keep memory low"


def _epochs(pictures: int, preset: Preset, *, small: bool) -> tuple[int, str]:
    seen = preset.seen * (_SMALL_SEEN if small else 1)
    epochs = min(500, max(10, math.ceil(seen / pictures)))
    return epochs, f"about {seen:,} pictures seen; at most, since early stopping watches validation loss"


def _timesteps(processor: "PipelineProcessor") -> tuple[str, str]:
    if processor.noising.kind == "flow":
        return "logit_normal", "flow matching learns most from the middle of the way (Esser et al. 2024)"
    return "uniform", "as the base was trained"


def _prompts(recipe: "TextToImageRecipe", split: "PictureSplit") -> tuple[str, ...]:
    """Return captions of held-out pictures first, then of others, as they are trained."""
    from haori.data.pictures import full_caption

    rows = [row for row in (*split.validation, *split.train) if not row.prior]
    told = [row for word in recipe.words for row in telling_rows(rows, (word,), 1)]
    return tuple(dict.fromkeys(full_caption(row.caption, row.augmentation) for row in (*told, *rows)))[:4]
