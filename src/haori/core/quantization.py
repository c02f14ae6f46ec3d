"""How the linear weights of a base are held in fewer bits while an adapter is trained over them.

NF4 (Dettmers et al. 2023, arXiv 2305.14314): blocks of 64 weights share one scale (absmax), kept as fp32, or with
double quantisation as 8 bits and one fp32 per 256 scales. LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339): each
output row has one fp32 scale.
"""

from importlib.util import find_spec
from typing import Literal, NamedTuple

from haori.core.errors import MissingExtraError

__all__ = ["Quantization", "require_bitsandbytes"]

_BLOCK = 64  # weights per NF4 scale
_SCALES = 256  # scales per second-level scale


class Quantization(NamedTuple):
    """Bits of a linear weight: 4 (NF4) or 8 (LLM.int8)."""

    bits: Literal[4, 8] = 4
    double: bool = True
    """Quantise the scales of 4-bit blocks too."""

    @property
    def label(self) -> str:
        """Return the name shown to people."""
        if self.bits == 8:
            return "8-bit LLM.int8"
        return f"4-bit NF4{' with double quantisation' if self.double else ''}"

    def linear_bytes(self, outputs: int, inputs: int) -> int:
        """Return the bytes of a linear weight of `outputs` x `inputs`, scales included."""
        weights = outputs * inputs
        if self.bits == 8:
            return weights + 4 * outputs
        scales = -(-weights // _BLOCK)
        return weights // 2 + (scales + 4 * -(-scales // _SCALES) if self.double else 4 * scales)


def require_bitsandbytes() -> None:
    """Check that bases can be quantised here.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            "A base in 4 or 8 bits needs bitsandbytes, which is not installed; run `pip install 'haori[quantization]'`."
        )
