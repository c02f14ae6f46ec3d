"""A product in many scenes: kept to the pixel, drawn anew where it stands, or blended in at rising strength.

`python docs/recipes/product_scenes.py --out FOLDER`; docs/recipes/product-scenes.md explains it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from garment import GARMENTS, PRODUCT, cut_out, photograph
from PIL import Image, ImageFilter
from steps import Options, draw, features, interval, learn, options, write_figures

from haori.images.request import PictureRequest
from haori.metrics.pictures import nearest_labels
from haori.tasks.text_to_image.sheet import SheetRow, draw_sheet

SCENES = (
    "beach with umbrella", "snow capped mountain", "castle", "house", "circus tent", "rainbow", "volcano",
    "christmas tree",
)  # fmt: skip
PLACE = {"scale": 0.6, "shift": (0.0, 0.18)}
BOX = (13, 23, 51, 64)  # what is cut out around the product to judge it
STRENGTHS = (0.1, 0.2, 0.4, 0.8)
INPAINTED = (0.5, 0.9)
GUIDANCE = 3.0


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Learn the product, draw scenes, put it into them in several ways, measure."""
    run = options("product-scenes", arguments)
    learn(
        PRODUCT, write_photographs(run), steps=run.count(90, 1), batch=run.count(16, 2),
        overrides=(f"data.trigger={PRODUCT}", "preset=concept"),
    )  # fmt: skip
    names = SCENES[: run.count(len(SCENES), 2)]
    scenes = draw([request(run, name, seed) for seed, name in enumerate(names)])
    drawn = {"scene": scenes, "pasted": [pasted(scene) for scene in scenes]}
    drawn |= inpainted(run, names, drawn["pasted"])
    drawn |= blended(run, names, drawn["pasted"])
    labels = [name.replace(" + ", "\n+ ").replace(" around", "\naround") for name in drawn]
    rows = [SheetRow(label, pictures) for label, pictures in zip(labels, drawn.values(), strict=True)]
    draw_sheet(rows, names, "a jumper in scenes of emoji-sd").save(run.out / "sheet.png")
    figures = measure(drawn, names)
    print("means with 95% intervals")
    for name, found in figures.items():
        print(f"  {name:24} " + "  ".join(f"{what} {value}" for what, value in found.items()))
    write_figures(run.out, figures)
    return figures


def write_photographs(run: Options) -> Path:
    """Write the product on white at several sizes and places, which captions leave unnamed."""
    folder = run.out / "shown"
    folder.mkdir(exist_ok=True)
    places = [(scale, (x, y)) for scale in (0.9, 0.75, 0.6) for x in (-0.08, 0.0, 0.08) for y in (-0.06, 0.1)]
    for number, (scale, shift) in enumerate(places[: run.count(len(places), 2)]):
        photograph(GARMENTS[PRODUCT], scale=scale, shift=shift).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text("t shirt\n", encoding="utf-8")
    return folder


def request(run: Options, scene: str, seed: int, *, tag: str = "", **more: Any) -> PictureRequest:
    """Ask for a scene."""
    return PictureRequest(f"noto {scene}{tag}", seed=seed, guidance=GUIDANCE, steps=run.count(25, 10), **more)


def pasted(scene: Image.Image) -> Image.Image:
    """Put the product over a scene as it is."""
    found = scene.convert("RGBA")
    found.alpha_composite(cut_out(GARMENTS[PRODUCT], **PLACE))
    return found.convert("RGB")


def inpainted(run: Options, names: Sequence[str], before: Sequence[Image.Image]) -> dict[str, list[Image.Image]]:
    """Draw scenes around the product, which is not touched; and the product anew by its adapter within the scene."""
    around = silhouette().point(lambda value: 255 - value)
    product = photograph(GARMENTS[PRODUCT], **PLACE)
    found = {
        "inpainted around": draw(
            [request(run, name, 100 + seed, init=product, mask=around, strength=1.0) for seed, name in enumerate(names)]
        )
    }
    within = silhouette().filter(ImageFilter.MaxFilter(5))
    prompt = f"{PRODUCT}, t shirt <lora:{PRODUCT}:1>"
    for strength in INPAINTED:
        found[f"inpainted {strength:g} + adapter"] = draw(
            [
                PictureRequest(
                    prompt,
                    seed=300 + seed,
                    guidance=GUIDANCE,
                    steps=run.count(25, 10),
                    init=picture,
                    mask=within,
                    strength=strength,
                )
                for seed, picture in enumerate(before)
            ]
        )
    return found


def silhouette() -> Image.Image:
    """Return where the product stands, white on black."""
    return cut_out(GARMENTS[PRODUCT], **PLACE).getchannel("A").point(lambda value: 255 if value > 127 else 0)


def blended(run: Options, names: Sequence[str], before: Sequence[Image.Image]) -> dict[str, list[Image.Image]]:
    """Draw the pasted pictures anew by a share, without and with the product's adapter."""
    found = {}
    for label, tag in (("", ""), (" + adapter", f", {PRODUCT} <lora:{PRODUCT}:0.7>")):
        for strength in STRENGTHS:
            found[f"img2img {strength:g}{label}"] = draw(
                [
                    request(run, name, 200 + seed, tag=tag, init=picture, strength=strength)
                    for seed, (name, picture) in enumerate(zip(names, before, strict=True))
                ]
            )
    return found


def measure(drawn: dict[str, list[Image.Image]], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return for each way how well the product is kept, and how often the scene is the one asked for.

    The product: the share of pictures in which it is the nearest of six garments, and the mean cosine with it, by what
    lies within its silhouette. All six have the same, so cloth, stripe and star decide. The scene: the nearest, by the
    part above the product, of the scenes without it.
    """
    garments = features([alone(photograph(found, **PLACE)) for found in GARMENTS.values()])
    upper = (0, 0, 64, BOX[1])
    scenes = features([picture.crop(upper) for picture in drawn["scene"]])
    figures = {}
    for way, pictures in drawn.items():
        seen = features([alone(picture) for picture in pictures])
        nearest = nearest_labels(seen, garments, tuple(GARMENTS))
        where = nearest_labels(features([picture.crop(upper) for picture in pictures]), scenes, names)
        figures[way] = {
            "kept": interval([near[0] == PRODUCT for near in nearest]),
            "likeness": interval(cosine(seen, garments[0])),
            "scene": interval([near[0] == name for near, name in zip(where, names, strict=True)]),
            "pixels changed": round(changed(pictures), 1),
        }
    return figures


def alone(picture: Image.Image) -> Image.Image:
    """Return what lies within the product's silhouette, on white."""
    found = Image.new("RGB", picture.size, "white")
    found.paste(picture, mask=silhouette())
    return found.crop(BOX)


def cosine(rows: Any, one: Any) -> Any:
    """Return [n] cosines."""
    return rows @ one / (np.linalg.norm(rows, axis=1) * np.linalg.norm(one))


def changed(pictures: Sequence[Image.Image]) -> float:
    """Return the mean difference from the product's own pixels, of 255, where it covers the picture whole."""
    product = cut_out(GARMENTS[PRODUCT], **PLACE)
    inside = np.asarray(product.getchannel("A").filter(ImageFilter.MinFilter(3))) == 255
    own = np.asarray(product.convert("RGB"), dtype=np.float64)[inside]
    return float(np.mean([np.abs(np.asarray(picture, dtype=np.float64)[inside] - own).mean() for picture in pictures]))


if __name__ == "__main__":
    sys.exit(not main())
