"""Judges the base: are the subject and the style asked for in the picture? `python gate.py BASE FOLDER`.

64 captions that were trained on, with fixed seeds. A picture is compared with every trained one by the features of
an ImageNet classifier; the subject of the nearest is what it shows, and its style is the style.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from captions import name_of
from diffusers import StableDiffusionPipeline
from gate_figures import captions, judge
from lists import STYLES
from sheet import as_images, generate, sheet, sheet_of_prompts

from haori.metrics.picture_features import PictureFeatures


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
