"""`/sdapi/v1/txt2img` and `/sdapi/v1/img2img`."""

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request

from haori.images.infotext import read_infotext
from haori.images.request import PictureRequest
from haori.server.lifecycle import service_of
from haori.server.openai.replying import ERRORS
from haori.server.pictures.backend import PictureBackend
from haori.server.pictures.body import JsonObject, Read, read_body
from haori.server.pictures.drawing import Drawn, Order, draw
from haori.server.sdapi.fields import Img2ImgFields, SharedFields, Txt2ImgFields
from haori.server.sdapi.masking import begin
from haori.server.sdapi.options import check_options

__all__ = ["router"]

router = APIRouter()

_SEEDS = 1 << 32
_PICTURES = ("init_images", "mask")


@router.post("/sdapi/v1/txt2img", responses=ERRORS)
async def txt2img(request: Request, given: JsonObject) -> dict[str, Any]:
    """Draw pictures from text."""
    lenient = _is_lenient(request, given)
    asked, read = read_body(Txt2ImgFields, given, lenient=lenient)
    seed = _seed(asked)

    def prepare(pictures: PictureBackend) -> Order:
        settings = {**_shared(asked, seed, pictures, lenient=lenient), "hires": asked.hires()}
        return Order(_rounds(asked, settings), _warnings(asked, read))

    drawn = await draw(request, prepare)
    return _reply(asked, drawn, request)


@router.post("/sdapi/v1/img2img", responses=ERRORS)
async def img2img(request: Request, given: JsonObject) -> dict[str, Any]:
    """Draw pictures from a picture, or within a mask."""
    lenient = _is_lenient(request, given)
    asked, read = read_body(Img2ImgFields, given, lenient=lenient)
    seed = _seed(asked)

    def prepare(pictures: PictureBackend) -> Order:
        settings = {**_shared(asked, seed, pictures, lenient=lenient), "strength": asked.denoising_strength}
        first = begin(asked, pictures.generator.family.native_size)
        return Order(_rounds(asked, {**settings, **first.settings}), _warnings(asked, read), first.finish)

    drawn = await draw(request, prepare)
    return _reply(asked, drawn, request)


def _is_lenient(request: Request, given: Mapping[str, Any]) -> bool:
    """Say whether what cannot be used is left out: by the request, or else as the server was started."""
    overrides = given.get("override_settings")
    nested = overrides.get("strict") if isinstance(overrides, dict) else None
    for strict in (given.get("strict"), nested):
        if isinstance(strict, bool):
            return not strict
    return service_of(request).pictures.settings.lenient


def _seed(asked: SharedFields) -> int:
    return secrets.randbelow(_SEEDS) if asked.seed == -1 else asked.seed


def _shared(asked: SharedFields, seed: int, pictures: PictureBackend, *, lenient: bool) -> dict[str, Any]:
    check_options({key: value for key, value in asked.override_settings.items() if key != "strict"}, pictures.base)
    return {**asked.settings(seed), "lenient": lenient}


def _rounds(asked: SharedFields, settings: Mapping[str, Any]) -> tuple[tuple[PictureRequest, ...], ...]:
    first = PictureRequest(**{**settings, "count": asked.batch_size})
    others = (settings["seed"] + at * asked.batch_size for at in range(1, asked.n_iter))
    return ((first,), *((PictureRequest(**{**settings, "count": asked.batch_size, "seed": seed}),) for seed in others))


def _warnings(asked: SharedFields, read: Read) -> Sequence[str]:
    warning = asked.eta_warning()
    return [*read.warnings, *([] if warning is None else [warning])]


def _reply(asked: SharedFields, drawn: Drawn, request: Request) -> dict[str, Any]:
    shown = isinstance(asked, Img2ImgFields) and asked.include_init_images
    echo = {key: value if shown or key not in _PICTURES else None for key, value in asked.model_dump().items()}
    images = list(drawn.files) if asked.send_images else []
    return {"images": images, "parameters": echo, "info": json.dumps(_info(asked, drawn, request))}


def _info(asked: SharedFields, drawn: Drawn, request: Request) -> dict[str, Any]:
    """Return what the web UI says of pictures, and our warnings beside it."""
    texts = [picture.infotext for picture in drawn.pictures]
    settings = dict(read_infotext(texts[0]).settings)
    base = service_of(request).drawing  # what draws may be draining by now
    assert base is not None
    seeds = [picture.seed for picture in drawn.pictures]
    size = drawn.pictures[0].image.size
    common = {
        "Steps", "Sampler", "CFG scale", "Seed", "Size", "Model hash", "Model", "Denoising strength", "Version",
        "Batch size", "Batch pos",
    }  # fmt: skip
    return {
        "prompt": asked.prompt, "all_prompts": [asked.prompt] * len(seeds),
        "negative_prompt": asked.negative_prompt, "all_negative_prompts": [asked.negative_prompt] * len(seeds),
        "seed": seeds[0], "all_seeds": seeds, "subseed": seeds[0], "all_subseeds": seeds, "subseed_strength": 0,
        "width": size[0], "height": size[1], "sampler_name": settings["Sampler"],
        "cfg_scale": float(settings["CFG scale"]), "steps": int(settings["Steps"]), "batch_size": asked.batch_size,
        "restore_faces": False, "face_restoration_model": None, "sd_model_name": base.name,
        "sd_model_hash": base.id[:10], "sd_vae_name": None, "sd_vae_hash": None, "seed_resize_from_w": -1,
        "seed_resize_from_h": -1, "denoising_strength": _number(settings.get("Denoising strength")),
        "extra_generation_params": {key: value for key, value in settings.items() if key not in common},
        "index_of_first_image": 0, "infotexts": texts, "styles": [], "job_timestamp": "", "clip_skip": 1,
        "is_using_inpainting_conditioning": False, "version": "haori", "warnings": list(drawn.warnings),
        "interrupted": drawn.interrupted,
    }  # fmt: skip


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)
