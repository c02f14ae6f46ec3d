"""What can go wrong while a model is loaded, as one sentence about the base."""

from collections.abc import Iterator
from contextlib import contextmanager

from haori.bases.base import Base
from haori.core.errors import BaseError, HaoriError, InputError
from haori.core.out_of_memory import is_out_of_memory

__all__ = ["LOAD_ERRORS", "check_device", "explain_load_errors", "first_line"]

LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError)
"""What transformers and diffusers raise for files that do not fit together."""


@contextmanager
def explain_load_errors(base: Base, device: str) -> Iterator[None]:
    """Turn what the block raises while it loads weights into a BaseError; our own errors pass."""
    try:
        yield
    except HaoriError:
        raise
    except (MemoryError, *LOAD_ERRORS) as error:
        if is_out_of_memory(error):
            raise BaseError(
                f"The base {base.name!r} does not fit into the memory of {device!r}: its files hold "
                f"{base.size_bytes / 1e9:.2f} GB; free memory or take a smaller base."
            ) from None
        raise BaseError(f"The base {base.name!r} cannot be loaded: {first_line(error)}.") from error


def check_device(device: str) -> None:
    """Check that a device is there.

    Raises:
        InputError: It is not.
    """
    import torch

    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, AssertionError):
        raise InputError(f"The device {device!r} is not available on this machine; try 'cpu'.") from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, short and without its full stop."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".:")[:300]
