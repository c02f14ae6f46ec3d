"""Kinds of job for the tests of the queue's worker: real work in real processes, but of a few milliseconds."""

import os
import signal
import sys
import time
from pathlib import Path

from haori.core.events import Measured, Progress, Said, Warned
from haori.core.storage import write_text
from haori.jobs.queue.child import StoppedError

HERE = "tests.queue_tasks"


def progress(step: int, of: int) -> Progress:
    return Progress(
        step=step, total_steps=of, epoch=step / of, loss=1.0 / step, rate_per_s=1.0, unit="tokens", peak_memory_bytes=0
    )


def count(arguments, folder, on_event):
    """Count to `to`, a step every 20 ms, each durable; go on from where an earlier attempt came to."""
    stopped = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    place = folder / "count.txt"
    step = int(place.read_text()) if place.exists() else 0
    on_event(Said(text=f"from {step}"))
    while step < arguments["to"]:
        time.sleep(0.02)
        step += 1
        with (folder / "steps.txt").open("a") as file:  # first: killed in between, it does this step again
            file.write(f"{os.getpid()} {step}\n")
        write_text(place, str(step))
        on_event(progress(step, arguments["to"]))
        if stopped:
            raise StoppedError(f"stopped at {step}")
    on_event(Measured(step=step, epoch=1.0, values={"loss": 0.5}))
    return {"counted": step, "tokens": 10 * step, "path": os.environ.get("SECRET_OF_THE_WORKER")}


def chatter(arguments, folder, on_event):
    """Print more than any pipe holds."""
    for _ in range(3000):
        print("x" * 1000)
    print("printed at the end", file=sys.stderr)
    on_event(Warned(text="careful"))
    return {}


def die(arguments, folder, on_event):
    print("about to die", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(arguments, folder, on_event):
    from haori.core.errors import DataError

    raise DataError("row 3 is empty.")


def deaf(arguments, folder, on_event):
    """Ignore SIGTERM for ever."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(folder / "pid").write_text(str(os.getpid()))
    while True:
        time.sleep(0.05)


def look(arguments, folder, on_event):
    """Say that it is there, and when it is told to, look into the database."""
    from haori.jobs.database.connection import open_database

    write_text(folder / "there.txt", "")
    while not Path(arguments["go"]).exists():
        time.sleep(0.01)
    database = open_database()
    with database.reading():
        database.close()
    return {}


def slow(arguments, folder, on_event):
    """Take `seconds` to save when it is asked to end."""
    stopped = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    on_event(progress(1, 2))
    while not stopped:
        time.sleep(0.01)
    time.sleep(arguments["seconds"])
    write_text(folder / "saved.txt", "whole")
    raise StoppedError("saved")


KINDS = {name: f"{HERE}:{name}" for name in ("count", "chatter", "die", "refuse", "deaf", "look", "slow")}


def main() -> None:
    """Run a worker, as `haori worker` does, with these kinds: URL NAME POLL LEASE [LAUNCHER]."""
    from haori.jobs.database.connection import open_database
    from haori.jobs.queue import kinds
    from haori.jobs.queue.attempt import Pace
    from haori.jobs.queue.worker import start_worker
    from haori.training.signals import stop_on_signals

    kinds.KINDS.update(KINDS)
    url, name, poll, lease, *launcher = sys.argv[1:]
    pace = Pace(lease_s=float(lease), heartbeat_s=float(lease) / 6, poll_s=float(poll), grace_s=5)
    with stop_on_signals() as stop:
        start_worker(
            open_database(url), name=name, pace=pace, stop=lambda: bool(stop), launcher=(launcher or ["local"])[0]
        )


if __name__ == "__main__":
    main()
