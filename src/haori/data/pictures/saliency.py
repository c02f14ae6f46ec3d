"""Where a picture draws the eye: spectral residual saliency (Hou and Zhang, CVPR 2007), in plain numpy."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["salient_point"]

_SIDE = 64
_BLUR = 3
_SPREAD = 2.5


def salient_point(image: "Image") -> tuple[float, float]:
    """Return the point around which the most striking things are, as shares of width and height.

    The residual is what the log spectrum of a 64 x 64 grey copy has beyond its own 3 x 3 mean; transformed back and
    smoothed it is large where a picture is unlike the rest of itself. The point is its centre of mass, of the squared
    values, so that faint texture everywhere does not pull it to the middle. A picture without any contrast gives its
    middle.
    """
    import numpy as np
    from PIL.Image import Resampling

    small = image.resize((_SIDE, _SIDE), Resampling.BOX, reducing_gap=2.0).convert("L")
    grey = np.asarray(small, dtype=np.float64)
    if np.ptp(grey) < 1.0:
        return 0.5, 0.5
    spectrum = np.fft.fft2(grey)
    log = np.log(np.abs(spectrum) + 1e-9)
    padded = np.pad(log, _BLUR // 2, mode="wrap")
    mean = np.lib.stride_tricks.sliding_window_view(padded, (_BLUR, _BLUR)).mean(axis=(2, 3))
    saliency = np.abs(np.fft.ifft2(np.exp(log - mean + 1j * np.angle(spectrum)))) ** 2
    blur = _gaussian()
    saliency = (blur @ saliency @ blur.T) ** 2
    across, down = saliency.sum(axis=0), saliency.sum(axis=1)
    place = (np.arange(_SIDE) + 0.5) / _SIDE
    return float(across @ place / across.sum()), float(down @ place / down.sum())


def _gaussian() -> "NDArray[np.float64]":
    """Return the matrix that blurs an axis with a Gaussian of 2.5 pixels, the ends as heavy as the rest: [64, 64]."""
    import numpy as np

    place = np.arange(_SIDE)
    weights = np.exp(-0.5 * ((place[:, None] - place[None, :]) / _SPREAD) ** 2)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float64)
