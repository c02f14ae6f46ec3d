"""Fair turns, prompts kept for later, and adapters that come and go within a budget."""

import random
import statistics
import threading

import pytest
import torch

from haori.core.errors import FileFormatError, InputError
from haori.serve.adapters.reading import AdapterWeights
from haori.serve.adapters.tiers import AdapterTiers
from haori.serve.engine.fair_queue import FairQueue
from haori.serve.engine.prefix_cache import BLOCK, PrefixCache


def turns(queue, count, cost=10):
    order = []
    for _ in range(count):
        place = queue.in_turn()[0]
        order.append(queue.take(place)[0])
        queue.serve(place, cost)
        queue.leave(place)
    return order


def closed_loop(streams, *, slots=32, tokens=64, prompt=100, steps=4000):
    """Let streams ask again as soon as they are answered; return the steps that each queue's requests waited."""
    queue, waits, running = FairQueue(), {place: [] for place in streams}, []
    for place, count in streams.items():
        for _ in range(count):
            queue.add(place, 0)
    for step in range(steps):
        while len(queue) and len(running) < slots:
            place = queue.in_turn()[0]
            began = queue.take(place)
            queue.serve(place, prompt)
            # Answers of different lengths, or everybody would go on ending together as they began.
            running.append([place, tokens // 2 + (7 * len(waits[place])) % tokens])
            waits[place].append(step - began)
        for entry in running:
            entry[1] -= 1
            queue.serve(entry[0], 1)
        for place, _ in [entry for entry in running if not entry[1]]:
            queue.leave(place)
            queue.add(place, step + 1)
        running = [entry for entry in running if entry[1]]
    return {place: statistics.median(found[len(found) // 4 :]) for place, found in waits.items()}


def test_a_name_with_many_requests_waits_for_itself():
    queue = FairQueue()
    for number in range(200):
        queue.add(("", "hot"), ("hot", number))
    turns(queue, 100, cost=200)
    for name in ("a", "b"):
        queue.add(("", name), (name, 0))
    order = turns(queue, 30, cost=200)
    assert order.index("a") <= 16  # the hot ones have waited for 20,000 tokens, these for 3,200
    assert order.index("b") <= 17


def test_requests_of_one_name_keep_their_order():
    queue, place = FairQueue(), ("", "a")
    for number in range(5):
        queue.add(place, number)
    taken = [queue.take(place) for _ in range(2)]
    queue.add(place, taken[1], first=True)
    assert [taken[0], *(queue.take(place) for _ in range(4))] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("trickle", [False, True], ids=["idle", "asking for little"])
def test_neither_being_idle_nor_asking_for_little_earns_anything(trickle):
    queue = FairQueue()
    queue.add(("", "late"), ("late", 0))
    queue.take(("", "late"))
    if not trickle:
        queue.leave(("", "late"))
    for number in range(40):
        queue.add(("", "busy"), ("busy", number))
    turns(queue, 20, cost=100)
    for number in range(20):
        queue.add(("", "late"), ("late", number))
    assert turns(queue, 10, cost=100).count("late") <= 6


def test_who_waits_long_enough_gets_a_turn_among_names_and_among_owners():
    for costly, cheap in ((("", "costly"), ("", "cheap")), (("costly", ""), ("cheap", ""))):
        queue = FairQueue()
        for place in (costly, cheap):
            queue.add(place, 0)
        queue.take(costly)
        queue.serve(costly, 1000)
        queue.add(costly, 1)
        order = []
        for _ in range(40_000):
            order.append(queue.in_turn()[0])
            if order[-1] == costly:
                break
            queue.take(cheap)
            queue.add(cheap, 2)
            queue.serve(cheap, 1)
            queue.leave(cheap)
        assert order[0] == cheap
        assert order[-1] == costly
        assert len(order) <= 1000  # at the latest when both were served as much


def test_names_that_as_many_ask_for_wait_alike():
    names = ["base", "support", "poet", "support:0.5", "poet:-0.5"]
    waits = closed_loop({("", name): 13 for name in names})
    assert max(waits.values()) <= 1.1 * min(waits.values())


def test_users_of_a_popular_name_wait_a_few_times_as_long_as_others_and_not_fifty_times():
    waits = closed_loop({("", "base"): 13, ("", "support"): 51})
    assert 1.0 < waits["", "support"] / waits["", "base"] <= 5.0


def test_one_owner_does_not_wait_for_the_crowd_of_another_under_however_many_names():
    crowd = {("crowd", f"support:{number / 10}"): 8 for number in range(7)}
    waits = closed_loop({("lone", "base"): 4, **crowd})
    assert waits["lone", "base"] <= 3
    assert min(waits[place] for place in crowd) > 40


def test_names_that_are_done_with_leave_nothing_behind():
    queue = FairQueue()
    for number in range(1000):
        place = (f"owner{number % 3}", f"name{number}")
        queue.add(place, number)
        if number % 2:
            queue.take(place)
            queue.serve(place, 5)
            queue.leave(place)
        else:
            queue.remove(place, number)
            queue.remove(place, number)
    assert len(queue) == 0
    assert not queue._owners
    assert not queue._counters.served


def block(value):
    return torch.full((2, 1, 1, BLOCK, 4), float(value))


def keep(cache, mix, tokens):
    for start, key in cache.missing("", mix, tokens):
        cache.keep(key, block(start))


def test_a_prompt_that_begins_alike_finds_the_blocks_and_no_other_does():
    cache = PrefixCache(1 << 20)
    mix = (("sha256:a", 1.0),)
    prompt = list(range(100))
    keep(cache, mix, prompt)
    assert len(cache.find("", mix, prompt)) == 3
    assert len(cache.find("", mix, prompt[:64])) == 1  # the last token must be read for its logits
    assert len(cache.find("", mix, [*prompt[:65], 7])) == 2
    assert not cache.find("", mix, [1, *prompt[1:]])
    assert not cache.find("", (), prompt)
    assert not cache.find("", (("sha256:a", 0.5),), prompt)
    assert not cache.find("", (("sha256:b", 1.0),), prompt)


def test_no_owner_finds_the_blocks_of_another():
    cache = PrefixCache(1 << 20)
    prompt = list(range(100))
    for start, key in cache.missing("one", (), prompt):
        cache.keep(key, block(start))
    assert len(cache.find("one", (), prompt)) == 3
    assert not cache.find("other", (), prompt)
    assert not cache.find("", (), prompt)
    assert len(cache.missing("other", (), prompt)) == 3


def test_the_prefix_cache_keeps_to_its_budget_and_drops_the_oldest():
    size = block(0).nbytes
    cache = PrefixCache(3 * size)
    keep(cache, (), range(BLOCK))
    keep(cache, (), range(100, 100 + BLOCK))
    cache.find("", (), range(BLOCK + 1))
    keep(cache, (), range(200, 200 + 2 * BLOCK))
    kept = [cache.find("", (), range(start, start + 3 * BLOCK)) for start in (0, 100, 200)]
    assert [len(blocks) for blocks in kept] == [1, 0, 2]
    for budget in (0, size - 1):
        nothing = PrefixCache(budget)
        keep(nothing, (), range(500))
        assert not nothing.find("", (), range(500))


def test_blocks_that_come_and_go_are_never_taken_for_each_other():
    cache = PrefixCache(5 * block(0).nbytes)
    for start in random.Random(0).choices(range(12), k=300):
        prompt = range(1000 * start, 1000 * start + BLOCK + 1)
        for found in cache.find("", (), prompt):
            assert (found == 1000 * start).all()
        for _, key in cache.missing("", (), prompt):
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

    def __call__(self, files, adapter):
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
    made = AdapterTiers(Bank(), str, Disk(), 30, landed=landed.release)
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


def test_adapters_that_must_go_get_no_new_users_and_nothing_else_takes_the_room(tiers):
    for name in ("a", "b", "c"):
        assert ready(tiers, name)
    for name in ("a", "a", "b", "c", "c"):
        tiers.acquire(mix(name))
    assert not ready(tiers, "d")
    assert not ready(tiers, "e")
    assert tiers.lacks_room(mix("d"))
    assert not tiers.lacks_room(mix("a"))
    assert tiers.make_way(mix("d"), at_least_s=60.0) == frozenset()  # none has been there for a minute
    assert tiers.make_way(mix("d"), at_least_s=0.0) == {"b"}
    assert not tiers.prepare(mix("b"))
    assert tiers.prepare(mix("a"))
    tiers.release(mix("b"))
    assert not tiers.prepare(mix("e"))
    assert not tiers.prepare(mix("b"))
    assert tiers.prepare(mix("d"))
    assert set(tiers.resident) == {"a", "c", "d"}
    assert tiers.make_way(None, at_least_s=0.0) == frozenset()
    assert tiers.prepare(mix("c"))


def test_pinned_adapters_never_make_way(tiers):
    tiers.pinned = lambda: {"a", "b"}
    for name in ("a", "b", "c"):
        assert ready(tiers, name)
        tiers.acquire(mix(name))
    assert not ready(tiers, "d")
    assert tiers.make_way(mix("d"), at_least_s=0.0) == {"c"}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_block_with_what_is_no_number_is_not_kept(number):
    cache = PrefixCache(1 << 20)
    tokens = list(range(2 * BLOCK + 1))
    for place, (_, key) in enumerate(cache.missing("", (), tokens)):
        spoilt = block(1.0)
        spoilt.view(-1)[place * 7] = number if place else 1.0
        cache.keep(key, spoilt)
    assert len(cache.find("", (), tokens)) == 1
