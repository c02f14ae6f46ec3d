"""Fair turns, prompts kept for later, and adapters that come and go within a budget."""

import random
import threading

import pytest
import torch

from haori.core.errors import FileFormatError, InputError
from haori.serve.adapter_tiers import AdapterTiers
from haori.serve.adapter_weights import AdapterWeights
from haori.serve.fair_queue import FairQueue
from haori.serve.prefix_cache import BLOCK, PrefixCache


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def turns(queue, count, cost=10):
    order = []
    for _ in range(count):
        name = queue.in_turn()[0]
        order.append(queue.take(name)[0])
        queue.serve(name, cost)
        queue.leave(name)
    return order


def test_a_name_with_many_requests_waits_for_itself():
    queue = FairQueue(Clock())
    for number in range(20):
        queue.add("hot", ("hot", number))
    for name in ("a", "b"):
        queue.add(name, (name, 0))
    assert set(turns(queue, 3)) == {"hot", "a", "b"}


def test_requests_of_one_name_keep_their_order():
    queue = FairQueue(Clock())
    for number in range(5):
        queue.add("a", number)
    taken = [queue.take("a") for _ in range(2)]
    queue.add("a", taken[1], first=True)
    assert [taken[0], *(queue.take("a") for _ in range(4))] == [0, 1, 2, 3, 4]


def test_time_spent_idle_earns_nothing():
    queue = FairQueue(Clock())
    for number in range(40):
        queue.add("busy", ("busy", number))
    turns(queue, 20, cost=100)
    for number in range(20):
        queue.add("late", ("late", number))
    assert turns(queue, 10, cost=100).count("late") <= 6


def test_who_waits_long_enough_gets_a_turn():
    clock = Clock()
    queue = FairQueue(clock)
    for name in ("costly", "cheap"):
        queue.add(name, (name, 0))
    queue.serve("costly", 1000)
    assert queue.in_turn() == ["cheap", "costly"]
    clock.now = 60.0
    queue.take("cheap")
    queue.add("cheap", ("cheap", 1))
    assert queue.in_turn() == ["costly", "cheap"]


def test_names_that_are_done_with_leave_nothing_behind():
    queue = FairQueue(Clock())
    for number in range(1000):
        queue.add(f"name{number}", number)
        if number % 2:
            queue.take(f"name{number}")
            queue.serve(f"name{number}", 5)
            queue.leave(f"name{number}")
        else:
            queue.remove(f"name{number}", number)
    assert len(queue) == 0
    assert not any(vars(queue)[name] for name in ("_waiting", "_served", "_active"))


def block(value):
    return torch.full((2, 1, 1, BLOCK, 4), float(value))


def keep(cache, mix, tokens):
    for start, key in cache.missing(mix, tokens):
        cache.keep(key, block(start))


def test_a_prompt_that_begins_alike_finds_the_blocks_and_no_other_does():
    cache = PrefixCache(1 << 20)
    mix = (("sha256:a", 1.0),)
    prompt = list(range(100))
    keep(cache, mix, prompt)
    assert len(cache.find(mix, prompt)) == 3
    assert len(cache.find(mix, prompt[:64])) == 1  # the last token must be read for its logits
    assert len(cache.find(mix, [*prompt[:65], 7])) == 2
    assert not cache.find(mix, [1, *prompt[1:]])
    assert not cache.find((), prompt)
    assert not cache.find((("sha256:a", 0.5),), prompt)
    assert not cache.find((("sha256:b", 1.0),), prompt)


def test_the_prefix_cache_keeps_to_its_budget_and_drops_the_oldest():
    size = block(0).nbytes
    cache = PrefixCache(3 * size)
    keep(cache, (), range(BLOCK))
    keep(cache, (), range(100, 100 + BLOCK))
    cache.find((), range(BLOCK + 1))
    keep(cache, (), range(200, 200 + 2 * BLOCK))
    kept = [cache.find((), range(start, start + 3 * BLOCK)) for start in (0, 100, 200)]
    assert [len(blocks) for blocks in kept] == [1, 0, 2]
    for budget in (0, size - 1):
        nothing = PrefixCache(budget)
        keep(nothing, (), range(500))
        assert not nothing.find((), range(500))


