"""The memory of a sweep: an Optuna study in SQLite that proposes values and keeps what came of them.

New values come from the tree-structured Parzen estimator (Bergstra et al. 2011); a finite set of combinations that
fits into the number of trials is gone through once instead. The estimator is seeded with the number of trials that
have an outcome, so that an interrupted sweep proposes what a whole one would have. A trial is given up when, from its
second validation on, its best loss is above the median of what finished trials had by then (the median stopping rule
of Golovin et al. 2017). Knows nothing about training.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from haori.core.errors import StorageError
from haori.core.records import Record
from haori.jobs.sweep.space import Choices, Range, grid, size
from haori.jobs.sweep.trial import TrialOutcome

if TYPE_CHECKING:
    from optuna import Study, Trial

__all__ = ["Proposal", "Search", "SweepTrial", "Value", "open_search"]

_STARTUP = 3  # finished trials before one is given up, and at least before the estimator takes over from chance
_UNLIKE = ("training.epochs", "training.max_steps", "training.evaluations_per_epoch")

Value = str | int | float


class SweepTrial(Record):
    """One trial with an outcome."""

    number: int
    values: dict[str, Value]
    outcome: TrialOutcome


class Proposal(NamedTuple):
    """What to try next; `known` is the trial that tried these values already, if one did."""

    trial: "Trial"
    values: dict[str, Value]
    known: SweepTrial | None

    def prune(self, number: int, loss: float) -> bool:
        """Note the loss of a validation, numbered from 1, and say whether to give up."""
        self.trial.report(loss, number)
        return self.trial.should_prune()


class Search:
    """Proposes values of a space and remembers outcomes."""

    def __init__(self, study: "Study", space: Sequence[Range], trials: int, seed: int) -> None:
        self.study, self.space, self.seed = study, space, seed
        count = size(space)
        self.whole = count is not None and count <= trials
        """Whether every combination is tried."""
        self.wanted = count if self.whole and count is not None else trials
        """How many trials there are to be."""

    def queue(self) -> list[int]:
        """Queue trials without an outcome again, and all combinations if they fit; return the former's numbers."""
        from optuna.trial import TrialState

        interrupted = []
        trials = self.study.get_trials(deepcopy=False)
        retried = {trial.user_attrs.get("retry_of") for trial in trials}
        for trial in trials:
            if trial.state == TrialState.WAITING:
                continue
            if "outcome" in trial.user_attrs:
                if trial.state == TrialState.RUNNING:  # killed between the two notes of `tell`
                    self._close(trial.number, TrialOutcome.model_validate(trial.user_attrs["outcome"]))
                continue
            interrupted.append(trial.number)
            if trial.number not in retried:
                values = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
                self.study.enqueue_trial(values, user_attrs={"retry_of": trial.number})
            if trial.state == TrialState.RUNNING:
                self.study.tell(trial.number, state=TrialState.FAIL)
        for values in grid(self.space) if self.whole else ():
            self.study.enqueue_trial(values, skip_if_exists=True)
        return interrupted

    def ask(self) -> Proposal:
        """Return what to try next."""
        from optuna.samplers import TPESampler

        seen = sum("outcome" in trial.user_attrs for trial in self.study.get_trials(deepcopy=False))
        startup = max(_STARTUP, self.wanted // 3)
        self.study.sampler = TPESampler(n_startup_trials=startup, seed=self.seed + seen)
        trial = self.study.ask()
        values = {one.key: _suggest(trial, one) for one in self.space}
        known = next((other for other in self.trials() if other.values == values), None)
        return Proposal(trial, values, known)

    def tell(self, proposal: Proposal, outcome: TrialOutcome) -> None:
        """Keep what came of a proposal."""
        if proposal.known is not None:
            proposal.trial.set_user_attr("repeats", proposal.known.number)
        proposal.trial.set_user_attr("values", proposal.values)
        proposal.trial.set_user_attr("outcome", outcome.model_dump(mode="json"))
        self._close(proposal.trial.number, outcome)

    def _close(self, number: int, outcome: TrialOutcome) -> None:
        from optuna.trial import TrialState

        if outcome.state == "finished":
            self.study.tell(number, outcome.loss)
        else:
            self.study.tell(number, state=TrialState.PRUNED if outcome.state == "pruned" else TrialState.FAIL)

    def trials(self) -> list[SweepTrial]:
        """Return the trials with an outcome of their own, in the order in which they began."""
        return [
            SweepTrial.model_validate(
                {
                    "number": trial.number,
                    "values": trial.user_attrs["values"],
                    "outcome": trial.user_attrs["outcome"],
                }
            )
            for trial in self.study.get_trials(deepcopy=False)
            if "outcome" in trial.user_attrs and "repeats" not in trial.user_attrs
        ]


@contextmanager
def open_search(file: Path, name: str, space: Sequence[Range], trials: int, seed: int) -> Iterator[Search]:
    """Open, or make, the study `name` in an SQLite file.

    Raises:
        StorageError: The file is no database or cannot be written.
    """
    import optuna
    from sqlalchemy.exc import DatabaseError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = None
    try:
        try:
            storage = optuna.storages.RDBStorage(f"sqlite:///{file}")
            study = optuna.create_study(
                storage=storage, study_name=name, load_if_exists=True, pruner=_pruner(space), direction="minimize"
            )
        except DatabaseError as error:
            reason = str(error.orig or error).rstrip(".")
            raise StorageError(f"{str(file)!r} cannot hold a study: {reason}; give --storage another file.") from None
        yield Search(study, space, trials, seed)
    finally:
        if storage is not None:
            storage.remove_session()
            storage.engine.dispose()


def _pruner(space: Sequence[Range]) -> Any:
    """Return the median stopping rule, or none where trials have validations at unlike times."""
    from optuna.pruners import MedianPruner, NopPruner

    if any(one.key in _UNLIKE for one in space):
        return NopPruner()
    return MedianPruner(n_startup_trials=_STARTUP, n_warmup_steps=2)


def _suggest(trial: "Trial", one: Range) -> Value:
    """Ask for a value; a number is cut to four digits, so that it reads well and repeats exactly."""
    if isinstance(one, Choices):
        return str(trial.suggest_categorical(one.key, list(one.values)))
    if one.scale == "int":
        return trial.suggest_int(one.key, int(one.low), int(one.high))
    exact = trial.suggest_float(one.key, one.low, one.high, log=one.scale == "log")
    return min(max(float(f"{exact:.4g}"), one.low), one.high)
