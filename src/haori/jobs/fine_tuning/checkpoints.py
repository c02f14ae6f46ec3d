"""Checkpoints of a run as adapters of their own: each proved as the end result is, named, and measured."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import VerificationError
from haori.core.events import EventSink, Warned
from haori.core.records import now
from haori.core.storage import staged_folder

if TYPE_CHECKING:
    from haori.library import StoredAdapter
    from haori.training.preparation import Prepared

__all__ = ["measured_accuracies", "store_checkpoints"]

_WEIGHTS = ("adapter_model.safetensors", "adapter_config.json", "words.json")
_TRAINING_ROWS = 200


def store_checkpoints(
    run: Path, prepared: "Prepared", final: "StoredAdapter", best_step: int | None, on_event: EventSink
) -> Mapping[int, "StoredAdapter"]:
    """Add the checkpoints that the run kept to the library; one that fails its proof is left out with a warning.

    Args:
        run: The run folder.
        prepared: What was trained.
        final: The stored end result.
        best_step: Whose weights that has.
        on_event: Told of what is left out.

    Returns:
        The adapters by their optimizer steps; that of `best_step` is the end result itself.
    """
    from haori.training.checkpoint import checkpoints_of, step_of

    found: dict[int, StoredAdapter] = {}
    for folder in checkpoints_of(run):
        step = step_of(folder)
        if step == best_step:
            found[step] = final
            continue
        try:
            found[step] = _store(run, folder, prepared, final, step)
        except VerificationError as error:
            on_event(Warned(text=f"The checkpoint of step {step} is not offered: {error}"))
    return found


def _store(run: Path, folder: Path, prepared: "Prepared", final: "StoredAdapter", step: int) -> "StoredAdapter":
    from haori.adapters.loading import loading_of
    from haori.library import Library, adapter_id, inspect_adapter, require_passed, verify_adapter

    with staged_folder(run / "offered" / folder.name) as stage:
        shutil.copytree(run / "adapter", stage, dirs_exist_ok=True)
        for name in _WEIGHTS:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, stage / name)
    place = run / "offered" / folder.name
    loading = loading_of(prepared.recipe.method, prepared.recipe.training.dtype)
    proof = verify_adapter(
        prepared.base, place, dtype=loading.dtype, quantization=loading.quantization,
        prompt_pair=prepared.task.rendering(prepared.processor, prepared.recipe, prepared.split),
        head=prepared.task.head(prepared.recipe),
    )  # fmt: skip
    require_passed(proof)
    identity = adapter_id(inspect_adapter(place))
    card = final.card.model_copy(
        update={"id": identity, "verification": proof, "created": now(), "evaluations": (), "names": ()}
    )
    return Library().add(place, f"{final.card.names[0].partition('@')[0]}-step-{step}", card)


def measured_accuracies(
    prepared: "Prepared", adapters: Mapping[int, "StoredAdapter"], base: str
) -> dict[int, dict[str, float]]:
    """Measure each adapter's token accuracy on the validation rows, and on up to 200 of the training rows."""
    from haori.jobs.fine_tuning.accuracy import token_accuracy
    from haori.library import open_adapter

    budget = prepared.recipe.training.budgets().microbatch
    found: dict[int, dict[str, float]] = {}
    for step, adapter in adapters.items():
        model: Any = open_adapter(adapter.name, base_spec=base).model
        measured = {"train": token_accuracy(model, prepared.train, budget, most_rows=_TRAINING_ROWS)}
        if prepared.validation is not None:
            measured["valid"] = token_accuracy(model, prepared.validation, budget)
        found[step] = {name: share for name, share in measured.items() if share is not None}
    return found
