"""Tries a grammar in a process of its own, for some take minutes and gigabytes, and a thread cannot be stopped.

The process has imported llguidance and nothing else; it is started when first needed, ended when a grammar takes too
long in it, and ends with this one.
"""

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLateError

__all__ = ["GrammarTrial"]

_LONGEST_S = 3.0
_START_S = 60.0
_SCRIPT = """
import json, os, sys
try:
    import resource
except ImportError:
    resource = None
if hasattr(os, "nice"):
    os.nice(10)
from llguidance import LLMatcher
print("ready", flush=True)
for line in sys.stdin:
    if resource is not None:  # should nobody be left to end this process
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 20, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.RLIM_INFINITY))
    LLMatcher.validate_grammar(json.loads(line), None)
    print("done", flush=True)
"""


class GrammarTrial:
    """Says whether grammars can be compiled in time; may be used from several threads.

    Args:
        longest_s: Longest that compiling one may take.
    """

    def __init__(self, longest_s: float = _LONGEST_S) -> None:
        self.longest_s = longest_s
        self._lock = threading.Lock()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="haori-grammar")
        self._child: subprocess.Popen[str] | None = None

    def ends(self, grammar: str) -> bool:
        """Say whether compiling a grammar ends in time and with bounded memory, whatever comes of it."""
        with self._lock:
            if self._child is None and not self._start():
                return False
            if self._ask(grammar):
                return True
            self._end()
            return False

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()
        self._reader.shutdown()

    def _start(self) -> bool:
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-c", _SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, encoding="utf-8",
        )  # fmt: skip
        weakref.finalize(self, _end, self._child)
        if self._said(_START_S) == "ready\n":
            return True
        self._end()
        return False

    def _ask(self, grammar: str) -> bool:
        assert self._child is not None
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(grammar) + "\n")
            self._child.stdin.flush()
        except OSError:  # it has ended
            return False
        return self._said(self.longest_s) == "done\n"

    def _said(self, timeout_s: float) -> str:
        """Return the next line; nothing if there is none in time."""
        assert self._child is not None
        assert self._child.stdout is not None
        line = self._reader.submit(self._child.stdout.readline)
        try:
            return line.result(timeout_s)
        except TooLateError:
            self._child.kill()
            line.result()
            return ""

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            _end(child)


def _end(child: "subprocess.Popen[str]") -> None:
    child.kill()
    with contextlib.suppress(OSError, ValueError):
        child.communicate()
