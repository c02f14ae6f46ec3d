"""Latents as sequences of tokens for transformers: each token is a square of 2 x 2 latent pixels."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["grid_ids", "pack", "unpack"]


def pack(latents: "Tensor") -> "Tensor":
    """Return [B, C, h, w] as [B, (h/2)(w/2), 4C], row by row, channels before places within a square."""
    batch, channels, height, width = latents.shape
    squares = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: "Tensor", height: int, width: int) -> "Tensor":
    """Undo `pack`: return [B, N, 4C] as [B, C, height, width]."""
    batch, _, channels = tokens.shape
    squares = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)


def grid_ids(height: int, width: int, axes: int, device: "torch.device") -> "Tensor":
    """Return the places [height * width, axes] of a grid: row in axis 1, column in axis 2, zero elsewhere.

    In fp32, whatever the model computes in: bf16 has no whole numbers above 256.
    """
    import torch

    ids = torch.zeros(height, width, axes, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)[None, :]
    return ids.reshape(height * width, axes)
