"""`haori evaluate` and `haori demo`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from haori.evaluation import EvaluationResult
    from haori.evaluation.pictures.asking import PictureOptions

__all__ = ["demo", "evaluate", "picture_options"]


def evaluate(
    name: Annotated[str, typer.Argument(help="Adapter in the library: name or name@version.")],
    data: Annotated[str, typer.Option(help="Data to measure on: file, folder, or hub dataset id.")],
    against: Annotated[str, typer.Option(help="`base` compares with the bare base; `nothing` does not.")] = "base",
    base: Annotated[str | None, typer.Option(help="Base to use; by default the one on the card.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="`auto`, `none`, or the labels of a label task, separated by commas.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=0, help="Answers shown side by side, 3; for pictures prompts, 8.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest generated answer in tokens; 64.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for evaluation.json and evaluation.html.")] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the data section, e.g. columns.prompt=q."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Pictures: prompts to draw, one a line; by default 32 captions of the data.")
    ] = None,
    unrelated: Annotated[
        Path | None, typer.Option(help="Pictures: prompts that have nothing to do with the data, one a line.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Pictures: how many of each prompt; 2.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Pictures: steps of the sampler; 25.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Pictures: CFG scale; the pipeline's own.")] = None,
    strength: Annotated[float | None, typer.Option(help="Pictures: of the adapter; 1.")] = None,
    features: Annotated[
        str | None, typer.Option(help="Pictures: folder or hub id of CLIP, DINOv2 or others to look at them with.")
    ] = None,
    force_fid: Annotated[
        bool, typer.Option("--force-fid", help="Pictures: give FID of fewer than 2,048 pictures too.")
    ] = False,
) -> None:
    """Measure an adapter on data, beside its base, with intervals; write a report."""
    from haori.cli.console import results
    from haori.core.errors import InputError
    from haori.evaluation import show_result

    if against not in {"base", "nothing"}:
        raise InputError(f"--against cannot be {against!r}; it is 'base' or 'nothing'.")
    drawn = {
        "prompts": prompts, "unrelated": unrelated, "seeds": seeds, "steps": steps, "guidance": guidance,
        "strength": strength, "features": features, "force-fid": force_fid or None,
    }  # fmt: skip
    answered = {"labels": labels, "max-tokens": max_tokens, "against": None if against == "base" else against}
    result, folder = _measure(name, data, override or [], base, samples, out, drawn, answered)
    show_result(result, results())
    results().print(f"Report: {folder / 'evaluation.html'}", soft_wrap=True)


def _measure(
    name: str, data: str, override: list[str], base: str | None, samples: int | None, out: Path | None,
    drawn: dict[str, Any], answered: dict[str, Any],
) -> "tuple[EvaluationResult, Path]":  # fmt: skip
    """Measure as the adapter's task is measured; options of the other kind of task are refused."""
    from haori.data.pictures import PictureSection
    from haori.evaluation import evaluate_stored
    from haori.evaluation.stored import data_task
    from haori.library import Library
    from haori.tasks.examination import MeasureOptions
    from haori.tasks.recipe import recipe_from

    keys = [item if item.startswith("data.") else f"data.{item}" for item in override]
    task = data_task(Library().get(name).card)
    section = recipe_from({"name": "evaluate", "base": "any", "task": task, "data": {"path": data}}, keys).data
    if isinstance(section, PictureSection):
        from haori.evaluation.pictures.evaluation import evaluate_pictures

        _refuse(answered, "text", name, task)
        shown = 8 if samples is None else samples
        options = picture_options(drawn)
        return evaluate_pictures(name, section, options=options, base_spec=base, samples=shown, out=out)
    _refuse(drawn, "pictures", name, task)
    labels: str = answered["labels"] or "auto"
    wanted: Literal["auto", "none"] | list[str]
    wanted = "auto" if labels == "auto" else "none" if labels == "none" else [x.strip() for x in labels.split(",")]
    return evaluate_stored(
        name,
        section,
        against_base=answered["against"] is None,
        base_spec=base,
        options=MeasureOptions(labels=wanted, max_new_tokens=answered["max-tokens"] or 64),
        samples=3 if samples is None else samples,
        out=out,
    )


def picture_options(given: dict[str, Any]) -> "PictureOptions":
    """Return how pictures are measured, from options that were given or are None."""
    from haori.core.user_path import user_path
    from haori.evaluation.pictures.asking import PictureOptions, read_prompts

    found = {name.replace("-", "_"): value for name, value in given.items() if value is not None}
    for name in ("prompts", "unrelated"):
        if name in found:
            found[name] = read_prompts(user_path(str(found[name])))
    return PictureOptions(**found)


def _refuse(given: dict[str, Any], of: str, name: str, task: str) -> None:
    from haori.core.errors import InputError

    for option, value in given.items():
        if value is not None:
            raise InputError(f"--{option} is for {of}, and {name!r} was trained for {task}; leave it out.")


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
