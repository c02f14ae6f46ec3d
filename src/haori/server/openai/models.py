"""`/v1/models`: the base, the adapters, and whose child each is."""

from fastapi import APIRouter, Request

from haori.server.access import Caller, caller_of
from haori.server.contracts import ModelEntry
from haori.server.errors import ApiError
from haori.server.lifecycle import service_of
from haori.server.openai.replies import ModelCard, ModelList
from haori.server.openai.replying import ERRORS

__all__ = ["router"]

router = APIRouter()


@router.get("/v1/models", responses=ERRORS)
def list_models(request: Request) -> ModelList:
    """List what the caller may use."""
    caller = caller_of(request)
    entries = service_of(request).backend.directory.entries()
    return ModelList(data=[_card(entry, caller) for entry in entries if caller.may_use(entry.id)])


@router.get("/v1/models/{model:path}", responses=ERRORS)
def show_model(model: str, request: Request) -> ModelCard:
    """Show one model."""
    caller = caller_of(request)
    backend = service_of(request).backend
    caller.check(model, backend.engine.base.name)
    entry = next((entry for entry in backend.directory.entries() if entry.id == model), None)
    if entry is None:
        # Explains what is wrong with the name, unless it is a blend or digits of an id.
        caller.resolve(backend.directory, model, backend.engine.base.name)
        raise ApiError(
            404, f"{model[:120]!r} can be asked for, but is no entry of /v1/models.", code="model_not_found",
            param="model",
        )  # fmt: skip
    card = _card(entry, caller)
    labels = None if backend.embedder is None else backend.embedder.labels(entry.adapter)
    return card if labels is None else card.model_copy(update={"labels": list(labels)})


def _card(entry: ModelEntry, caller: Caller) -> ModelCard:
    root = str(entry.root) if caller.admin and entry.root is not None else None
    return ModelCard(id=entry.id, created=int(entry.created_unix_s), root=root, parent=entry.parent)
