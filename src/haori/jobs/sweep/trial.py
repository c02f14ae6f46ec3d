"""One trial of a sweep: a whole training in a process and workspace of its own.

The trial's adapter goes into the library of the trial's folder, never into the user's. Knows nothing about how trials
are chosen.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from haori.core.records import BaseReference, DataReference, Record, RunRecord
from haori.jobs.process import JobResult, JobSpec, run_job
from haori.tasks.recipe import Recipe, recipe_from

__all__ = ["TrialOutcome", "run_trial", "train_trial"]


class TrialOutcome(Record):
    """How a trial ended."""

    state: Literal["finished", "pruned", "failed", "stopped"]
    loss: float | None = None
    """Lowest validation loss, in nats per token."""
    best_epoch: int | None = None
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    run: str | None = None
    """Run folder."""
    measured_on: str | None = None
    """Hash of the data and fingerprint of the base; equal for trials that can be compared."""
    error: str | None = None
    error_kind: str | None = None


def train_trial(
    arguments: Mapping[str, Any], say: Callable[[str], None], show: Callable[[Any], None]
) -> dict[str, Any]:
    """Train as a job's child does (see `process.py`); return run folder, record and signal as JSON data."""
    from haori.training import train_run

    run = train_run(recipe_from(json.loads(arguments["recipe"])), say=say, show=show)
    data = DataReference.model_validate_json((run.folder / "data.json").read_bytes())
    base = BaseReference.model_validate_json((run.folder / "base.json").read_bytes())
    return {
        "run": str(run.folder),
        "record": run.record.model_dump(mode="json"),
        "signal": run.signal,
        "measured_on": f"{data.hash} {base.id}",
    }


def run_trial(
    recipe: Recipe, folder: Path, *, prune: Callable[[int, float], bool], stop: Callable[[], bool]
) -> TrialOutcome:
    """Train `recipe` in a child process and wait for it.

    Args:
        recipe: What to train.
        folder: The trial's folder: job, library and runs.
        prune: Told the number of each validation, from 1, and its loss; says whether to give up on the trial.
        stop: Says whether the whole sweep is to stop.
    """
    watch = _Watch(prune)
    spec = JobSpec(
        task="haori.jobs.sweep.trial:train_trial",
        arguments={"recipe": recipe.model_dump_json()},
        folder=folder,
        environment={"HAORI_WORKSPACE": str(folder)},
    )
    result = run_job(spec, show=watch.see, stop=lambda: watch.pruned or stop())
    for name in ("checkpoints", "model"):  # large and of no use: trials are for their losses and recipes
        for path in folder.glob(f"runs/*/{name}"):
            shutil.rmtree(path)
    return _outcome(result, watch, stopped=stop())


class _Watch:
    """Counts the validations of a trial and remembers whether it was given up."""

    def __init__(self, prune: Callable[[int, float], bool]) -> None:
        self.prune = prune
        self.validations = 0
        self.best: float | None = None
        self.pruned = False

    def see(self, progress: Mapping[str, Any]) -> None:
        """Take one event of the loop; the validation before the first step does not count."""
        loss = progress.get("validation_loss")
        if loss is None or not progress["step"] or self.pruned:
            return
        self.validations += 1
        self.best = loss if self.best is None else min(loss, self.best)
        self.pruned = self.prune(self.validations, loss)


def _outcome(result: JobResult, watch: _Watch, *, stopped: bool) -> TrialOutcome:
    value = result.value
    if value is None:
        # SIGTERM may come before training listens for it; the child then dies of it, which is no failure.
        state: Literal["failed", "pruned", "stopped"] = "pruned" if watch.pruned else "stopped" if stopped else "failed"
        if state != "failed":
            return TrialOutcome(state=state, loss=watch.best)
        return TrialOutcome(state=state, loss=watch.best, error=result.error, error_kind=result.kind)
    record = RunRecord.model_validate(value["record"])
    ended = value["signal"] is not None
    if record.validation_loss is None and not ended:
        error = (
            "There are no validation rows to compare trials by; raise data.validation_share or give data.validation."
        )
        return TrialOutcome(state="failed", error=error, error_kind="RecipeError")
    return TrialOutcome(
        state=("pruned" if watch.pruned else "stopped") if ended else "finished",
        loss=watch.best if ended else record.validation_loss,
        best_epoch=record.best_epoch,
        seconds=record.seconds,
        peak_memory_bytes=record.peak_memory_bytes,
        run=value["run"],
        measured_on=value["measured_on"],
    )
