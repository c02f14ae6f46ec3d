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
    """Report rows, tokens, duplicates, truncations and problems of a dataset.

    Ends with 1 when there is nothing in it to train on.
    """
    from haori.bases import embeddings_of, find_base, load_tokenizer
    from haori.cli.console import results
    from haori.core.recipe import recipe_from
    from haori.data import check_text, report_table, sample_panels

    keys = [item if item.startswith("data.") else f"data.{item}" for item in override or []]
    section = recipe_from({"name": "check", "base": base, "data": {"path": path}}, keys).data
    found = find_base(base)
    tokenizer = load_tokenizer(found)
    data = check_text(section, tokenizer, context_length=found.context_length, embeddings=embeddings_of(found))
    results().print(report_table(data.report))
    for panel in sample_panels(tokenizer, data.train, show):
        results().print(panel)
    if data.report.refused:
        raise typer.Exit(1)
