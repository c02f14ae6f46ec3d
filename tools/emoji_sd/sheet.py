"""Draws a sheet of pictures of fixed prompts and seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

__all__ = ["GUIDANCE", "PROMPTS", "STEPS", "as_images", "generate", "sheet", "sheet_of_prompts"]

PROMPTS = (
    "red heart",
    "grinning face",
    "green apple",
    "grinning cat",
    "dog face",
    "pizza",
    "car",
    "sunflower",
    "soccer ball",
    "blue book",
)
GUIDANCE, STEPS = 3.0, 25
_MARGIN = 14


def generate(pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], *, batch: int = 16) -> list[Image.Image]:
    """Generate a picture of each prompt with its own seed, so that a picture does not depend on its neighbours."""
    pictures: list[Image.Image] = []
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), batch):
        pictures += pipeline(
            list(prompts[start : start + batch]),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]],
            guidance_scale=GUIDANCE,
            num_inference_steps=STEPS,
        ).images
    return pictures


def sheet_of_prompts(pipeline: Any, styles: Sequence[str]) -> Image.Image:
    """The ten prompts in each style, and in the last row without one."""
    rows = [*(f"{style} " for style in styles), ""]
    prompts = [row + prompt for row in rows for prompt in PROMPTS]
    pictures = generate(pipeline, prompts, list(range(len(PROMPTS))) * len(rows))
    return sheet(pictures, prompts, columns=len(PROMPTS))


def sheet(pictures: Sequence[Image.Image], names: Sequence[str], *, columns: int, scale: int = 2) -> Image.Image:
    """Put pictures of one size in rows, each with its name above it."""
    width, height = (side * scale for side in pictures[0].size)
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * width, rows * (height + _MARGIN)), "white")
    pen = ImageDraw.Draw(page)
    for place, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        left, top = place % columns * width, place // columns * (height + _MARGIN)
        pen.text((left + 2, top), name[: width // 6], fill="black")
        page.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top + _MARGIN))
    return page


def as_images(pictures: np.ndarray) -> list[Image.Image]:
    """Pictures uint8 [n, h, w, 3] as PIL images."""
    return [Image.fromarray(picture) for picture in pictures]
