"""`haori worker`: takes jobs from the queue, on this machine or on any that reaches the database."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from haori.jobs.queue.records import Job

__all__ = ["worker"]


def worker(
    database: Annotated[
        str | None, typer.Option(help="Address of the queue's database; by default HAORI_DATABASE or the embedded one.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the worker; of machine and process if not given.")] = None,
    launcher: Annotated[str, typer.Option(help="Where jobs run: local, ray or slurm.")] = "local",
    until_empty: Annotated[bool, typer.Option("--until-empty", help="End once no job is left for it.")] = False,
    heartbeat: Annotated[float, typer.Option(min=0.05, help="Seconds between signs of life.")] = 10.0,
    lease: Annotated[
        float, typer.Option(min=0.5, max=3600, help="Seconds without one after which a job is given to another.")
    ] = 60.0,
    with_parent: Annotated[bool, typer.Option("--with-parent", hidden=True)] = False,
) -> None:
    """Do the jobs of the queue one after another; Ctrl-C saves the one that runs and puts it back."""
    from haori.cli.console import notes
    from haori.core.errors import InputError
    from haori.jobs.database.connection import open_database
    from haori.jobs.queue.attempt import Pace
    from haori.jobs.queue.worker import start_worker, worker_name
    from haori.training.signals import stop_on_signals

    if heartbeat * 3 > lease:
        raise InputError(f"A lease of {lease:g} s is for heartbeats of {lease / 3:g} s at most; {heartbeat:g} s given.")
    own = name or worker_name()
    opened = open_database(database)
    pace = Pace(lease_s=lease, heartbeat_s=heartbeat)
    with stop_on_signals() as stop:
        if with_parent:
            _end_with_parent()
        notes().print(
            f"Worker {own} takes jobs from {opened.named()}; Ctrl-C saves the one that runs.",
            markup=False, soft_wrap=True,
        )  # fmt: skip
        start_worker(
            opened, name=own, launcher=launcher, stop=lambda: bool(stop), pace=pace, until_empty=until_empty,
            on_job=_tell,
        )  # fmt: skip
    opened.close()


def _tell(job: "Job") -> None:
    from haori.cli.console import notes

    said = f"{job.id} ({job.kind}, {job.owner}): {job.state}"
    if job.error is not None and job.state == "failed":
        said += f": {job.error.sentence}"
    notes().print(said, markup=False, soft_wrap=True)


def _end_with_parent() -> None:
    """Ask this process to end as soon as the one that started it is gone."""
    import os
    import signal
    import threading

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
