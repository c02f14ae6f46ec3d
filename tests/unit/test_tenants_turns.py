"""Many tenants at once: fair turns, shared batches, and nobody's failure or numbers in another's."""

import threading

import pytest
import torch

from haori.bases import find_base
from haori.core.errors import InputError, TrainingError
from haori.jobs.tenants.operations import Task
from haori.jobs.tenants.pool import TrainingPool
from haori.jobs.tenants.records import AdamParams, AdapterSpec
from tests.tenant_samples import rows

STEP = AdamParams(learning_rate=5e-3)
# Other ranks, targets, losses and row lengths; the last has a head of its own.
TENANTS = {
    "one": (AdapterSpec(rank=4, seed=1), "cross_entropy", [9, 14], {}),
    "two": (AdapterSpec(rank=2, seed=2, train_mlp=False), "ppo", [20], {}),
    "three": (AdapterSpec(rank=6, seed=3, alpha=8, train_attn=False), "gspo", [5, 9, 30], {}),
    "four": (AdapterSpec(rank=3, seed=4, train_unembed=True), "importance_sampling", [14, 14], {}),
}
MIXED_BOUND = 1e-5  # relative difference of all gradients of a tenant together


@pytest.fixture(scope="module")
def base(tiny_base_folder):
    return find_base(str(tiny_base_folder))


@pytest.fixture
def opened(base):
    pools = []

    def open_pool(**options):
        pools.append(TrainingPool(base, dtype="fp32", **options))
        return pools[-1]

    yield open_pool
    for pool in pools:
        pool.close()


class Held:
    """Holds a pool back inside the block, so that everything submitted in it waits together."""

    def __init__(self, pool):
        self.pool, self.go = pool, threading.Event()

    def __enter__(self):
        started = threading.Event()
        self.pool._submit("gate", Task(lambda: (started.set(), self.go.wait(60))))
        assert started.wait(60)

    def __exit__(self, *_):
        self.go.set()


def create(pool, names=tuple(TENANTS)):
    draw = torch.Generator().manual_seed(7)
    for name in TENANTS:
        pool.create(name, TENANTS[name][0]).result()
        with torch.no_grad():
            for pair in pool._tenants[name].factors.values():
                pair.b.copy_(0.05 * torch.randn(pair.b.shape, generator=draw))
    for name in set(TENANTS) - set(names):
        pool.drop(name).result()


def submit(pool, name, seed=0):
    _, loss, lengths, config = TENANTS[name]
    return pool.forward_backward(name, rows(lengths, seed=seed, kind=loss), loss, config)


def gradients(pool, name):
    return torch.cat([part.flatten() for pair in pool._tenants[name].gradients.values() for part in pair])


def lone(opened, names=tuple(TENANTS)):
    found = {}
    for name in names:
        pool = opened(mixed_tokens=0)
        create(pool, [name])
        output = submit(pool, name).result()
        found[name] = (output, gradients(pool, name))
    return found


def test_a_mixed_batch_gives_each_tenant_the_numbers_of_its_lone_run(opened):
    expected = lone(opened)
    pool = opened()
    create(pool)
    with Held(pool):
        futures = {name: submit(pool, name) for name in TENANTS}
    for name, future in futures.items():
        output, alone = future.result(), expected[name]
        assert output.metrics["loss:sum"] == pytest.approx(alone[0].metrics["loss:sum"], rel=1e-6)
        found = gradients(pool, name)
        assert (found - alone[1]).norm() < MIXED_BOUND * alone[1].norm()
    assert pool.status().mixed_batches == 1


def test_taking_turns_every_number_is_that_of_the_lone_run_to_the_bit(opened):
    def run(pool, names):
        futures = []
        with Held(pool):
            for seed in range(3):
                for name in names:
                    futures += [submit(pool, name, seed), pool.optim_step(name, STEP)]
        return [future.result() for future in futures]

    together = opened(mixed_tokens=0, micro_batch_tokens=16)
    create(together)
    run(together, list(TENANTS))
    assert together.status().mixed_batches == 0
    for name in TENANTS:
        alone = opened(mixed_tokens=0, micro_batch_tokens=16)
        create(alone, [name])
        run(alone, [name])
        for module, pair in alone._tenants[name].factors.items():
            own = together._tenants[name].factors[module]
            assert torch.equal(pair.a, own.a), module
            assert torch.equal(pair.b, own.b), module


def test_nan_stays_with_its_tenant(opened):
    expected = lone(opened)
    pool = opened()
    create(pool)
    with torch.no_grad():
        pool._tenants["two"].factors["model.layers.0.self_attn.q_proj"].b[3, 1] = torch.nan
    with Held(pool):
        futures = {name: submit(pool, name) for name in TENANTS}
    with pytest.raises(TrainingError, match="of 'two' is not finite, so nothing was added"):
        futures.pop("two").result()
    assert pool.status().mixed_batches == 1
    assert pool._tenants["two"].gradients is None
    for name, future in futures.items():
        assert future.result().metrics["loss:sum"] == pytest.approx(expected[name][0].metrics["loss:sum"], rel=1e-6)
        found = gradients(pool, name)
        assert (found - expected[name][1]).norm() < MIXED_BOUND * expected[name][1].norm()


def test_bad_rows_fail_alone(opened):
    pool = opened()
    create(pool)
    with Held(pool):
        bad = pool.forward_backward("one", rows([300]), "cross_entropy")
        absent = pool.forward_backward("nobody", rows([5]), "cross_entropy")
        good = submit(pool, "two")
    with pytest.raises(InputError, match="300 tokens"):
        bad.result()
    with pytest.raises(InputError, match="no training session 'nobody'"):
        absent.result()
    assert good.result().metrics["loss:sum"]


@pytest.mark.parametrize("mixed_tokens", [0, 100])
def test_a_hog_does_not_keep_others_waiting(opened, mixed_tokens):
    pool = opened(mixed_tokens=mixed_tokens, micro_batch_tokens=240)
    create(pool, ["one", "two"])
    done = []
    with Held(pool):
        hog = [pool.forward_backward("one", rows([200] * 5, seed=n), "cross_entropy") for n in range(6)]
        small = [submit(pool, "two", seed) for seed in range(5)]
        for number, future in enumerate(hog):
            future.add_done_callback(lambda _, number=number: done.append(("one", number)))
        for number, future in enumerate(small):
            future.add_done_callback(lambda _, number=number: done.append(("two", number)))
    [future.result() for future in (*hog, *small)]
    # 20 tokens a turn against 200: all five small ones are done within the first of six large ones.
    assert done.index(("two", 4)) < done.index(("one", 0))
    assert [number for name, number in done if name == "one"] == list(range(6))  # a tenant's own are done in order
    assert [number for name, number in done if name == "two"] == list(range(5))


def test_who_was_idle_has_saved_nothing_up(opened):
    pool = opened(mixed_tokens=0, micro_batch_tokens=240)
    create(pool, ["one", "two"])
    for seed in range(3):
        pool.forward_backward("one", rows([200], seed=seed), "cross_entropy").result()
    done = []
    with Held(pool):
        for name in ("one", "two"):
            for number in range(3):
                future = pool.forward_backward(name, rows([200], seed=number), "cross_entropy")
                future.add_done_callback(lambda _, name=name: done.append(name))
    future.result()
    assert set(done[:2]) == {"one", "two"}


def test_a_cancelled_request_is_not_computed(opened):
    pool = opened()
    create(pool, ["one"])
    with Held(pool):
        first, second = submit(pool, "one"), submit(pool, "one", 1)
        assert first.cancel()
    second.result()
    assert pool.status().tokens["one"] == 23
