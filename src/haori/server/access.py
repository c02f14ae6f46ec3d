"""Who sends a request, and what they may use: keys, scopes, and the Host header of a server without keys.

A server with keys asks for one on every address, also on loopback: a reverse proxy may stand in front. A server
without keys must be bound to loopback, and then refuses Host headers of other names, because a web page can point a
name of its own at 127.0.0.1 (DNS rebinding). A server that has required keys requires them until its process ends.
"""

import base64
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request

from haori.core.errors import InputError, LibraryDamagedError, LibraryError, MismatchError
from haori.jobs.model_names import PREFIX, ModelMissingError
from haori.jobs.quotas import Quotas as JobQuotas
from haori.serve.adapters.blend import parse_blend
from haori.server.contracts import Directory, Resolved
from haori.server.errors import ApiError
from haori.server.keys import ApiKey, KeyStore, Scope
from haori.server.owned_models import OwnedDirectory, name_and_strength

__all__ = ["SIGNED_CONTENT", "SIGNED_PATHS", "Access", "Caller", "caller_of", "is_loopback", "part_names"]

SIGNED_CONTENT = re.compile(r"/v1/uploads/upload_[0-9a-f]{24}/content")
"""Addresses that are asked with a secret of their own in place of a key, which their route looks at."""

SIGNED_PATHS = "/api/v1/external_weights/"  # the address itself says that its holder may
_OPEN_PATHS = frozenset({"/health", "/version", "/openapi.json"})
_TRAINING_API = "/api/v1/"
_TRAIN_PATHS = ("/v1/files", "/v1/uploads", "/v1/fine_tuning", "/v1/fine-tunes", "/v1/finetune",
                "/v1/webhook_endpoints", "/v1/webhook_event_types", _TRAINING_API)  # fmt: skip
_GUARDED_PATHS = ("/sdapi/", "/v1/images/", *_TRAIN_PATHS)
_ANY_SCOPE_PATHS = ("/v1/models", _TRAINING_API)  # what is asked for there says which scope it needs
_LOCAL = "local"
_PURPOSES: dict[Scope, str] = {"infer": "answers", "train": "training"}
_ADMIN_PATHS = frozenset({"/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"})


@dataclass(frozen=True)
class Caller:
    """Who sends a request. Without a key it is someone on this machine, who may use everything."""

    key: ApiKey | None
    admin: bool

    @property
    def owner(self) -> str:
        """The owner of its requests, for fair turns and the prefix cache: the key's hash, empty without keys."""
        return "" if self.key is None else self.key.hash

    @property
    def account(self) -> str:
        """Who owns the files, jobs and adapters that it makes; `local` for someone on this machine without a key."""
        return _LOCAL if self.key is None else self.key.account

    def need(self, scope: Scope) -> None:
        """Refuse a key that is not for this.

        Raises:
            ApiError: It is not (403).
        """
        if self.key is not None and scope not in self.key.scopes:
            message = (
                f"The API key {self.key.name!r} is not for {_PURPOSES[scope]}; make one with `haori keys create NAME "
                f"--scopes {scope}`."
            )
            raise ApiError(403, message, code="scope_required")

    def need_training_of(self, base: str) -> None:
        """Refuse a key that may not train a base.

        Raises:
            ApiError: It may not (403).
        """
        self.need("train")
        if self.key is not None and not self.key.trains(base):
            allowed = ", ".join(self.key.bases)
            message = f"The API key {self.key.name!r} may not train {base[:120]!r}; it may train {allowed}."
            raise ApiError(403, message, code="base_not_allowed", param="model")

    @property
    def quotas(self) -> JobQuotas:
        """Return what its account may have of jobs and files."""
        if self.key is None:
            return JobQuotas()
        key = self.key
        return JobQuotas(key.max_jobs, key.max_job_rows, key.max_job_tokens, key.max_file_bytes)

    def may_use(self, name: str) -> bool:
        """Say whether they may use one name: the base's, an adapter's, or one with a version."""
        return self.key is None or self.key.allows(name)

    def check(self, model: str, base: str) -> None:
        """Check every part of a model name, before anything is looked up.

        Raises:
            ApiError: A part is not allowed (403). Whether it exists is not told.
            InputError: It is no name.
        """
        for name in part_names(model, base) if self.key is not None else ():
            if not self.may_use(name):
                raise self._refusal(name)

    def resolve(self, directory: Directory, model: str, base: str) -> Resolved:
        """Say what a model name means, if they may use every adapter in it.

        A part must be allowed as it was asked for, and the adapter that it means by one of its own names: digits of an
        id could stand for any adapter, and a bare name for any version.

        Raises:
            ApiError: They may not use it (403), or it means nothing (404).
            HaoriError: The directory refuses it.
        """
        self.check(model, base)
        owned = directory if isinstance(directory, OwnedDirectory) else None
        try:
            resolved = directory.resolve(model if owned is None else owned.translated(model, self.seen_account))
        except ModelMissingError as error:
            raise ApiError(404, str(error), code="model_not_found", param="model") from None
        except (LibraryError, MismatchError) as error:
            if self.key is None or "*" in self.key.adapters or isinstance(error, LibraryDamagedError):
                raise
            raise _hidden(model) from error  # the sentence may name adapters that are hidden from this key
        if owned is not None:
            self._check_owners(owned, resolved, model)
        for names in resolved.full_names:
            mine = () if owned is None else self._own_names(owned, names)
            if not any(self.may_use(name) for name in (*names, *mine)):
                raise self._refusal(model)
        return resolved

    @property
    def seen_account(self) -> str | None:
        """The account whose models, files and jobs it sees; None for those of all, as an admin does."""
        return None if self.admin else self.account

    def _check_owners(self, owned: OwnedDirectory, resolved: Resolved, model: str) -> None:
        """Refuse an adapter that belongs to another account."""
        for rows in owned.claims(resolved):
            if rows and not any(self.admin or row.owner == self.account for row in rows):
                raise _hidden(model)

    def _own_names(self, owned: OwnedDirectory, full_names: Sequence[str]) -> Sequence[str]:
        """Return the account's own names of one adapter, given those that it has in the library."""
        return [row.name for row in owned.claims_of(full_names) if self.admin or row.owner == self.account]

    def _refusal(self, name: str) -> ApiError:
        assert self.key is not None
        message = f"The API key {self.key.name!r} may not use {name[:120]!r}; /v1/models lists what it may use."
        return ApiError(403, message, code="model_not_allowed", param="model")


