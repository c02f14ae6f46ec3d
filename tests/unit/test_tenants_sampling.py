"""The serving engine samples a session's weights as they are now, with no file in between."""

import queue
import threading
import time

import numpy as np
import pytest

from haori.bases import find_base
from haori.core.errors import InputError, LibraryError, MismatchError
from haori.jobs.tenants.pool import TrainingPool
from haori.jobs.tenants.records import AdamParams, AdapterSpec, Datum
from haori.jobs.tenants.share import TrainShare
from haori.serve import EngineLimits, open_engine
from haori.serve.adapters.reading import AdapterWeights, ModuleUpdate
from haori.serve.request import Sampling, TextRequest
from tests.tenant_samples import rows

PROMPT = tuple(5 + number * 7 % 290 for number in range(100))  # three blocks of the prefix cache
BOUND = 1e-4  # fp32: two ways of rounding


def missing(adapter):
    raise LibraryError(f"There is no adapter {adapter!r}.")


@pytest.fixture(scope="module", params=["fast", "slow"])
def engine(request, tiny_base_folder):
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "slow":
            patched.setattr("haori.serve.opening.why_not_llama", lambda _: "it is to be served slowly")
        opened = open_engine(
            find_base(str(tiny_base_folder)), missing,
            EngineLimits(context_length=256, chunk_tokens=64, prefix_bytes=4 << 20),
            weights="fp32", cache_bytes=16 << 20,
        )  # fmt: skip
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pool(tiny_base_folder):
    opened = TrainingPool(find_base(str(tiny_base_folder)), dtype="fp32")
    opened.create("t", AdapterSpec(rank=4, seed=1, train_unembed=True)).result()
    yield opened
    opened.close()


class Answers:
    def __init__(self, engine):
        self.engine, self.count = engine, 0

    def ask(self, adapter, *, max_tokens=12):
        self.count += 1
        chunks = queue.Queue()
        self.engine.submit(
            TextRequest(
                f"r{self.count}", PROMPT, ((adapter, 1.0),),
                Sampling(max_tokens=max_tokens, temperature=1.0, seed=self.count, logprobs=0, ignore_eos=True),
            ),
            chunks.put,
        )  # fmt: skip
        tokens, logprobs = [], []
        while True:
            chunk = chunks.get(timeout=60)
            tokens += chunk.tokens
            logprobs += [one.logprob for one in chunk.logprobs]
            if chunk.finish is not None:
                return tokens, logprobs, chunk


def scored(pool, tokens):
    """What the session itself gives the tokens that were sampled."""
    whole = np.array([*PROMPT, *tokens])
    datum = Datum(whole[:-1], {"target_tokens": whole[1:]})
    output = pool.forward_backward("t", [datum], "cross_entropy", forward_only=True).result()
    return output.logprobs[0][len(PROMPT) - 1 :]


def test_samples_follow_the_weights_and_no_cache_mixes_snapshots(engine, pool):
    answers = Answers(engine)
    names, previous = [], None
    for step in range(3):
        weights = pool.weights("t").result()
        names.append(weights.id)
        engine.put_adapter(weights.id, weights)
        for _ in range(2):  # the second reads the prompt from the prefix cache
            tokens, logprobs, last = answers.ask(weights.id)
            assert last.finish == "length", last.error
            own = scored(pool, tokens)
            np.testing.assert_allclose(logprobs, own, atol=BOUND)
        if previous is not None:  # the step between two snapshots is far more than the bound
            assert np.abs(np.array(previous[1]) - scored(pool, previous[0])).max() > 100 * BOUND
        previous = tokens, logprobs
        pool.forward_backward("t", rows([20], seed=step), "cross_entropy")
        pool.optim_step("t", AdamParams(learning_rate=2e-2)).result()
    tokens, logprobs, _ = answers.ask(names[-1])
    assert np.abs(np.array(logprobs) - scored(pool, tokens)).max() > 100 * BOUND  # a snapshot stays what it was
    for name in names:
        engine.drop_adapter(name)


def test_ids_are_used_once_and_forgotten(engine, pool):
    answers = Answers(engine)
    weights = pool.weights("t").result()
    engine.put_adapter("mine", weights)
    with pytest.raises(InputError, match="'mine' already; put the new weights under a new id"):
        engine.put_adapter("mine", weights)
    assert answers.ask("mine")[2].finish == "length"
    assert "mine" in engine.status().resident_adapters
    engine.drop_adapter("mine")
    engine.drop_adapter("never there")
    _, _, last = answers.ask("mine")
    assert last.finish == "error"
    assert "no adapter 'mine'" in last.error
    assert "mine" not in engine.status().resident_adapters
    engine.put_adapter("mine", weights)
    assert answers.ask("mine")[2].finish == "length"
    engine.drop_adapter("mine")


def test_what_the_base_does_not_have_is_refused(engine, pool):
    update = pool.weights("t").result().updates["lm_head"]
    lost = AdapterWeights("x", {"model.layers.9.mlp.up_proj": ModuleUpdate(update.a, update.b)}, {}, {}, 0)
    with pytest.raises(MismatchError, match=r"layers\.9"):
        engine.put_adapter("lost", lost)


def test_training_rests_while_requests_are_under_way_and_not_otherwise(engine, tiny_base_folder):
    def is_serving():
        status = engine.status()
        return status.running + status.waiting > 0

    shared = TrainingPool(find_base(str(tiny_base_folder)), dtype="fp32", train_share=0.2, is_serving=is_serving)
    try:
        shared.create("t", AdapterSpec(rank=4, seed=1)).result()
        shared.forward_backward("t", rows([40]), "cross_entropy").result()
        assert shared.share.rested_s == 0.0
        ended = threading.Event()
        request = TextRequest("long", PROMPT, (), Sampling(max_tokens=150, ignore_eos=True))
        engine.submit(request, lambda chunk: ended.set() if chunk.finish else None)
        while not ended.is_set():
            shared.forward_backward("t", rows([40]), "cross_entropy").result()
        assert shared.share.rested_s > 0.0
        time.sleep(0.1)  # the last rest ends with the request
        rested = shared.share.rested_s
        for seed in range(3):
            shared.forward_backward("t", rows([40], seed=seed), "cross_entropy").result()
        time.sleep(0.05)
        assert shared.share.rested_s - rested < 1e-3
    finally:
        shared.close()


def test_the_rest_is_what_the_share_leaves():
    share = TrainShare(0.25, lambda: True)
    begun = time.monotonic()
    share.rest(0.1, lambda: False)
    assert 0.3 <= time.monotonic() - begun < 1.0  # a tenth less would be too short
    share.rest(60.0, lambda: True)  # the pool is closing
    assert time.monotonic() - begun < 5.0
    with pytest.raises(InputError, match="above 0 and at most 1"):
        TrainShare(0.0, lambda: True)
