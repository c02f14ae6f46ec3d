"""`haori data check`: what a dataset holds, before anything is trained on it."""

from pathlib import Path
from typing import Annotated

import typer

from haori.cli.caption import caption

__all__ = ["app"]

app = typer.Typer(help="Look at data before training on it.", no_args_is_help=True)


app.command("caption")(caption)


@app.callback()
def _group() -> None:
    """Look at data before training on it."""


@app.command()
def check(
    path: Annotated[str, typer.Argument(help="File, folder, or hub dataset id.")],
    base: Annotated[
        str | None,
        typer.Option(help="Base whose tokenizer, chat template or picture sizes are used; a small one of the task's."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="What is learnt: how rows are read; text to image for pictures, else text generation."),
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Render this many rows, trained tokens marked.")] = 0,
    sheet: Annotated[
        Path | None, typer.Option(help="Write the pictures with captions and crops to this PNG file.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set a key of the recipe's data section, e.g. columns.prompt=q.",
        ),
    ] = None,
) -> None:
    """Report rows, lengths, duplicates, truncations and problems of a dataset, of texts or of pictures.

    Ends with 1 when there is nothing in it to train on.
    """
    from haori.bases import find_base
    from haori.cli.console import results
    from haori.core.errors import InputError
    from haori.data.pictures import PictureSplit, contact_sheet, holds_pictures
    from haori.tasks.recipe import recipe_from
    from haori.tasks.registry import DEFAULT_TASK, check_components, task_of

    keys = [item if item.startswith("data.") else f"data.{item}" for item in override or []]
    if task is None:
        task = "text_to_image" if holds_pictures(path) else DEFAULT_TASK
    recipe = recipe_from({"name": "check", "base": base or "", "task": task, "data": {"path": path}}, keys)
    what = task_of(recipe.task)
    found = find_base(base or what.example)
    check_components(found, what.components, f"the task {what.kind}")
    what.check(recipe, found)
    processor = what.processor(found, recipe)
    split = what.rows(recipe, found, processor, tolerant=True)
    results().print(split.table())
    for panel in what.show(split.train, processor, show):
        results().print(panel)
    if sheet is not None:
        if not isinstance(split, PictureSplit):
            raise InputError(f"--sheet is for pictures; the task {what.kind} has none.")
        shown = contact_sheet(split.train, sheet, held_out=split.validation)
        results().print(f"Contact sheet of {shown:,} pictures: {sheet}")
    if split.refused:
        raise typer.Exit(1)
