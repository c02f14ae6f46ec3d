"""Compare methods on one base: the same data, token budget and early stopping for each, every run in its own process.

The base is measured first, so that whatever is wrong with base, data or test rows is known before anything is trained.
Then come, method by method, the learning rates (if asked) and the seeds. A method that fails is a row with its
sentence. Finished runs are kept, and `resume` goes on from them.
"""

from collections.abc import Sequence
from pathlib import Path

from haori.core.errors import InputError, MismatchError
from haori.core.events import EventSink, Finished, Started, discard, fan_out, reporting_failure
from haori.core.lock import file_lock
from haori.core.records import now
from haori.core.storage import write_text
from haori.core.user_path import user_path
from haori.data.section import TextSection
from haori.evaluation import forgetting_between
from haori.jobs.compare.folder import ComparisonFolder, RunOutcome, new_folder, read_plan
from haori.jobs.compare.rates import choose_rate
from haori.jobs.compare.recipes import BASE, adapt_recipe, check_methods, run_key, with_run
from haori.jobs.compare.records import BaseMeasured, Comparison, Cost, Measured, MethodResult, Plan, Rate
from haori.jobs.compare.scores import scores_of
from haori.jobs.recipe_paths import absolute_path, absolute_recipe
from haori.tasks.recipe import Recipe
from haori.tasks.registry import task_of
from haori.tasks.task import Task

__all__ = ["compare_methods", "resume_comparison"]

_FULL = "full"


def compare_methods(
    recipe: Recipe,
    *,
    methods: Sequence[str] | None = None,
    seeds: int = 3,
    test: str | None = None,
    general: str | None = None,
    lr_sweep: bool = False,
    out: Path | None = None,
    on_event: EventSink = discard,
) -> tuple[Comparison, Path]:
    """Compare methods; return the comparison and its folder, which holds comparison.json and comparison.html.

    Args:
        recipe: What to train. Its method is replaced by each of the others.
        methods: Kinds of method; by default the recipe's own and full fine-tuning. The base is always measured.
        seeds: Runs per method, with the recipe's seed and those after it.
        test: Data to score on; by default the recipe's validation rows.
        general: General text of one's own, to measure forgetting on besides the shipped one.
        lr_sweep: Try three or four learning rates per method first, judged by validation loss.
        out: New folder for the comparison; by default one under `comparisons` in HAORI_HOME.
        on_event: Receives what happens, events of a run with its name as their `job`; what it raises does not end the
            comparison.

    Raises:
        HaoriError: Nothing can be compared. A method that fails is no error but a row; see `Comparison.failed`.
    """
    default = ("lora", _FULL) if recipe.method.kind == _FULL else (recipe.method.kind, _FULL)
    trained = check_methods(recipe, tuple(methods) if methods is not None else default)
    _check(recipe, seeds, test, lr_sweep)
    _check_sources(recipe, test, general)
    plan = Plan(
        recipe=absolute_recipe(recipe),
        methods=trained,
        seeds=tuple(range(recipe.training.seed, recipe.training.seed + seeds)),
        test=absolute_path(test),
        general=absolute_path(general),
        lr_sweep=lr_sweep,
        stamp=now(),
    )
    return _compare(new_folder(recipe.name, out), plan, fan_out(on_event))


def resume_comparison(folder: Path, *, on_event: EventSink = discard) -> tuple[Comparison, Path]:
    """Go on with a comparison that was interrupted or of which runs failed; finished runs are not repeated.

    Raises:
        HaoriError: The folder is no comparison, or as for `compare_methods`.
    """
    return _compare(folder, read_plan(folder), fan_out(on_event))


def _compare(folder: Path, plan: Plan, on_event: EventSink) -> tuple[Comparison, Path]:
    from haori.jobs.compare.report import render_comparison

    with (
        file_lock(folder / "comparison.lock", holds="comparison", timeout_s=0),
        reporting_failure(on_event),
    ):
        place = ComparisonFolder(folder, plan, on_event)
        recipe = plan.recipe
        on_event(Started(work="comparison", folder=str(place.folder), name=recipe.name, task=recipe.task))
        base = place.base()
        found = {method: _method(place, method) for method in plan.methods}
        comparison = _assemble(plan, base, found)
        page = render_comparison(comparison)
        write_text(folder / "comparison.json", comparison.model_dump_json(indent=1) + "\n")
        write_text(folder / "comparison.html", page)
    on_event(Finished(folder=str(place.folder)))
    return comparison, folder


