"""How long after its command `haori serve` answers: the first time that it meets a base, and after that."""

import os
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from setting import Setting

_PATIENCE_S = 120.0
_ASK_EVERY_S = 0.1  # asking takes time from the server that is starting


def start_part(setting: Setting) -> dict[str, Any]:
    """Start and end the server, each time as a new process over a base that lies on disk."""
    home = setting.home / "start"
    seconds = [_ready_after(setting.base, home) for _ in range(1 + setting.sizes.rounds)]
    first, later = seconds[0], seconds[1:]
    middle = statistics.median(later)
    print(f"  ready after {middle:.2f} s ({min(later):.2f} to {max(later):.2f}); the first time {first:.2f} s")
    return {"seconds": later, "median_s": middle, "first_s": first}


def _ready_after(base: Path, home: Path) -> float:
    started = time.perf_counter()
    with serving(base, home):
        return time.perf_counter() - started


@contextmanager
def serving(base: Path, home: Path, *options: str) -> Iterator[str]:
    """Start `haori serve` as a process of its own; yield its address once it answers, and end it."""
    started = time.perf_counter()
    haori = Path(sys.executable).with_name("haori")
    server = subprocess.Popen(
        [haori, "serve", "--base", base, "--port", "0", *options], env={**os.environ, "HAORI_HOME": str(home)},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        said = server.stdout.readline()
        found = re.search(r"http://\S+?:\d+", said)
        if found is None:
            raise RuntimeError(f"haori serve did not start; it said {said!r}.")
        while not _healthy(found[0]):
            if server.poll() is not None or time.perf_counter() - started > _PATIENCE_S:
                raise RuntimeError("haori serve did not become ready.")
            time.sleep(_ASK_EVERY_S)
        yield found[0]
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate()


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5.0) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:  # 503 while it is loading
        return False
