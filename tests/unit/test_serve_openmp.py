"""OpenMP's workers: they go when told to, and threads that read files have none."""

import subprocess
import sys

import pytest

from haori.core.native_code import openmp_path

PROGRAM = """
import os, threading
import torch
from haori.serve.kernels.openmp import compute_alone, let_workers_go

torch.set_num_threads(2)


def threads():
    return len(os.listdir("/proc/self/task"))


def work():
    torch.ones(2_000_000).add_(1.0)


before = threads()
work()
busy = threads()
let_workers_go()
gone = threads()
work()
counts = [before, busy, gone, threads()]
reader = threading.Thread(target=lambda: (compute_alone(), work(), counts.append(threads() - 1)))
reader.start()
reader.join()
print(*counts, torch.get_num_threads())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or openmp_path() is None, reason="looks into /proc, and torch came without GNU's OpenMP"
)
def test_workers_go_when_told_to_and_a_reader_has_none():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, busy, gone, again, beside_reader, threads = map(int, done.stdout.split())
    assert busy == before + 1
    assert gone == before
    assert again == beside_reader == before + 1
    assert threads == 2