class _MethodRuns:
    """The runs of one method, seed by seed."""

    def __init__(self, notes: Sequence[str]) -> None:
        self.notes = tuple(notes)
        self.rates: tuple[Rate, ...] = ()
        self.outcomes: list[tuple[int, RunOutcome]] = []

    @property
    def finished(self) -> list[tuple[int, RunOutcome]]:
        """Return the runs that were measured."""
        return [(seed, outcome) for seed, outcome in self.outcomes if outcome.measured is not None]

    @property
    def measured(self) -> list[Measured]:
        """Return what was measured of each finished run."""
        return [outcome.measured for _, outcome in self.finished if outcome.measured is not None]

    @property
    def errors(self) -> tuple[str, ...]:
        """Return the distinct sentences of the runs that failed."""
        return tuple(dict.fromkeys(f"{outcome.error}" for _, outcome in self.outcomes if outcome.error is not None))


def _method(place: ComparisonFolder, method: str) -> _MethodRuns:
    plan = place.plan
    recipe, notes = adapt_recipe(plan.recipe, method)
    runs = _MethodRuns(notes)
    lr: float | None = None
    if plan.lr_sweep:
        choice = choose_rate(place, recipe, plan.seeds[0])
        runs.rates = choice.rates
        if choice.error is not None:
            runs.outcomes = [(plan.seeds[0], RunOutcome(None, None, choice.error))]
            return runs
        lr = choice.lr
    for number, seed in enumerate(plan.seeds, start=1):
        place.say(f"{method}, seed {seed} ({number} of {len(plan.seeds)})")
        outcome = place.run(with_run(recipe, seed, lr), run_key(method, lr, seed), measure=True)
        if outcome.error is not None:
            place.say(f"{method} failed: {outcome.error}")
        runs.outcomes.append((seed, outcome))
        if outcome.for_all_seeds:
            break
    return runs


def _assemble(plan: Plan, base: BaseMeasured, found: dict[str, _MethodRuns]) -> Comparison:
    trained = [outcome.trained for runs in found.values() for _, outcome in runs.finished if outcome.trained]
    if len({one.data.hash for one in trained}) > 1:
        raise MismatchError("The training data changed between two runs of this comparison; begin a new one.")
    task = task_of(plan.recipe.task)
    full = found[_FULL].measured if _FULL in found else []
    results = []
    if base.measured is not None:
        results.append(MethodResult(method=BASE, seeds=(), scores=scores_of(task, [base.measured], {})))
    for method, runs in found.items():
        results.append(_result(task, method, runs, base, full if method != _FULL else []))
    return Comparison(
        name=plan.recipe.name,
        recipe=plan.recipe,
        seeds=plan.seeds,
        base=base.base,
        data=trained[0].data if trained else None,
        test=base.test,
        test_rows=base.rows or len(base.measured.rows if base.measured else ()),
        methods=tuple(results),
        notes=(*base.notes, *_notes(plan, results), *_how_scored(_measuring_notes(base, found))),
        machine=base.machine,
        time=now(),
    )


def _result(task: Task, method: str, runs: _MethodRuns, base: BaseMeasured, full: Sequence[Measured]) -> MethodResult:
    if not runs.finished:
        return MethodResult(method=method, seeds=(), errors=runs.errors, notes=runs.notes, rates=runs.rates)
    against: dict[str, Sequence[Measured]] = {BASE: [base.measured] if base.measured else [], _FULL: full}
    sets = base.measured.general if base.measured else {}
    trained = [outcome.trained for _, outcome in runs.finished if outcome.trained is not None]
    return MethodResult(
        method=method,
        seeds=tuple(seed for seed, _ in runs.finished),
        errors=runs.errors,
        notes=runs.notes,
        lr=trained[0].lr,
        rates=runs.rates,
        scores=scores_of(task, runs.measured, against),
        cost=_cost(runs),
        forgetting={
            name: forgetting_between(before, [run.general[name] for run in runs.measured])
            for name, before in sets.items()
        },
        curves=tuple(one.curve for one in trained),
    )


