"""Learning pictures as a task; see `haori.tasks.task.Task` for what each part is for."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import BaseError, InputError, RecipeError
from haori.core.methods import AdaptedMethod, FullMethod, HeadMethod
from haori.tasks.task import Choice, GeneralWords, Task
from haori.tasks.text_to_image.recipe import TextToImageRecipe
from haori.tasks.text_to_image.words import check_captions, check_words, new_words, telling_rows

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import nn

    from haori.bases import Base
    from haori.bases.diffusion import PipelineProcessor
    from haori.core.quantization import Quantization
    from haori.core.records import DataReference
    from haori.data.pictures import PictureRow, PictureSplit
    from haori.library.proof.logits import Probe
    from haori.metrics.statistics import Statistic
    from haori.tasks.examination import AnsweredRow, Examination, MeasureOptions, TextLosses
    from haori.tasks.text_to_image.encoded import Encoded
    from haori.tasks.text_to_image.objective import MeasuredPictures, TrainingPictures
    from haori.tasks.text_to_image.samples import SampleSheets

__all__ = ["TASK", "TextToImage"]

_TIMESTEPS = 4
_PROBES = 2
_NOT_MEASURED = (
    "Pictures have no answers; what an adapter draws is measured by `haori evaluate NAME --data FOLDER`, and its loss "
    "on the pictures held out is in the run folder."
)


class TextToImage(Task):
    """Styles, subjects and concepts for pipelines that draw pictures from text."""

    kind = "text_to_image"
    title = "text to image"
    components = ("vae",)
    rows_title = "pictures"
    example = "emoji-sd"
    unit = "pixels"
    loss_unit = "mean square of the prediction"
    counted = "pictures"
    general = GeneralWords(
        column="drift",
        figure="Drift: distance of predictions from the base's on {}",
        axis="squared distance, as a share of the base's prediction squared",
        parts="Drift by kind of prompt",
        sentence="drifted by {} instead of {} on unrelated prompts",
        note="Drift is how far predictions on prompts that have nothing to do with the data are from the base's: their "
        "squared distance as a share of the square of the base's prediction.",
        sets=("unrelated prompts", "prompts of your own"),
        passages="prompts",
    )

    def peft_type(self, recipe: TextToImageRecipe) -> None:
        """Return none: PEFT has no type for pipelines."""
        return

    def check(self, recipe: TextToImageRecipe, base: "Base") -> None:
        """Refuse bases that draw nothing, and keys that do not go together."""
        from haori.bases.diffusion import PipelineProcessor, family_of

        if base.pipeline is None:
            raise BaseError(f"The base {base.name!r} is no text-to-image pipeline; take one such as emoji-sd.")
        family = family_of(base)
        if isinstance(recipe.method, HeadMethod):
            raise RecipeError("The method 'head' is for classifiers; for pictures take lora, dora or full.")
        if isinstance(recipe.method, AdaptedMethod):
            _check_places(recipe.method, family.text_encoders, adapted=recipe.training.text_encoder)
        if recipe.noise.min_snr_gamma is not None and PipelineProcessor(base).noising.kind == "flow":
            raise RecipeError(
                f"'noise.min_snr_gamma' weighs the timesteps of noise schedules, and {base.name!r} was trained by flow "
                "matching; leave it out."
            )
        if getattr(recipe.method, "trainable_tokens", ()):
            raise RecipeError(
                "'method.trainable_tokens' is not for pictures: no file format here carries changed tokens of a text "
                "encoder. Learn a new word instead, such as words=['<lineart>'], or adapt the text encoder with "
                "training.text_encoder=true."
            )
        check_words(recipe, base, family.text_encoders)
        if not recipe.training.text_encoder and recipe.optimizer.text_encoder_lr != "auto":
            raise RecipeError("'optimizer.text_encoder_lr' needs training.text_encoder=true; leave it out.")

    def processor(self, base: "Base", recipe: TextToImageRecipe) -> "PipelineProcessor":
        """Return tokenizers, family and noise of the pipeline."""
        from haori.bases.diffusion import PipelineProcessor

        return PipelineProcessor(base, new_words(recipe))

    def skeleton(self, base: "Base", recipe: TextToImageRecipe) -> "nn.Module":
        """Return the denoiser, with the text encoders where they are adapted."""
        from haori.bases.diffusion import load_diffusion_skeleton

        return load_diffusion_skeleton(base, _adapted(base, recipe))

    def target(self, recipe: TextToImageRecipe, base: "Base") -> tuple[str, ...]:
        """Return `method.target`, and the text encoders where they are trained and it does not name them itself."""
        method = recipe.method
        assert not isinstance(method, FullMethod | HeadMethod)
        given = (method.target,) if isinstance(method.target, str) else method.target
        if any(item.startswith("text_encoder") for item in given):
            return given
        return (*given, *_adapted(base, recipe)[1:])

    def model(
        self,
        base: "Base",
        recipe: TextToImageRecipe,
        *,
        dtype: str,
        device: str,
        quantization: "Quantization | None",
    ) -> "nn.Module":
        """Load the denoiser, with the text encoders where they are adapted or learn new words."""
        from haori.bases.diffusion import PipelineProcessor, load_diffusion_model, put_words

        words = PipelineProcessor(base, new_words(recipe)).words if recipe.words else None
        components = _adapted(base, recipe) if words is None else None
        found = load_diffusion_model(
            base, dtype=dtype, device=device, quantization=quantization, components=components
        )  # fmt: skip
        if words is not None:
            put_words(found, words)
        return found

    def rows(
        self, recipe: TextToImageRecipe, base: "Base", processor: "PipelineProcessor", *, tolerant: bool = False
    ) -> "PictureSplit":
        """Read the pictures."""
        from haori.data.pictures import read_pictures

        return read_pictures(
            recipe.data, native_size=processor.native_size, size_multiple=processor.size_multiple, cut=processor.cut,
            tolerant=tolerant,
        )  # fmt: skip

    def show(self, rows: "Sequence[PictureRow]", processor: "PipelineProcessor", count: int) -> "list[RenderableType]":
        """Return pictures' files with their captions and crops."""
        from haori.tasks.text_to_image.show import picture_panels

        return picture_panels(rows[:count])

    def resolve(
        self, recipe: TextToImageRecipe, split: "PictureSplit", base: "Base", device: str
    ) -> tuple[TextToImageRecipe, tuple[Choice, ...]]:
        """Choose rank, rate, batch and the rest; see choices.py."""
        from haori.bases.diffusion import family_of
        from haori.tasks.text_to_image.choices import resolve_choices

        processor = self.processor(base, recipe)
        check_captions(recipe.words, split)
        resolved, found = resolve_choices(recipe, split, base, processor, device)
        warned = family_of(base).distilled()
        return resolved, (*found, *([Choice("base", base.name, warned)] if warned else ()))

    def ready(
        self,
        recipe: TextToImageRecipe,
        base: "Base",
        processor: "PipelineProcessor",
        split: "PictureSplit",
        device: str,
    ) -> None:
        """Compute latents of all pictures and embeddings of all captions that are not known yet."""
        self._encoded(recipe, processor).compute(split.validation, split.train, device)

    def objective(
        self, rows: "Sequence[PictureRow]", processor: "PipelineProcessor", recipe: TextToImageRecipe
    ) -> "TrainingPictures":
        """Return batches and losses of training pictures."""
        from haori.tasks.text_to_image.objective import TrainingPictures

        return TrainingPictures(rows, self._encoded(recipe, processor), recipe.noise)

    def measured(
        self, rows: "Sequence[PictureRow]", processor: "PipelineProcessor", recipe: TextToImageRecipe
    ) -> "MeasuredPictures":
        """Return pictures with fixed noise and timesteps."""
        from haori.tasks.text_to_image.objective import MeasuredPictures

        return MeasuredPictures(rows, self._encoded(recipe, processor), _TIMESTEPS, recipe.training.seed)

    def measured_training(
        self, split: "PictureSplit", processor: "PipelineProcessor", recipe: TextToImageRecipe
    ) -> "MeasuredPictures | None":
        """Return as many training pictures as are held out, at the same timesteps."""
        own = [row for row in split.train if not row.prior][: len(split.validation)]
        return self.measured(own, processor, recipe) if own else None

    def observer(
        self,
        recipe: TextToImageRecipe,
        base: "Base",
        processor: "PipelineProcessor",
        split: "PictureSplit",
        folder: Path,
    ) -> "SampleSheets | None":
        """Return what draws sample pictures."""
        from haori.tasks.text_to_image.samples import SampleSheets

        if not recipe.samples.prompts:
            return None
        epochs, resolution = recipe.training.epochs, recipe.data.resolution
        assert epochs != "auto" and resolution != "auto"
        side = resolution // processor.size_multiple * processor.size_multiple
        tokenizers = None if processor.words is None else processor.tokenizer_parts()
        return SampleSheets(recipe.samples, base, folder, epochs, (side, side), recipe.training.seed, tokenizers)

    def rate(self, recipe: TextToImageRecipe, parameter: str) -> float:
        """Return the factor of the learning rates that new words and text encoders have of their own."""
        from haori.bases.diffusion import WORD_ROWS

        lr, own = recipe.optimizer.lr, recipe.optimizer.text_encoder_lr
        if f".{WORD_ROWS}." in parameter:
            own = recipe.optimizer.word_lr
        if lr == "auto" or own == "auto" or ".text_encoder" not in f".{parameter}":
            return 1.0
        return own / lr

    def probes(self, processor: "PipelineProcessor", recipe: TextToImageRecipe, split: "PictureSplit") -> "list[Probe]":
        """Return a few training pictures at fixed timesteps with fixed noise, those with new words first."""
        own = telling_rows([row for row in split.train if not row.prior], recipe.words, _PROBES)
        pictures = self.measured(own, processor, recipe)
        return [pictures.inputs(pictures.batch([row])) for row in range(len(pictures.costs))]

    def check_out(self, recipe: TextToImageRecipe) -> None:
        """Refuse new words, which a PEFT folder has no place for."""
        if recipe.words:
            raise RecipeError(
                "--out writes a PEFT folder, which has no place for new words; leave it out, and export the adapter "
                "with `haori library export NAME --format kohya` or diffusers."
            )

    def next_command(self, adapter: str) -> str:
        """Return the command that writes a file for AUTOMATIC1111, ComfyUI and others."""
        return f"haori library export {adapter} --format kohya --out {adapter.partition('@')[0]}.safetensors"

    def card(self, processor: "PipelineProcessor", recipe: TextToImageRecipe) -> dict[str, Any]:
        """Return the trigger words, new ones among them, and the strength that was trained at."""
        words = [*([recipe.data.trigger] if recipe.data.trigger else []), *(section.word for section in recipe.words)]
        return {"trigger_words": tuple(dict.fromkeys(words)), "recommended_strength": 1.0}

    def read(self, section: Any) -> "tuple[Sequence[Any], DataReference, tuple[str, ...]]":
        """Refuse: pictures are measured by the loss of the rows held out."""
        raise InputError(_NOT_MEASURED)

    def held_out(self, split: "PictureSplit") -> "Sequence[PictureRow]":
        """Return the pictures held out."""
        return split.validation

    def examine(
        self, model: "nn.Module", processor: "PipelineProcessor", rows: Sequence[Any], options: "MeasureOptions"
    ) -> "Examination":
        """Make held-out pictures ready to be measured by the loss of the prediction."""
        from haori.tasks.text_to_image.examination import PictureExamination

        return PictureExamination(model, processor, rows, options)

    def statistics(self, rows: "Sequence[AnsweredRow]", labels: Sequence[str]) -> "dict[str, Statistic]":
        """Return the loss of the prediction."""
        from haori.tasks.text_to_image.examination import statistics_of

        return statistics_of(rows)

    def general_losses(self, model: "nn.Module", processor: Any, own: str | None) -> "dict[str, TextLosses]":
        """Measure how far predictions on unrelated prompts are from the base's."""
        from haori.tasks.text_to_image.examination import drift

        return {"shipped": drift(model, processor)}

    def check_general(self, own: str | None) -> None:
        """Refuse a text of one's own: drift is measured on prompts that are fixed."""
        if own is not None:
            raise InputError("--general has no meaning for pictures: how far they drift is measured on fixed prompts.")

    def _encoded(self, recipe: TextToImageRecipe, processor: "PipelineProcessor") -> "Encoded":
        from haori.tasks.text_to_image.encoded import Encoded

        return Encoded(
            processor.base, processor, recipe.training.seed, unmasked_weight=recipe.data.unmasked_weight,
            live_text=recipe.training.text_encoder or bool(recipe.words),
        )  # fmt: skip


def _check_places(method: AdaptedMethod, encoders: Sequence[str], *, adapted: bool) -> None:
    """Refuse targets that are not loaded, and numbers of layers, which denoisers have in several places."""
    if method.layers:
        raise RecipeError(
            "'method.layers' counts the layers of a language model, and a denoiser has blocks of several kinds; name "
            r"blocks in method.target, such as 'unet\.mid_block\..*'."
        )
    targets = [method.target] if isinstance(method.target, str) else method.target
    named = [target for target in targets if target.startswith(tuple(encoders))]
    if named and not adapted:
        raise RecipeError(
            f"'method.target' names {named[0]!r}, which is adapted with training.text_encoder=true alone."
        )


def _adapted(base: "Base", recipe: TextToImageRecipe) -> tuple[str, ...]:
    """Return the components whose modules are adapted; no others are in memory in training."""
    from haori.bases.diffusion import family_of

    family = family_of(base)
    return (family.denoiser, *(family.text_encoders if recipe.training.text_encoder else ()))


TASK = TextToImage()
