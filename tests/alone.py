"""Under several workers (`make test`) a test marked `alone` runs while the other workers wait."""

import fcntl
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside the limit of time, which waiting must not count to
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with ExitStack() as held:
        if hasattr(item.config, "workerinput"):
            shared = Path(item.config.option.basetemp).parent  # the workers of a run have folders in it
            is_alone = item.get_closest_marker("alone") is not None
            with locked(shared / "next.lock", fcntl.LOCK_EX):  # who waits to be alone is next: nobody slips in before
                held.enter_context(locked(shared / "running.lock", fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH))
        return (yield)


@contextmanager
def locked(path: Path, kind: int) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, kind)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough if a process forked meanwhile has it open too
