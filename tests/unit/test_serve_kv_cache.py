"""The cache of keys and values: rows that move never lose or mix what they hold, and the budget holds."""

import random

import pytest
import torch

from haori.serve.engine.kv_cache import CacheShape, KVCache

SHAPE = CacheShape(2, 2, 4, 1000, torch.float32, torch.device("cpu"))


def write(cache, sequence, start, stop, value):
    cache.put(sequence, start, torch.full((2, 2, 2, stop - start, 4), float(value)))


def test_what_a_sequence_wrote_is_there_whatever_others_do():
    random.seed(3)
    cache = KVCache(SHAPE, SHAPE.token_bytes * 200_000)
    held = {}
    for turn in range(400):
        action = random.random()
        if action < 0.4:
            length = random.randint(1, 200)
            sequence = cache.open(length)
            write(cache, sequence, 0, length, turn)
            held[sequence] = [length, turn]
        elif held:
            sequence = random.choice(list(held))
            if action < 0.55:
                cache.close(sequence)
                del held[sequence]
            elif action < 0.75:
                cache.decode(sequence)
            else:
                length = min(held[sequence][0] + random.randint(1, 150), 1000)
                assert cache.extend(sequence, length)
                write(cache, sequence, held[sequence][0], length, held[sequence][1])
                held[sequence][0] = length
        for sequence, (length, value) in held.items():
            assert (cache.take(sequence, 0, length) == value).all()
        for shelf in cache.shelves:
            assert all(cache.locate(name) == (shelf, row) for row, name in enumerate(shelf.order))
    for sequence in held:
        cache.close(sequence)
    assert cache.used_bytes == 0
    assert not cache.shelves


def test_those_that_decode_stand_first():
    cache = KVCache(SHAPE, SHAPE.token_bytes * 10_000)
    names = [cache.open(10) for _ in range(5)]
    cache.decode(names[3])
    cache.decode(names[1])
    cache.decode(names[3])
    (shelf,) = cache.shelves
    assert shelf.decoding == 2
    assert set(shelf.order[:2]) == {names[3], names[1]}
    cache.close(names[3])
    assert shelf.order[0] == names[1]
    assert shelf.decoding == 1


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_no_more_rows_than_the_budget_holds(rows):
    cache = KVCache(SHAPE, rows * 128 * SHAPE.token_bytes)
    opened = [cache.open(128) for _ in range(rows + 1)]
    assert opened[-1] is None
    assert None not in opened[:-1]
    assert not cache.extend(opened[0], 129)
    assert cache.used_bytes == cache.budget_bytes
    cache.close(opened[0])
    assert cache.open(1) is not None


def test_memory_of_rows_that_are_free_goes_to_other_lengths():
    cache = KVCache(SHAPE, 8 * 128 * SHAPE.token_bytes)
    short = [cache.open(128) for _ in range(8)]
    for sequence in short[1:]:
        cache.close(sequence)
    assert cache.open(990) is None  # with the row of 128 tokens it would be more than there is
    assert cache.open(700) is not None
    assert allocated(cache) <= cache.budget_bytes


def allocated(cache):
    return sum(tensor.nbytes for shelf in cache._shelves.values() for tensor in (*shelf.keys, *shelf.values))


def test_rows_that_are_empty_stay_until_others_need_the_memory():
    cache = KVCache(SHAPE, 8 * 128 * SHAPE.token_bytes)
    for length, number in ((100, 8), (1000, 1), (300, 2), (100, 8)):
        opened = [cache.open(length) for _ in range(number)]
        assert None not in opened
        assert allocated(cache) <= cache.budget_bytes
        for sequence in opened:
            write(cache, sequence, 0, length, 7)
            cache.close(sequence)
        assert cache.used_bytes == 0
        before = [tensor.data_ptr() for shelf in cache._shelves.values() for tensor in shelf.keys]
        cache.close(cache.open(length))
        assert [tensor.data_ptr() for shelf in cache._shelves.values() for tensor in shelf.keys] == before


def test_a_row_is_never_longer_than_the_context():
    shape = CacheShape(2, 2, 4, 100, torch.float32, torch.device("cpu"))
    cache = KVCache(shape, shape.token_bytes * 1000)
    shelf, _ = cache.locate(cache.open(70))
    assert shelf.capacity == 100


@pytest.mark.parametrize("fails_at", range(4))
def test_a_shelf_that_gets_no_memory_in_the_middle_is_as_it_was(fails_at, monkeypatch):
    cache = KVCache(SHAPE, 1 << 20)
    held = [cache.open(100) for _ in range(4)]  # all rows of the first shelf
    for number, sequence in enumerate(held):
        write(cache, sequence, 0, 100, float(number))
    zeros, left = torch.zeros, [fails_at]

    def scarce(*shape, **options):
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError
        return zeros(*shape, **options)

    monkeypatch.setattr(torch, "zeros", scarce)
    with pytest.raises(MemoryError):
        cache.open(100)
    monkeypatch.undo()
    shelf, _ = cache.locate(held[0])
    for number, sequence in enumerate(held):
        assert (cache.take(sequence, 0, 100) == number).all()
    own = [[tensor.data_ptr() for tensor in tensors] for tensors in (shelf.keys, shelf.values)]
    assert shelf.addresses.tolist() == own  # a kernel in C reads there
    late = cache.open(100)
    write(cache, late, 0, 100, 9.0)
    assert [float(cache.take(sequence, 0, 100).mean()) for sequence in (*held, late)] == [0, 1, 2, 3, 9]
