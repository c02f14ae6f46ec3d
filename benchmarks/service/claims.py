"""Eight processes empty a queue in SQLite at once: jobs claimed and ended in a second, and jobs that two claimed.

Run with a folder as its argument this file is one of the processes: it opens the database there, says so, waits for a
line, and claims and ends jobs until there is none.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

OWNERS = 4


def claims(home: Path, *, jobs: int, processes: int, rounds: int) -> dict[str, Any]:
    """Measure; the slowest of the rounds counts.

    Args:
        home: A new folder.
        jobs: In the queue, of four accounts.
        processes: That claim.
        rounds: How often it is done, each with a database of its own.
    """
    found = [_round(home / str(number), jobs, processes) for number in range(rounds)]
    return {
        "jobs": jobs, "processes": processes, "owners": OWNERS, "rounds": found,
        "claims_per_s": min(one["claims_per_s"] for one in found), "claimed_twice": sum(one["twice"] for one in found),
        "claims_lost": sum(one["lost"] for one in found),
    }  # fmt: skip


def _round(home: Path, jobs: int, processes: int) -> dict[str, Any]:
    from haori.jobs.database.connection import open_database
    from haori.jobs.queue.store import JobStore

    home.mkdir(parents=True)
    database = open_database(_url(home))
    store = JobStore(database, home / "jobs")
    for number in range(jobs):
        store.submit("train", {"n": number}, owner=f"owner-{number % OWNERS}")
    database.close()
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(processes)
    ]
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    started = time.perf_counter()
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [json.loads(process.communicate()[0]) for process in running]
    seconds = max(one["ended"] for one in said) - started
    taken = [identity for one in said for identity in one["taken"]]
    return {
        "claims_per_s": round(jobs / seconds, 1), "twice": len(taken) - len(set(taken)),
        "lost": jobs - len(set(taken)), "by_process": [len(one["taken"]) for one in said],
    }  # fmt: skip


def _url(home: Path) -> str:
    return f"sqlite:///{home / 'haori.db'}"


def _claim_all(home: Path) -> None:
    from haori.jobs.database.connection import open_database
    from haori.jobs.queue.records import Requirements
    from haori.jobs.queue.store import JobStore

    store = JobStore(open_database(_url(home)), home / "jobs")
    offers, taken = Requirements(device="cpu", memory_bytes=8 * 10**9), []
    print("ready", flush=True)
    sys.stdin.readline()
    while (job := store.claim("worker", offers=offers)) is not None:
        taken.append(job.id)
        if not store.finish(job, {}):
            raise SystemExit(f"{job.id} was ended by another.")
    print(json.dumps({"taken": taken, "ended": time.perf_counter()}))


if __name__ == "__main__":
    _claim_all(Path(sys.argv[1]))
