"""`haori train` and `haori schema`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from haori.cli.queueing import Priority, Queue, queue_training

if TYPE_CHECKING:
    from haori.core.records import Advice
    from haori.training import Prepared, TrainedRun

_SHOWN = 3

__all__ = ["schema", "show_choices", "show_run", "train"]


def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe in YAML. Not needed with --base, --data and --name.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base: catalogue name, folder, hub id, GGUF file or checkpoint.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data: JSONL, JSON, CSV, Parquet, a folder, or a hub dataset id.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the adapter in the library.")] = None,
    task: Annotated[str | None, typer.Option(help="What is learnt; text generation by default.")] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set any recipe key, e.g. optimizer.lr=1e-4."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the finished adapter to this new folder.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the interrupted run in this folder.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    queue: Queue = False,
    priority: Priority = 0,
) -> None:
    """Train an adapter, prove that the saved file works, and keep it in the library."""
    from haori.api import recipe_of
    from haori.cli.console import notes
    from haori.core.errors import InputError
    from haori.training import TrainingDisplay, prepare, resume_run, train_run

    if resume is not None:
        if recipe or base or data or name or task or override or dry_run or queue:
            raise InputError("--resume continues a run with its own recipe; give it alone (or with --out).")
        with TrainingDisplay(notes()) as display:
            run = resume_run(resume, out=out, on_event=display.update)
        show_run(run)
        return
    wanted = recipe_of(recipe, base, data, name, override or [], task=task)
    prepared = prepare(wanted)
    show_choices(prepared)
    if dry_run:
        _show_plan(prepared)
        return
    if queue:
        if out is not None:
            raise InputError("--queue keeps the adapter in the library; leave --out out and export it from there.")
        queue_training(wanted, prepared, priority)
        return
    with TrainingDisplay(notes()) as display:
        run = train_run(wanted, out=out, on_event=display.update, prepared=prepared)
    show_run(run)


def schema() -> None:
    """Print the JSON schema of a recipe."""
    import json

    from haori.tasks.recipe import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


def show_choices(prepared: "Prepared") -> None:
    """Print what will be trained on what, and each automatic choice with its reason."""
    from haori.cli.console import notes

    base, rows, held_out = prepared.base, len(prepared.split.train), len(prepared.split.validation)
    notes().print(
        f"[bold]{prepared.recipe.name}[/]: {rows:,} training and {held_out:,} validation {prepared.task.rows_title} on "
        f"{base.name} ({base.parameters / 1e6:,.0f}M parameters, {base.id})"
    )
    for note in prepared.split.notes:
        notes().print(f"  Note: {note}", markup=False)
    for choice in prepared.choices:
        notes().print(f"  [cyan]{choice.key}[/] = {choice.value}  [dim]{choice.reason}[/]")


def _show_plan(prepared: "Prepared") -> None:
    from rich.table import Table

    from haori.cli.console import results
    from haori.training import make_plan

    plan = make_plan(prepared)
    table = Table(title="Plan", show_header=False, title_justify="left")
    share = plan.trainable_parameters / plan.total_parameters
    minutes, seconds = divmod(round(plan.seconds), 60)
    for row in (
        ("trainable parameters", f"{plan.trainable_parameters:,} of {plan.total_parameters:,} ({share:.2%})"),
        ("adapted modules", f"{plan.target_modules}"),
        ("optimizer steps", f"{plan.steps:,} in at most {plan.epochs} epochs"),
        (f"{plan.unit} per epoch", f"{plan.cost_per_epoch:,}"),
        (
            "training time, estimated",
            f"{minutes} min {seconds} s (from the largest batch, measured; validation not counted)",
        ),
        (
            "peak memory, estimated",
            f"{plan.peak_memory_bytes / 1e9:.2f} GB (measured on that batch, plus AdamW)",
        ),
    ):
        table.add_row(*row)
    results().print(table)
    marked = "; what is trained is marked" if prepared.task.unit == "tokens" else ""
    results().print(f"The first {prepared.task.rows_title} as the model sees them{marked}:")
    for panel in prepared.task.show(prepared.split.train, prepared.processor, _SHOWN):
        results().print(panel)


def show_run(run: "TrainedRun") -> None:
    """Print the end of a run, and leave the group of processes where it had several.

    Raises:
        typer.Exit: The run was stopped by a signal; of several processes none exits before the first has said so.
    """
    from accelerate import PartialState

    from haori.cli.console import results
    from haori.cli.library import print_meaning
    from haori.tasks.registry import task_of

    record = run.record
    if run.signal is not None and run.reports:
        saved = "a checkpoint was saved" if record.steps else "nothing was trained yet"
        results().print(f"Stopped after step {record.steps}; {saved}. Continue with:")
        results().print(f"  haori train --resume {run.folder}", soft_wrap=True)
    if run.signal is not None:
        PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    if run.signal is not None:
        raise typer.Exit(128 + run.signal)
    if run.verification is None or not run.reports:
        return
    name = record.adapter or f"The model {record.name}"
    size_bytes = run.adapter.card.size_bytes if run.adapter else _size_bytes(Path(record.model or run.folder))
    results().print(
        f"[bold green]{name}[/] is trained and proved: {len(run.verification.checks)} checks passed, "
        f"{size_bytes / 1e6:.1f} MB, {record.seconds:.0f} s, peak memory {record.peak_memory_bytes / 1e9:.2f} GB."
    )
    for sentence in record.diagnosis:
        results().print(f"  {sentence}")
    _show_advice(record.advice, run.folder)
    results().print(f"  Run folder with recipe, metrics and loss plot: {run.folder}", soft_wrap=True)
    if (run.folder / "samples.png").is_file():
        results().print(
            f"  Sample pictures of each stage, the base's own first: {run.folder / 'samples.png'}", soft_wrap=True
        )
    if record.model is not None:
        results().print(f"  The model, a base like any other: {record.model}", soft_wrap=True)
        results().print(f"Next: haori bases add {record.model} --name {record.name}", soft_wrap=True)
        return
    if record.adapter is not None:
        print_meaning(record.adapter)
        results().print(f"Next: {task_of(run.recipe.task).next_command(record.adapter)}", soft_wrap=True, markup=False)


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _show_advice(advice: "tuple[Advice, ...]", run_folder: Path) -> None:
    from rich.markup import escape

    from haori.cli.console import results

    if advice:
        results().print("What to try next, one thing at a time:")
    for number, one in enumerate(advice, 1):
        results().print(f"  {number}. [bold]{escape(one.action)}[/]: {escape(one.reason)}.", soft_wrap=True)
        if (command := one.command_in(run_folder)) is not None:
            results().print(f"     {command}", soft_wrap=True, markup=False)
