"""Checks a merged checkpoint against base and adapter, both read again from disk.

What each weight should be is computed in float64 from the factors as the adapter stores them, scale · B A, or by
`ModuleUpdate.change`, not by the code that wrote it. A written value passes if no neighbour of its dtype is nearer;
what the adapter does not change must be the base's bytes.
"""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from haori.core.records import Check
from haori.core.safetensors_header import TensorEntry, read_safetensors_header
from haori.library.checkpoints.plan import Change, FilePlan
from haori.library.checkpoints.rounding import nearest_of
from haori.library.checkpoints.tensors import read_tensor
from haori.library.checkpoints.writing import Advance, results_of
from haori.library.proof.checks import failed, passed

__all__ = ["Checked", "check_file", "checks_of"]

_PIECE = 1 << 19  # values, in float64: a few megabytes
_COMPARED_BYTES = 8 << 20
# Two sums in float64 in another order may fall on either side of a tie: both neighbours are then as near.
_SLACK = 1e-6


@dataclass(frozen=True)
class Checked:
    """What was found in one tensor.

    Attributes:
        name: The tensor.
        wrong: Values that are not the nearest to W + dW, or bytes that are not the base's.
        is_changed: The adapter changes it.
        moved: Some value is another one than in the base.
    """

    name: str
    wrong: int
    is_changed: bool
    moved: bool = False


def check_file(plan: FilePlan, target: Path, pool: ThreadPoolExecutor, advance: Advance) -> list[Checked]:
    """Compare a written file with what it should be.

    Args:
        plan: What becomes of the base's file.
        target: The written file.
        pool: The threads that work on it.
        advance: Is called with bytes compared.

    Raises:
        FileFormatError: The written file is malformed.
    """
    written, held = read_safetensors_header(target), plan.source.header
    wanted = {**held.tensors, **plan.entries_added()}
    if written.tensors != wanted or written.metadata != held.metadata:
        return [Checked("the header", 1, is_changed=False)]
    with plan.source.path.open("rb") as source, target.open("rb") as out:
        jobs = []
        for name, entry in written.tensors.items():
            like, change = plan.added.get(name, (name, plan.changes.get(name)))
            pair = _Pair(
                name, source.fileno(), held.data_start, held.tensors[like], out.fileno(), written.data_start, entry
            )
            jobs.append(pool.submit(_check, pair, change, advance))
        return results_of(jobs)


def checks_of(found: Sequence[Checked]) -> list[Check]:
    """Say what was found, as checks of a proof."""
    checks = []
    for is_changed, name, what in ((True, "written", "W + dW rounded once"), (False, "unchanged", "the base's")):
        group = [checked for checked in found if checked.is_changed == is_changed]
        wrong = [checked for checked in group if checked.wrong]
        if wrong:
            values = sum(checked.wrong for checked in wrong)
            unit = "values" if is_changed else "bytes"
            checks.append(failed(name, f"{values:,} {unit} are not {what}, the first in {wrong[0].name!r}"))
        elif is_changed:
            checks.append(passed(name, f"every value of {len(group)} merged tensors, read back, is {what}"))
        else:
            checks.append(passed(name, f"{len(group)} tensors, read back, are {what}, byte by byte"))
    changed = [checked for checked in found if checked.is_changed]
    lost = [checked for checked in changed if not checked.moved]
    if changed and len(lost) == len(changed):
        checks.append(
            failed("rounding", "rounded to the base's dtype, all weights are the base's own: the effect is too small")
        )
    elif lost:
        checks.append(
            passed(
                "rounding", f"{len(lost)} of {len(changed)} merged tensors round to the base's, first {lost[0].name!r}"
            )
        )
    else:
        checks.append(passed("rounding", f"all {len(changed)} merged tensors differ from the base's"))
    return checks


