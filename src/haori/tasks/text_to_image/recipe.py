"""The recipe of learning pictures: style, subject or concept, for a text-to-image pipeline."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from haori.core.methods import Auto, Positive, Section
from haori.core.new_words import WORD_PATTERN
from haori.data.pictures.section import PictureSection
from haori.tasks.recipe import Budgets, Lighter, OptimizerSection, Recipe, TrainingSection

__all__ = [
    "RECIPE",
    "NoiseSection",
    "PictureOptimizer",
    "PictureTraining",
    "SampleSection",
    "TextToImageRecipe",
    "WordSection",
]

_SIDE_STEP = 32  # pixels
_Rate = Annotated[float, Field(gt=0, lt=1)]


class NoiseSection(Section):
    """Which noise pictures are mixed with in training."""

    timesteps: Auto | Literal["uniform", "logit_normal", "shift"] = Field(
        default="auto",
        description="How timesteps are drawn: evenly, more of the middle ones, or shifted towards noise as the base's "
        "own sampling; `auto` is even for noise schedules and logit-normal for flow matching.",
    )
    logit_mean: float = Field(
        default=0.0, description="Mean of the logit of logit-normal timesteps; above 0 is noisier."
    )
    logit_std: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0, description="Standard deviation of the logit of logit-normal timesteps."
    )
    shift: Annotated[float, Field(gt=0.0)] = Field(
        default=3.0, description="How far shifted timesteps move towards noise; 1 is not at all."
    )
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Weigh timesteps by min(SNR, gamma)/SNR (Hang et al. 2023); 5 is usual. Not for flow matching.",
    )
    offset: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.0, description="Noise that is the same all over a picture, added to the rest; 0.03 to 0.1 is usual."
    )


class WordSection(Section):
    """A new word: its vectors are trained beside the adapter (textual inversion; with LoRA, pivotal tuning)."""

    word: Annotated[str, Field(pattern=WORD_PATTERN)] = Field(
        description="As it stands in captions and prompts, such as `<lineart>`; the base must not have it yet."
    )
    vectors: Annotated[int, Field(ge=1, le=32)] = Field(default=1, description="How many vectors stand for it.")
    start: Auto | Annotated[str, Field(min_length=1)] = Field(
        default="auto", description="Text whose embeddings the vectors begin as; `auto` is the word's own letters."
    )


class SampleSection(Section):
    """The pictures that show how training goes."""

    prompts: Auto | tuple[str, ...] = Field(
        default="auto", description="What to draw; `auto` takes captions of the data, an empty list draws nothing."
    )
    steps: Positive = Field(default=20, description="Denoising steps.")
    guidance: Auto | Annotated[float, Field(ge=0.0)] = Field(
        default="auto", description="Strength of the prompt; `auto` is what diffusers' pipeline takes for the base."
    )
    sheets: Annotated[int, Field(ge=1, le=100)] = Field(
        default=8, description="How often samples are drawn over the run, besides those of the base."
    )


class PictureTraining(TrainingSection):
    """How long, how many pictures at once, how often, and what is trained besides the denoiser."""

    batch_size: Auto | Positive = Field(default="auto", description="Pictures of one optimizer step.")
    micro_batch_size: Auto | Positive = Field(
        default="auto", description="Pictures of one forward pass; steps of more accumulate gradients."
    )
    picture_pixels: Auto | Positive = Field(
        default="auto", description="Pixels that a picture of a batch counts as; `auto` is the largest picture's."
    )
    text_encoder: bool = Field(default=False, description="Adapt the text encoders too; embeddings are then not kept.")
    patience: Positive = Field(
        default=10,
        description="Stop after this many validations above the best by more than their noise; the best is restored.",
    )

    def budgets(self) -> Budgets:
        """Return the budgets in pixels; all three keys must be resolved."""
        assert self.batch_size != "auto" and self.micro_batch_size != "auto" and self.picture_pixels != "auto"
        return Budgets(self.batch_size * self.picture_pixels, self.micro_batch_size * self.picture_pixels)

    def lighter(self, longest: int) -> Lighter:
        """Return half the pictures at once, or where it is one already, pictures of half the area."""
        assert self.micro_batch_size != "auto"
        if self.micro_batch_size > 1:
            fewer = self.micro_batch_size // 2
            return Lighter(f"training.micro_batch_size={fewer}", fewer / self.micro_batch_size)
        side = max(_SIDE_STEP, int(math.sqrt(longest / 2)) // _SIDE_STEP * _SIDE_STEP)
        return Lighter(f"data.resolution={side}", min(1.0, side * side / longest))


class PictureOptimizer(OptimizerSection):
    """AdamW (Loshchilov & Hutter 2019) over the adapter's parameters, those of text encoders at a rate of their own."""

    text_encoder_lr: Auto | _Rate = Field(
        default="auto", description="Peak learning rate in text encoders; `auto` is half of the other."
    )
    word_lr: Auto | _Rate = Field(default="auto", description="Peak learning rate of new words; `auto` is 5e-4.")
    weight_decay: float = Field(default=0.01, ge=0.0, description="Decoupled weight decay.")


def _as_table(given: Any) -> Any:
    """Read a word alone as one with nothing else said of it."""
    return {"word": given} if isinstance(given, str) else given


class TextToImageRecipe(Recipe):
    """Everything a training run is made from that teaches a pipeline pictures."""

    task: Literal["text_to_image"] = Field(default="text_to_image", description="What is learnt.")
    preset: Literal["none", "style", "character", "concept"] = Field(
        default="none",
        description="Usual settings for what is learnt; keys that the recipe gives itself stand, and what is set is "
        "written down.",
    )
    data: PictureSection
    optimizer: PictureOptimizer = Field(default_factory=PictureOptimizer)
    training: PictureTraining = Field(default_factory=PictureTraining)
    words: tuple[Annotated[WordSection, BeforeValidator(_as_table)], ...] = Field(
        default=(),
        description="New words to learn beside the adapter: a list of words, or of tables with `word`, `vectors` (1 to "
        "32; 1) and `start` (the text whose embeddings they begin as; the word's own letters). Text encoders run in "
        "training then.",
    )
    noise: NoiseSection = Field(default_factory=NoiseSection)
    samples: SampleSection = Field(default_factory=SampleSection)


RECIPE = TextToImageRecipe
