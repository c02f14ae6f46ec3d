"""Work for the tests of `haori.jobs.process`, done in real child processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from haori.core.events import Measured, Progress, Said, Saved, Warned

EVENTS = (
    Said(text="hello\nthere é [brackets]"),
    Warned(text="careful"),
    Progress(
        step=1, total_steps=4, epoch=0.25, loss=2.5, rate_per_s=float("inf"), unit="tokens",
        peak_memory_bytes=2**40, values={"lr": 1e-30, "tokens": 12},
    ),
    Measured(step=1, epoch=0.25, values={"loss": 0.1 + 0.2, "accuracy": 1.0}),
    Saved(what="checkpoint", path="/a b/step-00000001", step=1),
)  # fmt: skip


def echo(arguments, on_event):
    print("printed by Python")
    subprocess.run([sys.executable, "-c", "print('printed below it')"], check=True)
    for event in EVENTS:
        on_event(event)
    return {"given": arguments, "home": os.environ["HAORI_HOME"]}


def refuse(arguments, on_event):
    from haori.core.errors import DataError

    raise DataError("row 3 is empty.")


def crash(arguments, on_event):
    raise KeyError("rank")


def die(arguments, on_event):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(arguments, on_event):
    os._exit(3)


def peak(arguments, on_event):
    from haori.training.memory import peak_memory_bytes

    return {"bytes": peak_memory_bytes("cpu")}


def sleep(arguments, on_event):
    Path(arguments["file"]).write_text(str(os.getpid()))
    on_event(Said(text="asleep"))
    time.sleep(300)


def write_to_the_channel(arguments, on_event):
    """Put lines among the events, as a library that prints before anything is caught, or a later version, would."""
    channel = on_event.__closure__[0].cell_contents
    on_event(Said(text="before"))
    for line in arguments["lines"]:
        channel.write(line + "\n")
    on_event(Said(text="after"))
    return {}
