"""Training as a kind of job: a recipe becomes an adapter of the library, or a model in the job's folder."""

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.events import EventSink
from haori.core.records import RunRecord
from haori.jobs.queue.child import StoppedError

if TYPE_CHECKING:
    from haori.training import TrainedRun

__all__ = ["train", "train_in"]


def train(arguments: dict[str, Any], folder: Path, on_event: EventSink) -> dict[str, Any]:
    """Train, or go on with training; returns run, adapter or model, tokens, and the run's record.

    Args:
        arguments: `recipe`: the recipe as JSON data.
        folder: Holds the run folder `run`.
        on_event: Receives what training reports.

    Raises:
        StoppedError: It was asked to stop and has saved a checkpoint.
        HaoriError: As `train_run`.
    """
    record = train_in(folder / "run", arguments["recipe"], on_event)
    return {
        "run": str(folder / "run"),
        "adapter": record.adapter,
        "model": None if record.model is None else str(folder / "run" / "model"),
        "tokens": record.cost if record.unit == "tokens" else None,
        "record": record.model_dump(mode="json"),
        "machine": socket.gethostname(),
    }


def train_in(folder: Path, recipe: dict[str, Any], on_event: EventSink) -> RunRecord:
    """Bring the run in a folder to its end, from wherever it stands; return its record.

    Raises:
        StoppedError: It was asked to stop and has saved a checkpoint.
        HaoriError: As `train_run`.
    """
    import json

    from haori.tasks.recipe import recipe_from
    from haori.training import resume_run, train_run
    from haori.training.run_folder import read_run_file

    if (folder / "run.json").is_file():
        record = read_run_file(folder, RunRecord, "run.json")
        if record.status == "finished":  # killed before its result was written
            return record
        run = resume_run(folder, on_event=on_event)
    else:
        run = train_run(recipe_from(json.loads(json.dumps(recipe))), folder=folder, on_event=on_event)
    return _ended(run)


def _ended(run: "TrainedRun") -> RunRecord:
    if run.signal is not None:
        raise StoppedError(f"The run was stopped after step {run.record.steps}, and a checkpoint was saved.")
    return run.record