class Access:
    """The rule of one server: keys always, or none on loopback while none has been made."""

    def __init__(self, keys: KeyStore, host: str) -> None:
        self._keys = keys
        self._host = host
        self._needs_key = not is_loopback(host) or bool(keys.list())
        if self._needs_key and not any(not key.expired for key in keys.list()):
            raise InputError(
                f"There is no API key that is valid, and {host!r} can be reached from other machines: make one with "
                "`haori keys create NAME`, or serve on 127.0.0.1."
                if not is_loopback(host)
                else "Every API key has expired: make one with `haori keys create NAME`, or revoke them all."
            )

    @property
    def needs_key(self) -> bool:
        """Say whether a key is asked for."""
        self._needs_key = self._needs_key or bool(self._keys.list())
        return self._needs_key

    def admit(self, path: str, headers: Headers, client: str | None) -> Caller | None:
        """Return who asks, or None where anybody may.

        Raises:
            ApiError: No key, a wrong one, or one that is not enough; or a Host header of another name.
            StorageError: The keys cannot be read.
        """
        if not self.needs_key:
            self._check_host(headers.get("host", ""))
            if path.startswith(_GUARDED_PATHS):
                _check_origin(headers)
            return Caller(None, admin=client is not None and is_loopback(client))
        if path in _OPEN_PATHS or path.startswith(SIGNED_PATHS) or SIGNED_CONTENT.fullmatch(path):
            return None
        key = self._key_of(headers)
        if path in _ADMIN_PATHS and not key.admin:
            message = f"The API key {key.name!r} is not an admin's; make one with `haori keys create NAME --admin`."
            raise ApiError(403, message, code="admin_key_required")
        caller = Caller(key, admin=key.admin)
        if path not in _ADMIN_PATHS and not path.startswith(_ANY_SCOPE_PATHS):
            caller.need("train" if path.startswith(_TRAIN_PATHS) else "infer")
        return caller

    def _key_of(self, headers: Headers) -> ApiKey:
        given = headers.get("authorization") or f"Bearer {headers.get('x-api-key', '')}"
        kind, _, secret = given.partition(" ")
        if kind.lower() == "basic":  # as the web UI's clients send it: any name, and the key as password
            secret = _password(secret)
        if kind.lower() not in ("bearer", "basic") or not secret.strip():
            message = "An API key is needed: send the header 'Authorization: Bearer sk-haori-...'."
            raise ApiError(401, message, code="missing_api_key")
        key = self._keys.find(secret.strip())
        if key is None:
            message = "The API key is not valid: it is wrong, revoked or expired."
            raise ApiError(401, message, code="invalid_api_key")
        return key

    def _check_host(self, given: str) -> None:
        name = given.rpartition(":")[0] if given.rpartition(":")[2].isdigit() else given
        if not (is_loopback(name.strip("[]")) or name == self._host):
            message = (
                f"This server answers only as localhost, not as {given[:120]!r}; make an API key to use other names."
            )
            raise ApiError(403, message, code="host_not_allowed")


def caller_of(request: Request) -> Caller:
    """Return who asks.

    Raises:
        ApiError: The address is one that needs an admin, and the caller is none.
    """
    caller = request.scope["haori.caller"]
    assert isinstance(caller, Caller)
    if request.scope["path"] in _ADMIN_PATHS and not caller.admin:
        raise ApiError(403, "Without an API key this is answered on the same machine only.", code="admin_key_required")
    return caller


def _check_origin(headers: Headers) -> None:
    """Refuse what a page of another origin sends. It may post forms and empty bodies without asking, and would draw."""
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        message = f"A page of {origin[:120]!r} asked; without an API key only pages of this server may. Make a key."
        raise ApiError(403, message, code="origin_not_allowed")


def _password(encoded: str) -> str:
    try:
        return base64.b64decode(encoded.strip(), validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Say whether a host name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hidden(model: str) -> ApiError:
    message = f"There is no adapter {model[:120]!r} that this API key may use; /v1/models lists what it may use."
    return ApiError(404, message, code="model_not_found", param="model")


def part_names(model: str, base: str) -> Sequence[str]:
    """Return the names in a model name, without strengths: `a:0.4+b@2:0.6` has `a` and `b@2`.

    Raises:
        InputError: It is no name.
    """
    if model == base:
        return [model]
    if PREFIX not in model:
        return [part.spec for part in parse_blend(model)]
    owned = [part for part in model.split("+") if part.startswith(PREFIX)]
    others = [part for part in model.split("+") if not part.startswith(PREFIX)]
    names = [name_and_strength(part)[0] for part in owned]
    return [*names, *([part.spec for part in parse_blend("+".join(others))] if others else [])]