class _Pair(NamedTuple):
    """A tensor in the base's file and in the written one."""

    name: str
    source: int
    source_data: int
    of_base: TensorEntry
    target: int
    target_data: int
    written: TensorEntry

    def pieces(self, rows: int) -> "Iterator[tuple[int, Tensor, Tensor]]":
        """Yield the first row of each piece, with these rows of the base's tensor and of the written one."""
        total = self.written.shape[0]
        row = (self.written.end - self.written.start) // total
        memory = [torch.empty(min(rows, total) * row, dtype=torch.uint8) for _ in range(2)]
        for first in range(0, total, rows):
            last = min(total, first + rows)
            before = self._rows(self.source, self.source_data, self.of_base, first, last, memory[0])
            yield first, before, self._rows(self.target, self.target_data, self.written, first, last, memory[1])

    def _rows(self, descriptor: int, data: int, entry: TensorEntry, first: int, last: int, into: Tensor) -> Tensor:
        row = (entry.end - entry.start) // entry.shape[0]
        part = entry._replace(
            shape=(last - first, *entry.shape[1:]), start=entry.start + first * row, end=entry.start + last * row
        )
        return read_tensor(descriptor, data, part, self.name, into)


def _check(pair: _Pair, change: Change | None, advance: Advance) -> Checked:
    if change is None or change.update is None:
        return _check_bytes(pair, advance)
    expected = _Expected(change, pair.written)
    wrong, moved = 0, False
    for first, weight, written in pair.pieces(expected.step):
        wrong += _not_nearest(written, expected.rows(weight, first))
        moved = moved or not _same_bits(weight, written)
        advance(written.nbytes)
    return Checked(pair.name, wrong, is_changed=True, moved=moved)


class _Expected:
    """What a tensor should be after the merge, in float64: piece by piece where each row stands for itself."""

    def __init__(self, change: Change, entry: TensorEntry) -> None:
        self._change = change
        rows = entry.shape[0]
        update = change.update
        assert update is not None
        self._update = update
        plain = update.kind == "lora" and "mid" not in update.factors and update.magnitude is None
        self._by_rows = plain and not change.is_bias
        self.step = min(rows, max(1, _PIECE * rows // max(1, math.prod(entry.shape)))) if self._by_rows else rows
        if self._by_rows:
            self._a = update.factors["A"].double().flatten(1)
            self._b = update.factors["B"].double().flatten(1) * update.scale
            self._wide = torch.empty(self.step, self._a.shape[1], dtype=torch.float64)

    def rows(self, weight: Tensor, first: int) -> Tensor:
        if self._by_rows:
            exact = self._wide[: len(weight)].copy_(weight.flatten(1))
            return exact.addmm_(self._b[first : first + len(weight)], self._a).reshape(weight.shape)
        exact = weight.double()
        if self._change.is_bias:
            assert self._update.bias is not None
            return exact + self._update.bias.double().reshape(exact.shape)
        return exact + self._update.change(exact)


def _check_bytes(pair: _Pair, advance: Advance) -> Checked:
    wrong, size = 0, pair.written.end - pair.written.start
    for start in range(0, size, _COMPARED_BYTES):
        count = min(_COMPARED_BYTES, size - start)
        first = os.pread(pair.source, count, pair.source_data + pair.of_base.start + start)
        second = os.pread(pair.target, count, pair.target_data + pair.written.start + start)
        if first != second:
            wrong += sum(one != other for one, other in zip(first, second, strict=True))
        advance(count)
    return Checked(pair.name, wrong, is_changed=False)


def _not_nearest(written: Tensor, exact: Tensor) -> int:
    """Count values that have a neighbour nearer to the exact one, or are not finite."""
    import numpy as np

    # torch's rounding is right but for one or two of 65,536, so the others need no closer look.
    usual = exact.to(written.dtype)
    least, most = written.aminmax()
    if not bool(least.isfinite() & most.isfinite()):
        return int((~written.isfinite()).sum())
    found = np.flatnonzero(_bits(written) != _bits(usual))
    if not len(found):
        return 0
    places = torch.from_numpy(found)
    near = nearest_of(written.reshape(-1)[places], exact.reshape(-1)[places], slack=_SLACK)
    return int((~near).sum())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    import numpy as np

    return np.array_equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Any:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().reshape(-1).view(kind).numpy()
