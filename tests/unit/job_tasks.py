"""Work for the tests of `haori.jobs.process`, done in real child processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def echo(arguments, say, show):
    print("printed by Python")
    subprocess.run([sys.executable, "-c", "print('printed below it')"], check=True)
    say("hello\nthere")
    show({"step": 1})
    return {"given": arguments, "home": os.environ["HAORI_HOME"]}


def refuse(arguments, say, show):
    from haori.core.errors import DataError

    raise DataError("row 3 is empty.")


def crash(arguments, say, show):
    raise KeyError("rank")


def die(arguments, say, show):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(arguments, say, show):
    os._exit(3)


def peak(arguments, say, show):
    from haori.training.memory import peak_memory_bytes

    return {"bytes": peak_memory_bytes("cpu")}


def sleep(arguments, say, show):
    Path(arguments["file"]).write_text(str(os.getpid()))
    say("asleep")
    time.sleep(300)
