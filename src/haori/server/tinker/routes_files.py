"""The training API's addresses for files of weights: copies, and downloads by addresses that are signed for an hour.

A signed address needs no key, as clients fetch it by a plain request: whoever has it has the file, until it expires or
the server ends, which forgets its secret.
"""

import hashlib
import hmac
import secrets
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse

from haori.jobs.missing import MissingError
from haori.jobs.sessions.copying import copy_weights
from haori.jobs.sessions.paths import CheckpointPath
from haori.server.access import SIGNED_PATHS, caller_of
from haori.server.errors import ApiError
from haori.server.tinker.fields import CopyWeights
from haori.server.tinker.serving import claim_key, key_of, training_of

__all__ = ["router"]

router = APIRouter(prefix="/api/v1", tags=["training"])

_SESSION = "session.json"
_FOR_S = 3600.0
_SECRET = secrets.token_bytes(32)


@router.post("/copy_weights")
def copy(asked: CopyWeights, request: Request) -> dict[str, str]:
    """Copy a checkpoint of the caller, or a published one, into a run of its own."""
    service, caller = training_of(request), caller_of(request)
    caller.need_training_of(service.base.name)
    if asked.weights_access_token is not None or "x-tinker-weights-access-token" in request.headers:
        raise ApiError(
            400, "There are no access tokens of weights here; let the owner publish the checkpoint, and copy it then.",
            param="weights_access_token", code="unsupported_field",
        )  # fmt: skip
    if (asked.session_id is None) != (asked.model_seq_id is None):
        raise ApiError(400, "Give both session_id and model_seq_id of the copy, or neither.", param="session_id")
    source = CheckpointPath.parse(asked.source_path)
    service.shelf.find(source, caller.account)
    claim_key(request, asked)
    session = asked.session_id
    if session is None:
        key = key_of(request)
        session = service.clients.open(
            caller.account, user_metadata={"given": None, "display_name": f"copy of {source}",
            "project": asked.destination_project_id}, request_key=None if key is None else f"copy_weights {key}",
        )  # fmt: skip
    service.clients.find(session, caller.account)
    made = copy_weights(service, caller.account, source, session, asked.model_seq_id or 0, asked.ttl_seconds)
    return {"tinker_path": str(made)}


@router.get("/training_runs/{run}/checkpoints/external_weights/{name}/external_weights_urls")
def external_weights_urls(run: str, name: str, request: Request) -> dict[str, Any]:
    """Return an address for each file of exported weights, from which anyone can fetch it for an hour."""
    service, caller = training_of(request), caller_of(request)
    caller.need("train")
    path = CheckpointPath.parse(f"tinker://{run}/external_weights/{name}")
    row = service.shelf.find(path, caller.account)
    expires = int(min(time.time() + _FOR_S, row.expires or float("inf")))
    at = f"{str(request.base_url).rstrip('/')}{SIGNED_PATHS}{quote(run)}/{quote(name)}"
    urls = {
        file: f"{at}/{quote(file)}?expires={expires}&signature={_signature(path, file, expires)}"
        for file in _files(service.shelf.folder(path))
    }
    return {"urls": urls, "expires": datetime.fromtimestamp(expires, UTC).isoformat()}


@router.get(f"{SIGNED_PATHS.removeprefix('/api/v1')}{{run}}/{{name}}/{{file:path}}")
def external_weights(
    run: str, name: str, file: str, request: Request, expires: int = 0, signature: str = ""
) -> FileResponse:
    """Send a file of exported weights to whoever has its signed address."""
    path = CheckpointPath.parse(f"tinker://{run}/external_weights/{name}")
    signed = hmac.compare_digest(_signature(path, file, expires).encode(), signature.encode())
    if not signed or expires < time.time():
        raise ApiError(
            403, "This address of a file has expired, or was changed, or is of a server that has ended; ask for new "
            "ones with get_external_weights_urls.", code="expired",
        )  # fmt: skip
    found = _files(training_of(request).shelf.folder(path)).get(file)
    if found is None:
        raise MissingError(f"There is no file {file[:200]!r} of {path} any more.")
    return FileResponse(found, media_type="application/octet-stream")


def _files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by their names in it, as they are listed and never as a client names them.

    What the run and its client are is no part of the weights, and is not given to whoever has an address.
    """
    found = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != _SESSION)
    return {file.relative_to(folder).as_posix(): file for file in found}


def _signature(path: CheckpointPath, file: str, expires: int) -> str:
    return hmac.new(_SECRET, f"{path}\n{file}\n{expires}".encode(), hashlib.sha256).hexdigest()
