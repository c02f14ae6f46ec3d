"""`haori sweep`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from haori.cli.queueing import Priority, Queue, queue_job

if TYPE_CHECKING:
    from haori.jobs.sweep.search import SweepResult
    from haori.tasks.recipe import Recipe
    from haori.training import TrainingDisplay

__all__ = ["sweep"]


def sweep(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="RECIPE [KEY=RANGE]...", help="A recipe in YAML, and further ranges.")
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=RANGE", help="What to vary: KEY=a,b,c or KEY=log:LOW:HIGH, lin:LOW:HIGH, int:LOW:HIGH."
        ),
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials at most; 20 if not given.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Begin no trial after this many seconds.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the best recipe to this new file.")] = None,
    storage: Annotated[
        Path | None, typer.Option(help="SQLite file for the study; by default in the sweep folder.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set any recipe key for all trials, e.g. training.epochs=2."),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the sweep in this folder.")] = None,
    range_test: Annotated[
        bool, typer.Option("--range-test", help="Instead, raise the learning rate step by step and suggest one.")
    ] = False,
    queue: Queue = False,
    priority: Priority = 0,
) -> None:
    """Search recipe keys for the lowest validation loss."""
    from haori.core.errors import InputError
    from haori.jobs.sweep.search import resume_sweep, start_sweep
    from haori.tasks.recipe import load_recipe

    ranges = [*(over or []), *(word for word in words or [] if _is_range(word))]
    files = [word for word in words or [] if not _is_range(word)]
    if out is not None and out.exists():
        raise InputError(f"{str(out)!r} exists already; give --out a new file.")
    if resume is not None:
        if files or ranges or override or storage or range_test or queue:
            raise InputError("--resume goes on with a sweep as it was; give with it only --trials, --timeout or --out.")
        with _display("sweeping") as display:
            result = resume_sweep(resume, trials=trials, timeout_s=timeout, on_event=display.update)
        _show(result, out)
        return
    if len(files) != 1:
        raise InputError(f"Give one recipe file; {len(files)} were given{': ' if files else ''}{', '.join(files)}.")
    recipe = load_recipe(Path(files[0]), override or [])
    if queue:
        _queue(recipe, ranges, trials or 20, priority, alone=not (storage or timeout is not None or out or range_test))
        return
    if range_test:
        if ranges or trials or timeout is not None or storage:
            raise InputError("--range-test varies the learning rate alone; give with it only --set or --out.")
        _show_range_test(recipe, Path(files[0]), override or [], out)
        return
    with _display("sweeping") as display:
        result = start_sweep(
            recipe, ranges, trials=trials or 20, timeout_s=timeout, storage=storage, on_event=display.update
        )
    _show(result, out)


def _queue(recipe: "Recipe", ranges: list[str], trials: int, priority: int, *, alone: bool) -> None:
    from haori.core.errors import InputError
    from haori.jobs.sweep.space import parse_space

    if not alone:
        raise InputError("With --queue go only ranges, --trials and --set; the sweep is kept in the job's folder.")
    parse_space(ranges, recipe.model_dump(mode="json", exclude_unset=True))  # refuses what cannot be searched
    queue_job("sweep", {"recipe": recipe, "over": ranges, "trials": trials}, priority)


def _display(between_jobs: str | None = None) -> "TrainingDisplay":
    """Return what shows the sweep's own lines, and of its trials the progress alone."""
    from haori.cli.console import notes
    from haori.training import TrainingDisplay

    return TrainingDisplay(notes(), between_jobs=between_jobs, lines_of_jobs=False)


def _is_range(word: str) -> bool:
    return "=" in word and not Path(word).is_file()


def _show(result: "SweepResult", out: Path | None) -> None:
    """Print table, plot, winner and what to do next.

    Raises:
        typer.Exit: The sweep was stopped by a signal.
    """
    import shlex

    from haori.cli.console import results
    from haori.jobs.sweep.show import draw_sweep, next_command, remarks, trial_table, write_winner

    if result.trials:
        results().print(trial_table(result))
    go_on = f"haori sweep --resume {shlex.quote(str(result.folder))}"
    if result.best is not None:
        draw_sweep(result, result.folder / "sweep.png")
        write_winner(result, result.folder / "best.yaml")
        if out is not None:
            write_winner(result, out)
        for sentence in remarks(result):
            results().print(sentence, markup=False)
        results().print(f"Plot: {result.folder / 'sweep.png'}", soft_wrap=True, markup=False)
    if result.signal is not None:
        results().print(f"Stopped after {len(result.trials)} of {result.wanted} trials. Continue with:")
        results().print(f"  {go_on}", soft_wrap=True, markup=False)
        raise typer.Exit(128 + result.signal)
    if len(result.trials) < result.wanted:
        results().print(f"To go on: {go_on}", soft_wrap=True, markup=False)
    if result.best is not None:
        results().print(f"Next: {next_command(out or result.folder / 'best.yaml')}", soft_wrap=True, markup=False)


def _show_range_test(recipe: "Recipe", file: Path, overrides: list[str], out: Path | None) -> None:
    """Run the range test; print the rate it suggests and the command that uses it."""
    import shlex

    from haori.cli.console import results
    from haori.core.errors import TrainingError
    from haori.core.storage import write_text
    from haori.jobs.sweep.range_test import range_test
    from haori.tasks.recipe import recipe_from, recipe_to_yaml

    with _display() as display:
        test, folder = range_test(recipe, on_event=display.update)
    results().print(f"Plot: {folder / 'range-test.png'}", soft_wrap=True, markup=False)
    if not test.settled:
        raise TrainingError(
            "The loss hardly fell at any learning rate, so none can be suggested; look at what is trained on with "
            f"`haori data check {shlex.quote(recipe.data.path)}`."
        )
    end = f"diverged at {test.diverged_at:.2g}" if test.diverged_at is not None else "did not diverge up to 0.1"
    results().print(
        f"Suggested learning rate: [bold]{test.suggested:g}[/] (the loss fell most steeply at {test.steepest:.2g} "
        f"and {end})"
    )
    if out is not None:
        document = recipe.model_dump(mode="json", exclude_unset=True)
        write_text(out, recipe_to_yaml(recipe_from(document, [f"optimizer.lr={test.suggested}"])))
    flags = [word for item in [*overrides, f"optimizer.lr={test.suggested:g}"] for word in ("--set", item)]
    results().print(f"Next: {shlex.join(['haori', 'train', str(file), *flags])}", soft_wrap=True, markup=False)
    low, high = test.suggested / 5, min(test.suggested * 5, 0.5)
    searched = [f"optimizer.lr=log:{low:.2g}:{high:.2g}", "--trials", "8"]
    kept = [word for item in overrides for word in ("--set", item)]
    results().print(
        f"Or search around it: {shlex.join(['haori', 'sweep', str(file), '--over', *searched, *kept])}",
        soft_wrap=True,
        markup=False,
    )
