"""Writes a merged weight file: what the adapter does not touch is copied in the kernel, the rest computed in pieces.

A piece is some rows, read, added to, rounded and written by one thread while it is in the cache; a change
that is no product of thin matrices (DoRA, full-rank LyCORIS) is computed for its whole tensor at once.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from haori.core.errors import BaseError
from haori.core.safetensors_header import TensorEntry
from haori.library.checkpoints.plan import Change, FilePlan
from haori.library.checkpoints.rounding import Rounder, round_once
from haori.library.checkpoints.tensors import DTYPES, read_tensor
from haori.library.combining.factors import Factors, factors_of

__all__ = ["Advance", "results_of", "threads", "write_file"]

T = TypeVar("T")

_PIECE = 1 << 19  # values, in float64: a few megabytes
_READ_BYTES = 4 << 20
_COPY_BYTES = 64 << 20
_THIN = 4  # a product of matrices of at most a quarter of the full rank is cheaper than the matrix
Advance = Callable[[int], None]


@contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    """Yield threads, one a core, and have torch compute on one core in each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def write_file(plan: FilePlan, target: Path, pool: ThreadPoolExecutor, advance: Advance) -> None:
    """Write the merged file of one file of the base.

    Args:
        plan: What becomes of it.
        target: The new file.
        pool: The threads that work on it.
        advance: Is called with bytes written.
    """
    header = plan.header()
    held = plan.source.header
    with plan.source.path.open("rb") as source, target.open("wb") as out:
        out.write(header)
        out.flush()
        entries = {name: (entry, plan.changes.get(name), entry) for name, entry in held.tensors.items()}
        for name, new in plan.entries_added().items():
            like, added = plan.added[name]
            entries[name] = (held.tensors[like], added, new)
        out.truncate(len(header) + max((new.end for _, _, new in entries.values()), default=0))
        jobs, lock = [], Lock()
        for name, (entry, change, new) in sorted(entries.items(), key=lambda item: item[1][2].start):
            place = _Place(
                name, source.fileno(), held.data_start + entry.start, out.fileno(), len(header) + new.start, entry, lock
            )
            jobs.append(pool.submit(_write, place, change, advance))
        results_of(jobs)


def results_of(jobs: "Sequence[Future[T]]") -> list[T]:
    """Return what jobs give, or raise what one of them raised; none is at work any more then, on files that close."""
    try:
        return [job.result() for job in jobs]
    finally:
        for job in jobs:
            job.cancel()
        wait(jobs)


class _Place(NamedTuple):
    """A tensor in the base's file and in the new one, by descriptor and offset.

    A file takes one writer at a time. Waiting for the lock here costs nothing; in the kernel, waiting threads spin.
    """

    name: str
    source: int
    source_start: int
    target: int
    target_start: int
    entry: TensorEntry
    lock: Lock

    @property
    def size(self) -> int:
        return self.entry.end - self.entry.start

    def read(self, first: int, rows: int, into: Tensor | None = None) -> Tensor:
        """Read some rows; a tensor of no axes is one row."""
        row = self.size // max(1, self.entry.shape[0] if self.entry.shape else 1)
        shape = (rows, *self.entry.shape[1:]) if self.entry.shape else ()
        start = self.source_start + first * row
        part = self.entry._replace(shape=shape, start=start, end=start + rows * row)
        return read_tensor(self.source, 0, part, self.name, into)

    def write(self, tensor: Tensor, offset: int) -> None:
        data: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
        view = memoryview(data)
        done = 0
        with self.lock:
            while done < len(view):
                done += os.pwrite(self.target, view[done:], self.target_start + offset + done)


def _write(place: _Place, change: Change | None, advance: Advance) -> None:
    if change is None or change.update is None:
        _copy(place, advance)
        return
    if change.is_bias:
        bias = change.update.bias
        assert bias is not None
        weight = place.read(0, place.entry.shape[0])
        place.write(round_once(weight.double() + bias.double().reshape(weight.shape), weight.dtype), 0)
        advance(place.size)
    elif (factors := _thin(change, place.entry.shape)) is not None:
        _add(place, factors, advance)
    else:
        weight = place.read(0, place.entry.shape[0])
        exact = weight.double()
        exact += change.update.change(exact)
        place.write(round_once(exact, weight.dtype), 0)
        advance(place.size)


def _thin(change: Change, shape: tuple[int, ...]) -> Factors | None:
    """Return the change as B A, if it is the product of thin matrices."""
    update = change.update
    if update is None or update.magnitude is not None or update.kind == "diff" or len(shape) < 2:
        return None
    factors = factors_of(update)
    return None if factors.rank * _THIN > factors.full_rank else factors


def _add(place: _Place, factors: Factors, advance: Advance) -> None:
    rows = place.entry.shape[0]
    row_bytes = place.size // rows
    b, a = factors.b.contiguous(), factors.a.contiguous()
    step = min(rows, max(1, _PIECE // a.shape[1]))
    read = torch.empty(step * row_bytes, dtype=torch.uint8)
    wide = torch.empty(step, a.shape[1], dtype=torch.float64)
    rounder = Rounder(wide.numel(), DTYPES[place.entry.dtype])
    for first in range(0, rows, step):
        piece = place.read(first, min(step, rows - first), read).flatten(1)
        exact = wide[: len(piece)].copy_(piece).addmm_(b[first : first + step], a)
        place.write(rounder(exact), first * row_bytes)
        advance(piece.nbytes)


def _copy(place: _Place, advance: Advance) -> None:
    """Copy a tensor's bytes inside the kernel where it can, or else through memory."""
    done = 0
    while done < place.size:
        count = min(_COPY_BYTES, place.size - done)
        with place.lock:
            copied = _copy_range(place, done, count)
        done += copied
        advance(copied)


def _copy_range(place: _Place, done: int, count: int) -> int:
    source, target = place.source_start + done, place.target_start + done
    if hasattr(os, "copy_file_range"):
        with suppress(OSError):  # not between these two file systems
            copied = os.copy_file_range(place.source, place.target, count, source, target)
            if copied:
                return copied
    data = os.pread(place.source, min(count, _READ_BYTES), source)
    if not data:
        raise BaseError(f"The file of the weight {place.name!r} is shorter than its header says.")
    return os.pwrite(place.target, data, target)
