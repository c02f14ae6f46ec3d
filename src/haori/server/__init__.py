"""The HTTP server: OpenAI's and vLLM's routes, keys, limits, metrics and logs, in one FastAPI app.

It puts any engine that keeps the contracts behind HTTP, and knows nothing about models or tensors. Importing this
package is light: the names below are loaded when they are first used.
"""

from typing import TYPE_CHECKING

from haori.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from haori.server.access import Access
    from haori.server.access_log import AccessLog
    from haori.server.app import create_app
    from haori.server.contracts import Backend
    from haori.server.keys import ApiKey, KeyStore, parse_duration, training_spelling
    from haori.server.launch import RunningServer, listen
    from haori.server.lifecycle import Service
    from haori.server.pictures.backend import PictureBackend
    from haori.server.pictures.opening import open_pictures
    from haori.server.settings import PictureSettings, ServerSettings, parse_size

__all__ = [
    "Access",
    "AccessLog",
    "ApiKey",
    "Backend",
    "KeyStore",
    "PictureBackend",
    "PictureSettings",
    "RunningServer",
    "ServerSettings",
    "Service",
    "create_app",
    "listen",
    "open_pictures",
    "parse_duration",
    "parse_size",
    "training_spelling",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "access": ("Access",),
        "access_log": ("AccessLog",),
        "app": ("create_app",),
        "contracts": ("Backend",),
        "keys": ("ApiKey", "KeyStore", "parse_duration", "training_spelling"),
        "launch": ("RunningServer", "listen"),
        "lifecycle": ("Service",),
        "pictures.backend": ("PictureBackend",),
        "pictures.opening": ("open_pictures",),
        "settings": ("PictureSettings", "ServerSettings", "parse_size"),
    },
)
