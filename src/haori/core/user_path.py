"""A path as a person writes it, with `~` for a home folder."""

from pathlib import Path

from haori.core.errors import InputError

__all__ = ["user_path"]


def user_path(given: str | Path) -> Path:
    """Return the path with `~` or `~name` replaced by that user's home folder.

    Raises:
        InputError: This machine has no such user, or does not know where that user's home is.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError:
        whose = Path(given).parts[0]
        raise InputError(
            f"{str(given)!r} begins with {whose}, and this machine knows no such home folder; write the path out, or "
            f"./{whose} for a file of that name."
        ) from None
