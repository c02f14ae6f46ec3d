"""Comparing methods and searching recipe keys as kinds of job; runs that are finished are not repeated."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.events import EventSink
from haori.jobs.queue.child import StoppedError

if TYPE_CHECKING:
    from haori.tasks.recipe import Recipe

__all__ = ["compare", "sweep"]


def compare(arguments: dict[str, Any], folder: Path, on_event: EventSink) -> dict[str, Any]:
    """Compare methods, or go on with it; returns the comparison's folder and the methods that failed.

    Args:
        arguments: `recipe` as JSON data, and as `compare_methods` takes them: methods, seeds, test, general, lr_sweep.
        folder: Holds the folder `comparison`.
        on_event: Receives what the comparison reports.

    Raises:
        HaoriError: As `compare_methods`.
    """
    from haori.jobs.compare.comparison import compare_methods, resume_comparison

    place = folder / "comparison"
    if (place / "plan.json").is_file():
        comparison, _ = resume_comparison(place, on_event=on_event)
    else:
        shutil.rmtree(place, ignore_errors=True)
        given = {name: value for name, value in arguments.items() if name != "recipe"}
        comparison, _ = compare_methods(_recipe(arguments), out=place, on_event=on_event, **given)
    return {
        "folder": str(place), "report": str(place / "comparison.html"), "failed": list(comparison.failed),
    }  # fmt: skip


def sweep(arguments: dict[str, Any], folder: Path, on_event: EventSink) -> dict[str, Any]:
    """Search recipe keys, or go on with it; returns the sweep's folder, and the best values, loss and recipe.

    Args:
        arguments: `recipe` as JSON data, `over` (a list of KEY=RANGE), `trials`.
        folder: Holds the folder `sweep`.
        on_event: Receives what the sweep reports.

    Raises:
        StoppedError: It was asked to stop; finished trials are kept.
        HaoriError: As `start_sweep`.
    """
    from haori.jobs.sweep.search import resume_sweep, start_sweep
    from haori.jobs.sweep.show import write_winner

    place = folder / "sweep"
    if (place / "sweep.json").is_file():
        result = resume_sweep(place, on_event=on_event)
    else:
        trials = int(arguments.get("trials", 20))
        result = start_sweep(_recipe(arguments), arguments["over"], trials=trials, folder=place, on_event=on_event)
    if result.signal is not None:
        raise StoppedError(f"The sweep was stopped after {len(result.trials)} of {result.wanted} trials.")
    found: dict[str, Any] = {"folder": str(place), "trials": len(result.trials)}
    if (best := result.best) is not None:
        write_winner(result, place / "best.yaml")
        found |= {"best": best.values, "loss": best.outcome.loss, "recipe": str(place / "best.yaml")}
    return found


def _recipe(arguments: dict[str, Any]) -> "Recipe":
    from haori.tasks.recipe import recipe_from

    return recipe_from(json.loads(json.dumps(arguments["recipe"])))
