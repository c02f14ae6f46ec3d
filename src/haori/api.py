"""The Python interface, what a script needs: `haori.train`, `haori.resume`, `haori.evaluate`, `haori.compare`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from haori.core.events import EventSink
    from haori.evaluation import EvaluationResult
    from haori.evaluation.pictures.asking import PictureOptions
    from haori.jobs import Comparison
    from haori.tasks.examination import MetricGroup
    from haori.tasks.recipe import Recipe
    from haori.training import TrainedRun

__all__ = ["compare", "evaluate", "recipe_of", "resume", "train"]


def train(
    recipe: "Recipe | Path | str | None" = None,
    *,
    base: str | None = None,
    data: str | None = None,
    name: str | None = None,
    task: str | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    progress: bool = True,
    on_event: "EventSink | None" = None,
) -> "TrainedRun":
    """Train an adapter, prove that the saved file works, and keep it in the library.

    Args:
        recipe: A recipe, or the path of one. Not needed with `base`, `data` and `name`.
        base: Base model: catalogue name, folder, hub id or GGUF file.
        data: File, folder or hub dataset id.
        name: Name of the adapter in the library.
        task: What is learnt; text generation by default.
        overrides: Recipe keys to set, as `optimizer.lr=1e-4`.
        out: Also write the finished adapter to this new folder.
        progress: Show progress on standard error.
        on_event: Called with each event of the run (`haori.core.events`): steps, validations, files, how it ended. What
            it raises does not end the run.

    Raises:
        HaoriError: What was given cannot be used, training could not go on, or the proof failed.
    """
    from haori.training import train_run

    found = recipe_of(recipe, base, data, name, overrides, task=task)
    with _shown(progress, on_event) as sink:
        return train_run(found, out=out, on_event=sink)


def recipe_of(
    recipe: "Recipe | Path | str | None",
    base: str | None,
    data: str | None,
    name: str | None,
    overrides: Sequence[str],
    *,
    task: str | None = None,
) -> "Recipe":
    """Build the recipe that `train` was asked for.

    Raises:
        RecipeError: A key or value is wrong.
        InputError: Neither a recipe nor base, data and name together were given.
    """
    import json

    from haori.core.errors import InputError
    from haori.tasks.recipe import Recipe, load_recipe, recipe_from

    flags = {"base": base, "data.path": data, "name": name, "task": task}
    # Quoted, so that a value stays text even where YAML would read a number.
    given = [f"{key}={json.dumps(str(value))}" for key, value in flags.items() if value is not None]
    if isinstance(recipe, Recipe):
        return recipe_from(recipe.model_dump(mode="json"), [*given, *overrides])
    if recipe is not None:
        return load_recipe(Path(recipe), [*given, *overrides])
    if base is None or data is None or name is None:
        raise InputError("Give a recipe file, or --base, --data and --name together.")
    if task is None and not any(override.partition("=")[0].strip() == "task" for override in overrides):
        given += _task_of_base(base)
    return recipe_from({}, [*given, *overrides])


def _task_of_base(base: str) -> list[str]:
    """Return the task of a base that is a pipeline, for pictures; the usual task is for any other."""
    from haori.bases import find_base
    from haori.core.errors import HaoriError

    try:
        return ["task=text_to_image"] if find_base(base).pipeline is not None else []
    except HaoriError:  # said where it is looked for in earnest, after what else is wrong
        return []


def resume(folder: Path | str, *, progress: bool = True, on_event: "EventSink | None" = None) -> "TrainedRun":
    """Continue an interrupted run from its folder; the result equals that of a run that was never interrupted.

    Args:
        folder: The run folder.
        progress: Show progress on standard error.
        on_event: Called with each event, as in `train`.

    Raises:
        HaoriError: The folder is no unfinished run, or its base or data changed.
    """
    from haori.training import resume_run

    with _shown(progress, on_event) as sink:
        return resume_run(Path(folder), on_event=sink)


def evaluate(
    name: str,
    data: str,
    *,
    against_base: bool = True,
    labels: "Sequence[str] | Literal['auto', 'none']" = "auto",
    metrics: "Sequence[MetricGroup] | None" = None,
    samples: int = 3,
    max_new_tokens: int = 64,
    overrides: Sequence[str] = (),
    pictures: "PictureOptions | None" = None,
    out: Path | None = None,
) -> "tuple[EvaluationResult, Path]":
    """Measure an adapter of the library on data, beside its base; return the result and the report's folder.

    Args:
        name: `support` or `support@2`.
        data: File, folder or hub dataset id.
        against_base: Measure the bare base too.
        labels: The labels of a label task; `auto` finds out whether it is one, `none` says that it is not.
        metrics: Groups of metrics; those that apply by default.
        samples: Side-by-side answers in the report.
        max_new_tokens: Longest generated answer in tokens.
        overrides: Keys of the data section to set, as `data.columns.prompt=q`.
        pictures: How an adapter for pictures is measured; labels, metrics, `against_base` and `max_new_tokens` are not
            for it.
        out: Folder of the report; by default one under `HAORI_HOME/evaluations`.

    Raises:
        HaoriError: Adapter, base or data cannot be used.
    """
    from haori.core.errors import InputError
    from haori.data.pictures import PictureSection
    from haori.evaluation import evaluate_stored
    from haori.evaluation.stored import data_task
    from haori.library import Library
    from haori.tasks.examination import MeasureOptions
    from haori.tasks.recipe import recipe_from

    task = data_task(Library().get(name).card)
    section = recipe_from({"name": "a", "base": "b", "task": task, "data": {"path": str(data)}}, overrides).data
    options = MeasureOptions(labels=labels, metrics=metrics, max_new_tokens=max_new_tokens)
    if isinstance(section, PictureSection):
        from haori.evaluation.pictures.asking import PictureOptions
        from haori.evaluation.pictures.evaluation import evaluate_pictures

        if options != MeasureOptions() or not against_base:
            raise InputError("Pictures have no labels and no answers, and are measured against the base.")
        return evaluate_pictures(name, section, options=pictures or PictureOptions(), samples=samples, out=out)
    if pictures is not None:
        raise InputError(f"{name!r} was trained for {task}, and draws no pictures.")
    return evaluate_stored(name, section, options=options, against_base=against_base, samples=samples, out=out)


def compare(
    recipe: "Recipe | Path | str | None" = None,
    *,
    base: str | None = None,
    data: str | None = None,
    name: str | None = None,
    overrides: Sequence[str] = (),
    methods: Sequence[str] | None = None,
    seeds: int = 3,
    test: str | None = None,
    general: str | None = None,
    lr_sweep: bool = False,
    out: Path | None = None,
    progress: bool = True,
    on_event: "EventSink | None" = None,
) -> "tuple[Comparison, Path]":
    """Train several methods on the same data, each run in a process of its own; return figures and report folder.

    Args:
        recipe: A recipe, or the path of one. Not needed with `base`, `data` and `name`.
        base: Base model: catalogue name, folder, hub id or GGUF file.
        data: File, folder or hub dataset id.
        name: Name of the comparison.
        overrides: Recipe keys to set, as `training.epochs=2`.
        methods: Kinds of method; by default the recipe's own and full fine-tuning. The base is always measured.
        seeds: Runs per method, with the recipe's seed and those after it.
        test: Data to score on; by default the recipe's validation rows.
        general: General text of one's own, to measure forgetting on besides the shipped one.
        lr_sweep: Try three or four learning rates per method first, judged by validation loss.
        out: New folder for the comparison; by default one under `comparisons` in HAORI_HOME.
        progress: Show on standard error what is being done.
        on_event: Called with each event, as in `train`; events of a run have its name as their `job`.

    Raises:
        HaoriError: What was given cannot be used. A method that fails is noted in `Comparison.failed` instead.
    """
    from haori.jobs import compare_methods

    found = recipe_of(recipe, base, data, name, overrides)
    with _shown(progress, on_event, between_jobs="comparing") as sink:
        return compare_methods(
            found, methods=methods, seeds=seeds, test=test, general=general, lr_sweep=lr_sweep, out=out, on_event=sink
        )


@contextmanager
def _shown(progress: bool, on_event: "EventSink | None", *, between_jobs: str | None = None) -> "Iterator[EventSink]":
    """Yield where events go: to `on_event` if it is given, and if wanted to a display on standard error."""
    from haori.core.events import discard, fan_out

    listener = on_event or discard
    if not progress:
        yield listener
        return
    from rich.console import Console

    from haori.training import TrainingDisplay

    with TrainingDisplay(Console(stderr=True, highlight=False), between_jobs=between_jobs) as display:
        yield fan_out(display.update, listener)
