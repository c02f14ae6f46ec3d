"""The error of what was here, or may have been, and is no longer."""

from haori.core.errors import HaoriError

__all__ = ["GoneError"]


class GoneError(HaoriError):
    """What a client refers to is no longer here; it has to ask anew."""
