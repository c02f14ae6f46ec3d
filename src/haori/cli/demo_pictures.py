"""The demo for pictures: a style learnt from fifty of them by the embedded base, and drawn for subjects not shown."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from haori.cli.console import results
from haori.cli.demo import train_shown
from haori.core.settings import settings
from haori.core.storage import staged_file
from haori.tasks.recipe import Recipe, recipe_from

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

    from haori.bases import Base
    from haori.training import TrainedRun

__all__ = ["run_picture_demo"]

_BASE = "emoji-sd"
_NAME = "lineart"
_ASKED = ("red heart", "grinning cat", "pizza", "car", "sunflower", "teddy bear", "snail", "rocket")
_STRENGTHS = (0.0, 0.5, 1.0)
_GUIDANCE = 3.0  # what the card of the base has
_BATCH = 16


def run_picture_demo() -> None:
    """Train, prove, draw base and adapter at two strengths side by side, and say what to type next.

    Raises:
        HaoriError: Any step failed.
    """
    from haori.bases import find_base
    from haori.data.sample_pictures import ATTRIBUTION, LICENCE, write_sample_pictures

    started = time.perf_counter()
    console = results()
    console.rule("1. A base model and pictures")
    base = find_base(_BASE)
    data = write_sample_pictures(settings().home / "demo")
    console.print(f"{base.name}: {base.parameters / 1e6:.0f}M parameters, {base.licence}, fingerprint {base.id}")
    console.print(f"50 pictures in one style, with captions ({LICENCE}): {data}", soft_wrap=True)

    console.rule("2. Training an adapter")
    run = train_shown(_recipe(data, LICENCE, ATTRIBUTION))
    assert run.adapter is not None

    console.rule("3. What it draws")
    drawn = draw_at_strengths(base, run.adapter.name, [f"{_NAME}, {subject}" for subject in _ASKED])
    sheet = run.folder / "strengths.png"
    _write_sheet(sheet, drawn)
    _print_similarity(console, data, drawn)

    console.rule("4. What it cost")
    _print_cost(console, run, time.perf_counter() - started)
    console.rule("Next")
    for command, what in (
        (f"haori library show {_NAME}", "its card: base, data, licence, proof"),
        (f"haori library export {_NAME} --format kohya --out {_NAME}.safetensors", "for AUTOMATIC1111 and ComfyUI"),
        (f"haori data check pictures --base {_BASE}", "look at pictures of your own"),
        (f"haori train --base {_BASE} --data pictures --name mine", "and train on them"),
    ):
        console.print(f"  [bold]{command}[/]  [dim]{what}[/]", soft_wrap=True)
    console.print(f"Base and adapter at strength 0.5 and 1.0: {sheet}", soft_wrap=True)
    console.print(f"Samples while training: {run.folder / 'samples.png'}", soft_wrap=True)


def _recipe(data: Path, licence: str, attribution: str) -> Recipe:
    section = {"path": str(data), "trigger": _NAME, "licence": licence, "attribution": attribution}
    return recipe_from({"name": _NAME, "task": "text_to_image", "base": _BASE, "preset": "style", "data": section})


def draw_at_strengths(base: "Base", adapter: str, prompts: list[str]) -> "dict[float, list[Image]]":
    """Return the pictures of each prompt, with the same seeds at every strength; strength 0 is the base.

    Args:
        base: What draws.
        adapter: Name in the library.
        prompts: Without tags.
    """
    from haori.images.generation import PictureGenerator
    from haori.images.request import PictureRequest

    generator = PictureGenerator(base, batch=_BATCH)
    found = {}
    for strength in _STRENGTHS:
        tag = f" <lora:{adapter}:{strength:g}>" if strength else ""
        requests = [PictureRequest(f"{prompt}{tag}", seed=at, guidance=_GUIDANCE) for at, prompt in enumerate(prompts)]
        found[strength] = [drawn.image for drawn in generator.draw(requests)]
    return found


def _write_sheet(path: Path, drawn: "dict[float, list[Image]]") -> None:
    from haori.tasks.text_to_image.sheet import SheetRow, draw_sheet

    rows = [
        SheetRow(f"strength {strength:g}" if strength else "base", pictures) for strength, pictures in drawn.items()
    ]
    with staged_file(path) as stage:
        draw_sheet(rows, _ASKED, f"{_BASE} with {_NAME}").save(stage, format="PNG")


def _print_similarity(console: "Console", data: Path, drawn: "dict[float, list[Image]]") -> None:
    """Print how like the pictures that were trained on those of each strength are, as `haori evaluate` measures it."""
    import numpy as np
    from PIL import Image

    from haori.metrics.picture_features import PictureFeatures
    from haori.metrics.pictures import centred_cosines

    network = PictureFeatures.load()
    shown = network.features([Image.open(path).convert("RGB") for path in sorted(data.glob("*.png"))]).numpy()
    features = {strength: network.features(pictures).numpy() for strength, pictures in drawn.items()}
    centre = features[0.0].mean(0)
    among = centred_cosines(shown, shown, centre)
    limit = (among.sum() - np.trace(among)) / (len(shown) * (len(shown) - 1))
    found = {strength: centred_cosines(rows, shown, centre).mean() for strength, rows in features.items()}
    told = ", ".join(f"at strength {strength:g} {value:.2f}" for strength, value in found.items() if strength)
    console.print(
        f"How like the 50 pictures those of subjects that were not shown are (mean cosine): by the base "
        f"{found[0.0]:.2f}, {told}; the 50 among themselves {limit:.2f}."
    )


def _print_cost(console: "Console", run: "TrainedRun", total_s: float) -> None:
    from rich.table import Table

    from haori.training import peak_memory_bytes

    assert run.adapter is not None
    card, record = run.adapter.card, run.record
    table = Table(show_header=False)
    for row in (
        ("trained parameters", f"{record.trainable_parameters:,} of {record.total_parameters:,}"),
        ("adapter file", f"{card.size_bytes / 1e6:.1f} MB"),
        ("training", f"{record.seconds:.0f} s for {record.steps:,} steps, {record.epochs:.0f} epochs"),
        ("whole demo", f"{total_s:.0f} s"),
        ("peak memory", f"{peak_memory_bytes() / 1e9:.2f} GB"),
    ):
        table.add_row(*row)
    console.print(table)
