"""`haori compare`: what each method is worth, or each epoch and strength of an adapter for pictures."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from haori.cli.queueing import Priority, Queue, queue_job

if TYPE_CHECKING:
    from haori.core.events import Event, EventSink
    from haori.jobs import Comparison

__all__ = ["compare"]

_INTERRUPTED = 130


_Methods = Annotated[
    str | None,
    typer.Option(
        help="Methods, separated by commas: base, lora, dora, adalora, ard_lora, qlora, full, peft; dreambooth for "
        "pictures."
    ),
]
_General = Annotated[str | None, typer.Option(help="General text of your own, to measure forgetting on as well.")]
_Sweep = Annotated[
    bool, typer.Option("--lr-sweep", help="Find a learning rate for each method first, by validation loss.")
]
_Override = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any recipe key, e.g. training.epochs=2.")
]


def compare(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A recipe in YAML; not needed with --base, --data and --name. Or, for pictures, a run folder or an "
            "adapter, whose epochs and strengths are compared."
        ),
    ] = None,
    methods: _Methods = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Runs per method, 3; or pictures of each prompt, 2. Each has its own seed."),
    ] = None,
    test: Annotated[str | None, typer.Option(help="Data to score on; by default the recipe's validation rows.")] = None,
    general: _General = None,
    lr_sweep: _Sweep = False,
    base: Annotated[str | None, typer.Option(help="Base model: catalogue name, folder, hub id or GGUF file.")] = None,
    data: Annotated[str | None, typer.Option(help="Data: file, folder, or hub dataset id.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the comparison.")] = None,
    task: Annotated[str | None, typer.Option(help="What is learnt; text generation by default.")] = None,
    override: _Override = None,
    out: Annotated[Path | None, typer.Option(help="New folder for the comparison.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the comparison in this folder.")] = None,
    strengths: Annotated[str | None, typer.Option(help="Strengths of an adapter for pictures, like 0.4,0.7,1.")] = None,
    epochs: Annotated[
        str | None, typer.Option(help="Epochs of a run on pictures, like 3,6; up to 4 of those kept.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Pictures: prompts, one a line; by default 8 captions.")] = None,
    unrelated: Annotated[Path | None, typer.Option(help="Pictures: prompts unlike the data, one a line.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Pictures: steps of the sampler; 25.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Pictures: CFG scale; the pipeline's own.")] = None,
    features: Annotated[str | None, typer.Option(help="Pictures: folder or hub id of a network to look with.")] = None,
    queue: Queue = False,
    priority: Priority = 0,
) -> None:
    """Train several methods on the same data, or draw at epochs and strengths of a run, and say what each is worth."""
    drawn = {
        "strengths": strengths, "epochs": epochs, "prompts": prompts, "unrelated": unrelated, "steps": steps,
        "guidance": guidance, "features": features,
    }  # fmt: skip
    trained = {
        "methods": methods, "test": test, "general": general, "lr-sweep": lr_sweep or None, "name": name,
        "task": task, "resume": resume, "set": override or None, "queue": queue or None,
    }  # fmt: skip
    if recipe is not None and not _is_recipe(recipe):
        from haori.cli.compare_settings import compare_settings

        _refuse(trained, "methods, and epochs and strengths are compared of what is trained already")
        compare_settings(recipe, {**drawn, "seeds": seeds}, data, base, out)
        return
    _refuse(drawn, "epochs and strengths; give a run folder, or an adapter for pictures, instead of a recipe")
    chosen = None if methods is None else tuple(word.strip() for word in methods.split(","))
    options = {"methods": chosen, "test": test, "general": general, "lr_sweep": lr_sweep, "out": out}
    if resume is not None:
        given = [recipe, base, data, name, task, override, methods, test, general, lr_sweep, out, queue]
        _resume(resume, alone=not any(given))
        return
    wanted = (None if recipe is None else Path(recipe), base, data, name, override or [], task)
    _queue(*wanted, seeds or 3, options, priority) if queue else _compare(*wanted, seeds or 3, options)


def _is_recipe(given: str) -> bool:
    """Say whether this is a recipe, or (in error) meant as one; a run's folder and an adapter's name are not."""
    return given.endswith((".yaml", ".yml", ".json")) or Path(given).is_file()


def _refuse(given: dict[str, Any], of: str) -> None:
    from haori.core.errors import InputError

    for option, value in given.items():
        if value is not None:
            raise InputError(f"--{option} is for comparing {of}.")


def _resume(folder: Path, *, alone: bool) -> None:
    from haori.core.errors import InputError
    from haori.jobs import resume_comparison

    if not alone:
        raise InputError("--resume goes on with a comparison as it was begun; give it alone.")
    with _shown() as on_event:
        comparison, place = resume_comparison(folder, on_event=on_event)
    _show(comparison, place)


def _compare(
    recipe: Path | None, base: str | None, data: str | None, name: str | None, override: list[str], task: str | None,
    seeds: int, options: dict[str, Any],
) -> None:  # fmt: skip
    from haori.api import recipe_of
    from haori.jobs import compare_methods

    wanted = recipe_of(recipe, base, data, name, override, task=task)
    with _shown() as on_event:
        comparison, folder = compare_methods(wanted, seeds=seeds, on_event=on_event, **options)
    _show(comparison, folder)


def _queue(
    recipe: Path | None, base: str | None, data: str | None, name: str | None, override: list[str], task: str | None,
    seeds: int, options: dict[str, Any], priority: int,
) -> None:  # fmt: skip
    from haori.api import recipe_of
    from haori.core.errors import InputError
    from haori.jobs.recipe_paths import absolute_path

    if options["out"] is not None:
        raise InputError("--queue keeps the comparison in the job's folder; leave --out out.")
    wanted = recipe_of(recipe, base, data, name, override, task=task)
    given = {key: options[key] for key in ("methods", "lr_sweep")}
    paths = {key: absolute_path(options[key]) for key in ("test", "general")}
    queue_job("compare", {"recipe": wanted, "seeds": seeds, **given, **paths}, priority)


def _show(comparison: "Comparison", folder: Path) -> None:
    from haori.cli.console import results
    from haori.jobs import show_comparison

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
