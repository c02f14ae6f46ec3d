"""The folder of a comparison, and the jobs in it: each is run once, and its result is read back ever after.

plan.json         what is compared (Plan)
base/             the job that measured the base
rates/<run>/      the job of each learning rate that was tried
runs/<run>/       the job of each run: method, learning rate, seed
workspace/        library and runs of the comparison, apart from the user's
comparison.json   the result
comparison.html   the same as a page
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from haori.core import errors
from haori.core.errors import InputError, MissingExtraError
from haori.core.events import EventSink, Said
from haori.core.settings import settings
from haori.core.storage import make_folder, make_stamped_folder, write_text
from haori.jobs.compare.records import BaseMeasured, Measured, Plan, Trained
from haori.jobs.process import JobResult, JobSpec, run_job
from haori.tasks.recipe import Recipe

__all__ = ["ComparisonFolder", "RunOutcome", "new_folder", "read_plan"]

_PLAN, _WORKSPACE = "plan.json", "workspace"
_GIVEN = (InputError, MissingExtraError)


class RunOutcome(NamedTuple):
    """One run: finished, with what was measured if that was asked for, or failed with a sentence."""

    trained: Trained | None
    measured: Measured | None
    error: str | None
    for_all_seeds: bool = False
    """Whether the failure lies in what was given, so that another seed would fail alike."""


def new_folder(name: str, out: Path | None) -> Path:
    """Make the folder of a new comparison: `out`, or one under `comparisons` in HAORI_HOME.

    Raises:
        InputError: `out` exists and is not empty.
        StorageError: It cannot be made.
    """
    from haori.library.formats.peft import check_new_folder

    if out is not None:
        check_new_folder(out)
        return make_folder(out.absolute())
    return make_stamped_folder(settings().home / "comparisons", name)


def read_plan(folder: Path) -> Plan:
    """Read the plan of a comparison that was begun.

    Raises:
        InputError: The folder is no comparison, or its plan is damaged.
    """
    try:
        return Plan.model_validate_json((folder / _PLAN).read_bytes())
    except OSError:
        raise InputError(f"{str(folder)!r} is not the folder of a comparison: it has no {_PLAN}.") from None
    except ValidationError:
        raise InputError(f"{str(folder / _PLAN)!r} is damaged; begin a new comparison.") from None


class ComparisonFolder:
    """Runs the jobs of one comparison in its folder.

    Args:
        folder: The folder.
        plan: What is compared; written into it.
        on_event: Receives what the comparison and its jobs report.
    """

    def __init__(self, folder: Path, plan: Plan, on_event: EventSink) -> None:
        self.folder, self.plan, self.on_event = folder.absolute(), plan, on_event
        write_text(self.folder / _PLAN, plan.model_dump_json(indent=1))

    def say(self, text: str) -> None:
        """Report a line for the user."""
        self.on_event(Said(text=text))

    def base(self) -> BaseMeasured:
        """Measure the base.

        Raises:
            HaoriError: Base, data or test rows cannot be used, so there is nothing to compare.
        """
        arguments = {**self._data(), "recipe": self.plan.recipe.model_dump_json()}
        return _read_base(self._job("base", "measure_base", arguments, _read_base).require())

    def run(self, recipe: Recipe, key: str, *, measure: bool) -> RunOutcome:
        """Train the recipe, and measure what came of it if asked; a failure is an outcome.

        Args:
            recipe: Of one method, seed and learning rate.
            key: Names the run in this comparison.
            measure: Whether to score it and measure forgetting.
        """
        folder = self.folder / "runs" / key
        arguments = {**self._data(), "recipe": recipe.model_dump_json(), "folder": str(folder), "measure": measure}
        result = self._job(f"{'runs' if measure else 'rates'}/{key}", "train_and_measure", arguments, _read_run)
        if result.value is None:
            kind = getattr(errors, result.kind or "", errors.HaoriError)
            return RunOutcome(None, None, result.error, for_all_seeds=issubclass(kind, _GIVEN))
        return _read_run(result.value)

    def forget_weights(self, trained: Trained) -> None:
        """Delete the run folder of a run that is not used any further; of a full fine-tuning it holds a whole model."""
        shutil.rmtree(trained.folder, ignore_errors=True)

    def _job(
        self, key: str, task: str, arguments: dict[str, Any], read: Callable[[dict[str, Any]], object]
    ) -> JobResult:
        folder = self.folder / key
        held = _held(folder, task, arguments, read)
        if held is not None:
            self.say(f"{folder.name}: taken from the earlier part of this comparison.")
            return held
        spec = JobSpec(
            task=f"haori.jobs.compare.run:{task}",
            arguments=arguments,
            folder=folder,
            environment={"HAORI_HOME": str(settings().home), "HAORI_WORKSPACE": str(self.folder / _WORKSPACE)},
        )
        make_folder(self.folder / _WORKSPACE)
        return run_job(spec, on_event=self.on_event)

    def _data(self) -> dict[str, str | None]:
        return {"test": self.plan.test, "general": self.plan.general}


def _held(
    folder: Path, task: str, arguments: dict[str, Any], read: Callable[[dict[str, Any]], object]
) -> JobResult | None:
    """Return the result of a job that was done before with the same arguments, did not fail, and can be read.

    Where its folder was then does not count: a comparison may have been moved since.
    """
    try:
        spec = JobSpec.model_validate_json((folder / "job.json").read_bytes())
        result = JobResult.model_validate_json((folder / "result.json").read_bytes())
        same = {**spec.arguments, "folder": None} == {**arguments, "folder": None}
        if result.value is None or not spec.task.endswith(f":{task}") or not same:
            return None
        read(result.value)
    except (OSError, ValidationError, KeyError):
        return None
    return result


def _read_base(value: dict[str, Any]) -> BaseMeasured:
    return BaseMeasured.model_validate_json(json.dumps(value))


def _read_run(value: dict[str, Any]) -> RunOutcome:
    measured = value["measured"]
    return RunOutcome(
        Trained.model_validate_json(json.dumps(value["trained"])),  # as JSON: sections of a recipe are strict
        Measured.model_validate_json(json.dumps(measured)) if measured else None,
        None,
    )
