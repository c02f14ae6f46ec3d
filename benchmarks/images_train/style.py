"""style_fit: a style that the base never saw, learnt from 50 pictures and asked for in 64 other subjects.

Nearest by the features of EfficientNet-Lite0 (haori.metrics): the style among the base's two and the 50 pictures; the
subject among the base's 800 training pictures, for base and adapter alike. The base is asked the same without the
adapter. Needs those 800 pictures: `python tools/emoji_sd/prepare.py FOLDER` writes them, and `--pictures FOLDER` says
where.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "emoji_sd"))

__all__ = ["BARS", "measure_style"]

BARS = {"style_fit": 0.8, "style_of_base": 0.2, "subjects_lost": 0.1}
STYLE = "lineart"


def measure_style(reference: Path) -> dict[str, Any]:
    """Train through the API, draw, and judge.

    Args:
        reference: Folder with pictures.pt of tools/emoji_sd.

    Returns:
        `style_fit` and `style_of_base`, shares of pictures whose nearest style is the learnt one; `subjects` and
        `subjects_of_base`, shares of pictures whose nearest subject is the one asked for, and `subjects_lost`, the
        difference; `train_s`.
    """
    import torch
    from captions import name_of
    from lists import ASKED_IN_STYLE
    from PIL import Image
    from sheet import as_images

    import haori
    from haori.cli.demo_pictures import draw_at_strengths
    from haori.data.sample_pictures import write_sample_pictures
    from haori.metrics.picture_features import PictureFeatures

    with tempfile.TemporaryDirectory() as folder:
        shown = write_sample_pictures(Path(folder))
        started = time.perf_counter()
        haori.train(
            base="emoji-sd", data=str(shown), name=f"{STYLE}-benchmark", task="text_to_image",
            overrides=(f"data.trigger={STYLE}", "preset=style"), out=Path(folder) / "adapter",
        )  # fmt: skip
        train_s = time.perf_counter() - started
        prompts = [f"{STYLE} {name_of(subject)}" for subject in ASKED_IN_STYLE]
        drawn = draw_at_strengths(haori.find_base("emoji-sd"), Path(folder) / "adapter", prompts)
        learnt = [Image.open(path).convert("RGB") for path in sorted(shown.glob("*.png"))]
    kept = torch.load(reference / "pictures.pt")
    features = PictureFeatures.load()
    known = features.features(as_images(kept["pictures"].numpy())).numpy()
    of_style = features.features(learnt).numpy()
    judged = {
        strength: judge(features.features(drawn[strength]).numpy(), ASKED_IN_STYLE, known, kept["labels"], of_style)
        for strength in (0.0, 1.0)
    }
    style, subjects = judged[1.0]
    base_style, base_subjects = judged[0.0]
    figures = {
        "style_fit": style, "style_of_base": base_style, "subjects": subjects, "subjects_of_base": base_subjects,
        "subjects_lost": base_subjects - subjects,
    }  # fmt: skip
    for key, value in figures.items():
        bar = "" if key not in BARS else f">= {BARS[key]}" if key == "style_fit" else f"<= {BARS[key]}"
        print(f"style  {key:20} {value:6.2f}  {bar}", flush=True)
    return {**{key: round(value, 4) for key, value in figures.items()}, "train_s": round(train_s, 1), "bars": BARS}


def judge(
    pictures: Any, asked: Sequence[str], known: Any, labels: Sequence[tuple[str, str]], of_style: Any
) -> tuple[float, float]:
    """Return the shares of pictures whose nearest style is the learnt one, and whose nearest subject is the one asked.

    Args:
        pictures: [n, d] features of what was drawn.
        asked: [n] subjects.
        known: [m, d] features of the base's training pictures.
        labels: [m] style and subject of each.
        of_style: [k, d] features of the pictures that the style was learnt from.
    """
    import numpy as np

    from haori.metrics.pictures import nearest_labels, retrieval

    styles = [style for style, _ in labels] + [STYLE] * len(of_style)
    near = nearest_labels(pictures, np.concatenate([known, of_style]), styles)
    found = retrieval(pictures, asked, known, [subject for _, subject in labels])
    return sum(one[0] == STYLE for one in near) / len(near), found.first
