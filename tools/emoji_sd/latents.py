"""The code of a picture: the first principal components of its 4 x 4 patches, 8 channels at a quarter of the size.

The autoencoder is trained to this code, so that the denoiser can be trained on it at the same time. Each component is
scaled by the inverse root of its deviation: half way to white, so that colour and outline still weigh most.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CHANNELS", "PATCH", "PatchCode", "as_tensor"]

CHANNELS = 8
PATCH = 4


def as_tensor(pictures: "numpy.ndarray") -> Tensor:  # noqa: F821
    """Pictures uint8 [n, 64, 64, 3] as float32 [n, 3, 64, 64] in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass
class PatchCode:
    """Linear code of patches: `(patch - mean) @ basis * scale`."""

    mean: Tensor  # [48]
    basis: Tensor  # [48, 8]
    scale: Tensor  # [8]

    @classmethod
    def of(cls, pictures: Tensor) -> "PatchCode":
        """The principal components of the patches of `pictures` [n, 3, h, w]."""
        patches = _patches(pictures).double()
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        deviation = values[-CHANNELS:].flip(0).sqrt()
        scale = deviation**-0.5 / deviation.mean() ** 0.5
        return cls(mean.float(), vectors[:, -CHANNELS:].flip(1).float(), scale.float())

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [n, 3, h, w] to codes [n, 8, h/4, w/4] of mean 0 and mean square 1 over what it was fitted to."""
        n, _, height, width = pictures.shape
        code = (_patches(pictures) - self.mean) @ self.basis * self.scale
        return code.view(n, height // PATCH, width // PATCH, CHANNELS).permute(0, 3, 1, 2).contiguous()

    def decode(self, codes: Tensor) -> Tensor:
        """The nearest pictures to codes by least squares; what the decoder is measured against."""
        n, _, height, width = codes.shape
        flat = codes.permute(0, 2, 3, 1).reshape(-1, CHANNELS)
        patches = (flat / self.scale) @ self.basis.T + self.mean
        grid = patches.view(n, height, width, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        return grid.reshape(n, 3, height * PATCH, width * PATCH)


def _patches(pictures: Tensor) -> Tensor:
    n, channels, height, width = pictures.shape
    grid = pictures.view(n, channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return grid.reshape(-1, channels * PATCH * PATCH)
