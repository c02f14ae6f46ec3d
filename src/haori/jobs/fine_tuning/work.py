"""The work of a fine-tuning job, in a process of its own: train, prove, measure against the base, name what was made.

Whatever instant it is killed at, the next attempt finds what was done in the folder and repeats the rest: the names and
files that it writes are those of the job, so that writing them twice changes nothing.
"""

import math
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.events import EventSink, Said
from haori.jobs.fine_tuning.recipe import Hyperparameters
from haori.jobs.model_names import ModelName

if TYPE_CHECKING:
    from haori.library import StoredAdapter
    from haori.training.preparation import Prepared

__all__ = ["fine_tune"]


def fine_tune(arguments: dict[str, Any], folder: Path, on_event: EventSink) -> dict[str, Any]:
    """Do a job, or go on with it.

    Args:
        arguments: As `FineTuning.create` submitted them.
        folder: Holds the run folder `run`.
        on_event: Receives what training reports, and the comparison with the base.

    Returns:
        `model`, `result_file`, `adapter`, `checkpoints`, `evaluation`, `tokens`, and for estimates the
        run's `record` and the `machine`.

    Raises:
        StoppedError: It was asked to stop and has saved a checkpoint.
        VerificationError: The adapter is not what was trained; nothing is named.
        HaoriError: As `train_run`.
    """
    from haori.jobs.database.connection import open_database
    from haori.jobs.files import FileStore
    from haori.jobs.fine_tuning.checkpoints import measured_accuracies, store_checkpoints
    from haori.jobs.fine_tuning.results import checkpoint_metrics, result_csv
    from haori.jobs.model_names import ModelNames
    from haori.jobs.queue.kinds.training import train_in
    from haori.library import Library
    from haori.tasks.recipe import load_recipe
    from haori.training.measurements import read_measurements
    from haori.training.preparation import prepare

    run = folder / "run"
    on_event(Said(text=f"The training file has {arguments['rows']:,} rows."))
    record = train_in(run, _settled(arguments), on_event)
    assert record.adapter is not None
    final = Library().get(record.adapter)
    prepared = prepare(load_recipe(run / "recipe.yaml"))
    lines = read_measurements(run / "metrics.jsonl")
    adapters = store_checkpoints(run, prepared, final, record.best_step or record.steps, on_event)
    of_text = arguments["wanted"]["method"] == "supervised"  # accuracies of pairs of answers mean nothing
    accuracies = measured_accuracies(prepared, adapters, prepared.recipe.base) if of_text else {}
    evaluation = _against_base(arguments, prepared, final, folder, on_event)
    database = open_database()
    try:
        names = _names(arguments["name"], final, adapters)
        ModelNames(database).put(names)
        file_id = f"file-{arguments['name']['job_id'].removeprefix('ftjob-')}"
        FileStore(database).put(
            arguments["owner"], file_id, "step_metrics.csv", "fine-tune-results", result_csv(lines, accuracies)
        )
    finally:
        database.close()
    return {
        "model": names[0].name, "adapter": final.name, "result_file": file_id, "evaluation": evaluation,
        "tokens": record.cost, "run": str(run), "record": record.model_dump(mode="json"),
        "machine": socket.gethostname(),
        "checkpoints": [
            {"name": name.name, "step": name.step, "adapter": name.library_name, "created": name.created,
             "metrics": checkpoint_metrics(name.step, lines, accuracies.get(name.step, {}))}
            for name in names if name.step is not None
        ],
    }  # fmt: skip


def _settled(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe with what depends on the data: a multiple of the usual learning rate, rows of a step, saves."""
    asked = Hyperparameters.model_validate(arguments["wanted"]["hyperparameters"])
    checkpoints: int | None = arguments["wanted"].get("checkpoints")
    recipe: dict[str, Any] = arguments["recipe"]
    if asked.learning_rate_multiplier == "auto" and asked.batch_size == "auto" and checkpoints is None:
        return recipe
    from haori.tasks.recipe import recipe_from
    from haori.training.preparation import planned_steps, prepare

    found = prepare(recipe_from(recipe))
    if asked.learning_rate_multiplier != "auto":
        usual = found.recipe.optimizer.lr
        assert usual != "auto"
        recipe["optimizer"]["lr"] = usual * asked.learning_rate_multiplier
    if asked.batch_size != "auto":
        costs = list(found.train.costs)
        # A step is budgeted in tokens: those of as many rows of mean length, and of the longest at least.
        recipe["training"]["batch_tokens"] = max(math.ceil(asked.batch_size * sum(costs) / len(costs)), *costs)
    if checkpoints is not None:
        planned = found if asked.batch_size == "auto" else prepare(recipe_from(recipe))
        recipe["training"]["save_every"] = math.ceil(planned_steps(planned) / checkpoints)
    return recipe


def _against_base(
    arguments: dict[str, Any], prepared: "Prepared", final: "StoredAdapter", folder: Path, on_event: EventSink
) -> dict[str, Any] | None:
    """Measure the adapter beside its base on the validation file; return the finding and its figures."""
    if arguments["validation_file"] is None:
        return None
    from haori.evaluation import evaluate_stored
    from haori.evaluation.result import headline
    from haori.tasks.examination import MeasureOptions

    of_recipe = prepared.recipe.data
    section = of_recipe.model_copy(update={"path": of_recipe.validation, "validation": None, "validation_share": 0.0})
    options = MeasureOptions(metrics=("perplexity",) if arguments["wanted"]["method"] == "supervised" else None)
    result, _ = evaluate_stored(
        final.name, section, options=options, base_spec=prepared.recipe.base, samples=0, out=folder / "evaluation"
    )
    finding = headline(result)
    on_event(Said(text=f"Against the base on the validation file: {finding}"))
    return {"finding": finding, "metrics": {name: metric.model_dump() for name, metric in result.metrics.items()}}


def _names(
    given: dict[str, Any], final: "StoredAdapter", adapters: "dict[int, StoredAdapter] | Any"
) -> list[ModelName]:
    """Return the rows of the end result and of each checkpoint."""
    name = ModelName.model_validate(given)
    now = time.time()
    made = {"adapter": final.card.id, "library_name": final.name, "created": now}
    names = [name.model_copy(update=made)]
    for step, adapter in sorted(adapters.items()):
        changes = {"name": f"{name.name}:ckpt-step-{step}", "step": step}
        found = {"adapter": adapter.card.id, "library_name": adapter.name, "created": now}
        names.append(name.model_copy(update=changes | found))
    return names
