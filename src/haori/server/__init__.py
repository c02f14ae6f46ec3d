"""The HTTP server: OpenAI's and vLLM's routes, keys, limits, metrics and logs, in one FastAPI app.

It puts any engine that keeps the contracts behind HTTP, and knows nothing about models or tensors. Importing this
package is light: the names below are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from haori.server.access import Access
    from haori.server.access_log import AccessLog
    from haori.server.app import create_app
    from haori.server.contracts import Backend
    from haori.server.keys import ApiKey, KeyStore, parse_duration
    from haori.server.launch import RunningServer, listen
    from haori.server.lifecycle import Service
    from haori.server.settings import ServerSettings, parse_size

__all__ = [
    "Access",
    "AccessLog",
    "ApiKey",
    "Backend",
    "KeyStore",
    "RunningServer",
    "ServerSettings",
    "Service",
    "create_app",
    "listen",
    "parse_duration",
    "parse_size",
]

_HOMES = {
    "Access": "access",
    "AccessLog": "access_log",
    "ApiKey": "keys",
    "Backend": "contracts",
    "KeyStore": "keys",
    "RunningServer": "launch",
    "ServerSettings": "settings",
    "Service": "lifecycle",
    "create_app": "app",
    "listen": "launch",
    "parse_duration": "keys",
    "parse_size": "settings",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
