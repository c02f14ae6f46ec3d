"""`DELETE /v1/models/{model}`: a fine-tuned model is taken away, with its adapter."""

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from haori.jobs.model_names import PREFIX
from haori.server.access import caller_of
from haori.server.errors import ApiError
from haori.server.lifecycle import jobs_of
from haori.server.openai.replying import ERRORS

__all__ = ["router"]

router = APIRouter()


class DeletedModel(BaseModel):
    """That a model is gone."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


@router.delete("/v1/models/{model:path}", responses=ERRORS)
def delete_model(model: str, request: Request) -> DeletedModel:
    """Delete a fine-tuned model, or a checkpoint; answers that are being written are finished."""
    caller = caller_of(request)
    caller.need("train")
    if not model.startswith(PREFIX):
        message = f"{model[:120]!r} is no fine-tuned model; adapters are removed with `haori library remove`."
        raise ApiError(404, message, code="model_not_found", param="model")
    jobs_of(request).names.delete(model, caller.seen_account)
    return DeletedModel(id=model)
