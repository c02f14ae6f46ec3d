"""One trial of a sweep: a whole training in a process and workspace of its own.

The trial's adapter goes into the library of the trial's folder, never into the user's. Knows nothing about how trials
are chosen.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from haori.core.events import Event, EventSink, Measured, discard
from haori.core.records import BaseReference, DataReference, Record, RunRecord
from haori.jobs.process import JobResult, JobSpec, run_job
from haori.tasks.recipe import Recipe, recipe_from

__all__ = ["TrialOutcome", "run_trial", "train_trial"]


class TrialOutcome(Record):
    """How a trial ended."""

    state: Literal["finished", "pruned", "failed", "stopped"]
    loss: float | None = None
    """Lowest validation loss, in the unit of the task's losses."""
    best_epoch: int | None = None
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    run: str | None = None
    """Run folder."""
    measured_on: str | None = None
    """Hash of the data and fingerprint of the base; equal for trials that can be compared."""
    error: str | None = None
    error_kind: str | None = None


def train_trial(arguments: Mapping[str, Any], on_event: EventSink) -> dict[str, Any]:
    """Train as a job's child does (see `process.py`); return run folder, record and signal as JSON data."""
    from haori.training import train_run

    run = train_run(recipe_from(json.loads(arguments["recipe"])), on_event=on_event)
    data = DataReference.model_validate_json((run.folder / "data.json").read_bytes())
    base = BaseReference.model_validate_json((run.folder / "base.json").read_bytes())
    return {
        "run": str(run.folder),
        "record": run.record.model_dump(mode="json"),
        "signal": run.signal,
        "measured_on": f"{data.hash} {base.id}",
    }


def run_trial(
    recipe: Recipe,
    folder: Path,
    *,
    prune: Callable[[int, float], bool],
    stop: Callable[[], bool],
    on_event: EventSink = discard,
) -> TrialOutcome:
    """Train `recipe` in a child process and wait for it.

    Args:
        recipe: What to train.
        folder: The trial's folder: job, library and runs.
        prune: Told the number of each validation, from 1, and its loss; says whether to give up on the trial.
        stop: Says whether the whole sweep is to stop.
        on_event: Receives what the trial reports.
    """
    validations = _Validations(prune)
    spec = JobSpec(
        task="haori.jobs.sweep.trial:train_trial",
        arguments={"recipe": recipe.model_dump_json()},
        folder=folder,
        environment={"HAORI_WORKSPACE": str(folder)},
    )

    def emit(event: Event) -> None:
        validations.see(event)
        on_event(event)

    result = run_job(spec, on_event=emit, stop=lambda: validations.pruned or stop())
    for name in ("checkpoints", "model"):  # large and of no use: trials are for their losses and recipes
        for path in folder.glob(f"runs/*/{name}"):
            shutil.rmtree(path)
    return _outcome(result, validations, stopped=stop())


class _Validations:
    """Counts the validations of a trial and remembers whether it was given up."""

    def __init__(self, prune: Callable[[int, float], bool]) -> None:
        self.prune = prune
        self.count = 0
        self.best: float | None = None
        self.pruned = False

    def see(self, event: Event) -> None:
        """Take an event; the validation before the first step does not count."""
        if not isinstance(event, Measured) or not event.step or self.pruned:
            return
        loss = event.values["loss"]
        self.count += 1
        self.best = loss if self.best is None else min(loss, self.best)
        self.pruned = self.prune(self.count, loss)


def _outcome(result: JobResult, validations: _Validations, *, stopped: bool) -> TrialOutcome:
    value = result.value
    if value is None:
        # SIGTERM may come before training listens for it; the child then dies of it, which is no failure.
        state: Literal["failed", "pruned", "stopped"] = (
            "pruned" if validations.pruned else "stopped" if stopped else "failed"
        )
        if state != "failed":
            return TrialOutcome(state=state, loss=validations.best)
        return TrialOutcome(state=state, loss=validations.best, error=result.error, error_kind=result.kind)
    record = RunRecord.model_validate(value["record"])
    ended = value["signal"] is not None
    if record.validation_loss is None and not ended:
        error = (
            "There are no validation rows to compare trials by; raise data.validation_share or give data.validation."
        )
        return TrialOutcome(state="failed", error=error, error_kind="RecipeError")
    return TrialOutcome(
        state=("pruned" if validations.pruned else "stopped") if ended else "finished",
        loss=validations.best if ended else record.validation_loss,
        best_epoch=record.best_epoch,
        seconds=record.seconds,
        peak_memory_bytes=record.peak_memory_bytes,
        run=value["run"],
        measured_on=value["measured_on"],
    )