def _cost(runs: _MethodRuns) -> Cost:
    trained = [outcome.trained for _, outcome in runs.finished if outcome.trained is not None]
    records = [one.run for one in trained]
    seconds, tokens = sum(record.seconds for record in records), sum(record.cost for record in records)
    count = len(records)
    return Cost(
        seconds=seconds / count,
        tokens=tokens / count,
        tokens_per_s=tokens / seconds if seconds else 0.0,
        peak_memory_bytes=max(record.peak_memory_bytes for record in records),
        trainable_parameters=records[0].trainable_parameters,
        total_parameters=records[0].total_parameters,
        size_bytes=max(one.size_bytes for one in trained),
        steps=sum(record.steps for record in records) / count,
        epochs=sum(record.epochs for record in records) / count,
    )


def _notes(plan: Plan, results: Sequence[MethodResult]) -> list[str]:
    notes = [
        "Every run had the same data, batches, number of epochs at most, and early stopping; the best checkpoint by "
        "validation loss was kept. Each run had a process of its own; peak memory is that of its training alone.",
        "Scores are means over seeds. Intervals are 95% percentile bootstrap over rows; differences are on the same "
        "rows. The spread is the standard deviation over seeds, which the intervals do not hold.",
    ]
    if any(result.forgetting for result in results):
        notes.append(task_of(plan.recipe.task).general.note)
    if len(plan.seeds) < 3:
        count = "one seed" if len(plan.seeds) == 1 else f"{len(plan.seeds)} seeds"
        notes.append(f"With {count} per method, a difference may be luck; use three or more.")
    for result in results:
        tried = [rate.lr for rate in result.rates]
        if tried and result.lr in (tried[0], tried[-1]):
            notes.append(
                f"{result.method}: the best learning rate, {result.lr:.2g}, is the last that was tried; a better one "
                "may lie beyond. Set optimizer.lr to it and compare again."
            )
    notes += [note for result in results for note in result.notes]
    return notes


def _measuring_notes(base: BaseMeasured, found: dict[str, _MethodRuns]) -> tuple[str, ...]:
    """Return how rows were scored: said alike of the base and of every run."""
    measured = [base.measured, *(run for runs in found.values() for run in runs.measured)]
    return next((one.notes for one in measured if one is not None), ())


def _how_scored(notes: Sequence[str]) -> list[str]:
    """Return what an evaluation of the base says about all: not its own intervals."""
    return [note for note in notes if not note.startswith(("Intervals are", "All rows came out alike"))]


def _check(recipe: Recipe, seeds: int, test: str | None, lr_sweep: bool) -> None:
    if seeds < 1:
        raise InputError(f"--seeds cannot be {seeds}; give 1 or more.")
    held = recipe.data.validation is not None or recipe.data.validation_share > 0
    if not held and test is None:
        raise InputError("There are no rows to score on: the recipe holds no validation rows; give a file with --test.")
    if not held and lr_sweep:
        raise InputError("--lr-sweep judges by validation loss, and the recipe holds no validation rows.")


def _check_sources(recipe: Recipe, test: str | None, general: str | None) -> None:
    """Find the base and every file, so that a wrong name leaves no comparison behind."""
    from haori.bases import find_base
    from haori.data.selection import measuring_source, training_sources

    task = task_of(recipe.task)
    task.check_general(general)
    if task.unit == "pixels":
        _check_pictures(recipe, test)
        find_base(recipe.base, revision=recipe.revision)
        return
    training_sources(recipe.data)
    for path in (test, general):
        if path is not None:
            measuring_source(TextSection(path=path))
    find_base(recipe.base, revision=recipe.revision)


def _check_pictures(recipe: Recipe, test: str | None) -> None:
    if test is not None:
        raise InputError("--test is for text: pictures are scored on those held out; give them as data.validation.")
    for path in (recipe.data.path, recipe.data.validation):
        if path is not None and not user_path(path).exists():
            raise InputError(f"There are no pictures at {path!r}.")
