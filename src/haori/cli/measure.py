"""`haori evaluate` and `haori demo`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = ["demo", "evaluate"]


def evaluate(
    name: Annotated[str, typer.Argument(help="Adapter in the library: name or name@version.")],
    data: Annotated[str, typer.Option(help="Data to measure on: file, folder, or hub dataset id.")],
    against: Annotated[str, typer.Option(help="`base` compares with the bare base; `nothing` does not.")] = "base",
    base: Annotated[str | None, typer.Option(help="Base to use; by default the one on the card.")] = None,
    labels: Annotated[
        str, typer.Option(help="`auto`, `none`, or the labels of a label task, separated by commas.")
    ] = "auto",
    samples: Annotated[int, typer.Option(min=0, help="Answers shown side by side.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest generated answer in tokens.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Folder for evaluation.json and evaluation.html.")] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the data section, e.g. columns.prompt=q."),
    ] = None,
) -> None:
    """Measure an adapter on data, beside its base, with intervals; write a report."""
    from haori.cli.console import results
    from haori.core.errors import InputError
    from haori.evaluation import evaluate_stored, show_result
    from haori.library import Library
    from haori.tasks.examination import MeasureOptions
    from haori.tasks.recipe import recipe_from

    if against not in {"base", "nothing"}:
        raise InputError(f"--against cannot be {against!r}; it is 'base' or 'nothing'.")
    keys = [item if item.startswith("data.") else f"data.{item}" for item in override or []]
    task = Library().get(name).card.task
    section = recipe_from({"name": "evaluate", "base": "any", "task": task, "data": {"path": data}}, keys).data
    wanted: Literal["auto", "none"] | list[str]
    wanted = "auto" if labels == "auto" else "none" if labels == "none" else [x.strip() for x in labels.split(",")]
    result, folder = evaluate_stored(
        name,
        section,
        against_base=against == "base",
        base_spec=base,
        options=MeasureOptions(labels=wanted, max_new_tokens=max_tokens),
        samples=samples,
        out=out,
    )
    show_result(result, results())
    results().print(f"Report: {folder / 'evaluation.html'}", soft_wrap=True)


def demo(
    rows: Annotated[int, typer.Option(min=100, max=4000, help="Reviews to train on.")] = 640,
    images: Annotated[
        bool, typer.Option("--images", help="Learn a style from 50 pictures instead, and draw with it.")
    ] = False,
) -> None:
    """Train on movie reviews and show what it was worth: base and adapter on 400 test reviews."""
    if images:
        from haori.cli.demo_pictures import run_picture_demo

        run_picture_demo()
        return
    from haori.cli.demo import run_demo

    run_demo(rows)
