"""Reads an adapter into the factors that the engine multiplies, without building a model.

    y = output_scale * (W x) + B A x + bias          W: D_in -> D_out, R rank

Whatever the method, this is what it computes: the scale, AdaLoRA's singular values, ARD-LoRA's gates and DoRA's ratio
(arXiv 2402.09353) are multiplied into B, in fp32, and rounded once. An adapter at strength c adds c (output_scale - 1)
to the factor on W x, c B A x to the update and c times the other differences.

The file is read, not mapped: a folder outside the library may be written over while it is read, and a mapped file that
shrinks kills the process.
"""

import re
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from haori.core.errors import FileFormatError, InputError
from haori.core.hashing import short
from haori.serve.adapters.plan import AdapterPlan, ModuleTensors, plan_adapter
from haori.serve.adapters.refusals import not_applied, refuse_classifier

if TYPE_CHECKING:
    from haori.library import AdapterFiles

__all__ = ["AdapterWeights", "BaseTensors", "ModuleUpdate", "read_adapter_weights"]

_ROUNDING = 1e-6  # an untouched magnitude differs from the norm it was taken from by so much at most
_MOST_KEPT = 64 << 20  # bytes that a reader keeps for the next file
_DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class BaseTensors(Protocol):
    """What reading an adapter asks of the base."""

    @property
    def names(self) -> Collection[str]:
        """Full names of all parameters, that of a tied output head included."""

    def linear(self, name: str) -> tuple[int, int] | None:
        """Return (D_out, D_in) of the linear module `name`; None if it is none, or takes no update."""

    @property
    def tables(self) -> Collection[str]:
        """Full names of the parameters that may be changed row by row: the embedding and the output head."""

    def weight(self, module: str) -> Tensor:
        """Return the weight (D_out, D_in) of a linear module."""

    def tensor(self, name: str) -> Tensor:
        """Return the parameter `name`, in the base's dtype or as a copy in fp32."""


@dataclass(frozen=True)
class ModuleUpdate:
    """What an adapter does to one linear module.

    Attributes:
        a: A, [R, D_in]; R is the true rank of this module.
        b: B transposed, [R, D_out], with every scale multiplied in.
        output_scale: DoRA's m / ||W + s B A|| by output row, [D_out] in fp32: rounded to 16 bits it would be mostly 1.
        bias: Added to the base's bias, [D_out] in fp32.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    output_scale: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter in memory.

    Attributes:
        id: Its content id.
        updates: By full module name in the base, such as `model.layers.0.self_attn.q_proj`.
        vectors: Difference of each changed norm weight to the base's, by full parameter name, in fp32.
        token_rows: Of each embedding with trained tokens, by full parameter name: ids [K] and the difference of their
            rows to the base's [K, D]. On a base with tied embeddings the rows of the input embedding hold for the
            output head too, unless the head has an entry of its own, even an empty one.
        size_bytes: Memory of all tensors.
        apart: Copies of the tensors that were to be kept apart, by their key in the file, in fp32.
    """

    id: str
    updates: Mapping[str, ModuleUpdate]
    vectors: Mapping[str, Tensor]
    token_rows: Mapping[str, tuple[Tensor, Tensor]]
    size_bytes: int
    apart: Mapping[str, Tensor] = field(default_factory=dict)


def read_adapter_weights(
    files: "AdapterFiles",
    base: BaseTensors,
    *,
    adapter: str,
    dtype: torch.dtype,
    apart: Collection[str] | None = None,
) -> AdapterWeights:
    """Read the adapter in a PEFT folder for serving over `base`.

    Args:
        files: What `inspect_adapter` found in the folder.
        base: The base.
        adapter: Its content id; hashing the file here would take longer than reading it.
        dtype: Dtype of A, B and token rows.
        apart: Of a classifier, the keys of tensors that are no change of the base, such as those of its head. Without
            them no classifier is read.

    Raises:
        InputError: It holds what the engine cannot apply per request, or does nothing.
        MismatchError: It does not fit the base, or is not complete.
        FileFormatError: The file changed since it was inspected, or holds NaN or infinity.
    """
    label = repr(short(adapter))
    if apart is None:
        refuse_classifier(files, label)
    acting = {key: entry for key, entry in files.tensors.items() if key not in apart} if apart else files.tensors
    try:
        plan = plan_adapter(replace(files, tensors=acting), base, label)
    except (KeyError, ValueError, TypeError, ZeroDivisionError, re.error) as error:
        raise FileFormatError(f"The configuration of the adapter {label} is damaged ({error!r}).") from None
    with torch.no_grad():
        tensors, sums_to_zero = _read_tensors(files, label)
        if any(module.rho is not None for module in plan.modules.values()):
            tensors = _without_gates(files, tensors, label)
            sums_to_zero = tensors.keys()
        kept = {key: tensors[key].to(torch.float32, copy=True) for key in apart or ()}
        return _Reader(plan, tensors, sums_to_zero, base, dtype).read(adapter, label, kept)


