"""What the child processes of a comparison do: measure the base; train one run and measure what came of it.

Training comes first, in a fresh process, and its peak memory is read before anything is measured. A run whose training
is finished (`trained.json`) is not trained again. Knows nothing about the other runs.
"""

import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import DataError, TrainingError
from haori.core.events import EventSink, Said
from haori.core.records import DataReference
from haori.core.storage import make_folder, write_text
from haori.evaluation import EvaluationResult, evaluate_adapter
from haori.jobs.compare.records import BaseMeasured, Measured, MeasuredRow, Point, Trained
from haori.tasks.recipe import Recipe, recipe_from
from haori.tasks.registry import task_of
from haori.tasks.task import Split, Task

if TYPE_CHECKING:
    from haori.training import TrainedRun

__all__ = ["measure_base", "train_and_measure"]

_TRAINED = "trained.json"


def measure_base(arguments: Mapping[str, Any], on_event: EventSink) -> dict[str, Any]:
    """Check the data, then measure the bare base; returns `BaseMeasured`.

    Args:
        arguments: `recipe`, `test` and `general` as in `Plan`.
        on_event: Receives a line for the user.

    Raises:
        HaoriError: The base, the data, the test rows or the general text cannot be used.
    """
    from haori.bases import default_device, find_base

    recipe = recipe_from(json.loads(arguments["recipe"]))
    task = task_of(recipe.task)
    base = find_base(recipe.base, revision=recipe.revision)
    processor = task.processor(base, recipe)
    split = task.rows(recipe, base, processor)
    rows, reference = _test_rows(task, recipe, arguments["test"], split)
    task.check_general(arguments["general"])  # before weights are loaded
    measured = None
    if task.head(recipe) is None:
        on_event(Said(text=f"Measuring the bare base on {len(rows):,} rows and the general text."))
        model = task.model(base, recipe, dtype=recipe.training.dtype, device=default_device(), quantization=None)
        measured = _measure(task, recipe, model, processor, rows, reference, arguments["general"])
    return BaseMeasured(
        base=base.reference(),
        parameters=base.parameters,
        test=reference,
        rows=len(rows),
        measured=measured,
        notes=_test_notes(task, arguments["test"], rows, split),
        machine=_machine(),
    ).model_dump(mode="json")


def train_and_measure(arguments: Mapping[str, Any], on_event: EventSink) -> dict[str, Any]:
    """Train one run, unless it is trained already, and measure it if asked.

    Args:
        arguments: `recipe`; `folder`, where `trained.json` is kept; `measure`, whether to; `test` and `general`.
        on_event: Receives what the training reports.

    Returns:
        `trained`: a `Trained`; `measured`: a `Measured`, or None.

    Raises:
        HaoriError: Training or measuring failed.
    """
    recipe = recipe_from(json.loads(arguments["recipe"]))
    file = Path(arguments["folder"]) / _TRAINED
    if file.is_file():
        trained = Trained.model_validate_json(file.read_bytes())
    else:
        trained = _train(recipe, on_event)
        write_text(make_folder(file.parent) / file.name, trained.model_dump_json(indent=1))
    measured = (
        _measure_trained(trained, recipe, arguments["test"], arguments["general"]) if arguments["measure"] else None
    )
    return {
        "trained": trained.model_dump(mode="json"),
        "measured": measured.model_dump(mode="json") if measured else None,
    }


def _train(recipe: Recipe, on_event: EventSink) -> Trained:
    from haori.training import train_run

    run = train_run(recipe, on_event=on_event)
    if run.signal is not None:
        raise TrainingError(f"The run was stopped by signal {run.signal}.")
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)  # of a full fine-tuning several times the model
    resolved = run.recipe
    assert resolved.optimizer.lr != "auto"
    model = getattr(run.record, "model", None)
    return Trained(
        run=run.record,
        folder=str(run.folder),
        adapter=run.record.adapter,
        model=model,
        lr=resolved.optimizer.lr,
        dtype=resolved.training.dtype,
        method=resolved.method,
        data=DataReference.model_validate_json((run.folder / "data.json").read_bytes()),
        size_bytes=_size(run, model),
        curve=_curve(run.folder),
    )


