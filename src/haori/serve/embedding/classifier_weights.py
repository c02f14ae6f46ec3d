"""Reads a classifier: what it changes of the encoder, and its head.

Its tensors are named as in the model that it was trained on, transformers' classifier, in which the encoder is a part.
The head is what the file saves whole; what it leaves out is the base's own, where the base has it.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Never

import torch
from torch import Tensor

from haori.core.errors import MismatchError
from haori.core.hashing import short
from haori.core.records import Head
from haori.serve.adapters.reading import AdapterWeights, ModuleUpdate, read_adapter_weights
from haori.serve.models.classifier_form import PROBE_LABELS, ClassifierForm
from haori.serve.models.encoder_bank import ClassifierWeights, EncoderBank

if TYPE_CHECKING:
    from haori.library import AdapterFiles

__all__ = ["ClassifierReader"]

_PREFIX = "base_model.model."
_OF_PEFT = frozenset({"classifier", "score"})  # PEFT adds both to `modules_to_save`, whichever there is


class ClassifierReader:
    """Reads the classifiers of one base.

    Args:
        form: What follows the encoder.
        bank: What adapters may change of the encoder.
        stored: What the base's files hold of head and pooler, by full name in the classifier.
        name: What errors call the base.
    """

    def __init__(self, form: ClassifierForm, bank: EncoderBank, stored: Mapping[str, Tensor], *, name: str) -> None:
        self._form = form
        self._bank = bank
        self._stored = stored
        self._name = name

    def own_head(self, head: Head) -> Mapping[str, Tensor]:
        """Return the base's own head, for so many labels; empty where its files lack a part."""
        shapes = self._form.shapes(len(head.labels))
        fits = all(name in self._stored and self._stored[name].shape == shape for name, shape in shapes.items())
        is_whole = fits and all(name in self._stored for name in self._form.poolers)
        return {name: self._stored[name].float() for name in shapes} if is_whole else {}

    def read(self, files: "AdapterFiles", head: Head, *, adapter: str, dtype: torch.dtype) -> ClassifierWeights:
        """Read a classifier.

        Args:
            files: What `inspect_adapter` found in its folder.
            head: What its head is for.
            adapter: Its content id.
            dtype: Of what changes the encoder; the head stays in fp32.

        Raises:
            InputError: It holds what cannot be applied per request.
            MismatchError: It does not fit the base or its labels, or a part of its head is nowhere.
            FileFormatError: The file changed since it was inspected, or holds NaN or infinity.
        """
        label, labels = repr(short(adapter)), len(head.labels)
        saved = self._saved(files, labels, label)
        tensors = _ClassifierTensors(self._form, self._bank, self._stored, labels, saved)
        encoder_files = replace(files, modules_to_save=tensors.unsaved(files.modules_to_save))
        keys = {f"{_PREFIX}{name}" for name in saved}
        found = read_adapter_weights(encoder_files, tensors, adapter=adapter, dtype=dtype, apart=keys)
        own = {key.removeprefix(_PREFIX): tensor for key, tensor in found.apart.items()}
        parameters = self._head(own, found, labels, label)
        return ClassifierWeights(
            id=adapter,
            updates={inner: update for name, update in found.updates.items() if (inner := self._form.inner(name))},
            vectors=self._inner(found.vectors),
            token_rows=self._inner(found.token_rows),
            size_bytes=found.size_bytes + sum(tensor.nbytes for name, tensor in parameters.items() if name not in own),
            head=parameters,
            pooler=self._inner(own),
        )

    def _inner(self, by_name: Mapping[str, Any]) -> dict[str, Any]:
        return {inner: value for name, value in by_name.items() if (inner := self._form.inner(name))}

    def _saved(self, files: "AdapterFiles", labels: int, label: str) -> frozenset[str]:
        """Return the parameters of head and pooler that the file holds whole; their shapes are checked."""
        shapes = self._form.shapes(labels)
        for name in self._form.poolers:
            shapes[name] = tuple(self._bank.tensor(str(self._form.inner(name))).shape)
        saved = frozenset(name for name in shapes if f"{_PREFIX}{name}" in files.tensors)
        for name in saved:
            entry, shape = files.tensors[f"{_PREFIX}{name}"], shapes[name]
            if entry.shape != shape:
                self._misfit(label, f"its {name!r} of shape {list(entry.shape)} is not the {list(shape)} of this base")
        lost = [name for name in self._form.poolers if name not in saved and name not in self._stored]
        if lost:
            self._refuse_lost(label, lost[0])
        return saved

    def _head(self, own: Mapping[str, Tensor], found: AdapterWeights, labels: int, label: str) -> dict[str, Tensor]:
        """Return every parameter of the head: what the adapter saved, else the base's, with its updates added."""
        parameters = {}
        for name, shape in self._form.shapes(labels).items():
            held = own.get(name, self._stored.get(name))
            if held is None or held.shape != shape:
                self._refuse_lost(label, name)
            parameters[name] = held.float()
        for module, update in found.updates.items():
            if self._form.inner(module) is None:
                _apply(update, parameters, module)
        for name, change in found.vectors.items():
            if name in parameters:
                parameters[name] = parameters[name] + change
        return parameters

    def _refuse_lost(self, label: str, name: str) -> Never:
        module = name.rpartition(".")[0]
        self._misfit(
            label,
            f"its head needs {name!r}, which is neither in its file nor in the base's, so it was random when it was "
            f"trained; train it with {module.rpartition('.')[2]!r} in modules_to_save",
        )

    def _misfit(self, label: str, problem: str) -> Never:
        raise MismatchError(f"The adapter {label} cannot be served on the base {self._name!r}: {problem}.")


