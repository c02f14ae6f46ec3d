"""`/health`, `/version` and `/metrics`, for those who run the server."""

from importlib.metadata import version
from typing import Literal

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.responses import Response

from haori.server.access import caller_of
from haori.server.errors import ErrorReply
from haori.server.lifecycle import service_of
from haori.server.openai.replying import ERRORS

__all__ = ["router"]

router = APIRouter()

# The two probes run on the event loop: they must answer also when every thread for requests is busy.


class Health(BaseModel):
    """That the server answers requests."""

    status: Literal["ready"] = "ready"


class Version(BaseModel):
    """Which Haori this is."""

    version: str


@router.get(
    "/health", responses={503: {"model": ErrorReply, "description": "Loading, about to end, or unable to go on."}}
)
async def health(request: Request) -> Health:
    """Say whether requests are answered."""
    service_of(request).check_health()
    return Health()


@router.get("/version")
async def show_version() -> Version:
    """Say which version this is."""
    return Version(version=version("haori"))


@router.get("/metrics", response_class=Response, responses=ERRORS)
def metrics(request: Request) -> Response:
    """Return the figures in Prometheus' text format."""
    caller_of(request)
    return Response(generate_latest(service_of(request).meters.registry), media_type=CONTENT_TYPE_LATEST)
