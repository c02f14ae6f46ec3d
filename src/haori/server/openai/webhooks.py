"""`/v1/webhook_endpoints`: who is told when a job ends."""

import secrets
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from haori.core.errors import DownloadError, InputError
from haori.jobs.webhooks.sending import send
from haori.jobs.webhooks.store import EVENT_TYPES, Webhook
from haori.server.access import caller_of
from haori.server.errors import ApiError
from haori.server.lifecycle import jobs_of
from haori.server.openai.replying import ERRORS
from haori.server.openai.request_fields import RequestPart

__all__ = ["router"]

router = APIRouter()


class CreateWebhook(RequestPart):
    """An endpoint to make."""

    name: str = Field(min_length=1, max_length=100)
    url: str = Field(max_length=2048)
    event_types: list[str]


class ChangeWebhook(RequestPart):
    """What is to be changed."""

    name: str | None = Field(default=None, min_length=1, max_length=100)
    url: str | None = Field(default=None, max_length=2048)
    event_types: list[str] | None = None


class RotateSecret(RequestPart):
    """How a secret is replaced."""

    keep_old_secret_active_for_24_hours: bool = False


class TestWebhook(RequestPart):
    """What an endpoint is to be told as a test."""

    event_type: str


class WebhookObject(BaseModel):
    """An endpoint; its secret is shown once."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str


class WebhookWithSecret(WebhookObject):
    """An endpoint with its new secret."""

    signing_secret: str


class WebhookList(BaseModel):
    """A page of endpoints."""

    object: Literal["list"] = "list"
    data: list[WebhookObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedWebhook(BaseModel):
    """That an endpoint is gone."""

    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: Literal[True] = True


class TestResult(BaseModel):
    """What an endpoint replied to a test."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    event_type: str
    status_code: int
    success: Literal[True] = True
    webhook_endpoint_id: str


class EventTypes(BaseModel):
    """What can be told."""

    object: Literal["list"] = "list"
    data: list[str]


@router.get("/v1/webhook_event_types", responses=ERRORS)
def list_event_types(request: Request) -> EventTypes:
    """List what can be told."""
    caller_of(request).need("train")
    return EventTypes(data=list(EVENT_TYPES))


@router.post("/v1/webhook_endpoints", responses=ERRORS)
def create_webhook(asked: CreateWebhook, request: Request) -> WebhookWithSecret:
    """Make an endpoint; its secret is in this reply and in no other."""
    caller = caller_of(request)
    return _with_secret(jobs_of(request).webhooks.create(caller.account, asked.name, asked.url, asked.event_types))


@router.get("/v1/webhook_endpoints", responses=ERRORS)
def list_webhooks(
    request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> WebhookList:
    """List the endpoints of the account, the newest first."""
    found = list(jobs_of(request).webhooks.list(caller_of(request).account))
    if after is not None:
        places = [place for place, webhook in enumerate(found) if webhook.id == after]
        if not places:
            raise InputError(f"'after' cannot be {after[:80]!r}: there is no such endpoint.")
        found = found[places[0] + 1 :]
    page = [WebhookObject(**_fields(webhook)) for webhook in found[:limit]]
    ends = (page[0].id, page[-1].id) if page else (None, None)
    return WebhookList(data=page, has_more=len(found) > limit, first_id=ends[0], last_id=ends[1])


@router.get("/v1/webhook_endpoints/{webhook_id}", responses=ERRORS)
def show_webhook(webhook_id: str, request: Request) -> WebhookObject:
    """Show one endpoint."""
    return WebhookObject(**_fields(jobs_of(request).webhooks.find(webhook_id, caller_of(request).account)))


@router.post("/v1/webhook_endpoints/{webhook_id}", responses=ERRORS)
def change_webhook(webhook_id: str, asked: ChangeWebhook, request: Request) -> WebhookObject:
    """Change an endpoint."""
    changed = jobs_of(request).webhooks.change(
        webhook_id, caller_of(request).account, name=asked.name, url=asked.url, event_types=asked.event_types
    )
    return WebhookObject(**_fields(changed))


@router.delete("/v1/webhook_endpoints/{webhook_id}", responses=ERRORS)
def delete_webhook(webhook_id: str, request: Request) -> DeletedWebhook:
    """Delete an endpoint."""
    jobs_of(request).webhooks.delete(webhook_id, caller_of(request).account)
    return DeletedWebhook(id=webhook_id)


@router.post("/v1/webhook_endpoints/{webhook_id}/rotate_secret", responses=ERRORS)
def rotate_secret(webhook_id: str, request: Request, asked: RotateSecret | None = None) -> WebhookWithSecret:
    """Give an endpoint a new secret."""
    keep = asked is not None and asked.keep_old_secret_active_for_24_hours
    return _with_secret(jobs_of(request).webhooks.rotate(webhook_id, caller_of(request).account, keep_old=keep))


@router.post("/v1/webhook_endpoints/{webhook_id}/test", responses=ERRORS)
def test_webhook(webhook_id: str, asked: TestWebhook, request: Request) -> TestResult:
    """Send an event that says it is a test, once, and tell what came back."""
    webhook = jobs_of(request).webhooks.find(webhook_id, caller_of(request).account)
    if asked.event_type not in EVENT_TYPES:
        raise InputError(f"'event_type' cannot be {asked.event_type[:80]!r}; allowed are {', '.join(EVENT_TYPES)}.")
    identity = f"evt_{secrets.token_hex(12)}"
    event = {"id": identity, "object": "event", "created_at": int(time.time()), "type": asked.event_type,
             "data": {"id": "ftjob-test"}}  # fmt: skip
    try:
        status = send(webhook.url, webhook.signing, identity, event)
    except DownloadError as error:
        raise ApiError(400, f"The endpoint could not be told: {error}", code="webhook_unreachable") from None
    return TestResult(event_type=asked.event_type, status_code=status, webhook_endpoint_id=webhook.id)


def _fields(webhook: Webhook) -> dict[str, Any]:
    return {
        "id": webhook.id, "created_at": int(webhook.created), "name": webhook.name or "", "url": webhook.url,
        "event_types": list(webhook.event_types), "signing_secret_hint": webhook.secret[-4:],
    }  # fmt: skip


def _with_secret(webhook: Webhook) -> WebhookWithSecret:
    return WebhookWithSecret(**_fields(webhook), signing_secret=webhook.secret)
