"""What a request is told that ends with an error which nobody foresaw."""

from haori.core.errors import HaoriError

__all__ = ["unforeseen"]


def unforeseen(error: BaseException) -> str:
    """Return a sentence for what was raised on a request's account; a foreseen error has its own."""
    if isinstance(error, HaoriError):
        return str(error)
    return f"The engine could not go on with this request ({type(error).__name__}: {error})."
