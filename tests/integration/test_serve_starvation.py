"""Adapters that find no room in memory beside endless load on others get their turn all the same, within a bound."""

import threading
import time

import pytest
import torch

from haori.bases import find_base, load_tokenizer
from haori.serve.adapters.reading import AdapterWeights, ModuleUpdate
from haori.serve.engine.engine import TextEngine
from haori.serve.engine.scheduler import EngineLimits
from haori.serve.opening import open_runner
from haori.serve.request import Sampling, TextRequest

PROMPT = tuple(range(5, 25))


def reader(opened):
    def read(adapter):
        draw = torch.Generator().manual_seed(int(adapter.removeprefix("a")))
        updates = {
            name: ModuleUpdate(torch.randn(4, width, generator=draw) * 0.3, torch.randn(4, out, generator=draw) * 0.3)
            for name, (out, width) in opened.tensors._linears.items()
        }
        return AdapterWeights(adapter, updates, {}, {}, 0)

    return read


@pytest.fixture
def start(tiny_base_folder):
    """Start an engine with room for so many adapters."""
    engines = []

    def begin(room):
        base = find_base(str(tiny_base_folder))
        opened = open_runner(base, EngineLimits(context_length=256), weights="fp32", cache_bytes=8 << 20)
        read = reader(opened)
        size = opened.runner.bank.prepare(read("a1")).size_bytes
        limits = EngineLimits(context_length=256, running=8, adapter_bytes=room * size)
        engine = TextEngine(
            base, load_tokenizer(base), opened.runner, str, lambda _, adapter: read(adapter),
            stop_tokens=frozenset(), limits=limits, vocabulary=opened.vocabulary,
        )  # fmt: skip
        engines.append(engine)
        return engine

    yield begin
    for engine in engines:
        engine.close()


class Load:
    """Keeps some requests for each of several mixes under way, and notes when each mix got tokens."""

    def __init__(self, engine, mixes, each=4, tokens=16):
        self.engine = engine
        self.tokens = tokens
        self.told = {mix: [] for mix in mixes}
        self.ended = dict.fromkeys(mixes, 0)
        self.stopping = threading.Event()
        for mix in mixes:
            for number in range(each):
                self.ask(mix, f"{mix}-{number}-0")

    def ask(self, mix, name, again=0):
        def deliver(chunk):
            if chunk.tokens:
                self.told[mix].append(time.monotonic())
            assert chunk.error is None
            if chunk.finish:
                self.ended[mix] += 1
                if not self.stopping.is_set():
                    self.ask(mix, f"{name.rpartition('-')[0]}-{again + 1}", again + 1)

        # Answers of different lengths: at no time have all ended.
        length = self.tokens + 3 * (len(self.told[mix]) % 7)
        sampling = Sampling(max_tokens=length, temperature=0.0, ignore_eos=True)
        self.engine.submit(TextRequest(name, PROMPT, mix, sampling, queue=str(mix)), deliver)


def mix(*names):
    return tuple((name, 1.0) for name in names)


def first_token_s(engine, wanted, timeout_s=60.0):
    """Ask once; return the seconds to the first token."""
    told = threading.Event()
    began = time.monotonic()
    sampling = Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)
    request = TextRequest(f"cold-{wanted}-{began}", PROMPT, wanted, sampling, queue=str(wanted))
    engine.submit(request, lambda chunk: told.set() if chunk.tokens else None)
    assert told.wait(timeout_s), "no token"
    return time.monotonic() - began


@pytest.mark.parametrize(("room", "hot"), [(1, [mix("a1")]), (2, [mix("a1"), mix("a2")]), (2, [mix("a1", "a2")])])
def test_a_cold_adapter_waits_within_a_bound_beside_endless_load(start, room, hot):
    engine = start(room)
    load = Load(engine, hot, each=8)
    while not all(load.told[mix] for mix in hot):
        time.sleep(0.01)
    assert first_token_s(engine, mix("a3")) < 15.0
    before = {mix: len(load.told[mix]) for mix in hot}
    time.sleep(3.0)
    assert all(len(load.told[mix]) > before[mix] for mix in hot)  # and the hot ones are served again
    load.stopping.set()
    assert engine.drain(30)


def test_a_cold_adapter_does_not_wait_for_the_end_of_long_answers(start, monkeypatch):
    from haori.serve.engine import scheduler

    monkeypatch.setattr(scheduler, "_INTERRUPT_S", 3.0)
    engine = start(1)
    step, delayed = engine._runner.step, 0.2

    def slowly(runs):
        time.sleep(delayed)
        return step(runs)

    engine._runner.step = slowly
    load = Load(engine, [mix("a1")], each=2, tokens=100)  # 20 s
    while not load.told[mix("a1")]:
        time.sleep(0.01)
    assert first_token_s(engine, mix("a3")) < 10.0
    delayed = 0.0
    load.stopping.set()
    assert engine.drain(60)
    assert load.ended[mix("a1")] == 2  # interrupted, and answered whole


def test_adapters_that_take_turns_do_some_work_in_between(start):
    engine = start(1)
    names = [mix("a1"), mix("a2"), mix("a3")]
    load = Load(engine, names)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and min(load.ended.values()) < 20:
        time.sleep(0.05)
    load.stopping.set()
    assert min(load.ended.values()) >= 20
    assert engine.status().adapter_loads <= sum(load.ended.values()) / 2
    assert engine.drain(30)
