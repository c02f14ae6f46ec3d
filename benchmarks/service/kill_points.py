"""Workers and their processes are killed (SIGKILL) at random instants while they train; what is lost, twice, other.

Each job trains a tiny model with a seed of its own. First all are done undisturbed. Then they are submitted again, and
three workers do them while something is killed every few seconds, the worker or the process of its job by the throw of
a coin; a killed worker is replaced at once. Should all be done before enough was killed, they are submitted once more.
In the end every job must have succeeded once, its adapter be in the library once, and its file be equal to the
undisturbed one to the byte.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tiny import tiny_base

PACE = ("--lease", "3", "--heartbeat", "0.5")
BUSY = 0.8  # of kills, to where a job has its process; the others hit workers that start, claim or wait as well
ATTEMPTS = 10_000  # an attempt that was killed is no fault of its job


def kill_points(
    home: Path, *, kills: int, jobs: int, workers: int, every_s: float, seed: int = 0, limit_s: float = 7200.0
) -> dict[str, Any]:
    """Measure.

    Args:
        home: A new folder.
        kills: How many processes are killed at least.
        jobs: Trained at once.
        workers: That train them.
        every_s: Mean time between two kills; each time is drawn between 0 and twice that.
        seed: Of what is killed when.
        limit_s: Longest time for all.
    """
    os.environ["HAORI_HOME"] = str(home / "haori")
    from haori.core.settings import settings
    from haori.jobs.database.connection import open_database
    from haori.jobs.queue.store import JobStore

    settings.cache_clear()
    home.mkdir(parents=True, exist_ok=True)
    recipe = _recipe(home)
    database = open_database()
    store = JobStore(database)
    calm = [_submit(store, recipe, "calm", number) for number in range(jobs)]
    for process in [_worker("--until-empty") for _ in range(min(workers, os.cpu_count() or 1))]:
        process.wait()
    expected = [_weights(store, job) for job in calm]
    drawn, ends = random.Random(seed), time.monotonic() + limit_s
    running = [_worker(*PACE) for _ in range(workers)]
    killed = {"killed_workers": 0, "killed_processes": 0}
    stormy: list[list[str]] = []
    while sum(killed.values()) < kills:
        stormy.append([_submit(store, recipe, f"storm-{len(stormy)}", number) for number in range(jobs)])
        _storm(store, stormy[-1], running, drawn, killed, kills, every_s, ends)
    for process in running:
        process.terminate()
    for process in running:
        process.wait()
    found = _judge(store, stormy, expected)
    database.close()
    return {
        "kills": sum(killed.values()), **killed, "jobs": jobs, "workers": workers, "every_s": every_s,
        "rounds": len(stormy), **found,
    }  # fmt: skip


def _recipe(home: Path) -> dict[str, Any]:
    rows = [{"prompt": f"what is {i} plus {i}?", "completion": f"it is {2 * i}"} for i in range(60)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "base": str(tiny_base(home / "base")), "data": {"path": str(home / "rows.jsonl")},
        "method": {"kind": "lora", "rank": 4},
        "training": {"dtype": "fp32", "epochs": 4, "evaluations_per_epoch": 4},
    }  # fmt: skip


def _submit(store: Any, recipe: dict[str, Any], name: str, number: int) -> str:
    document = {**recipe, "name": f"{name}-{number}", "training": {**recipe["training"], "seed": number}}
    return str(store.submit("train", {"recipe": document}, max_attempts=ATTEMPTS).id)


def _worker(*words: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "haori.cli.app", "worker", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _storm(
    store: Any, wanted: list[str], running: list[Any], drawn: random.Random, killed: dict[str, int], kills: int,
    every_s: float, ends: float,
) -> None:  # fmt: skip
    """Kill now and then until all jobs have ended; no more than `kills` in all."""
    next_at = time.monotonic() + drawn.uniform(0, 2 * every_s)
    while any(store.find(job).state in ("queued", "running") for job in wanted):
        if time.monotonic() > ends:
            raise SystemExit("The jobs were not done in time; kill less often (--every).")
        time.sleep(0.02)
        if time.monotonic() < next_at or sum(killed.values()) >= kills:
            continue
        next_at = time.monotonic() + drawn.uniform(0, 2 * every_s)
        busy = [number for number, process in enumerate(running) if _children(process.pid)]
        number = drawn.choice(busy if busy and drawn.random() < BUSY else range(len(running)))
        children = _children(running[number].pid)
        if children and drawn.random() < 0.5:
            with suppress(ProcessLookupError):
                os.kill(children[0], signal.SIGKILL)
                killed["killed_processes"] += 1
        else:
            running[number].kill()
            running[number].wait()
            running[number] = _worker(*PACE)
            killed["killed_workers"] += 1
        print(f"  {sum(killed.values())} of {kills} killed", end="\r", file=sys.stderr, flush=True)


def _judge(store: Any, stormy: list[list[str]], expected: list[bytes | None]) -> dict[str, Any]:
    from haori.library import Library

    names = [stored.name for stored in Library().list()]
    lost = twice = other = attempts = 0
    for number, jobs in enumerate(stormy):
        for index, identity in enumerate(jobs):
            job = store.find(identity)
            attempts += job.fence
            versions = [name for name in names if name.partition("@")[0] == f"storm-{number}-{index}"]
            ended = [event for event in store.events(identity, limit=1_000_000) if "succeeded" in event.message]
            lost += job.state != "succeeded" or not versions
            twice += len(versions) > 1 or len(ended) > 1
            weights = _weights(store, identity)
            other += weights is None or weights != expected[index]
    return {"kill_lost": lost, "kill_twice": twice, "kill_other_bytes": other, "attempts": attempts}


def _weights(store: Any, identity: str) -> bytes | None:
    result = store.find(identity).result
    return None if result is None else (Path(result["run"]) / "adapter" / "adapter_model.safetensors").read_bytes()


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
