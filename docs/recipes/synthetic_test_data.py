"""Synthetic pictures in place of personal data: is a classifier trained on them as good, and are they new?

`python docs/recipes/synthetic_test_data.py --out FOLDER`; docs/recipes/synthetic-test-data.md explains it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from steps import Options, draw, features, interval, learn, options, write_figures

from haori.evaluation.bootstrap import intervals
from haori.images.request import PictureRequest
from haori.metrics.memorisation import Closeness, closeness
from haori.metrics.statistics import mean_sums
from haori.tasks.text_to_image.sheet import SheetRow, draw_sheet

DIGITS = (2, 3, 4, 7)
SIDE = 64  # pixels


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Split the handwriting, learn and draw each digit, train the classifiers, compare, look for copies."""
    run = options("synthetic-test-data", arguments)
    digits = DIGITS[: run.count(len(DIGITS), 2)]
    shown, test = split(digits, run.count(24, 4), run.count(75, 6))
    drawn = synthetic(run, shown, run.count(24, 3))

    scanned = {digit: [scan(picture) for picture in pictures] for digit, pictures in drawn.items()}

    sets = {"real": shown, "synthetic": scanned, "test": test}
    inks = {name: ink(every(pictures)) for name, pictures in sets.items()}
    labels = {name: every_label(pictures) for name, pictures in sets.items()}
    inks["both"] = np.concatenate([inks["real"], inks["synthetic"]])
    labels["both"] = labels["real"] + labels["synthetic"]
    right = {
        name: classifier().fit(inks[name], labels[name]).predict(inks["test"]) == labels["test"]
        for name in ("real", "synthetic", "both")
    }
    seen = {name: features(every(pictures)) for name, pictures in sets.items()}
    copies = closeness(seen["synthetic"], seen["real"])
    unseen = closeness(seen["test"], seen["real"])
    figures = compare(right) | judged_by_the_real(inks, labels) | told_apart(copies, unseen)
    for name, found in figures.items():
        print(f"{name:42} {found}")
    write_sheets(run.out, {"real": shown, "drawn": drawn, "scanned": scanned}, copies)
    write_figures(run.out, figures)
    return figures


Pictures = dict[int, list[Image.Image]]


def split(digits: Sequence[int], train: int, test: int) -> tuple[Pictures, Pictures]:
    """Return pictures to learn from and pictures to test on, by digit.

    The handwriting comes with scikit-learn: 1,797 digits of 8 x 8 pixels by 13 people (optdigits, UCI, CC BY 4.0).
    """
    data, chance = load_digits(), np.random.default_rng(0)
    shown, held = {}, {}
    for digit in digits:
        rows = chance.permutation(np.flatnonzero(data.target == digit))
        pictures = [enlarged(data.images[row]) for row in rows[: train + test]]
        shown[digit], held[digit] = pictures[:train], pictures[train:]
    return shown, held


def enlarged(values: Any) -> Image.Image:
    """Return 8 x 8 values from 0 to 16 as dark ink on white paper, of the base's size."""
    grey = Image.fromarray((255 - values * 255 / 16).astype(np.uint8))
    return grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")


def scan(picture: Image.Image) -> Image.Image:
    """Return a drawn picture as the scanner of the real ones would have given it: 8 x 8 values from 0 to 16, enlarged.

    Otherwise sharpness tells what is drawn from what is real.
    """
    return enlarged(np.round(16 * ink([picture]).reshape(8, 8)))


def ink(pictures: Sequence[Image.Image]) -> Any:
    """Return [n, 64], how dark each of 8 x 8 places is, from 0 to 1."""
    small = [picture.convert("L").resize((8, 8), Image.Resampling.BOX) for picture in pictures]
    return 1 - np.stack([np.asarray(picture, dtype=np.float64).ravel() for picture in small]) / 255


