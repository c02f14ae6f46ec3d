"""The error of what is not there: a job, a file or a webhook that does not exist, or that another account owns."""

from haori.core.errors import InputError

__all__ = ["MissingError"]


class MissingError(InputError):
    """There is no such thing for this account; whether another has it is not told."""
