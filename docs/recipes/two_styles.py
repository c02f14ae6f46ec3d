"""Two styles, each an adapter of its own, blended in one prompt: seen on a sheet, and measured.

`python docs/recipes/two_styles.py --out FOLDER`; docs/recipes/two-styles.md explains it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from steps import Options, draw, features, interval, learn, options, write_figures

from haori.data.sample_pictures import write_sample_pictures
from haori.images.request import PictureRequest
from haori.tasks.text_to_image.sheet import SheetRow, draw_sheet

INK = (16, 40, 150)
# What the second style is shown on, and what both are asked for afterwards. The base knows all of them.
SHOWN = (
    "lion", "fox", "pig", "koala", "penguin", "owl", "flamingo", "frog", "spouting whale", "octopus", "crab",
    "lady beetle", "rose", "tulip", "cactus", "mushroom", "grapes", "lemon", "banana", "pineapple", "cherries",
    "carrot", "bread", "pancakes", "cheese wedge", "french fries", "soft ice cream", "cookie", "teapot", "house",
    "castle", "ambulance", "sailboat", "watch", "umbrella", "balloon", "trophy", "crown", "guitar", "hammer",
)  # fmt: skip
ASKED = ("red heart", "grinning cat", "pizza", "automobile", "sunflower", "teddy bear", "snail", "rocket")
SYSTEMS = {
    "base": {},
    "line art 1": {"lineart": 1.0},
    "line art 0.5": {"lineart": 0.5},
    "0.6 + 0.4": {"lineart": 0.6, "blueink": 0.4},
    "0.4 + 0.6": {"lineart": 0.4, "blueink": 0.6},
    "blue 0.5": {"blueink": 0.5},
    "blue 1": {"blueink": 1.0},
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train both, draw all systems, measure."""
    run = options("two-styles", arguments)
    learn(
        "lineart", write_lineart(run), steps=run.count(110, 1), batch=run.count(16, 2),
        licence="mit",
        overrides=("data.trigger=lineart",),
    )  # fmt: skip
    learn("blueink", write_blue(run), steps=run.count(110, 1), batch=run.count(16, 2))

    asked = ASKED[: run.count(len(ASKED), 2)]
    requests = [
        PictureRequest(prompt(subject, mix), seed=seed, guidance=3.0, steps=run.count(25, 2))
        for mix in SYSTEMS.values()
        for seed, subject in enumerate(asked)
    ]
    drawn = draw(requests)
    by_system = {name: drawn[at * len(asked) : (at + 1) * len(asked)] for at, name in enumerate(SYSTEMS)}
    rows = [SheetRow(name, pictures) for name, pictures in by_system.items()]
    draw_sheet(rows, asked, "two styles on emoji-sd").save(run.out / "sheet.png")
    figures = measure(by_system)
    for name, found in figures.items():
        print(f"{name:14}" + "".join(f"  {what} {low_mid_high}" for what, low_mid_high in found.items()))
    write_figures(run.out, figures)
    return figures


def prompt(subject: str, mix: dict[str, float]) -> str:
    """Ask for a subject with adapters; the line art has a trigger word before it, as in training, the ink has none."""
    tags = "".join(f" <lora:{name}:{strength:g}>" for name, strength in mix.items())
    return f"{'lineart, ' if 'lineart' in mix else ''}{subject}{tags}"


def write_lineart(run: Options) -> Path:
    """Write the pictures of the first style, which come with Haori."""
    folder = write_sample_pictures(run.out)
    for path in sorted(folder.glob("*.png"))[run.count(50, 4) :]:
        path.unlink()
        path.with_suffix(".txt").unlink()
    return folder


def write_blue(run: Options) -> Path:
    """Write the pictures of the second style: what the base draws, printed in one blue ink.

    Dark becomes ink and light paper, by the share of the brightness from black to white.
    """
    folder = run.out / "blue"
    folder.mkdir(exist_ok=True)
    subjects = SHOWN[: run.count(len(SHOWN), 2)]
    requests = [
        PictureRequest(subject, seed=1000 + seed, guidance=3.0, steps=run.count(25, 2))
        for seed, subject in enumerate(subjects)
    ]
    for subject, picture in zip(subjects, draw(requests), strict=True):
        printed = ImageOps.colorize(picture.convert("L"), INK, "white")
        printed.save(folder / f"{subject.replace(' ', '-')}.png")
        (folder / f"{subject.replace(' ', '-')}.txt").write_text(subject + "\n", encoding="utf-8")
    return folder


def measure(by_system: dict[str, list[Image.Image]]) -> dict[str, dict[str, list[float]]]:
    """Return for each system how much of each style is in it, with 95% intervals over subjects.

    By features: a picture's are taken as those of the base's picture of the same subject and seed, plus a shares of
    what the line art alone changed and b shares of what the blue ink alone did; a and b by least squares. The base is
    (0, 0), each style alone (1, 0) or (0, 1) by definition; the others are measured.

    By pixels: how colourful what is drawn is, and how blue.
    """
    seen = {name: features(pictures) for name, pictures in by_system.items()}
    base, first, second = (seen[name] for name in ("base", "line art 1", "blue 1"))
    found = {}
    for name, rows in seen.items():
        shares = []
        for at, row in enumerate(rows):
            changes = np.stack([first[at] - base[at], second[at] - base[at]], axis=1)  # [1280, 2]
            shares.append(np.linalg.lstsq(changes, row - base[at], rcond=None)[0])
        columns = {"line art": np.stack(shares)[:, 0], "blue": np.stack(shares)[:, 1]}
        columns |= {
            what: np.array([one[at] for one in map(colours, by_system[name])])
            for at, what in enumerate(("colourful", "bluish"))
        }
        found[name] = {what: interval(column) for what, column in columns.items()}
    return found


def colours(picture: Image.Image) -> tuple[float, float]:
    """Return how far from grey the drawn pixels are, and how far towards blue, both from 0 to 1.

    The largest of red, green and blue minus the smallest; and blue minus the mean of red and green. Means over what is
    not paper.
    """
    pixels = np.asarray(picture, dtype=np.float64) / 255
    drawn = pixels[pixels.min(axis=-1) < 0.8]
    if not len(drawn):
        return 0.0, 0.0
    return float(np.ptp(drawn, axis=-1).mean()), float((drawn[:, 2] - drawn[:, :2].mean(axis=-1)).mean())


if __name__ == "__main__":
    sys.exit(not main())
