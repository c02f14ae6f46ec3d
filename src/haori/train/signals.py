"""Turns SIGINT and SIGTERM into a request that the loop answers at the next step: save, then exit.

A signal may reach one of several processes only. What it caught is therefore apart from what all of them agreed on:
`StopRequest.agree` exchanges it, and only an agreed stop ends a run.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["StopRequest", "stop_on_signals"]


class StopRequest:
    """Holds the signal that this process caught, and the one that all processes stop for."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self.signal: int | None = None

    def __bool__(self) -> bool:
        """Say whether all processes agreed to stop."""
        return self.signal is not None

    def agree(self, accelerator: "Accelerator") -> bool:
        """Say whether any process caught a signal; all processes call this at the same step and get the same answer."""
        if accelerator.num_processes == 1:
            self.signal = self.signal or self.caught
            return bool(self)
        import torch

        mine = torch.tensor([self.caught or 0], device=accelerator.device)
        self.signal = self.signal or int(accelerator.gather(mine).max()) or None
        return bool(self)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM while the block runs; a second SIGINT interrupts at once.

    A signal that came after the run had decided to go on to its end is raised again when the block ends.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.caught is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.caught = number

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if request.caught is not None and not request:
        signal.raise_signal(request.caught)
