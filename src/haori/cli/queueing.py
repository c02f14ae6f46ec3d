"""Putting what `haori train`, `compare` and `sweep` would run into the queue instead."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from haori.jobs.queue.estimate import Estimate
    from haori.jobs.queue.records import Job
    from haori.tasks.recipe import Recipe
    from haori.training import Prepared

__all__ = ["Priority", "Queue", "queue_job", "queue_training"]

Queue = Annotated[bool, typer.Option("--queue", help="Put it in the queue, for `haori worker`, instead of running it.")]
Priority = Annotated[int, typer.Option(min=-100, max=100, help="With --queue: higher ones go first.")]


def queue_training(recipe: "Recipe", prepared: "Prepared", priority: int) -> None:
    """Submit a training that was checked, after saying what it is likely to take."""
    from haori.jobs.database.connection import open_database
    from haori.jobs.queue.estimate import estimate
    from haori.jobs.queue.records import Requirements
    from haori.jobs.queue.store import JobStore

    database = open_database()
    assert prepared.recipe.training.epochs != "auto"
    tokens = sum(prepared.train.costs) * prepared.recipe.training.epochs
    spec = _spec(recipe)
    base = spec["recipe"]["base"]
    found = estimate(JobStore(database), base=base, tokens=tokens, parameters=prepared.base.parameters)
    if not found.from_jobs:
        found = estimate(JobStore(database), base=base, tokens=tokens, measured=_measure(prepared))
    database.close()
    _show(found, prepared.task.unit)
    needs = Requirements(memory_bytes=found.memory_bytes if prepared.device == "cpu" else None)
    queue_job("train", spec, priority, rows=len(prepared.split.train), tokens=tokens, requirements=needs)


def queue_job(kind: str, spec: dict[str, Any], priority: int, **further: Any) -> None:
    """Submit a job and say how to follow it."""
    from haori.cli.console import results
    from haori.jobs.database.connection import open_database
    from haori.jobs.queue.store import JobStore
    from haori.jobs.queue.workers import obstacle

    if "recipe" in spec and not isinstance(spec["recipe"], dict):
        spec = {**spec, **_spec(spec["recipe"])}
    database = open_database()
    job: Job = JobStore(database).submit(kind, spec, priority=priority, **further)
    why = obstacle(database, job)
    database.close()
    results().print(f"Queued as [bold]{job.id}[/].")
    if why is not None:
        results().print(why, markup=False)
    results().print(f"Follow it with: haori jobs logs {job.id} --follow", soft_wrap=True)


def _spec(recipe: "Recipe") -> dict[str, Any]:
    from haori.jobs.recipe_paths import absolute_recipe

    return {"recipe": absolute_recipe(recipe).model_dump(mode="json", exclude_unset=True)}


def _measure(prepared: "Prepared") -> Any:
    from haori.cli.console import notes
    from haori.jobs.queue.estimate import Measured
    from haori.training import make_plan

    with notes().status("measuring the largest batch"):
        plan = make_plan(prepared)
    return Measured(plan.seconds, plan.peak_memory_bytes)


def _show(found: "Estimate", unit: str) -> None:
    from rich.table import Table

    from haori.cli.console import results
    from haori.cli.job_words import duration

    table = Table(title="Estimate", show_header=False, title_justify="left")
    low, high = duration(found.seconds_low), duration(found.seconds_high)
    table.add_row("time", f"{duration(found.seconds)} ({low} to {high})")
    if found.memory_bytes is not None:
        table.add_row("peak memory", f"{found.memory_bytes / 1e9:.2f} GB")
    table.add_row(unit, f"{found.tokens:,} at most")
    if found.price is not None:
        table.add_row("price", f"{found.price:,.4g} {found.currency}")
    table.add_row("from", found.reason)
    results().print(table)
