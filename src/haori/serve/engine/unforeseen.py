"""What a caller is told when its request fails with an unexpected error, and what the error comes from."""

from haori.core.errors import HaoriError, InputError
from haori.serve.request import Fault

__all__ = ["fault_of", "unforeseen"]


def unforeseen(error: BaseException) -> str:
    """Return a sentence for an error that a request raised; a `HaoriError` has its own."""
    if isinstance(error, HaoriError):
        return str(error)
    return f"The engine could not go on with this request ({type(error).__name__}: {error})."


def fault_of(error: BaseException) -> Fault:
    """Return what an error that a request raised comes from: what was asked for, or the engine."""
    return "request" if isinstance(error, InputError) else "engine"