class _ClassifierTensors:
    """The base as a classifier's file names it, for reading what the file does not save whole.

    Args:
        form: What follows the encoder.
        bank: The encoder.
        stored: What the base's files hold of head and pooler.
        labels: How many there are.
        saved: Parameters that the file saves whole.
    """

    def __init__(
        self,
        form: ClassifierForm,
        bank: EncoderBank,
        stored: Mapping[str, Tensor],
        labels: int,
        saved: Collection[str],
    ) -> None:
        self._form = form
        self._bank = bank
        self._stored = stored
        self._labels = labels
        self._saved = frozenset(saved)
        self.names: Collection[str] = [name for name in form.names if name not in self._saved]
        self.tables: Collection[str] = ()

    def unsaved(self, modules_to_save: Collection[str]) -> tuple[str, ...]:
        """Return those of a configuration's `modules_to_save` that the file must hold beside what it saves whole."""
        return tuple(
            name for name in modules_to_save
            if any(_module(left).endswith(name) for left in self.names if left not in self._form.shapes(self._labels))
            or not (name in _OF_PEFT or any(name in _module(saved) for saved in self._saved))
        )  # fmt: skip

    def linear(self, name: str) -> tuple[int, int] | None:
        inner = self._form.inner(name)
        if inner is not None:
            return self._bank.linear(inner)
        if f"{name}.weight" in self._saved or name not in self._form.linears:
            return None
        rows, width = self._form.linears[name]
        return (self._labels if rows == PROBE_LABELS else rows), width

    def weight(self, module: str) -> Tensor:
        inner = self._form.inner(module)
        return self._tensor_of_head(f"{module}.weight") if inner is None else self._bank.weight(inner)

    def tensor(self, name: str) -> Tensor:
        inner = self._form.inner(name)
        return self._tensor_of_head(name) if inner is None else self._bank.tensor(inner)

    def _tensor_of_head(self, name: str) -> Tensor:
        shape = self._form.shapes(self._labels)[name]
        held = self._stored.get(name)
        # What is nowhere is refused once the file has been read.
        return torch.zeros(shape) if held is None or held.shape != shape else held


def _apply(update: ModuleUpdate, parameters: dict[str, Tensor], module: str) -> None:
    """Add an update to a linear module of the head: W <- output_scale * W + B A, and its bias."""
    weight = parameters[f"{module}.weight"]
    if update.output_scale is not None:
        weight = update.output_scale[:, None] * weight
    if update.a is not None and update.b is not None:
        weight = weight + update.b.float().T @ update.a.float()
    parameters[f"{module}.weight"] = weight
    if update.bias is not None:
        parameters[f"{module}.bias"] = parameters[f"{module}.bias"] + update.bias


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]
