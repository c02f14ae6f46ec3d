"""Log-probabilities of answers under the reference: the model that is trained, before its first step.

No second copy is held. A fresh adapter computes what the base computes, so the model as it stands is the reference;
so is an adapter that a run goes on from, unless the base is asked for, and then adapters are switched off for the
pass. What was computed is kept in the cache by content, so that resuming, sweeps and comparisons find it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from haori.adapters.fused import stock_forward
from haori.core.errors import RecipeError
from haori.core.hashing import hash_data, hash_parts, short
from haori.core.methods import FullMethod, LoraMethod, LowRankMethod, PeftMethod, QloraMethod
from haori.core.settings import settings
from haori.core.storage import staged_folder
from haori.data.batching import plan_batches
from haori.data.progress import tracked

if TYPE_CHECKING:
    from haori.tasks.preference.recipe import PreferenceRecipe

__all__ = ["Reference", "reference_of"]

_VERSION = 1
_CHUNK = 1000  # rows whose tokens are hashed at once
_RESIDUAL = ("pissa", "olora", "loftq")  # starts that keep a part of the base's weights in the adapter
_Sequences = Callable[[Sequence[int]], list[tuple[list[int], list[int]]]]


@dataclass(frozen=True)
class Reference:
    """Computes the reference's log-probabilities, or takes them from the cache.

    Attributes:
        identity: What decides about them besides the tokens: base, number formats, and the adapter gone on from.
        adapters_off: Whether adapters are switched off.
        budget: Tokens of one forward pass, padding included.
    """

    identity: tuple[Any, ...]
    adapters_off: bool
    budget: int

    def scores(self, model: torch.nn.Module, sequences: _Sequences, costs: Sequence[int], pad_token_id: int) -> Tensor:
        """Return the log-probabilities of both answers of each row [N, 2], fp32.

        Args:
            model: To be trained, before its first step.
            sequences: Gives ids and labels of rows: their first answers, then their second ones.
            costs: Tokens of each row's two answers, padded alike.
            pad_token_id: Padding.
        """
        path = self._path(sequences, len(costs), _device(model))
        found = _read(path, len(costs))
        if not _everywhere(found is not None):
            found = self._computed(model, sequences, costs, pad_token_id)
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                _write(path, found)
        assert found is not None
        return found

    @torch.no_grad()
    def _computed(
        self, model: torch.nn.Module, sequences: _Sequences, costs: Sequence[int], pad_token_id: int
    ) -> Tensor:
        from haori.tasks.preference.objective import answer_scores, pad

        device = _device(model)
        found = torch.zeros(len(costs), 2, device=device)
        was_training = model.training
        model.eval()
        batches = plan_batches(costs, self.budget)
        rank, processes = _place()

        def rows_done() -> Iterator[int]:
            for rows in batches[rank::processes]:
                scores, _ = answer_scores(model, pad(sequences(rows), pad_token_id, device))
                found[rows] = scores.view(2, len(rows)).T
                yield from rows

        with self._paths(model):
            for _ in tracked(rows_done(), "Scoring under the reference", total=len(costs) / processes):
                pass
        model.train(was_training)
        if processes > 1:
            torch.distributed.all_reduce(found)
        return found.cpu()

    def _paths(self, model: Any) -> AbstractContextManager[Any]:
        return _adapters_off(model) if self.adapters_off else nullcontext()

    def _path(self, sequences: _Sequences, rows: int, device: torch.device) -> Path:
        chunks = (range(start, min(rows, start + _CHUNK)) for start in range(0, rows, _CHUNK))
        tokens = hash_parts(hash_data(sequences(chunk)) for chunk in chunks)
        key = hash_data(["reference", _VERSION, *self.identity, device.type, tokens])
        return settings().cache / "reference" / short(key)


def reference_of(recipe: "PreferenceRecipe") -> Reference | None:
    """Return the reference of a resolved recipe; None for a loss that needs none."""
    from haori.bases import find_base

    wanted = getattr(recipe.loss, "reference", None)
    if wanted is None:
        return None
    fingerprint = find_base(recipe.base, revision=recipe.revision).fingerprint
    method = recipe.method
    changes: list[Any] = []
    if isinstance(method, FullMethod):
        changes.append(method.weights)
    if isinstance(method, QloraMethod):
        changes += [method.bits, method.double_quantization]
    if isinstance(method, LoraMethod | QloraMethod) and method.init in _RESIDUAL:
        changes += [method.init, method.rank, recipe.training.seed]
    off = isinstance(method, PeftMethod)  # some of PEFT's methods change the model from the start
    if recipe.from_ is not None and wanted == "start":
        changes.append(_adapter(recipe.from_))
    elif recipe.from_ is not None:
        off = True
        if isinstance(method, LowRankMethod) and method.bias != "none":
            raise RecipeError(
                f"The adapter {recipe.from_!r} has biases of the base, which cannot be switched off to compare with "
                "the base; use loss.reference=start."
            )
    identity = (fingerprint.structure, fingerprint.weights, recipe.training.dtype, *changes)
    return Reference(identity, off, recipe.training.budgets().microbatch)


def _adapter(spec: str) -> str:
    """Return the id of the adapter that a run goes on from: a name of the library, or a folder."""
    from haori.library import Library, inspect_adapter
    from haori.library.cards import adapter_id

    folder = Path(spec) if "/" in spec else Library().get(spec).path
    return adapter_id(inspect_adapter(folder))


@contextmanager
def _adapters_off(model: Any) -> Iterator[None]:
    """Let a model compute as its base, on PEFT's own path, inside the block."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with stock_forward(model), model.disable_adapter():
        yield
    for parameter, flag in flags.items():  # PEFT makes all of an adapter trainable when it is switched on again
        parameter.requires_grad = flag


def _place() -> tuple[int, int]:
    """Return the number of this process, and of processes."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _everywhere(here: bool) -> bool:
    """Say whether something is so in all processes."""
    if not torch.distributed.is_initialized():
        return here
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, here)
    return all(found)


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _read(folder: Path, rows: int) -> Tensor | None:
    import numpy as np

    try:
        found = np.load(folder / "scores.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = found.shape == (rows, 2) and found.dtype == np.float32
    return torch.from_numpy(found) if whole else None


def _write(folder: Path, scores: Tensor) -> None:
    import numpy as np

    with staged_folder(folder) as stage:
        np.save(stage / "scores.npy", scores.numpy(), allow_pickle=False)
