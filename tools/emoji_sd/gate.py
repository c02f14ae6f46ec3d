"""Judges the base: are the subject and the style asked for in the picture? `python gate.py BASE FOLDER`.

64 captions that were trained on, with fixed seeds. A picture is compared with every trained one by the features of
an ImageNet classifier; the subject of the nearest is what it shows, and its style is the style.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from captions import name_of
from diffusers import StableDiffusionPipeline
from lists import STYLES, SUBJECTS
from sheet import as_images, generate, sheet, sheet_of_prompts

from haori.metrics.picture_features import PictureFeatures
from haori.metrics.pictures import kernel_inception_distance, nearest_labels, retrieval

__all__ = ["BARS", "captions", "judge"]

BARS = {"first": 0.5, "in_five": 0.75, "style": 0.9}
"""What the base has to reach."""


def captions(count: int = 64) -> list[tuple[str, str]]:
    """(style, subject) of the captions asked for: `count` different subjects, the styles in turn."""
    subjects = random.Random(0).sample(SUBJECTS, count)
    styles = list(STYLES)
    return [(styles[place % len(styles)], subject) for place, subject in enumerate(subjects)]


def judge(
    generated: npt.ArrayLike, asked: Sequence[tuple[str, str]], real: npt.ArrayLike, labels: Sequence[tuple[str, str]]
) -> dict[str, float]:
    """The figures of the gate.

    Args:
        generated: [n, d] features of the pictures generated.
        asked: [n] style and subject of each.
        real: [m, d] features of the trained pictures.
        labels: [m] style and subject of each.
    """
    found = retrieval(generated, [subject for _, subject in asked], real, [subject for _, subject in labels])
    styles = nearest_labels(generated, real, [style for style, _ in labels])
    right = sum(near[0] == style for near, (style, _) in zip(styles, asked, strict=True))
    wanted = set(asked)
    same = np.array([label in wanted for label in labels])
    real = np.asarray(real)
    return {
        "first": found.first,
        "in_five": found.in_five,
        "style": right / len(asked),
        "kid": kernel_inception_distance(generated, real),
        "kid_of_real": kernel_inception_distance(real[same], real[~same]),
    }


def main() -> None:
    """Print the figures, add them to gate.jsonl, and draw the sheets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, help="the folder of the pipeline")
    parser.add_argument("folder", type=Path, help="where pictures.pt is, and the results go")
    parser.add_argument("--step", type=int, default=0, help="for the log")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = torch.load(arguments.folder / "pictures.pt")
    seen = PictureFeatures.load()
    cached = arguments.folder / "features.pt"
    if not cached.exists():
        torch.save(seen.features(as_images(data["pictures"].numpy())), cached)
    pipeline = StableDiffusionPipeline.from_pretrained(arguments.base)
    asked = captions()
    prompts = [f"{style} {name_of(subject)}" for style, subject in asked]
    pictures = generate(pipeline, prompts, range(1000, 1000 + len(asked)))
    figures = judge(seen.features(pictures), asked, torch.load(cached), data["labels"])
    figures = {name: round(value, 4) for name, value in figures.items()}
    entry = {"step": arguments.step, "time": time.strftime("%H:%M:%S"), **figures}
    print(json.dumps(entry))
    with (arguments.folder / "gate.jsonl").open("a") as log:
        log.write(json.dumps(entry) + "\n")
    sheet(pictures, prompts, columns=16).save(arguments.folder / f"gate-{arguments.step}.png")
    sheet_of_prompts(pipeline, list(STYLES)).save(arguments.folder / f"prompts-{arguments.step}.png")


if __name__ == "__main__":
    main()
