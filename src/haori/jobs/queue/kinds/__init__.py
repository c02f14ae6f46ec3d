"""The kinds of job: a name, and the function that does one in a process of its own.

It is called as `work(arguments, folder, on_event)`: `arguments` is what was submitted (JSON data), `folder` holds what
earlier attempts made and is gone on from, and what it returns (JSON data; `tokens` are those trained on) is the job's
result. Asked to stop (SIGTERM) it may save, and raise `haori.jobs.queue.child.StoppedError`.
"""

from haori.core.errors import InputError, nearest

__all__ = ["KINDS", "task_of_kind"]

KINDS: dict[str, str] = {
    "train": "haori.jobs.queue.kinds.training:train",
    "compare": "haori.jobs.queue.kinds.searching:compare",
    "sweep": "haori.jobs.queue.kinds.searching:sweep",
    "evaluate": "haori.jobs.queue.kinds.adapters:evaluate",
    "merge": "haori.jobs.queue.kinds.adapters:merge",
    "export": "haori.jobs.queue.kinds.adapters:export",
    "generate": "haori.jobs.queue.kinds.pictures:generate",
    "fine_tune": "haori.jobs.fine_tuning.work:fine_tune",
}
"""Where the work of each kind is, as `package.module:function`."""


def task_of_kind(kind: str) -> str:
    """Return where the work of a kind is.

    Raises:
        InputError: There is no such kind.
    """
    if kind in KINDS:
        return KINDS[kind]
    near = nearest(kind, KINDS)
    raise InputError(f"There is no kind of job {kind!r}; there are {', '.join(KINDS)}{'; ' + near if near else ''}.")
