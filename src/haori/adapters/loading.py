"""How a method wants its base loaded: in which number format, and whether quantised."""

from typing import NamedTuple

from haori.core.errors import InputError
from haori.core.methods import FullMethod, Method, QloraMethod
from haori.core.quantization import Quantization

__all__ = ["Loading", "loading_of"]


class Loading(NamedTuple):
    """The arguments of `load_model` that follow from a method."""

    dtype: str
    quantization: Quantization | None = None


def loading_of(method: Method, dtype: str) -> Loading:
    """Return how the base of a run is loaded.

    Args:
        method: The resolved section of the recipe.
        dtype: The run's dtype, in which it computes.

    Raises:
        InputError: The number format of a full fine-tuning's weights is still `auto`.
    """
    if isinstance(method, FullMethod):
        if method.weights == "auto":
            raise InputError("The number format of the weights must be fp32 or bf16 here; `haori train` chooses it.")
        return Loading(method.weights)
    if isinstance(method, QloraMethod):
        return Loading(dtype, Quantization(method.bits, method.double_quantization))
    return Loading(dtype)
