"""What a request is told that ends with an error which nobody foresaw, and what is to blame."""

from haori.core.errors import HaoriError, InputError
from haori.serve.request import Fault

__all__ = ["fault_of", "unforeseen"]


def unforeseen(error: BaseException) -> str:
    """Return a sentence for what was raised on a request's account; a foreseen error has its own."""
    if isinstance(error, HaoriError):
        return str(error)
    return f"The engine could not go on with this request ({type(error).__name__}: {error})."


def fault_of(error: BaseException) -> Fault:
    """Return what an error raised on a request's account comes from: what was asked for, or the engine."""
    return "request" if isinstance(error, InputError) else "engine"
