"""What is remembered of adapters' layouts goes with the last adapter that has them."""

import gc
import weakref

import pytest
import torch

from haori.serve.engine.runner import Run
from haori.serve.kernels.native import compiled, native_kernels
from tests.serve_models import random_adapter, runners

NATIVE = pytest.param("native", marks=pytest.mark.skipif(native_kernels() is None, reason=compiled().reason))


@pytest.mark.parametrize("kernels", ["torch", NATIVE])
def test_rank_layouts_that_nobody_has_any_more_are_forgotten(kernels):
    model = None

    def keep(built):
        nonlocal model
        model = built
        return []

    used = native_kernels() if kernels == "native" else None
    fast, _ = runners("llama", keep, dtype=torch.bfloat16, kernels=used)
    layouts = []
    for number in range(30):
        name = f"a{number}"
        ranks = (1 + number % 6, 1 + number // 6, 3)
        fast.bank.put(fast.bank.prepare(random_adapter(model, name, number, ranks=ranks)))
        layouts.append(weakref.ref(fast.bank.held[name].layout))
        place = fast.cache.open(2)
        for token in range(2):
            fast.step([Run(place, token, [5], ((name, 1.0),))])
        fast.cache.close(place)
        if number >= 2:
            fast.bank.drop(f"a{number - 2}")
    gc.collect()
    assert len({ref() for ref in layouts}) - 1 == 2
    assert len(fast.bank._layouts) == 2
    # A layout that comes back is not taken for the one that was there before.
    assert fast.bank.prepare(random_adapter(model, "again", 3, ranks=(1, 1, 3))).layout is not layouts[0]()


def test_adapters_of_one_layout_share_it():
    made = []

    def two(built):
        made.extend(random_adapter(built, name, seed) for seed, name in enumerate(("a", "b")))
        return made

    fast, _ = runners("llama", two)
    assert fast.bank.held["a"].layout is fast.bank.held["b"].layout
