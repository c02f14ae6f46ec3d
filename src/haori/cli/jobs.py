"""`haori jobs`: the queue, as the one who runs the machine sees it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from haori.jobs.queue.records import Job
    from haori.jobs.queue.store import JobStore

__all__ = ["app"]

app = typer.Typer(help="Jobs in the queue: what waits, runs and ended.", no_args_is_help=True)
_Id = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")]
_FOLLOWED_S = 0.5
_COLOURS = {"succeeded": "green", "failed": "red", "running": "cyan", "paused": "yellow", "cancelled": "dim"}


@app.command("list")
def list_jobs(
    state: Annotated[
        list[str] | None, typer.Option(help="Only in this state; may be repeated: queued, running, paused, ...")
    ] = None,
    owner: Annotated[str | None, typer.Option(help="Only of this account.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Jobs at most, the newest first.")] = 20,
) -> None:
    """Show jobs, the newest first."""
    from rich.table import Table

    from haori.cli.console import results
    from haori.cli.job_words import ago
    from haori.core.errors import InputError, nearest
    from haori.jobs.queue.records import STATES

    for one in state or []:
        if one not in STATES:
            raise InputError(f"A job is never {one!r}; it is {', '.join(STATES)}. {nearest(one, STATES)}".rstrip())
    with _store() as store:
        found, more = store.list(owner, states=state, limit=limit)
        why = _why(store, found)
    if not found:
        results().print("There are no such jobs." if state or owner else "There are no jobs yet.")
        return
    table = Table("job", "kind", "owner", "state", "progress", "submitted", "worker")
    for job in found:
        colour = _COLOURS.get(job.state, "default")
        state_shown = f"[{colour}]{job.state}[/]"
        table.add_row(job.id, job.kind, job.owner, state_shown, _progress(job), ago(job.created), job.worker or "")
    results().print(table)
    if more:
        results().print(f"There are more; --limit shows more than {limit}.")
    for line in why:
        results().print(line, markup=False, soft_wrap=True)


@app.command()
def show(job: _Id) -> None:
    """Show one job: how far it is, what came of it, where its files are."""
    from rich.table import Table

    from haori.cli.console import results

    with _store() as store:
        found = store.find(job)
        why = _why(store, (found,))
        latest = store.events_newest(job, 10)
    table = Table(title=found.id, show_header=False, title_justify="left")
    for row in _rows(found):
        table.add_row(*row)
    results().print(table)
    for line in why:
        results().print(line.partition(": ")[2], markup=False, soft_wrap=True)
    for event in latest:
        results().print(f"  {event.message}", markup=False, soft_wrap=True)


@app.command()
def logs(
    job: _Id,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    printed: Annotated[
        bool, typer.Option("--printed", help="Instead what its latest process printed: log.txt, to its end.")
    ] = False,
) -> None:
    """Print what a job reported, or printed."""
    import time

    from haori.jobs.queue.records import ENDED

    with _store() as store:
        found = store.find(job)
        if printed:
            _print_log(found)
            return
        last = 0
        while True:
            found = store.find(job)  # before its events: what came before its end is then printed
            while events := store.events(job, after_n=last):
                for event in events:
                    stamp = time.strftime("%H:%M:%S", time.localtime(event.at))
                    typer.echo(f"{stamp} {'' if event.level == 'info' else event.level + ': '}{event.message}")
                last = events[-1].n
            if not follow or found.state in ENDED:
                break
            time.sleep(_FOLLOWED_S)
    if follow and found.state != "succeeded":
        raise typer.Exit(1)


@app.command()
def cancel(job: _Id) -> None:
    """End a job; one that runs is ended by its worker within seconds."""
    _ask("cancel", job)


@app.command()
def pause(job: _Id) -> None:
    """Hold a job back; one that runs saves a checkpoint first."""
    _ask("pause", job)


@app.command()
def resume(job: _Id) -> None:
    """Let a paused job go on."""
    _ask("resume", job)


@app.command()
def retry(job: _Id) -> None:
    """Try a failed or cancelled job again, from its last checkpoint."""
    _ask("retry", job)


@app.command()
def prune(
    older_than: Annotated[str, typer.Option(help="How long ago they ended: 90m, 12h, 30d.")] = "30d",
    owner: Annotated[str | None, typer.Option(help="Only of this account.")] = None,
) -> None:
    """Delete ended jobs with their folders; adapters in the library stay."""
    from haori.cli.console import results
    from haori.server import parse_duration

    age = parse_duration(older_than).total_seconds()
    with _store() as store:
        gone = store.prune(older_than_s=age, owner=owner)
    results().print(f"Deleted {len(gone)} job{'' if len(gone) == 1 else 's'} that ended more than {older_than} ago.")


@contextmanager
def _store() -> "Iterator[JobStore]":
    from haori.jobs.database.connection import open_database
    from haori.jobs.queue.store import JobStore

    database = open_database()
    try:
        yield JobStore(database)
    finally:
        database.close()


def _ask(action: str, job_id: str) -> None:
    from haori.cli.console import results

    with _store() as store:
        job = getattr(store, action)(job_id)
    asked = " It is asked to stop." if job.state == "running" and action in ("cancel", "pause") else ""
    results().print(f"{job.id} is {job.state}.{asked}")


def _why(store: "JobStore", found: "tuple[Job, ...]") -> list[str]:
    """Return why jobs that wait could be taken by no worker, a line for each reason."""
    from haori.jobs.queue.workers import obstacle

    reasons: dict[str, list[str]] = {}
    for job in found:
        if (why := obstacle(store.database, job)) is not None:
            reasons.setdefault(why, []).append(job.id)
    return [f"{', '.join(ids[:3])}{' and others' if len(ids) > 3 else ''}: {why}" for why, ids in reasons.items()]


def _progress(job: "Job") -> str:
    from haori.cli.job_words import duration

    if not job.progress:
        return ""
    text = f"{job.progress['step']:,} of {job.progress['of']:,}"
    left = job.progress.get("seconds_left")
    return text if left is None or job.state != "running" else f"{text}, {duration(left)} left"


def _rows(job: "Job") -> list[tuple[str, str]]:
    from haori.cli.job_words import ago, duration

    found: list[tuple[str, Any]] = [
        ("kind", job.kind), ("owner", job.owner), ("state", job.state), ("priority", job.priority),
        ("submitted", ago(job.created)), ("progress", _progress(job)), ("worker", job.worker or ""),
        ("attempts", f"{job.attempts} of {job.max_attempts}"),
    ]  # fmt: skip
    if job.started is not None and job.ended is not None:
        found.append(("from start to end", duration(job.ended - job.started)))
    if job.state == "failed" and job.error is not None:
        found.append(("error", job.error.sentence))
    for key, value in (job.result or {}).items():
        if isinstance(value, str | int | float):
            found.append((key, f"{value:,}" if isinstance(value, int) else value))
    return [(name, str(value)) for name, value in [*found, ("folder", job.folder)] if value != ""]


def _print_log(job: "Job") -> None:
    from haori.core.errors import InputError
    from haori.jobs.queue.folders import LOG, attempts_of

    attempts = attempts_of(job.folder)
    path: Path | None = attempts[-1][1] / LOG if attempts else None
    if path is None or not path.is_file():
        raise InputError(f"The job {job.id!r} has printed nothing yet.")
    typer.echo(path.read_text(encoding="utf-8", errors="replace"), nl=False)
