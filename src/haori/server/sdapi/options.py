"""The web UI's settings, as far as they mean something here: they can be read, and set to what they are."""

from collections.abc import Mapping
from typing import Any

from haori.bases import Base
from haori.core.errors import nearest
from haori.server.errors import ApiError

__all__ = ["check_options", "checkpoint", "options_of"]


def checkpoint(base: Base) -> dict[str, Any]:
    """Return a base as the web UI describes a checkpoint; where it lies is not told."""
    short = base.id[:10]
    return {
        "title": f"{base.name} [{short}]", "model_name": base.name, "hash": short, "sha256": None,
        "filename": base.name, "config": None,
    }  # fmt: skip


def options_of(base: Base) -> dict[str, Any]:
    """Return the settings of a server that draws with a base."""
    found = checkpoint(base)
    return {
        "sd_model_checkpoint": found["title"], "sd_checkpoint_hash": found["hash"], "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1, "eta_noise_seed_delta": 0, "randn_source": "CPU", "samples_format": "png",
        "samples_save": False, "grid_save": False,
    }  # fmt: skip


def check_options(given: Mapping[str, Any], base: Base) -> None:
    """Refuse settings that are not as they are.

    Raises:
        ApiError: One is unknown, or has another value; another base is a case of it.
    """
    current = options_of(base)
    names = {current["sd_model_checkpoint"], base.name, base.id[:10]}
    for name, value in given.items():
        shown = ascii(name)[1:-1][:100]
        if name not in current:
            hint = nearest(shown, current) or "it is not supported by this server; take it out."
            raise ApiError(400, f"There is no setting {shown!r}; {hint}", param=shown, code="unknown_field")
        if name == "sd_model_checkpoint":
            if value not in (*names, None, ""):
                message = f"This server draws with {base.name!r} and has no checkpoint {str(value)[:120]!r}."
                raise ApiError(404, message, param=shown, code="model_not_found")
        elif value not in (current[name], None) and (name, value) != ("sd_vae", "None"):
            message = f"The setting {shown!r} is {current[name]!r} on this server and cannot be {str(value)[:120]!r}."
            raise ApiError(400, message, param=shown, code="unsupported_field")