def test_blocks_that_come_and_go_are_never_taken_for_each_other():
    cache = PrefixCache(5 * block(0).nbytes)
    for start in random.Random(0).choices(range(12), k=300):
        prompt = range(1000 * start, 1000 * start + BLOCK + 1)
        for found in cache.find((), prompt):
            assert (found == 1000 * start).all()
        for _, key in cache.missing((), prompt):
            cache.keep(key, block(1000 * start))
    assert cache.hits > 0


class Bank:
    """Counts what is in memory: each adapter takes 10 bytes."""

    def __init__(self):
        self.held = []

    def prepare(self, weights):
        return weights

    def put(self, weights):
        self.held.append(weights.id)

    def drop(self, adapter):
        self.held.remove(adapter)


class Disk:
    def __init__(self):
        self.open = threading.Event()
        self.open.set()
        self.reads = []

    def __call__(self, adapter):
        assert self.open.wait(10)
        self.reads.append(adapter)
        if adapter == "damaged":
            raise FileFormatError("The file is damaged.")
        if adapter == "gone":
            raise FileNotFoundError(2, "No such file", "gone")
        return AdapterWeights(adapter, {}, {}, {}, 10)


@pytest.fixture
def tiers():
    landed = threading.Semaphore(0)
    made = AdapterTiers(Bank(), Disk(), 30, landed=landed.release)
    made.landed = landed
    yield made
    made.close()


def mix(*names):
    return tuple((name, 1.0) for name in names)


def ready(tiers, *names):
    for _ in range(20):
        if tiers.prepare(mix(*names)):
            return True
        if not tiers.landed.acquire(timeout=0.5):
            return False
    return False


def test_the_adapter_used_longest_ago_makes_room(tiers):
    for name in ("a", "b", "c"):
        assert ready(tiers, name)
    assert ready(tiers, "a")
    assert ready(tiers, "d")
    assert set(tiers.resident) == {"a", "c", "d"} == set(tiers._bank.held)
    assert (tiers.loads, tiers.evictions, tiers.used_bytes) == (4, 1, 30)


def test_an_adapter_in_use_or_pinned_stays(tiers):
    tiers.pinned = lambda: {"b"}
    for name in ("a", "b", "c"):
        assert ready(tiers, name)
    tiers.acquire(mix("a", "c"))
    assert not ready(tiers, "d")
    tiers.release(mix("c"))
    assert tiers.prepare(mix("d"))  # it was read already and needed only the room
    assert set(tiers.resident) == {"a", "b", "d"}


def test_what_cannot_fit_beside_the_pinned_is_said_instead_of_waited_for(tiers):
    tiers.pinned = lambda: {"a", "b", "c"}
    for name in ("a", "b", "c"):
        assert ready(tiers, name)
    with pytest.raises(InputError, match=r"those pinned.*--adapter-memory"):
        ready(tiers, "d")
    assert set(tiers.resident) == {"a", "b", "c"}


def test_reading_happens_elsewhere_and_once(tiers):
    tiers._read.open.clear()
    for _ in range(5):
        assert not tiers.prepare(mix("a", "b"))
    tiers._read.open.set()
    assert ready(tiers, "a", "b")
    assert sorted(tiers._read.reads) == ["a", "b"]


def test_what_cannot_be_read_is_said_and_tried_again_later(tiers):
    for name, said in (("damaged", "damaged"), ("gone", "cannot be read")):
        for _ in range(2):
            with pytest.raises(Exception, match=said):
                ready(tiers, name)
    assert tiers._read.reads.count("damaged") == 2
    assert ready(tiers, "a")


def test_a_blend_that_never_fits_is_refused(tiers):
    with pytest.raises(InputError, match="--adapter-memory"):
        ready(tiers, "a", "b", "c", "d")