class _Reader:
    """Turns the tensors of a file into what the engine multiplies."""

    def __init__(
        self,
        plan: AdapterPlan,
        tensors: Mapping[str, Tensor],
        sums_to_zero: Collection[str],
        base: BaseTensors,
        dtype: torch.dtype,
    ) -> None:
        self.plan = plan
        self.tensors = tensors
        self.sums_to_zero = sums_to_zero
        self.base = base
        self.dtype = dtype

    def read(self, adapter: str, label: str, apart: Mapping[str, Tensor]) -> AdapterWeights:
        rows = self._whole_tables(label)
        updates = {}
        for name, module in self.plan.modules.items():
            if (update := self._update(name, module)) is not None:
                updates[name] = update
        vectors = {name: self._difference(key, name) for name, key in self.plan.vectors.items()}
        vectors = {name: vector for name, vector in vectors.items() if vector.any()}
        rows |= {name: pair for name in self.plan.tokens if (pair := self._token_rows(name))[1].any()}
        if not updates and not vectors and not apart and not any(len(ids) for ids, _ in rows.values()):
            raise InputError(f"The adapter {label} does nothing: every update in its file is zero. Train it again.")
        held = [t for u in updates.values() for t in (u.a, u.b, u.output_scale, u.bias) if t is not None]
        held += [*vectors.values(), *(t for pair in rows.values() for t in pair), *apart.values()]
        return AdapterWeights(adapter, updates, vectors, rows, sum(tensor.nbytes for tensor in held), apart)

    def _update(self, name: str, module: ModuleTensors) -> ModuleUpdate | None:
        """Return what is done to a module, without the parts that change nothing; None if none is left."""
        factor, bias = self.plan.scales[name], None
        if module.lora_bias is not None:
            bias = self.tensors[module.lora_bias].float() * factor
        if module.base_bias is not None:
            difference = self._difference(module.base_bias, f"{name}.bias")
            bias = difference if bias is None else bias + difference
        if bias is not None and not bias.any():
            bias = None
        if module.a is None or module.b is None:
            return None if bias is None else ModuleUpdate(bias=bias)
        a, b = self.tensors[module.a], self.tensors[module.b]  # R D_in, D_out R
        scaled_again = module.e is not None or module.magnitude is not None
        if scaled_again or b.dtype != self.dtype:
            b = b.float()  # a single product of bf16 is rounded once as it is
        b = b * factor
        if module.e is not None:
            values = self.tensors[module.e].float().flatten()
            kept = values != 0  # AdaLoRA takes a rank away by making its singular value zero
            a, b = a[kept], b[:, kept] * values[kept]
        scale = None
        if module.magnitude is not None:
            weight = self.base.weight(name).float()
            norm = torch.linalg.vector_norm(torch.addmm(weight, b, a.float()), dim=1)  # D_out
            scale = self.tensors[module.magnitude].float() / norm
            b = b * scale[:, None]
            if (scale - 1).abs().max() < _ROUNDING:
                scale = None
        # A look at every number is worth it only where they sum to zero, or something scales them.
        may_vanish = scaled_again or factor == 0.0 or not {module.a, module.b}.isdisjoint(self.sums_to_zero)
        if may_vanish and not (a.any() and b.any()):
            return None if scale is None and bias is None else ModuleUpdate(output_scale=scale, bias=bias)
        return ModuleUpdate(a.to(self.dtype, copy=True), b.to(self.dtype).T, scale, bias)

    def _difference(self, key: str, name: str) -> Tensor:
        return self.tensors[key].float() - self.base.tensor(name).float()

    def _whole_tables(self, label: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the rows in which an embedding or a head that was saved whole differs from the base's."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, key in self.plan.copies.items():
            stored = self.tensors[key]
            if torch.equal(stored, self.base.tensor(name).to(stored.dtype)):
                continue
            if name not in self.base.tables:
                raise InputError(not_applied(label, f"the whole of {name!r}, changed"))
            change = self._difference(key, name)  # V D
            tokens = change.any(1).nonzero().flatten()
            found[name] = tokens, change[tokens].to(self.dtype)
        if found and not self.plan.is_tied:  # PEFT gives each a weight of its own, so the head keeps the base's
            for name in set(self.base.tables) - found.keys():
                found[name] = torch.empty(0, dtype=torch.long), torch.empty(0, change.shape[1], dtype=self.dtype)
        return found

    def _token_rows(self, name: str) -> tuple[Tensor, Tensor]:
        key, ids = self.plan.tokens[name]
        tokens = torch.tensor(ids)
        rows = self.tensors[key].float() - self.base.tensor(name)[tokens].float()  # K D
        return tokens, rows.to(self.dtype)


class _Scratch(threading.local):
    """Memory that files are read into, kept by each thread: a system takes its time to give new memory."""

    buffer = bytearray()

    def take(self, length: int) -> bytearray:
        if length > _MOST_KEPT:
            return bytearray(length)
        if len(self.buffer) < length:
            self.buffer = bytearray(length)
        return self.buffer


_scratch = _Scratch()


def _read_tensors(files: "AdapterFiles", label: str) -> tuple[dict[str, Tensor], Collection[str]]:
    """Read the data of a file whose header was checked before.

    Returns:
        Views of memory that the next file overwrites, and the names of those whose numbers sum to zero.
    """
    length = max(entry.end for entry in files.tensors.values())
    buffer = _scratch.take(length)
    unread = memoryview(buffer)[:length]
    try:
        with files.weights.open("rb", buffering=0) as file:
            file.seek(files.size_bytes - length)
            while unread and (count := file.readinto(unread)):
                unread = unread[count:]
            is_changed = bool(unread) or bool(file.read(1))
    except OSError as error:
        raise FileFormatError(f"The file of the adapter {label} cannot be read: {error.strerror}.") from None
    if is_changed:
        raise FileFormatError(f"The file of the adapter {label} was changed while it was read; try again.")
    tensors = {}
    for key, entry in files.tensors.items():
        dtype = _DTYPES[entry.dtype]
        count = (entry.end - entry.start) // dtype.itemsize
        empty = torch.empty(0, dtype=dtype)
        flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=entry.start) if count else empty
        # Arithmetic in 8 bits is not to be had; bf16 holds every such number.
        tensors[key] = (flat.bfloat16() if dtype.itemsize == 1 else flat).view(entry.shape)
    return tensors, _check_finite(tensors, label)


def _check_finite(tensors: Mapping[str, Tensor], label: str) -> Collection[str]:
    """Refuse NaN and infinity; return the names of tensors whose numbers sum to zero."""
    # NaN and infinity survive a sum, which is the quickest look at every number; a sum may also overflow.
    sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors.values()])
    for key, is_finite in zip(tensors, sums.isfinite().tolist(), strict=True):
        if not is_finite and not tensors[key].isfinite().all():
            raise FileFormatError(f"The adapter {label} holds NaN or infinity in {key!r}, so it cannot be served.")
    return {key for key, total in zip(tensors, sums.tolist(), strict=True) if total == 0.0}


def _without_gates(files: "AdapterFiles", tensors: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    """Multiply the gates of an ARD-LoRA adapter into its factors; one that was pruned has none."""
    from haori.adapters.ard_lora import to_lora

    try:
        return {**tensors, **to_lora(files.folder)[1]}
    except (RuntimeError, ValueError, TypeError) as error:
        raise FileFormatError(
            f"The rank factors of the adapter {label} do not fit its modules ({str(error).splitlines()[0][:200]})."
        ) from None
