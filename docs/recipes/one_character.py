"""One character in many poses: learnt from pictures in eight poses, drawn in those and in four others.

`python docs/recipes/one_character.py --out FOLDER`; docs/recipes/one-character.md explains it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from figure import CHARACTERS, HERO, MANNEQUIN, POSES, draw_figure
from PIL import Image
from steps import Options, draw, features, interval, learn, options, write_figures

from haori.images.request import PictureRequest
from haori.metrics.pictures import nearest_labels
from haori.tasks.text_to_image.sheet import SheetRow, draw_sheet

SHOWN = tuple(POSES)[:8]
STRENGTHS = (0.5, 0.7, 0.9)
"""How much of the mannequin is drawn anew."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Draw what is learnt from, learn it, draw all poses from a mannequin, measure."""
    run = options("one-character", arguments)
    shown = SHOWN[: run.count(len(SHOWN), 2)]
    learn(
        HERO, write_pictures(run.out / "shown", shown), steps=run.count(110, 1), batch=run.count(16, 2),
        lr=2e-3, overrides=(f"data.trigger={HERO}",),
    )  # fmt: skip
    poses = run.count(len(POSES), 2)
    asked = tuple(POSES)[:poses]
    seeds = run.count(3, 1)
    systems = [("base", STRENGTHS[1]), *((HERO, strength) for strength in STRENGTHS)]
    drawn = iter(draw([one for who, strength in systems for one in requests(run, who, strength, asked, seeds)]))
    by_system = {
        (who, strength): {pose: [next(drawn) for _ in range(seeds)] for pose in asked} for who, strength in systems
    }
    figures = measure(by_system, asked)
    print_table(figures)
    rows = [SheetRow("mannequin", [draw_figure(MANNEQUIN, POSES[pose]) for pose in asked])]
    for (who, strength), found in by_system.items():
        rows.append(SheetRow(f"{who} {strength:g}", [found[pose][0] for pose in asked]))
    draw_sheet(rows, [pose if pose in SHOWN else f"{pose} (new)" for pose in asked]).save(run.out / "sheet.png")
    write_figures(run.out, figures)
    return figures


def write_pictures(folder: Path, poses: Sequence[str]) -> Path:
    """Write the character in each pose at three sizes and places."""
    folder.mkdir(exist_ok=True)
    for pose in poses:
        for number, (scale, shift) in enumerate(((1.0, (0.0, 0.0)), (0.9, (0.05, 0.02)), (0.95, (-0.05, -0.02)))):
            name = f"{pose.replace(' ', '-')}-{number}"
            draw_figure(CHARACTERS[HERO], POSES[pose], scale=scale, shift=shift).save(folder / f"{name}.png")
            # A base that knows the words learns to keep the pose apart from the character; this one passes them over.
            (folder / f"{name}.txt").write_text(f"{pose}\n", encoding="utf-8")
    return folder


def requests(run: Options, who: str, strength: float, poses: Sequence[str], seeds: int) -> list[PictureRequest]:
    """Ask for each pose, from a mannequin that stands in it."""
    tag = f" <lora:{HERO}:1>" if who == HERO else ""
    return [
        PictureRequest(
            f"{HERO}, {pose}{tag}", seed=seed, guidance=2.0, steps=run.count(25, 4), strength=strength,
            init=draw_figure(MANNEQUIN, POSES[pose]),
        )
        for pose in poses
        for seed in range(seeds)
    ]  # fmt: skip


def measure(
    by_system: dict[tuple[str, float], dict[str, list[Image.Image]]], poses: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return by system and pose the shares of pictures that show the character, and that show the pose.

    The character: the nearest of six by features, each in all twelve poses. The pose: that of the twelve whose outline
    covers the same part of the picture, by intersection over union; features of photographs tell poses badly.
    """
    gallery = [(who, pose) for who in CHARACTERS for pose in poses]
    known = features([draw_figure(CHARACTERS[who], POSES[pose]) for who, pose in gallery])
    outlines = np.stack([outline(draw_figure(CHARACTERS[HERO], pose)) for pose in POSES.values()])
    figures = {}
    for (who, strength), found in by_system.items():
        wanted = [pose for pose in poses for _ in found[pose]]
        pictures = [picture for pose in poses for picture in found[pose]]
        characters = nearest_labels(features(pictures), known, [name for name, _ in gallery])
        is_it = [near[0] == HERO for near in characters]
        posed = [nearest_pose(picture, outlines) == pose for picture, pose in zip(pictures, wanted, strict=True)]
        figures[f"{who} {strength:g}"] = {
            "character": interval(is_it),
            "pose": interval(posed),
            "by pose": {
                pose: [sum(flags[at] for at, name in enumerate(wanted) if name == pose) for flags in (is_it, posed)]
                for pose in poses
            },
        }
    return figures


def outline(picture: Image.Image) -> Any:
    """Return [64, 64], where the picture is not paper."""
    return np.asarray(picture.convert("L")) < 235


def nearest_pose(picture: Image.Image, outlines: Any) -> str:
    """Return the pose whose outline is most like that of a picture."""
    own = outline(picture)
    shares = (outlines & own).sum(axis=(1, 2)) / (outlines | own).sum(axis=(1, 2))
    return tuple(POSES)[int(shares.argmax())]


def print_table(figures: dict[str, dict[str, Any]]) -> None:
    """Print a line for each pose: in how many pictures it is the character, and in how many the pose."""
    print("character and pose, mean with 95% interval")
    for name, found in figures.items():
        print(f"  {name:10} character {found['character']}  pose {found['pose']}")
    for pose in next(iter(figures.values()))["by pose"]:
        cells = "  ".join(f"{name}: {found['by pose'][pose]}" for name, found in figures.items())
        print(f"  {pose:12}{'' if pose in SHOWN else ' (new)'}  {cells}")


if __name__ == "__main__":
    sys.exit(not main())
