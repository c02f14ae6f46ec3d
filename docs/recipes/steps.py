"""What all recipes do: read their options, train an adapter, draw, measure features, write sheets and figures."""

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import haori
from haori.core.settings import settings
from haori.images.generation import PictureGenerator
from haori.images.request import PictureRequest
from haori.metrics.picture_features import PictureFeatures

__all__ = ["BASE", "Options", "draw", "features", "interval", "learn", "options", "write_figures"]

BASE = "emoji-sd"


@dataclass(frozen=True)
class Options:
    """How a recipe runs.

    Attributes:
        out: Folder for what it writes; adapters and runs go there too, and not to your library.
        smoke: Do everything, but hardly train and draw little: the figures then mean nothing.
    """

    out: Path
    smoke: bool

    def count(self, full: int, smoke: int) -> int:
        """Return a number of steps or pictures."""
        return smoke if self.smoke else full


def options(name: str, arguments: Sequence[str] | None = None) -> Options:
    """Read the options of a recipe and set its workplace up."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(f"{name}-out"), help="folder for pictures and figures")
    parser.add_argument("--smoke", action="store_true", help="try that it runs; the figures mean nothing")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    os.environ["HAORI_WORKSPACE"] = str(given.out / "haori")
    settings.cache_clear()
    return Options(given.out, given.smoke)


def learn(
    name: str,
    folder: Path,
    *,
    steps: int,
    batch: int,
    lr: float = 1e-3,
    licence: str = "apache-2.0",
    overrides: Sequence[str] = (),
) -> None:
    """Train an adapter on a folder of pictures with captions; `<lora:NAME:1>` then draws with it."""
    rows = len(list(folder.glob("*.png")))
    own = (
        f"training.epochs={math.ceil(steps / math.ceil(rows / batch))}", f"training.batch_size={batch}",
        f"optimizer.lr={lr}", "data.validation_share=0", "samples.prompts=[]", f"data.licence={licence}",
    )  # fmt: skip
    run = haori.train(base=BASE, data=str(folder), name=name, task="text_to_image", overrides=(*own, *overrides))
    print(f"{name}: {run.record.steps} steps on {rows} pictures in {run.record.seconds:.0f} s", flush=True)


def draw(requests: Sequence[PictureRequest]) -> list[Image.Image]:
    """Return the pictures of requests for one picture each."""
    print(f"drawing {len(requests)} pictures", flush=True)
    return [one.image for one in _generator().draw(requests)]


@cache
def _generator() -> PictureGenerator:
    return PictureGenerator(haori.find_base(BASE), batch=16)


@cache
def _network() -> PictureFeatures:
    return PictureFeatures.load()


def features(pictures: Sequence[Image.Image]) -> Any:
    """Return [n, 1280] features of EfficientNet-Lite0."""
    return _network().features(pictures).numpy().astype(np.float64)


def interval(values: Any) -> list[float]:
    """Return the mean over rows with its 95% interval, by percentile bootstrap with 2,000 resamples; 3 digits."""
    rows = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(rows), size=(2000, len(rows)))
    low, high = np.percentile(rows[picks].mean(axis=1), (2.5, 97.5))
    return [round(float(value), 3) for value in (rows.mean(), low, high)]


def write_figures(out: Path, figures: dict[str, Any]) -> None:
    """Write what was measured as JSON."""
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"Written to {out}, after {time.process_time():.0f} s of processor time.")
