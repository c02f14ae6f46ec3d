"""Chooses the number format a base is loaded in, and says why.

bf16 where the processor computes it fast (AVX512-BF16, AMX, Arm BF16, CUDA from compute capability 8.0), fp32
elsewhere: a processor that only emulates bf16 is slower with it than with fp32.
"""

import platform
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from haori.core.errors import InputError, nearest

if TYPE_CHECKING:
    import torch

__all__ = ["DtypeChoice", "choose_dtype", "default_device", "torch_dtype"]

_NAMES = ("auto", "fp32", "bf16", "fp16")
_X86_FLAGS = ("amx_bf16", "avx512_bf16")


class DtypeChoice(NamedTuple):
    """A number format (`fp32`, `bf16` or `fp16`) and the reason for it, for people."""

    name: str
    reason: str


def choose_dtype(requested: str = "auto", device: str | None = None) -> DtypeChoice:
    """Resolve `auto` for a device (`cpu`, `cuda`, `cuda:1`, `mps`; None is `default_device()`).

    Raises:
        InputError: The name is not one of auto, fp32, bf16, fp16.
    """
    if requested not in _NAMES:
        hint = nearest(requested, _NAMES) or "allowed are " + ", ".join(_NAMES) + "."
        raise InputError(f"There is no dtype {requested!r}; {hint}")
    if requested != "auto":
        return DtypeChoice(requested, "as requested")
    kind = (device or default_device()).partition(":")[0]
    if kind == "cuda":
        return _for_cuda(device)
    if kind == "cpu":
        flag = _fast_bf16_flag()
        if flag:
            return DtypeChoice("bf16", f"this processor computes bf16 fast ({flag})")
        return DtypeChoice("fp32", "this processor has no fast bf16")
    return DtypeChoice("fp32", f"fp32 is the safe choice on {kind}")


def default_device() -> str:
    """Return `cuda` where there is one, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_dtype(name: str) -> "torch.dtype":
    """Return the torch dtype of `fp32`, `bf16` or `fp16`.

    Raises:
        InputError: There is no such name.
    """
    import torch

    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in known:
        raise InputError(f"There is no dtype {name!r}; allowed are {', '.join(known)}.")
    return known[name]


def _for_cuda(device: str | None) -> DtypeChoice:
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return DtypeChoice("bf16", f"the GPU computes bf16 (compute capability {major}.{minor})")
    return DtypeChoice("fp32", f"the GPU has no bf16 (compute capability {major}.{minor})")


def _fast_bf16_flag() -> str | None:
    """Return the name of the processor feature that makes bf16 fast, from the kernel's list (Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    wanted = ("bf16",) if platform.machine().lower() in ("aarch64", "arm64") else _X86_FLAGS
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            words = set(value.split())
            return next((flag for flag in wanted if flag in words), None)
    return None