def synthetic(run: Options, shown: Pictures, count: int) -> Pictures:
    """Learn an adapter for each digit and draw with it, so that the label of what is drawn is known."""
    for digit, pictures in shown.items():
        folder = write_pictures(run.out / "shown" / str(digit), pictures)
        learn(f"digit-{digit}", folder, steps=run.count(60, 1), batch=run.count(8, 2), lr=2e-3, licence="cc-by-4.0")
    requests = [
        PictureRequest(f"digit <lora:digit-{digit}:1>", seed=1000 * digit + at, guidance=2.0, steps=run.count(20, 2))
        for digit in shown
        for at in range(count)
    ]
    # The real ones are grey, so colour would only tell the classifier what is synthetic.
    drawn = [picture.convert("L").convert("RGB") for picture in draw(requests)]
    return {digit: drawn[at * count : (at + 1) * count] for at, digit in enumerate(shown)}


def write_pictures(folder: Path, pictures: Sequence[Image.Image]) -> Path:
    """Write pictures with one caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for at, picture in enumerate(pictures):
        picture.save(folder / f"{at:03d}.png")
        (folder / f"{at:03d}.txt").write_text("digit\n", encoding="utf-8")
    return folder


def every(pictures: Pictures) -> list[Image.Image]:
    """Return all pictures, digit by digit."""
    return [picture for found in pictures.values() for picture in found]


def every_label(pictures: Pictures) -> list[int]:
    """Return their digits."""
    return [digit for digit, found in pictures.items() for _ in found]


def classifier() -> Any:
    """Return a small classifier over ink: the same for every set, with nothing tuned."""
    return LogisticRegression(max_iter=2000)


def compare(right: dict[str, Any]) -> dict[str, Any]:
    """Return accuracies on real handwriting, and differences to training on the real, paired by test picture."""
    statistics = {name: mean_sums(found) for name, found in right.items()}
    figures: dict[str, Any] = {}
    for name, statistic in statistics.items():
        found = intervals(statistic, statistics["real"])
        assert found is not None and found.difference is not None
        figures[f"accuracy, trained on {name}"] = [round(value, 3) for value in (statistic.value, *found.value)]
        if name != "real":
            difference = statistic.value - statistics["real"].value
            figures[f"{name} minus real"] = [round(value, 3) for value in (difference, *found.difference)]
    return figures


def judged_by_the_real(inks: dict[str, Any], labels: dict[str, list[int]]) -> dict[str, Any]:
    """Return the share of synthetic pictures in which a classifier of the real ones reads the digit asked for."""
    read = classifier().fit(inks["real"], labels["real"]).predict(inks["synthetic"])
    return {"synthetic read as what was asked for": interval(read == labels["synthetic"])}


def told_apart(copies: Closeness, unseen: Closeness) -> dict[str, Any]:
    """Return how many pictures are taken for copies of a shown one; and so of real ones that were not shown."""
    return {
        "synthetic within the limit of copies": interval(copies.flagged),
        "unseen real within the limit of copies": interval(unseen.flagged),
        "distance to the nearest shown, synthetic": interval(copies.distances),
        "distance to the nearest shown, unseen real": interval(unseen.distances),
    }


def write_sheets(out: Path, sets: dict[str, Pictures], copies: Closeness) -> None:
    """Write real beside synthetic pictures, and the synthetic ones that are nearest to a shown one beside it."""
    shown, scanned = sets["real"], sets["scanned"]
    rows = [SheetRow(f"{digit} {what}", found[digit][:8]) for digit in shown for what, found in sets.items()]
    draw_sheet(rows, ()).save(out / "sheet.png")
    nearest, real, made = copies.distances.argsort()[:8], every(shown), every(scanned)
    pairs = [
        SheetRow("synthetic", [made[at] for at in nearest]),
        SheetRow("nearest shown", [real[copies.nearest[at]] for at in nearest]),
    ]
    titles = [f"distance {copies.distances[at]:.2f}" for at in nearest]
    draw_sheet(pairs, titles, f"the nearest pairs; the limit is {copies.limit:.2f}").save(out / "nearest.png")


if __name__ == "__main__":
    sys.exit(not main())
