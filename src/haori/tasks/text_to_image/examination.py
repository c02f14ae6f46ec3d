"""Pictures made ready to be measured: the loss of predicting their noise, always with the same noise and timesteps.

So the losses of two systems are paired picture by picture. How far a system has moved from its base on prompts that
have nothing to do with the data is measured by `drift`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from haori.core.errors import DataError, InputError
from haori.core.progress_bar import progress_bar
from haori.metrics.likelihood import loss_sums
from haori.tasks.examination import USUAL, Answer, AnsweredRow, Measured, MeasureOptions, Scores, TextLosses, Turn
from haori.tasks.text_to_image.encoded import Encoded
from haori.tasks.text_to_image.objective import MeasuredPictures

if TYPE_CHECKING:
    from torch import Tensor, nn

    from haori.bases.diffusion import PipelineProcessor
    from haori.data.pictures import PictureRow
    from haori.metrics.statistics import Statistic

__all__ = ["LOSS", "UNRELATED", "PictureExamination", "drift", "statistics_of"]

LOSS = "prediction_loss"
"""Name of the metric."""

_TIMESTEPS = 8
_BATCH = 8
_SEED = 0
# Kind of prompt and prompts; none is about a style, and none about one subject that people often teach.
UNRELATED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("things", ("a wooden chair", "a blue bicycle", "a cup of tea")),
    ("places", ("a mountain lake", "a city street at night", "an empty beach")),
    ("living things", ("a brown horse", "an oak tree", "a group of people")),
    ("nothing", ("",)),
)


@dataclass(frozen=True)
class _Row:
    """A picture that is measured; `trained_tokens` is at how many timesteps."""

    index: int
    origin: str
    reference: str
    trained_tokens: int


class PictureExamination:
    """Held-out pictures; see `haori.tasks.examination.Examination`.

    Args:
        model: Tells by the text encoders it has whether captions go through them.
        processor: Of the base.
        rows: The pictures.
        options: What was asked for.

    Raises:
        InputError: Something was asked for that pictures have not.
        DataError: There is no picture.
    """

    labels: tuple[str, ...] = ()

    def __init__(
        self, model: Any, processor: "PipelineProcessor", rows: "Sequence[PictureRow]", options: MeasureOptions
    ) -> None:
        if options != USUAL:
            raise InputError("Pictures are measured by the loss of the prediction alone; leave labels and metrics out.")
        if not rows:
            raise DataError("There is no picture to measure.")
        encoded = Encoded(
            processor.base, processor, _SEED, unmasked_weight=0.0, live_text=bool(_loaded(model).text_encoders)
        )
        encoded.compute(rows, (), str(_loaded(model).device))
        self._pictures = MeasuredPictures(rows, encoded, _TIMESTEPS, _SEED)
        self.rows = [_Row(index, row.origin, encoded.captions(row)[0], _TIMESTEPS) for index, row in enumerate(rows)]

    def score(self, model: "nn.Module", system: str) -> Scores:
        """Sum the loss of each picture over the timesteps."""
        losses = [0.0] * len(self.rows)
        device = _loaded(model).device
        every = list(range(len(self._pictures.costs)))
        by_size = sorted(every, key=lambda row: self._pictures.costs[row])
        with progress_bar(f"{system}: predicting", len(every), "predictions") as advance:
            for start in range(0, len(every), _BATCH):
                some = by_size[start : start + _BATCH]
                found = self._pictures.loss(model, self._pictures.batch(some, device))
                for loss, place in zip(found.each.tolist(), found.row_of.tolist(), strict=True):
                    losses[some[place] // _TIMESTEPS] += loss
                advance(len(some))
        statistic = loss_sums(losses, [_TIMESTEPS] * len(losses))
        answers = {row.index: Answer(nll=loss) for row, loss in zip(self.rows, losses, strict=True)}
        return Scores({LOSS: Measured(statistic.value, statistic)}, answers)

    def notes(self, adapter: Scores, base: Scores | None) -> list[str]:
        """Return how pictures are measured."""
        return [
            f"The loss of a picture is the mean square error of the prediction at {_TIMESTEPS} timesteps, with noise "
            "that is the same for every system."
        ]

    def sampled(self, scores: Scores) -> Sequence[_Row]:
        """Return nothing: what is drawn is shown by the sample sheets of a run."""
        return []

    def prompt(self, row: _Row) -> tuple[Turn, ...]:
        """Return the caption."""
        return (Turn("user", row.reference),)

    def answers(self, model: "nn.Module", system: str, rows: Sequence[Any], scores: Scores) -> list[Answer]:
        """Return nothing."""
        return []

    def sample_note(self) -> str:
        """Return nothing."""
        return ""


def statistics_of(rows: Sequence[AnsweredRow]) -> "dict[str, Statistic]":
    """Return the loss of pictures that were measured."""
    return {LOSS: loss_sums([row.nll or 0.0 for row in rows], [row.tokens for row in rows])}


def drift(model: "nn.Module", processor: "PipelineProcessor") -> TextLosses:
    """Return how far a model's predictions are from its base's, on prompts that have nothing to do with the data.

    For each prompt and timestep the squared distance of the two predictions divided by the squared size of the base's;
    0 for the base itself. Noise and timesteps are fixed.
    """
    import torch

    from haori.bases import load_model

    held = _loaded(model)
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(held.dtype, "fp32")
    base: Any = load_model(processor.base, dtype=dtype, device=str(held.device))
    kinds, distances = [], []
    with torch.no_grad():
        for kind, inputs in _prompts(processor):
            before = base(**{name: value.to(held.device) for name, value in inputs.items()}).sample.double()
            after = _predicted(model, base, inputs).double()
            shares = (after - before).square().flatten(1).sum(1) / before.square().flatten(1).sum(1)
            kinds.append(kind)
            distances.append(float(shares.mean()))
    return TextLosses(kinds=tuple(kinds), nll=tuple(distances), tokens=(1,) * len(kinds))


def _predicted(model: "nn.Module", base: Any, inputs: "dict[str, Tensor]") -> "Tensor":
    """Run a model; one without text encoders reads the embeddings of its base's."""
    held = _loaded(model)
    given = {name: value.to(held.device) for name, value in inputs.items()}
    if not held.text_encoders:
        tokens = {name.removeprefix("tokens_"): given.pop(name) for name in list(given) if name.startswith("tokens_")}
        given |= base.family.embed(base.text_encoders, tokens)
    predicted: Tensor = model(**given).sample
    return predicted


def _prompts(processor: "PipelineProcessor") -> "Iterator[tuple[str, dict[str, Tensor]]]":
    """Yield the kind of each prompt, and the arguments of the forward at some timesteps."""
    import torch

    from haori.bases.diffusion import PictureSize

    family = processor.family
    side = family.native_size
    latent = side // family.latent_factor
    timesteps = processor.noising.even(_TIMESTEPS)
    numbers = torch.Generator().manual_seed(_SEED)
    noisy = torch.randn(_TIMESTEPS, family.latent_channels, latent, latent, generator=numbers)
    sizes = family.sizes([PictureSize((side, side), (0, 0), (side, side))] * _TIMESTEPS)
    for kind, prompts in UNRELATED:
        for prompt in prompts:
            tokens = processor.tokens([prompt] * _TIMESTEPS)
            text = {f"tokens_{name}": ids for name, ids in tokens.items()}
            yield kind, {"noisy": noisy, "timesteps": timesteps, **text, **sizes}


def _loaded(model: Any) -> Any:
    """Return the pipeline's model under an adapter, or as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
