"""What the web UI's clients list: adapters, bases, samplers, settings."""

from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from haori.images.catalogue import Listing
from haori.images.request import UPSCALERS
from haori.images.samplers import SAMPLERS, SCHEDULES
from haori.server.access import caller_of
from haori.server.errors import ApiError, without_folders
from haori.server.lifecycle import service_of
from haori.server.openai.replying import ERRORS
from haori.server.pictures.body import JsonObject
from haori.server.sdapi.options import check_options, checkpoint, options_of

__all__ = ["router"]

router = APIRouter()

Described = dict[str, Any]


@router.get("/sdapi/v1/loras", responses=ERRORS)
def loras(request: Request) -> list[Described]:
    """List the adapters that prompts may name."""
    caller = caller_of(request)
    listings = service_of(request).pictures.catalogue.listings()
    return [_described(listing) for listing in listings if caller.may_use(listing.name)]


@router.get("/sdapi/v1/lora-preview", responses={**ERRORS, 200: {"content": {"image/*": {}}}}, response_class=Response)
def lora_preview(request: Request, name: str = Query(description="Of the adapter.", max_length=1000)) -> Response:
    """Return the picture that lies beside an adapter's file."""
    caller, catalogue = caller_of(request), service_of(request).pictures.catalogue
    if not caller.may_use(name) or not any(caller.may_use(full) for full in catalogue.names_of(name)):
        message = f"This API key may not use {name[:120]!r}; /v1/models lists what it may use."
        raise ApiError(403, message, code="model_not_allowed", param="name")
    found = catalogue.preview(name)
    return Response(found.content, media_type=found.media_type, headers={"X-Content-Type-Options": "nosniff"})


@router.post("/sdapi/v1/refresh-loras", responses=ERRORS)
async def refresh_loras(request: Request) -> Described:
    """Look for new, changed and deleted files in the mounted folders."""
    scans = await run_in_threadpool(service_of(request).pictures.catalogue.refresh)
    return {
        "files": sum(scan.files for scan in scans), "changed": sum(scan.changed for scan in scans),
        "warnings": [without_folders(problem) for scan in scans for problem in scan.problems],
    }  # fmt: skip


@router.post("/sdapi/v1/refresh-checkpoints", responses=ERRORS)
async def refresh_checkpoints(request: Request) -> Described:
    """Do nothing: a server draws with the base that it was started with."""
    service_of(request).pictures  # noqa: B018 - says that it is loaded
    return {}


@router.get("/sdapi/v1/sd-models", responses=ERRORS)
async def sd_models(request: Request) -> list[Described]:
    """List the one base."""
    return [checkpoint(service_of(request).pictures.base)]


@router.get("/sdapi/v1/options", responses=ERRORS)
async def options(request: Request) -> Described:
    """Show the settings."""
    return options_of(service_of(request).pictures.base)


@router.post("/sdapi/v1/options", responses=ERRORS)
async def set_options(request: Request, given: JsonObject) -> Described:
    """Take settings that are so already, and refuse others."""
    check_options(given, service_of(request).pictures.base)
    return {}


@router.get("/sdapi/v1/samplers", responses=ERRORS)
async def samplers(request: Request) -> list[Described]:
    """List the samplers."""
    own = type(service_of(request).pictures.generator.pipeline.scheduler).__name__
    known = [one for one in SAMPLERS if one.name == "Euler" or not own.startswith("FlowMatch")]
    return [{"name": one.name, "aliases": [one.name.lower()], "options": {}} for one in known]


@router.get("/sdapi/v1/schedulers", responses=ERRORS)
async def schedulers(request: Request) -> list[Described]:
    """List the schedule types."""
    caller_of(request)
    return [
        {"name": name.lower().replace(" ", "_"), "label": name, "aliases": None, "default_rho": -1.0,
         "need_inner_model": False}
        for name in SCHEDULES
    ]  # fmt: skip


@router.get("/sdapi/v1/upscalers", responses=ERRORS)
async def upscalers(request: Request) -> list[Described]:
    """List what enlarges pictures before the second pass."""
    caller_of(request)
    return [
        {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4.0}
        for name in ("None", *UPSCALERS)
    ]


@router.get("/sdapi/v1/scripts", responses=ERRORS)
async def scripts(request: Request) -> Described:
    """Show that there are no scripts."""
    caller_of(request)
    return {"txt2img": [], "img2img": []}


@router.get("/sdapi/v1/embeddings", responses=ERRORS)
async def embeddings(request: Request) -> Described:
    """Show that there are no embeddings of words beside those in adapters."""
    caller_of(request)
    return {"loaded": {}, "skipped": {}}


@router.get("/sdapi/v1/cmd-flags", responses=ERRORS)
async def cmd_flags(request: Request) -> Described:
    """Show how the server was started, as far as clients ask."""
    caller_of(request)
    return {"api": True, "lora_dir": "models/Lora", "lenient": service_of(request).pictures.settings.lenient}


@router.get("/sdapi/v1/sd-vae", responses=ERRORS)
@router.get("/sdapi/v1/latent-upscale-modes", responses=ERRORS)
@router.get("/sdapi/v1/hypernetworks", responses=ERRORS)
@router.get("/sdapi/v1/face-restorers", responses=ERRORS)
@router.get("/sdapi/v1/realesrgan-models", responses=ERRORS)
@router.get("/sdapi/v1/prompt-styles", responses=ERRORS)
@router.get("/sdapi/v1/script-info", responses=ERRORS)
async def nothing(request: Request) -> list[Described]:
    """Show that there is none of these: autoencoders of their own, hypernetworks, face restorers, styles."""
    caller_of(request)
    return []


def _described(listing: Listing) -> Described:
    said = {
        "activation text": listing.activation, "negative text": listing.negative,
        "preferred weight": listing.strength, "description": listing.description, "notes": listing.notes,
        "category": listing.category,
        "preview": f"/sdapi/v1/lora-preview?name={quote(listing.full_name)}" if listing.has_preview else "",
    }  # fmt: skip
    metadata = {**listing.facts, **{key: value for key, value in said.items() if value not in (None, "")}}
    return {"name": listing.name, "alias": listing.alias, "path": listing.path, "metadata": metadata}
