"""The optional packages that image bases need."""

from importlib.util import find_spec

from haori.core.errors import MissingExtraError

__all__ = ["require_diffusers"]


def require_diffusers() -> None:
    """Check that pipelines can be loaded here.

    Raises:
        MissingExtraError: diffusers is not installed.
    """
    if find_spec("diffusers") is None:
        raise MissingExtraError(
            "Image bases need diffusers, which is not installed; run `pip install 'haori[images]'`."
        )
