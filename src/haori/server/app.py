"""The one FastAPI app: OpenAI's, vLLM's and the web UI's routes, and the layers that every request passes.

From the outside in: request id, log and last resort (`Front`); who may enter, and how much (`Gate`); routes.
There is no CORS: a web page of another origin cannot read replies.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from starlette.middleware import Middleware

from haori.server import adapters_routes, operations
from haori.server.access import Access
from haori.server.document import correct_document
from haori.server.errors import handle_errors
from haori.server.front import Front
from haori.server.gate import Gate
from haori.server.lifecycle import Service
from haori.server.openai import (
    chat,
    classification,
    completions,
    embeddings,
    files,
    fine_tuned_models,
    fine_tuning,
    fine_tuning_extras,
    image_edits,
    images,
    models,
    responses,
    tokenizing,
    uploads,
    webhooks,
)
from haori.server.sdapi import control, lists
from haori.server.sdapi import drawing as sdapi_drawing
from haori.server.tinker import routes_files, routes_lists, routes_sampling, routes_sessions, routes_training
from haori.server.together import extras as together_extras
from haori.server.together import fine_tunes, uploading

__all__ = ["create_app"]


def create_app(service: Service, access: Access) -> FastAPI:
    """Return the app.

    Args:
        service: What answers requests; it may still be loading.
        access: Who may ask.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.open_streams()
        yield

    app = FastAPI(
        title="Haori",
        description="Text and pictures from a base and any adapter of it, for OpenAI, vLLM and web UI clients.",
        version=version("haori"),
        docs_url=None,  # its pages would be fetched from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        middleware=[
            Middleware(Front, log=service.log),
            Middleware(Gate, access=access, max_body_bytes=service.max_body_bytes),
        ],
    )
    app.state.service = service
    handle_errors(app)
    texts = (chat, responses, completions, embeddings, classification, tokenizing, adapters_routes)
    drawing = (images, image_edits, sdapi_drawing, lists, control)
    chosen = (*(texts if service.has_text else ()), *(drawing if service.drawing is not None else ()))
    if service.jobs is not None:
        chosen += (files, uploads, fine_tuning, fine_tuning_extras, fine_tuned_models, webhooks)
        chosen += (together_extras, fine_tunes, uploading)
    if service.training is not None:
        chosen += (routes_sessions, routes_training, routes_sampling, routes_files, routes_lists)
    for module in (operations, models, *chosen):
        app.include_router(module.router)
    if service.jobs is not None:
        app.include_router(fine_tunes.elsewhere)
    correct_document(app)
    return app
