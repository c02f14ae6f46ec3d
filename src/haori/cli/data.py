"""`haori data check`: what a dataset holds, before anything is trained on it."""

from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(help="Look at data before training on it.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Look at data before training on it."""


@app.command()
def check(
    path: Annotated[str, typer.Argument(help="File, folder, or hub dataset id.")],
    base: Annotated[
        str, typer.Option(help="Base whose tokenizer and chat template are used.")
    ] = "smollm2-135m-instruct",
    task: Annotated[
        str | None, typer.Option(help="What is learnt: how rows are read; text generation by default.")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Render this many rows, trained tokens marked.")] = 0,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set a key of the recipe's data section, e.g. columns.prompt=q.",
        ),
    ] = None,
) -> None:
    """Report rows, lengths, duplicates, truncations and problems of a dataset.

    Ends with 1 when there is nothing in it to train on.
    """
    from haori.bases import find_base
    from haori.cli.console import results
    from haori.tasks.recipe import recipe_from
    from haori.tasks.registry import check_components, task_of

    keys = [item if item.startswith("data.") else f"data.{item}" for item in override or []]
    named = {} if task is None else {"task": task}
    recipe = recipe_from({"name": "check", "base": base, **named, "data": {"path": path}}, keys)
    found = find_base(base)
    what = task_of(recipe.task)
    check_components(found, what.components, f"the task {what.kind}")
    what.check(recipe, found)
    processor = what.processor(found, recipe)
    split = what.rows(recipe, found, processor, tolerant=True)
    results().print(split.table())
    for panel in what.show(split.train, processor, show):
        results().print(panel)
    if split.refused:
        raise typer.Exit(1)
