"""Runs the Ray of our own, as a process: `python -m haori.serve.ray.head ray's own arguments`.

It ends with whoever started it, however that ends: then its standard input closes. A process of its own, and not
`ray.init`, because only `ray start` takes ports for all of Ray's processes; with ports of their own choice Ray waits
for each of them 15 seconds at most, which a busy machine misses.
"""

import os
import signal
import sys
import threading

__all__ = ["main"]


def main() -> None:
    """Start Ray, and wait for the end of standard input or a signal."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    from ray.scripts.scripts import cli

    cli(["start", "--head", "--block", *sys.argv[1:]])


def _end_with_input() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # Ray ends its processes then


if __name__ == "__main__":
    main()
