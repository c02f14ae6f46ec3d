"""Tensors of adapters, files of them, and the comparison of two adapters by what they change."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from haori.library.updates import AdapterUpdates

if TYPE_CHECKING:
    from torch import Tensor


def noise(*shape: int, seed: int = 0) -> "Tensor":
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(hash((seed, *shape)) % 2**31))


def save(path: Path, tensors: "Mapping[str, Tensor]", **metadata: str) -> Path:
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=metadata or None)
    return path


def assert_equal(found: AdapterUpdates, expected: AdapterUpdates) -> None:
    """Compare two adapters: dW to 1e-6, magnitudes and biases; a module that is not in both changes nothing."""
    import torch

    for name in set(found.modules) | set(expected.modules):
        mine, its = found.modules.get(name), expected.modules.get(name)
        present = mine or its
        assert present is not None
        nothing = torch.zeros(()).double()
        delta = nothing if mine is None or not mine.factors else mine.delta()
        wanted = nothing if its is None or not its.factors else its.delta()
        assert (delta - wanted).norm() <= 1e-6 * max(wanted.norm().item(), 1e-30), name
        for field in ("magnitude", "bias"):
            values = [getattr(update, field, None) for update in (mine, its)]
            flat = [torch.zeros(1) if value is None else value.flatten() for value in values]
            assert torch.allclose(*torch.broadcast_tensors(*flat), rtol=1e-6, atol=0), (name, field)
