"""No request sees what another left in the cache: whatever stands in its free bytes changes no logit."""

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from haori.serve.engine.runner import Run
from haori.serve.kernels.native import compiled, native_kernels
from haori.serve.models.llama_plan import plan_llama
from haori.serve.models.llama_runner import LlamaRunner
from haori.serve.models.llama_weights import lay_out_llama
from haori.serve.models.reference_runner import ReferenceRunner
from tests.serve_models import CACHE, build, random_adapter

NATIVE = pytest.mark.skipif(native_kernels() is None, reason=compiled().reason or "")
CASES = [
    ("llama", "fp32", False), ("llama", "bf16", False), ("llama-wide", "bf16", False),
    *(pytest.param("llama-wide", form, True, marks=NATIVE) for form in ("bf16", "int8", "int4")),
    *(pytest.param("qwen3", form, True, marks=NATIVE) for form in ("bf16", "int8", "int4")),
]  # fmt: skip
MIXES = [(), (("good", 1.0),), (("good", -0.5),)]
SPOILT = [float("nan"), float("inf"), float("-inf"), 1e31, -1e31, 3e38]


@cache
def laid_out(kind, form):
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    model = build(kind, dtype=dtype)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    return lay_out_llama(plan_llama(model), tensors.__getitem__, form, dtype, 300), model


def runner_over(weights, model, native):
    runner = LlamaRunner(weights, cache_bytes=CACHE, kernels=native_kernels() if native else None)
    bad = random_adapter(model, "bad", 2)
    for update in bad.updates.values():
        update.a.mul_(1e30)  # a product of two of these overflows
        update.b.mul_(1e30)
    for adapter in (random_adapter(model, "good", 1), bad):
        runner.bank.put(runner.bank.prepare(adapter))
    return runner


def plant(cache, lengths, value):
    """Write a value wherever no sequence has anything."""
    for shelf in cache._shelves.values():
        for tensor in (*shelf.keys, *shelf.values):
            tensor[len(shelf.order) :] = value
            for row, sequence in enumerate(shelf.order):
                tensor[row, :, lengths[sequence] :] = value


def play(runner, course, value=None):
    """Run a course of events and return the logits of every step; a spoilt run plants a value before each."""
    sequences, found = [], []
    for joining, leaving, chunks in course:
        for length, mix in joining:
            place = runner.cache.open(length + 1)
            sequences.append({"place": place, "tokens": [(7 * length + 3 * i) % 96 for i in range(length)],
                              "read": 0, "mix": mix})  # fmt: skip
        if leaving is not None and sequences:
            runner.cache.close(sequences.pop(leaving % len(sequences))["place"])
        runs = []
        for sequence, chunk in zip(sequences, chunks, strict=False):
            count = min(chunk, len(sequence["tokens"]) - sequence["read"])
            if count:
                stop = sequence["read"] + count
                assert runner.cache.extend(sequence["place"], stop)
                tokens = sequence["tokens"][sequence["read"] : stop]
                runs.append((sequence, Run(sequence["place"], sequence["read"], tokens, sequence["mix"],
                                           wants_logits=stop == len(sequence["tokens"]))))  # fmt: skip
        if value is not None:
            plant(runner.cache, {s["place"]: s["read"] for s in sequences}, value)
        if not runs:
            continue
        logits = runner.step([run for _, run in runs])
        found.append(logits.clone())
        for sequence, run in runs:
            sequence["read"] += len(run.tokens)
            if run.wants_logits:  # the same in both runs, whatever came out
                sequence["tokens"].append((sequence["read"] * 5) % 96)
    for sequence in sequences:
        runner.cache.close(sequence["place"])
    return found


JOINING = st.lists(st.tuples(st.integers(1, 140), st.sampled_from(MIXES)), max_size=3)
CHUNKS = st.lists(st.sampled_from([0, 1, 1, 2, 8, 40, 150]), min_size=8, max_size=8)
COURSE = st.lists(st.tuples(JOINING, st.none() | st.integers(0, 9), CHUNKS), min_size=1, max_size=8)


@pytest.mark.parametrize(("kind", "form", "native"), CASES)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(course=COURSE, value=st.sampled_from(SPOILT))
def test_nothing_in_the_free_bytes_of_the_cache_is_ever_seen(kind, form, native, course, value):
    weights, model = laid_out(kind, form)
    clean = play(runner_over(weights, model, native), course)
    spoilt = play(runner_over(weights, model, native), course, value)
    for one, other in zip(clean, spoilt, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


@pytest.mark.parametrize(("kind", "form", "native"), CASES)
def test_who_computes_beside_or_after_numbers_that_are_none_is_not_changed(kind, form, native):
    weights, model = laid_out(kind, form)
    good = [
        ([(9, MIXES[1]), (20, MIXES[0])], None, [8] * 8),
        *([([], None, [20] * 8)] * 2),
        *([([], None, [1] * 8)] * 9),
    ]
    wanted = play(runner_over(weights, model, native), good)
    runner = runner_over(weights, model, native)
    bad = (("bad", 1.0),)
    play(runner, [([(100, bad), (60, bad), (30, bad), (30, bad)], None, [50] * 8), *([([], None, [50, 60, 1, 7])] * 3)])
    assert all(map(torch.equal, wanted, play(runner, good)))  # after
    beside = [([*joining, *([(120, bad)] * 2 if number == 0 else [])], None, [*chunks[:2], 13, 1, 0, 0, 0, 0])
              for number, (joining, _, chunks) in enumerate(good)]  # fmt: skip
    for one, other in zip(wanted, play(runner, beside), strict=True):
        torch.testing.assert_close(other[: len(one)], one, rtol=1e-4 if form == "fp32" else 0.05, atol=0.05)


def test_the_slow_runner_keeps_nothing_of_a_sequence_that_has_ended():
    model = build("llama")
    runner = ReferenceRunner(model, cache_bytes=CACHE)
    bad = random_adapter(model, "bad", 2)
    for update in bad.updates.values():
        update.a.fill_(float("nan"))
    runner.bank.put(runner.bank.prepare(bad))
    place = runner.cache.open(9)
    wanted = runner.step([Run(place, 0, [1, 2, 3, 4], ())])
    runner.cache.close(place)
    places = [runner.cache.open(9) for _ in range(3)]
    runs = [Run(place, 0, [1, 2, 3, 4], (("bad", 1.0),) if i != 1 else ()) for i, place in enumerate(places)]
    found = runner.step(runs)
    assert found.isnan().any(-1).tolist() == [True, False, True]
    assert torch.equal(found[1:2], wanted)
    for place in places:
        runner.cache.close(place)
    assert torch.equal(runner.step([Run(runner.cache.open(9), 0, [1, 2, 3, 4], ())]), wanted)
