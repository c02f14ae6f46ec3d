"""`haori compare`: what each method is worth on the same data, beside the base."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from haori.core.events import Event, EventSink
    from haori.jobs import Comparison
    from haori.tasks.recipe import Recipe

__all__ = ["compare"]

_INTERRUPTED = 130


def compare(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe in YAML. Not needed with --base, --data and --name.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, separated by commas: base, lora, dora, adalora, ard_lora, qlora, full, peft; dreambooth "
            "for pictures."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per method, each with a seed of its own.")] = 3,
    test: Annotated[str | None, typer.Option(help="Data to score on; by default the recipe's validation rows.")] = None,
    general: Annotated[
        str | None, typer.Option(help="General text of your own, to measure forgetting on as well.")
    ] = None,
    lr_sweep: Annotated[
        bool, typer.Option("--lr-sweep", help="Find a learning rate for each method first, by validation loss.")
    ] = False,
    base: Annotated[str | None, typer.Option(help="Base model: catalogue name, folder, hub id or GGUF file.")] = None,
    data: Annotated[str | None, typer.Option(help="Data: file, folder, or hub dataset id.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the comparison.")] = None,
    task: Annotated[str | None, typer.Option(help="What is learnt; text generation by default.")] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set any recipe key, e.g. training.epochs=2."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for the comparison.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the comparison in this folder.")] = None,
) -> None:
    """Train several methods on the same data and report quality, memory, time, size and what was forgotten."""
    from haori.api import recipe_of
    from haori.cli.console import results
    from haori.core.errors import InputError
    from haori.jobs import compare_methods, resume_comparison, show_comparison

    wanted: Recipe | None = None
    if resume is None:
        wanted = recipe_of(recipe, base, data, name, override or [], task=task)
    elif recipe or base or data or name or task or override or methods or test or general or lr_sweep or out:
        raise InputError("--resume goes on with a comparison as it was begun; give it alone.")
    chosen = None if methods is None else tuple(word.strip() for word in methods.split(","))
    with _shown() as on_event:
        if resume is not None:
            comparison, folder = resume_comparison(resume, on_event=on_event)
        else:
            assert wanted is not None
            comparison, folder = compare_methods(
                wanted, methods=chosen, seeds=seeds, test=test, general=general, lr_sweep=lr_sweep, out=out,
                on_event=on_event,
            )  # fmt: skip
    show_comparison(comparison, results())
    results().print(f"Report: {folder / 'comparison.html'}", soft_wrap=True)
    _require_all(comparison, folder)


def _require_all(comparison: "Comparison", folder: Path) -> None:
    if comparison.failed:
        from haori.cli.console import notes

        tried = sum(one.method != "base" for one in comparison.methods)
        notes().print(
            f"Error: {len(comparison.failed)} of {tried} methods failed "
            f"({', '.join(comparison.failed)}); try them again with `haori compare --resume {folder}`.",
            soft_wrap=True,
        )
        raise typer.Exit(1)


@contextmanager
def _shown() -> "Iterator[EventSink]":
    """Print each line, and on a terminal the progress of the present run; on Ctrl-C say how to go on."""
    from haori.cli.console import notes
    from haori.core.events import Started
    from haori.training import TrainingDisplay

    begun: list[str] = []
    try:
        with TrainingDisplay(notes(), between_jobs="comparing", indent="  ") as display:

            def show(event: "Event") -> None:
                if isinstance(event, Started) and event.work == "comparison":
                    begun.append(event.folder)
                display.update(event)

            yield show
    except KeyboardInterrupt:
        if begun:
            notes().print(f"Stopped. Go on with: haori compare --resume {begun[0]}", soft_wrap=True)
        sys.exit(_INTERRUPTED)
