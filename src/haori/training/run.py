"""One run from recipe to what is proved and kept, and the same run continued after an interruption.

What is trained is an adapter, which the library stores, or after full fine-tuning a model, which stays in the run
folder (see run_folder.py).
"""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.errors import InputError, MismatchError
from haori.core.events import EventSink, Finished, Started, discard, fan_out, reporting_failure
from haori.core.lock import file_lock
from haori.core.methods import FullMethod
from haori.core.records import BaseReference, DataReference, RunRecord, Verification, now
from haori.core.settings import settings
from haori.core.storage import make_folder, sweep
from haori.library import export_stored
from haori.library.formats.peft import check_new_folder
from haori.tasks.recipe import Recipe, load_recipe
from haori.training.checkpoint import checkpoints_of, step_of
from haori.training.finish import copy_model, prove_and_store, prove_model
from haori.training.preparation import Prepared, planned_steps, prepare
from haori.training.run_folder import new_run_folder, note_failure, read_run_file, write_record
from haori.training.session import Trained, train_prepared

if TYPE_CHECKING:
    from haori.library import StoredAdapter

__all__ = ["TrainedRun", "resume_run", "train_run"]


@dataclass(frozen=True)
class TrainedRun:
    """What `train_run` returns."""

    folder: Path
    recipe: Recipe
    record: RunRecord
    adapter: "StoredAdapter | None"
    """The stored adapter; None when the run was stopped before its end, or trained a whole model."""
    signal: int | None = None
    """The signal that stopped the run, if one did."""
    verification: Verification | None = None
    """The proof of the adapter or model; None when the run was stopped before its end."""
    reports: bool = True
    """Whether this process tells the user; of several, only the first one does."""


def train_run(
    recipe: Recipe,
    *,
    out: Path | None = None,
    folder: Path | None = None,
    on_event: EventSink = discard,
    prepared: Prepared | None = None,
) -> TrainedRun:
    """Train, verify and store an adapter, or a whole model.

    Args:
        recipe: What to train; `auto` values are resolved.
        out: Also write the finished adapter, or model, to this new folder.
        folder: The run folder; by default a new one under `HAORI_HOME/runs`.
        on_event: Receives what happens, from the run's folder to its end; what it raises does not end the run.
        prepared: The result of `prepare(recipe)`, if it was made already.

    Raises:
        HaoriError: Anything that is wrong, before training where it can be known before.
    """
    if out is not None:
        check_new_folder(out)
        make_folder(out.parent)
    make_folder(settings().home)
    prepared = prepared or prepare(recipe)
    if out is not None:
        prepared.task.check_out(prepared.recipe)
    folder = new_run_folder(prepared, folder)
    return _execute(prepared, folder, out, fan_out(on_event))


def resume_run(
    folder: Path,
    *,
    out: Path | None = None,
    on_event: EventSink = discard,
) -> TrainedRun:
    """Continue a run from its last complete checkpoint (or from the start, if it had none).

    Raises:
        InputError: The folder is no run, or the run is finished.
        MismatchError: The base or the data changed since the run began.
    """
    record = read_run_file(folder, RunRecord, "run.json")
    if record.status == "finished":
        result = f"its model is {record.model}" if record.model else f"its adapter is {record.adapter}"
        raise InputError(f"The run {str(folder)!r} is finished; {result}.")
    if out is not None:
        check_new_folder(out)
        make_folder(out.parent)
    prepared = prepare(load_recipe(folder / "recipe.yaml"))
    if out is not None:
        prepared.task.check_out(prepared.recipe)
    before = read_run_file(folder, DataReference, "data.json")
    if prepared.split.reference().hash != before.hash:
        raise MismatchError(f"The data {before.source!r} changed since the run began; restore it, or start a new run.")
    base = read_run_file(folder, BaseReference, "base.json")
    if not prepared.base.reference().is_same(base, base.components):
        raise MismatchError(
            f"The base {base.name!r} changed since the run began (fingerprint {base.id}, now "
            f"{prepared.base.id}); restore it, or start a new run."
        )
    return _execute(prepared, folder, out, fan_out(on_event))


def _execute(
    prepared: Prepared,
    folder: Path,
    out: Path | None,
    on_event: EventSink,
) -> TrainedRun:
    """Hold the run folder and go on from its newest checkpoint, or from the start.

    Of several processes the first one holds the folder, and it alone writes there. After a signal the others return
    when it has written the record: a launcher ends the processes that are left as soon as one has exited.
    """
    from accelerate import PartialState

    state = PartialState(cpu=prepared.device == "cpu")
    if not state.is_main_process:
        trained = train_prepared(prepared, folder, _newest(folder), now(), discard)
        if trained.signal is not None:
            state.wait_for_everyone()
        return TrainedRun(folder, prepared.recipe, trained.record, None, trained.signal, reports=False)
    with file_lock(folder / "run.lock", holds="run", timeout_s=0):
        for place in (folder, folder / "checkpoints"):
            sweep(place)
        with reporting_failure(on_event):
            run = _go_on(prepared, folder, out, on_event)
    if run.signal is not None:
        state.wait_for_everyone()
    return run


def _go_on(
    prepared: Prepared,
    folder: Path,
    out: Path | None,
    on_event: EventSink,
) -> TrainedRun:
    record = RunRecord(name=prepared.recipe.name, status="running", started=now())
    write_record(folder, record)
    checkpoint = _newest(folder)
    on_event(
        Started(
            folder=str(folder), name=record.name, task=prepared.task.kind,
            step=step_of(checkpoint) if checkpoint else 0, total_steps=planned_steps(prepared), unit=prepared.task.unit,
        )
    )  # fmt: skip
    try:
        trained = train_prepared(prepared, folder, checkpoint, record.started, on_event)
        record = trained.record
        if trained.signal is not None:
            write_record(folder, record)
            on_event(Finished(folder=str(folder), record=record, signal=trained.signal))
            return TrainedRun(folder, prepared.recipe, record, None, trained.signal)
        gc.collect()  # the live model, before a fresh base is loaded beside it
        done = _keep(prepared, folder, trained, out, on_event)
    except BaseException as error:
        note_failure(folder, record, error)
        raise
    write_record(folder, done.record)
    on_event(Finished(folder=str(folder), record=done.record, adapter=done.record.adapter))
    return done


def _keep(prepared: Prepared, folder: Path, trained: Trained, out: Path | None, on_event: EventSink) -> TrainedRun:
    """Prove what was trained and put it where it belongs."""
    recipe, record = prepared.recipe, trained.record
    if isinstance(recipe.method, FullMethod):
        proof = prove_model(prepared, folder, trained.live, on_event)
        if out is not None:
            copy_model(folder, out)
        record = record.with_fields(model=str(folder / "model"), ended=now())
        return TrainedRun(folder, recipe, record, None, verification=proof)
    stored = prove_and_store(prepared, folder, record, trained.live, on_event)
    if out is not None:
        export_stored(stored.name, out, base=prepared.base)
    record = record.with_fields(adapter=stored.name, ended=now())
    return TrainedRun(folder, recipe, record, stored, verification=stored.card.verification)


def _newest(folder: Path) -> Path | None:
    found = checkpoints_of(folder)
    return found[-1] if found else None