def _size(run: "TrainedRun", model: str | None) -> int:
    if run.adapter is not None:
        return run.adapter.card.size_bytes
    if model is None:
        raise TrainingError(f"The run {str(run.folder)!r} left neither an adapter nor a model.")
    return sum(file.stat().st_size for file in Path(model).rglob("*.safetensors"))


def _curve(folder: Path) -> tuple[Point, ...]:
    from haori.training.measurements import read_measurements

    lines = read_measurements(folder / "metrics.jsonl")
    return tuple(
        Point(epoch=line["epoch"], step=line["step"], loss=line["loss"])
        for line in lines
        if line["kind"] == "validation"
    )


def _measure_trained(trained: Trained, recipe: Recipe, test: str | None, general: str | None) -> Measured:
    """Load what was trained, over the base as it was trained on (in 4 or 8 bits for QLoRA), and measure it."""
    from haori.adapters.loading import loading_of
    from haori.bases import default_device, find_base
    from haori.library import Library, attach_files, inspect_adapter

    task = task_of(recipe.task)
    base = find_base(recipe.base, revision=recipe.revision)
    processor = task.processor(base, recipe)
    split = task.rows(recipe, base, processor)
    rows, reference = _test_rows(task, recipe, test, split)
    resolved = task.resolve(recipe, split, base, default_device())[0]
    device = default_device()
    if trained.adapter is not None:
        quantization = loading_of(trained.method, trained.dtype).quantization
        files = inspect_adapter(Library().get(trained.adapter).path)
        loaded: Any = task.model(base, resolved, dtype=trained.dtype, device=device, quantization=quantization)
        model: Any = attach_files(loaded, files, base_name=base.name)
    else:
        assert trained.model is not None
        model = task.model(find_base(trained.model), resolved, dtype=trained.dtype, device=device, quantization=None)
    return _measure(task, resolved, model, processor, rows, reference, general)


def _measure(
    task: Task,
    recipe: Recipe,
    model: Any,
    processor: Any,
    rows: Sequence[Any],
    reference: DataReference,
    general: str | None,
) -> Measured:
    from peft import PeftModel

    from haori.adapters.fused import fuse

    if isinstance(model, PeftModel):
        fuse(model)  # stock PEFT would cast every adapter's input to fp32, which takes most of the time on a CPU
    options = task.options(recipe.data)
    result = evaluate_adapter(
        task, model, processor, rows, data_reference=reference, options=options, against_base=False, samples=0
    )
    losses = task.general_losses(model, processor, general)
    return Measured(rows=_rows(result), labels=result.labels, notes=result.notes, general=losses)


def _rows(result: EvaluationResult) -> tuple[MeasuredRow, ...]:
    return tuple(
        MeasuredRow(
            origin=row.origin,
            reference=row.reference,
            tokens=row.tokens,
            nll=row.adapter.nll,
            label=row.adapter.label,
            text=row.adapter.text,
            score=row.adapter.score,
            scores=row.adapter.scores,
        )
        for row in result.rows
    )


def _test_rows(task: Task, recipe: Recipe, test: str | None, split: Split) -> tuple[Sequence[Any], DataReference]:
    """Return the rows to score on: the test file, read as the training data are, or the validation rows."""
    if test is not None:
        read_alike = recipe.data.model_dump(exclude={"path", "split", "revision", "validation", "max_rows"})
        rows, reference, _ = task.read(type(recipe.data)(path=test, **read_alike))
        return rows, reference
    if not len(split.validation):
        raise DataError("There are no rows to score on: the recipe holds no validation rows; give a file with --test.")
    return task.held_out(split), split.reference()


def _test_notes(task: Task, test: str | None, rows: Sequence[Any], split: Split) -> tuple[str, ...]:
    """Say what speaks against the test rows: they chose the epoch, or were trained on."""
    if test is None:
        return (
            "The rows scored on are the validation rows, which also chose the best epoch of every run, so all scores "
            "are somewhat too good; give rows of their own with --test.",
        )
    leaks = task.leaks(rows, split)
    if leaks is None:
        return ("Whether test rows are among the training rows was not looked for: this task has no way to tell.",)
    if not leaks.exact and not leaks.near:
        return ()
    return (
        f"Of the {len(rows):,} test rows {leaks.exact:,} are in the training data and {leaks.near:,} nearly so: scores "
        "on them are too good.",
    )


def _machine() -> dict[str, str]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    cores = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    return {"device": device, "cores": cores, "python": platform.python_version(), **packages}
