"""The queue of drawings: turns, shares, cancelling, failures; what draws is a stand-in that waits for a gate."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest

from haori.core.errors import HaoriError, InputError, OverloadedError, UnavailableError
from haori.images.generation import StepsDone
from haori.images.queue import PictureQueue
from haori.images.request import PictureRequest

STEPS = 10


class Steps:
    """Takes ten steps for each request once its gate is open, and gives the prompts back as pictures."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.drawn: list[str] = []
        self.taken = 0

    def draw(self, requests: Any, on_step: Any = None) -> Any:
        prompts = [request.prompt for request in requests]
        self.drawn += prompts
        for number in range(STEPS):
            assert self.gate.wait(10)
            if prompts[0] == "refused":
                raise InputError("This cannot be drawn.")
            if prompts[0] == "broken":
                raise RuntimeError("/secret/path")
            if prompts[0].startswith("slow"):
                time.sleep(0.01)
            self.taken += 1
            on_step(StepsDone(number + 1, STEPS))
        return prompts


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def queue(steps: Steps, said: list[str]) -> Iterator[PictureQueue]:
    made = PictureQueue(steps, waiting=8, say=said.append)
    yield made
    steps.gate.set()
    made.close()


def submit(queue: PictureQueue, prompt: str, owner: str = "", rounds: int = 1) -> Any:
    return queue.submit(owner, [(PictureRequest(prompt),)] * rounds, STEPS * rounds)


def running(queue: PictureQueue, prompt: str, owner: str = "", rounds: int = 1) -> Any:
    """Submit a job and wait until it runs."""
    job = submit(queue, prompt, owner, rounds)
    until(lambda: queue.status() == (1, 0))
    return job


def until(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_owners_take_turns(queue, steps):
    first = running(queue, "first", "a")
    jobs = [submit(queue, f"a{number}", "a") for number in range(3)]
    jobs += [submit(queue, "b0", "b"), submit(queue, "c0", "c")]
    steps.gate.set()
    assert [job.pictures.result(10) for job in (first, *jobs)] == [["first"], ["a0"], ["a1"], ["a2"], ["b0"], ["c0"]]
    assert steps.drawn == ["first", "a0", "b0", "c0", "a1", "a2"]


def test_a_full_queue_refuses_and_one_owner_cannot_fill_it(queue, steps):
    running(queue, "first")
    for number in range(6):
        submit(queue, f"a{number}", "a")
    with pytest.raises(OverloadedError, match="6 drawings are waiting"):
        submit(queue, "a6", "a")
    submit(queue, "b0", "b")
    submit(queue, "b1", "b")
    with pytest.raises(OverloadedError, match="8 drawings are waiting"):
        submit(queue, "c0", "c")


def test_what_is_cancelled_is_not_drawn(queue, steps):
    first = running(queue, "slow")
    waiting = submit(queue, "waiting")
    last = submit(queue, "last")
    queue.cancel(waiting)
    steps.gate.set()
    until(lambda: first.done >= 2)
    queue.cancel(first)
    assert last.pictures.result(10) == ["last"]
    with pytest.raises(CancelledError):
        waiting.pictures.result(0)
    assert steps.drawn == ["slow", "last"] and steps.taken < 2 * STEPS
    queue.cancel(last)  # one that has ended is no error


def test_progress_is_that_of_the_owner(queue, steps):
    job = running(queue, "slow", "a", rounds=2)
    submit(queue, "b", "b")
    assert queue.progress("b")[:3] == (0.0, 0.0, 1) and queue.progress("c").rounds == 0
    steps.gate.set()
    until(lambda: job.done > STEPS)
    seen = queue.progress("a")
    assert 0.5 < seen.share <= 1 and seen.round == 1 and seen.steps == 2 * STEPS
    # Steps take the same time, so that the time left is that of as many as there are.
    spent = time.monotonic() - job.started_s
    assert seen.left_s == pytest.approx(spent * (1 - seen.share) / seen.share, rel=0.5, abs=0.05)
    queue.interrupt("b")
    assert job.pictures.result(10) == ["slow", "slow"]


def test_interrupt_keeps_the_rounds_that_are_done_and_skip_leaves_one(queue, steps):
    steps.gate.set()
    job = submit(queue, "slow", rounds=3)
    until(lambda: job.done > STEPS)
    queue.interrupt("")
    assert job.pictures.result(10) == ["slow"] and job.interrupted
    job = submit(queue, "slow", rounds=3)
    until(lambda: job.round == 1)
    queue.skip("")
    assert job.pictures.result(10) == ["slow", "slow"] and job.skipped == 1


def test_a_failure_is_its_own_jobs(queue, steps, said):
    steps.gate.set()
    refused, broken, good = (submit(queue, prompt) for prompt in ("refused", "broken", "good"))
    with pytest.raises(InputError, match="cannot be drawn"):
        refused.pictures.result(10)
    with pytest.raises(HaoriError, match="log says why") as found:
        broken.pictures.result(10)
    assert "/secret" not in str(found.value) and any("/secret" in one for one in said)
    assert good.pictures.result(10) == ["good"]


def test_closing_ends_everything(steps):
    queue = PictureQueue(steps, waiting=4)
    first, waiting = running(queue, "slow"), submit(queue, "waiting")
    assert not queue.drain(0.01)
    steps.gate.set()
    queue.close()
    for job in (first, waiting):
        with pytest.raises(UnavailableError, match="ask again"):
            job.pictures.result(10)
    with pytest.raises(UnavailableError):
        submit(queue, "late")
