"""Products of ever new shapes: what is remembered of them stays small once that was asked for."""

import os
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import ctypes, sys
import torch
from haori.serve.kernels.onednn import remember_few_shapes
from haori.serve.models.weight import PackedWeight


class Heap(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


heap = ctypes.CDLL("libc.so.6").mallinfo2
heap.restype = Heap
if sys.argv[1] == "few":
    remember_few_shapes()
weight = PackedWeight(torch.randn(64, 64))
used = []
for rows in range(1, 901):
    weight(torch.randn(rows, 64))
    if rows in (300, 900):
        used.append(heap().uordblks)
print(used[1] - used[0])
"""


@pytest.mark.skipif(sys.platform != "linux" or not torch._C._has_mkldnn, reason="glibc's mallinfo2; needs oneDNN")
def test_products_of_ever_new_shapes_take_no_more_memory():
    limits = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # an engine opened by another test sets them
    env = {name: value for name, value in os.environ.items() if name not in limits}
    grown = {}
    for how in ("few", "many"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], env=env, capture_output=True, text=True, check=True)
        grown[how] = int(done.stdout)
    assert grown["many"] > 20 << 20
    assert grown["few"] < 2 << 20
