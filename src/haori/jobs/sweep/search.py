"""A search over recipe keys: trials one after another, each a training in a process of its own.

The sweep folder, under `HAORI_HOME/sweeps`:

    sweep.json    what is searched (SweepPlan)
    study.db      every trial with its values and outcome (see sweep_study.py)
    trials/0003/  job, library and runs of a trial; nothing enters the user's library

A sweep that was killed goes on: a trial without an outcome counts as failed, and its values are tried again.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from haori.core import errors
from haori.core.errors import HaoriError, InputError, MismatchError, RecipeError, TrainingError
from haori.core.events import EventSink, Finished, Said, Started, discard, fan_out, reporting_failure
from haori.core.lock import file_lock
from haori.core.records import Record, now
from haori.core.settings import settings
from haori.core.storage import make_folder, make_stamped_folder, write_text
from haori.jobs.sweep.space import Range, overrides_of, parse_space
from haori.jobs.sweep.study import Proposal, Search, SweepTrial, open_search
from haori.jobs.sweep.trial import TrialOutcome, run_trial
from haori.tasks.recipe import Recipe, recipe_from

__all__ = ["SweepPlan", "SweepResult", "resume_sweep", "start_sweep"]

_PLAN = "sweep.json"
_MOST_REPEATS = 20  # values proposed again in a row: the estimator has nothing new to say
_ORDER = ("finished", "pruned", "failed")


class SweepPlan(Record):
    """What a sweep searches; kept as `sweep.json`."""

    recipe: dict[str, Any] = Field(description="The recipe as it was given.")
    over: tuple[str, ...] = Field(description="Keys with their ranges, as they were given.")
    trials: int = Field(ge=1)
    storage: Path | None = Field(default=None, description="File of the study; None is `study.db` in the folder.")
    started: str


class SweepResult(Record):
    """A sweep as far as it got; trials in order of validation loss, those without one last."""

    folder: Path
    plan: SweepPlan
    trials: tuple[SweepTrial, ...]
    wanted: int = Field(description="Trials that the sweep is to have in the end.")
    signal: int | None = None

    @property
    def best(self) -> SweepTrial | None:
        """Return the finished trial with the lowest validation loss."""
        return next((trial for trial in self.trials if trial.outcome.state == "finished"), None)

    @property
    def space(self) -> tuple[Range, ...]:
        """Return the ranges that were searched."""
        return parse_space(self.plan.over, self.plan.recipe)


def start_sweep(
    recipe: Recipe,
    over: Sequence[str],
    *,
    trials: int = 20,
    timeout_s: float | None = None,
    storage: Path | None = None,
    folder: Path | None = None,
    on_event: EventSink = discard,
) -> SweepResult:
    """Search the ranges for the lowest validation loss.

    Args:
        recipe: What every trial shares.
        over: Keys with what to try, as `parse_space` reads them.
        trials: Trials at most.
        timeout_s: Begin no further trial after this many seconds.
        storage: SQLite file of the study; by default in the sweep folder.
        folder: The sweep folder; by default a new one under `HAORI_HOME/sweeps`.
        on_event: Receives what happens, events of a trial with its number as their `job`; what it raises does not end
            the sweep.

    Raises:
        RecipeError: A key or value cannot be used, or the recipe has no validation.
        HaoriError: The first trial said that the recipe cannot be trained, or no trial finished.
    """
    document = recipe.model_dump(mode="json", exclude_unset=True)
    parse_space(over, document)
    if recipe.data.validation is None and recipe.data.validation_share == 0:
        raise RecipeError("A sweep compares validation losses; raise data.validation_share or give data.validation.")
    if trials < 1:
        raise InputError(f"A sweep cannot have {trials} trials; give at least 1.")
    if storage is not None:
        storage = storage.absolute()
        make_folder(storage.parent)
    place = settings().home / "sweeps"
    folder = make_stamped_folder(place, recipe.name) if folder is None else make_folder(folder)
    plan = SweepPlan(recipe=document, over=tuple(over), trials=trials, storage=storage, started=now())
    write_text(folder / _PLAN, plan.model_dump_json(indent=1))
    try:
        return _run(folder, plan, timeout_s, fan_out(on_event))
    except HaoriError:
        if not list(folder.glob("trials/*/runs/*")):  # it never began
            shutil.rmtree(folder)
        raise


def resume_sweep(
    folder: Path,
    *,
    trials: int | None = None,
    timeout_s: float | None = None,
    on_event: EventSink = discard,
) -> SweepResult:
    """Go on with a sweep until it has its number of trials, or another number.

    Raises:
        InputError: The folder is no sweep.
        MismatchError: The data or the base changed since the sweep began.
    """
    try:
        plan = SweepPlan.model_validate_json((folder / _PLAN).read_bytes())
    except OSError:
        raise InputError(f"{str(folder)!r} is not a sweep folder: it has no {_PLAN}.") from None
    except ValidationError:
        raise InputError(f"{str(folder / _PLAN)!r} is damaged; start a new sweep.") from None
    if trials is not None:
        plan = plan.with_fields(trials=trials)
        write_text(folder / _PLAN, plan.model_dump_json(indent=1))
    return _run(folder, plan, timeout_s, fan_out(on_event))


def _run(folder: Path, plan: SweepPlan, timeout_s: float | None, on_event: EventSink) -> SweepResult:
    from haori.training.signals import stop_on_signals

    ends = None if timeout_s is None else time.monotonic() + timeout_s
    space = parse_space(plan.over, plan.recipe)
    recipe = recipe_from(plan.recipe)
    file = plan.storage or folder / "study.db"
    repeats = 0
    with (
        file_lock(folder / "sweep.lock", holds="sweep", timeout_s=0),
        open_search(file, folder.name, space, plan.trials, recipe.training.seed) as search,
        stop_on_signals() as stop,
        reporting_failure(on_event),
    ):
        on_event(Started(work="sweep", folder=str(folder), name=recipe.name, task=recipe.task))
        for number in search.queue():
            shutil.rmtree(_trial_folder(folder, number), ignore_errors=True)
        while len(search.trials()) < search.wanted and not stop and repeats < _MOST_REPEATS:
            if ends is not None and time.monotonic() >= ends:
                on_event(Said(text=f"The time is up after {len(search.trials())} of {search.wanted} trials."))
                break
            proposal = search.ask()
            if proposal.known is None:
                _try(search, proposal, plan, folder, lambda: bool(stop), on_event)
                repeats = 0
            else:
                search.tell(proposal, proposal.known.outcome)
                repeats += 1
        trials = tuple(sorted((_in_place(trial, folder) for trial in search.trials()), key=_rank))
        if repeats == _MOST_REPEATS:
            text = f"The search only proposes values that were tried already; it ends after {len(trials)} trials."
            on_event(Said(text=text))
        if trials and not stop and trials[0].outcome.state == "failed":
            first = trials[0].outcome.error
            raise TrainingError(f"None of the {len(trials)} trials was trained; the first said: {first}")
    on_event(Finished(folder=str(folder), signal=stop.signal))
    return SweepResult(folder=folder, plan=plan, trials=trials, wanted=search.wanted, signal=stop.signal)


def _try(
    search: Search,
    proposal: Proposal,
    plan: SweepPlan,
    folder: Path,
    stop: Callable[[], bool],
    on_event: EventSink,
) -> None:
    """Train with the proposed values and keep the outcome; a trial that was stopped has none and is done again."""
    before = search.trials()
    values = ", ".join(f"{key}={value}" for key, value in proposal.values.items())
    on_event(Said(text=f"Trial {len(before) + 1} of {search.wanted}: {values}"))
    recipe = recipe_from(plan.recipe, overrides_of(proposal.values))
    trial_folder = _trial_folder(folder, proposal.trial.number)
    outcome = run_trial(recipe, trial_folder, prune=proposal.prune, stop=stop, on_event=on_event)
    if outcome.state == "stopped":
        return
    _refuse_unlike(outcome, before)
    search.tell(proposal, outcome)
    on_event(Said(text=f"  {_sentence(outcome, before)}"))


def _refuse_unlike(outcome: TrialOutcome, before: Sequence[SweepTrial]) -> None:
    """Refuse what would spoil the whole sweep rather than one trial.

    Raises:
        HaoriError: The first trial was refused for what it was given; or the data or base are not those of the others.
    """
    kind = getattr(errors, outcome.error_kind or "", HaoriError)
    if outcome.state == "failed" and kind.exit_code == InputError.exit_code and not before:
        raise kind(outcome.error)
    known = {trial.outcome.measured_on for trial in before} - {None}
    if outcome.measured_on is not None and known and outcome.measured_on not in known:
        raise MismatchError(
            "The data or the base changed since the sweep began, so trials cannot be compared; restore it and resume, "
            "or start a new sweep."
        )


def _rank(trial: SweepTrial) -> tuple[int, float, int]:
    """Sort finished trials first, then those given up, each by loss, then those that failed."""
    loss = trial.outcome.loss
    return _ORDER.index(trial.outcome.state), float("inf") if loss is None else loss, trial.number


def _in_place(trial: SweepTrial, folder: Path) -> SweepTrial:
    """Return a trial with its run folder where it is now, should the sweep have been moved since."""
    if trial.outcome.run is None:
        return trial
    run = _trial_folder(folder, trial.number) / "runs" / Path(trial.outcome.run).name
    return trial.model_copy(update={"outcome": trial.outcome.model_copy(update={"run": str(run)})})


def _trial_folder(folder: Path, number: int) -> Path:
    return folder / "trials" / f"{number:04d}"


def _sentence(outcome: TrialOutcome, before: Sequence[SweepTrial]) -> str:
    if outcome.loss is None or outcome.state == "failed":
        return f"failed: {outcome.error}"
    if outcome.state == "pruned":
        return f"given up at validation loss {outcome.loss:.4f}, above the median of the other trials at that point"
    losses = [t.outcome.loss for t in before if t.outcome.state == "finished" and t.outcome.loss is not None]
    known = "the best so far" if outcome.loss < min(losses, default=float("inf")) else f"best {min(losses):.4f}"
    return f"validation loss {outcome.loss:.4f} at epoch {outcome.best_epoch} ({known})"
