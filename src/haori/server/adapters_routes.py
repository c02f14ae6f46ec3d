"""vLLM's routes for loading and unloading adapters while the server runs, for admins."""

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response

from haori.core.errors import InputError, LibraryError
from haori.server.access import caller_of
from haori.server.errors import ApiError, without_folders
from haori.server.lifecycle import service_of
from haori.server.openai.replying import ERRORS
from haori.server.openai.request_fields import RequestPart
from haori.server.request_note import note_of

__all__ = ["router"]

router = APIRouter()

_SENTENCE = {"description": "A sentence.", "content": {"text/plain": {"schema": {"type": "string"}}}}


class LoadRequest(RequestPart):
    """An adapter to serve."""

    lora_name: str = Field(min_length=1, max_length=100, description="Name to ask for it by.")
    lora_path: str = Field(
        min_length=1, max_length=4096, description="Name in the library, or a folder inside an --adapter-root."
    )
    load_inplace: bool = Field(default=False, description="Replace an adapter that was loaded under this name.")


class UnloadRequest(RequestPart):
    """An adapter to serve no longer."""

    lora_name: str = Field(min_length=1, max_length=100)
    lora_int_id: int | None = Field(default=None, description="Taken, without effect.")


@router.post("/v1/load_lora_adapter", responses={**ERRORS, 200: _SENTENCE})
async def load_adapter(asked: LoadRequest, request: Request) -> Response:
    """Give an adapter a name."""
    caller_of(request)
    backend = service_of(request).backend
    note_of(request.scope).model = asked.lora_name
    try:
        await run_in_threadpool(
            backend.directory.register, asked.lora_name, asked.lora_path, backend.engine.check_adapter,
            replace=asked.load_inplace,
        )  # fmt: skip
    except LibraryError as error:
        raise ApiError(404, str(error), param="lora_path", code="adapter_not_found") from None
    except InputError as error:
        raise ApiError(400, without_folders(str(error)), param="lora_path", code="adapter_refused") from None
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", responses={**ERRORS, 200: _SENTENCE})
async def unload_adapter(asked: UnloadRequest, request: Request) -> Response:
    """Take the name of a loaded adapter away; requests that run keep it."""
    caller_of(request)
    directory = service_of(request).backend.directory
    note_of(request.scope).model = asked.lora_name
    try:
        await run_in_threadpool(directory.unregister, asked.lora_name)
    except LibraryError as error:
        raise ApiError(404, str(error), param="lora_name", code="adapter_not_found") from None
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")
