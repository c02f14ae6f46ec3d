"""Sample pictures drawn while training, from fixed prompts and seeds, on one sheet that grows.

The first row is the base's own, the others are of the model after so many epochs. Single pictures are kept beside the
sheet, so that a resumed run goes on with it.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.bases.embedded import usual_guidance
from haori.core.storage import make_folder, staged_file
from haori.tasks.text_to_image.sheet import SheetRow, draw_sheet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image
    from torch import nn

    from haori.bases import Base
    from haori.bases.diffusion import DiffusionModel
    from haori.tasks.text_to_image.recipe import SampleSection

__all__ = ["SampleSheets", "draw_pictures"]

_NAME = re.compile(r"step-(\d{8})-epoch-([\d.]+)-(\d+)\.png")


class SampleSheets:
    """Draws samples at validations, evenly over the run; see `haori.tasks.task.Observer`.

    Args:
        section: What to draw, resolved.
        base: The pipeline; what is not trained of it is loaded for each sheet, and freed.
        folder: Of the run.
        epochs: Of the whole run.
        size: Width and height in pixels.
        seed: Of the first prompt; the others follow.
        tokenizers: With new words, by the pipeline's names of them; None takes the base's.
    """

    def __init__(
        self,
        section: "SampleSection",
        base: "Base",
        folder: Path,
        epochs: int,
        size: tuple[int, int],
        seed: int,
        tokenizers: "Mapping[str, Any] | None" = None,
    ) -> None:
        self.section, self.base, self.folder, self.tokenizers = section, base, folder, tokenizers
        self.size, self.seed = size, seed
        self.marks = [epochs * (number + 1) / section.sheets for number in range(section.sheets)]

    def __call__(self, model: "nn.Module", step: int, epoch: float) -> None:
        """Draw the prompts, if it is time to, and write the sheet anew."""
        done = self._drawn()
        last = max((drawn for _, drawn in done), default=-1.0)
        if step and not any(last < mark <= epoch + 1e-9 for mark in self.marks):
            return
        place = self.folder / "samples"
        make_folder(place)
        pictures = draw_pictures(
            self.base, unwrapped(model), self.section, self.size, self.seed, tokenizers=self.tokenizers
        )
        for number, picture in enumerate(pictures):
            with staged_file(place / f"step-{step:08d}-epoch-{epoch:.3g}-{number}.png") as stage:
                picture.save(stage, format="PNG")
        self._write_sheet()

    def _drawn(self) -> list[tuple[int, float]]:
        """Return step and epoch of the rows drawn so far, the base's own at step 0."""
        found = (_NAME.fullmatch(path.name) for path in (self.folder / "samples").glob("*.png"))
        return sorted({(int(match[1]), float(match[2])) for match in found if match})

    def _write_sheet(self) -> None:
        from PIL import Image

        rows = []
        for step, epoch in self._drawn():
            files = sorted((self.folder / "samples").glob(f"step-{step:08d}-*.png"), key=lambda path: path.name)
            label = "base" if step == 0 else f"epoch {epoch:.3g}\nstep {step:,}"
            rows.append(SheetRow(label, [Image.open(file).convert("RGB") for file in files]))
        assert self.section.prompts != "auto"
        with staged_file(self.folder / "samples.png") as stage:
            draw_sheet(rows, self.section.prompts).save(stage, format="PNG")


def unwrapped(model: Any) -> "DiffusionModel":
    """Return the pipeline's model inside PEFT's, whose layers hold the adapters."""
    found: DiffusionModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return found


def draw_pictures(
    base: "Base",
    model: "DiffusionModel",
    section: "SampleSection",
    size: tuple[int, int],
    seed: int,
    *,
    tokenizers: "Mapping[str, Any] | None" = None,
) -> "Sequence[Image]":
    """Return a picture for each prompt, drawn by diffusers' own pipeline with live models in it."""
    import torch

    from haori.bases.diffusion import pipeline_of
    from haori.library.proof.logits import model_dtype

    device = next(model.parameters()).device
    pipeline: Any = pipeline_of(
        base, dict(model.named_children()), dtype=model_dtype(model.denoiser), device=str(device),
        tokenizers=tokenizers,
    )  # fmt: skip
    guidance = usual_guidance(base.source) if section.guidance == "auto" else section.guidance
    options = {} if guidance is None else {"guidance_scale": guidance}
    assert section.prompts != "auto"
    return [
        pipeline(
            prompt=prompt, width=size[0], height=size[1], num_inference_steps=section.steps,
            generator=torch.Generator(device.type).manual_seed(seed + number), **options,
        ).images[0]
        for number, prompt in enumerate(section.prompts)
    ]  # fmt: skip
