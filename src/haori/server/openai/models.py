"""`/v1/models`: the bases, the adapters, and whose child each is."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime

from fastapi import APIRouter, Request

from haori.server.access import Caller, caller_of
from haori.server.contracts import ModelEntry
from haori.server.errors import ApiError
from haori.server.lifecycle import Service, service_of
from haori.server.openai.replies import ModelCard, ModelList
from haori.server.openai.replying import ERRORS
from haori.server.owned_models import OwnedDirectory

__all__ = ["router"]

router = APIRouter()


@router.get("/v1/models", responses=ERRORS)
def list_models(request: Request) -> ModelList:
    """List what the caller may use."""
    caller, service = caller_of(request), service_of(request)
    texts = [_card(entry, caller) for entry in _entries(service, caller)] if service.has_text else []
    cards = [*texts, *_picture_cards(service)]
    return ModelList(data=[card for card in cards if caller.may_use(card.id)])


@router.get("/v1/models/{model:path}", responses=ERRORS)
def show_model(model: str, request: Request) -> ModelCard:
    """Show one model."""
    caller, service = caller_of(request), service_of(request)
    if service.drawing is not None and caller.may_use(model):
        for card in _picture_cards(service):
            if card.id == model:
                return card
    if not service.has_text:
        message = f"There is no model {model[:120]!r}; /v1/models lists what can be asked for."
        raise ApiError(404, message, code="model_not_found", param="model")
    backend = service.backend
    caller.check(model, backend.engine.base.name)
    entry = next((entry for entry in _entries(service, caller) if entry.id == model), None)
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


def _entries(service: Service, caller: Caller) -> Sequence[ModelEntry]:
    directory = service.backend.directory
    return directory.entries_of(caller.seen_account) if isinstance(directory, OwnedDirectory) else directory.entries()


def _card(entry: ModelEntry, caller: Caller) -> ModelCard:
    root = str(entry.root) if caller.admin and entry.root is not None else None
    return ModelCard(id=entry.id, created=int(entry.created_unix_s), root=root, parent=entry.parent)


def _picture_cards(service: Service) -> Iterator[ModelCard]:
    if service.drawing is None:
        return
    pictures = service.pictures
    base = pictures.base.name
    yield ModelCard(id=base, created=pictures.created_unix_s, root=None, parent=None)
    for listing in pictures.catalogue.listings():
        created = pictures.created_unix_s
        with suppress(ValueError):
            created = int(datetime.fromisoformat(listing.created).timestamp())
        yield ModelCard(id=listing.name, created=created, root=None, parent=base)
