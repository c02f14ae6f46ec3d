"""Whatever one request or adapter raises ends its own requests with a sentence, and nobody else's."""

import threading
from dataclasses import replace

import pytest
import torch

from haori.bases import find_base, load_model, load_tokenizer
from haori.core.errors import UnavailableError
from haori.serve.engine.engine import TextEngine
from haori.serve.models.reference_runner import ReferenceRunner
from haori.serve.opening import open_runner
from haori.serve.request import Sampling
from tests.integration.test_serve_engine import GREEDY, LIMITS, Answers, read_adapter, request, without_files
from tests.server_samples import until


class PanicError(BaseException):
    """As code in Rust raises it: no Exception."""


RAISED = [
    OverflowError("cannot convert float infinity to integer"), MemoryError(), RecursionError("too deep"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"), PanicError("index out of bounds"), OSError(5, "I/O"),
    KeyError("lora_A"),
]  # fmt: skip


class Reader:
    """Reads adapters named after a number; one named after an error's place in RAISED raises that."""

    def __init__(self, opened):
        self.read = read_adapter(opened)

    def __call__(self, adapter):
        if adapter.startswith("bad"):
            raise RAISED[int(adapter.removeprefix("bad"))]
        weights = self.read(adapter.removesuffix("-twisted"))
        if adapter.endswith("-twisted"):  # rows of a width that no product takes: nothing notices before the step
            twisted = {"model.embed_tokens.weight": (torch.arange(5, 250), torch.ones(245, 7))}
            return replace(weights, id=adapter, token_rows=twisted)
        if adapter.endswith("00"):  # no numbers from the second layer on
            for name, update in weights.updates.items():
                if ".1." in name:
                    update.a.fill_(float("nan"))
        return weights


@pytest.fixture
def start(tiny_base_folder):
    engines = []

    def begin(limits=LIMITS, slow=False):
        base = find_base(str(tiny_base_folder))
        opened = open_runner(base, limits, weights="fp32", cache_bytes=8 << 20)
        runner = opened.runner
        if slow:
            runner = ReferenceRunner(load_model(base, dtype="fp32", device="cpu"), cache_bytes=1 << 30)
        engine = TextEngine(
            base, load_tokenizer(base), runner, *without_files(Reader(opened)),
            stop_tokens=frozenset({2}), limits=limits, vocabulary=opened.vocabulary,
        )  # fmt: skip
        engines.append(engine)
        return engine

    yield begin
    for engine in engines:
        engine.close()


def one(name, strength=1.0):
    return ((name, strength),)


@pytest.mark.parametrize("number", range(len(RAISED)))
def test_what_reading_an_adapter_raises_is_its_own(start, number):
    engine, answers = start(), Answers()
    for i in range(6):
        mix = one(f"bad{number}") if i % 2 else (("a1", 0.5), (f"bad{number}", 0.5))
        engine.submit(request(f"bad{i}", mix, i), answers.of(f"bad{i}"))
        engine.submit(request(f"good{i}", one("a1"), i), answers.of(f"good{i}"))
    for i in range(6):
        end = answers.end(f"bad{i}")
        assert end.finish == "error"
        assert f"bad{number}" in end.error
        assert answers.end(f"good{i}").finish == "length"
    engine.submit(request("after", one(f"bad{number}")), answers.of("after"))  # nothing of it is left
    assert answers.end("after").finish == "error"
    assert engine.drain(5)
    assert engine.failure is None


@pytest.mark.parametrize("method", ["prepare", "put"])
@pytest.mark.parametrize("number", [0, 4])
def test_what_a_bank_raises_is_its_own(start, method, number):
    engine, answers = start(), Answers()
    bank, stock = engine._runner.bank, getattr(engine._runner.bank, method)

    def raising(adapter):
        if adapter.id != "a7":
            return stock(adapter)
        if method == "put":
            stock(adapter)
        raise RAISED[number]

    setattr(bank, method, raising)
    for i in range(4):
        engine.submit(request(f"bad{i}", one("a7"), i), answers.of(f"bad{i}"))
        engine.submit(request(f"good{i}", one("a1"), i), answers.of(f"good{i}"))
    for i in range(4):
        assert (answers.end(f"bad{i}").finish, "a7" in answers.end(f"bad{i}").error) == ("error", True)
        assert answers.end(f"good{i}").finish == "length"
    assert "a7" not in bank.held


def test_adapters_read_for_a_blend_that_is_refused_do_not_keep_others_out(start):
    engine, answers = start(), Answers()
    for i in range(10):  # more than are read at once
        engine.submit(request(f"r{i}", (("bad0", 1.0), (f"a{i}", 1.0)), i, queue=f"q{i}"), answers.of(f"r{i}"))
        assert answers.end(f"r{i}").finish == "error"
    engine.submit(request("late", one("a99")), answers.of("late"))
    assert answers.end("late").finish == "length"


@pytest.mark.parametrize("slow", [False, True])
def test_what_a_step_raises_ends_the_rows_at_fault_and_changes_no_other(start, slow):
    engine, answers = start(replace(LIMITS, running=16), slow=slow), Answers()
    mixes = [(), one("a1"), one("a2", 0.5), one("a3")]
    for i in range(12):
        engine.submit(request(f"alone{i}", mixes[i % 4], i), answers.of(f"alone{i}"))
        answers.end(f"alone{i}")
    for i in range(12):
        engine.submit(request(f"r{i}", mixes[i % 4], i, length=20 + 5 * i), answers.of(f"r{i}"))
        engine.submit(request(f"s{i}", mixes[i % 4], i), answers.of(f"s{i}"))
        if i % 3 == 0:
            engine.submit(request(f"bad{i}", one("a8-twisted", 1 + i), i), answers.of(f"bad{i}"))
    for i in range(12):
        assert answers.end(f"r{i}").finish == "length"
        assert answers.tokens(f"s{i}") == answers.tokens(f"alone{i}")
        if i % 3 == 0:
            assert answers.end(f"bad{i}").finish == "error"
            assert "could not go on with this request" in answers.end(f"bad{i}").error
    assert engine.drain(5)
    assert engine.failure is None
    assert engine._runner.cache.used_bytes == 0


def test_numbers_that_are_none_stay_in_the_request_that_computed_them(start):
    engine, answers = start(), Answers()
    for i in range(6):
        engine.submit(request(f"alone{i}", one("a1"), i, length=100), answers.of(f"alone{i}"))
        answers.end(f"alone{i}")
    for i in range(6):
        engine.submit(request(f"bad{i}", one("a700"), i, length=200), answers.of(f"bad{i}"))
        if i % 2:  # in the middle of its prompt
            engine.cancel(f"bad{i}")
    for i in range(6):
        assert answers.end(f"bad{i}").finish in ("error", "cancelled")
    for i in range(6):
        engine.submit(request(f"worse{i}", one("a700"), i, length=200), answers.of(f"worse{i}"))
        engine.submit(request(f"r{i}", one("a1"), i, length=100), answers.of(f"r{i}"))
    for i in range(6):
        assert "not numbers" in answers.end(f"worse{i}").error
        assert answers.end(f"worse{i}").cached_tokens == 0  # no block of such a request is kept
        assert answers.tokens(f"r{i}") == answers.tokens(f"alone{i}")


class Broken:
    """A constraint that lets three tokens pass."""

    finished = False

    def __init__(self, method, error):
        self.method, self.error, self.passed = method, error, 0

    def allowed(self):
        if self.method == "allowed" and self.passed == 3:
            raise self.error
        return torch.ones(512, dtype=torch.bool)[: self.width]

    def accept(self, token):
        if self.method == "accept" and self.passed == 3:
            raise self.error
        self.passed += 1


@pytest.mark.parametrize("method", ["allowed", "accept"])
@pytest.mark.parametrize("number", [0, 4])
def test_what_a_constraint_raises_is_its_own(start, method, number, monkeypatch):
    engine, answers = start(), Answers()
    monkeypatch.setattr(Broken, "width", engine.vocabulary, raising=False)
    engine._constraint = lambda wanted: None if wanted.json_schema is None else Broken(method, RAISED[number])
    for i in range(4):
        wanted = Sampling(max_tokens=12, ignore_eos=True, json_schema={}, temperature=0.5 * (i % 2))
        engine.submit(request(f"bad{i}", number=i, sampling=wanted), answers.of(f"bad{i}"))
        seeded = Sampling(max_tokens=12, ignore_eos=True, seed=i)
        engine.submit(request(f"good{i}", number=i, sampling=seeded), answers.of(f"good{i}"))
    for i in range(4):
        assert answers.end(f"bad{i}").finish == "error"
        assert type(RAISED[number]).__name__ in answers.end(f"bad{i}").error
        assert len(answers.tokens(f"bad{i}")) == 3
        assert answers.end(f"good{i}").finish == "length"


def test_rows_beside_one_that_cannot_be_drawn_from_draw_the_same_tokens(start, monkeypatch):
    from haori.serve.sampling import sampler as sampling

    engine, answers = start(), Answers()
    stock = sampling.draw

    def draws(logits, filters, numbers):
        if any(f.temperature == 7.0 for f in filters):
            raise RuntimeError("probability tensor contains either inf, nan or element < 0")
        return stock(logits, filters, numbers)

    for label in ("alone", "beside"):
        for i in range(3):
            wanted = Sampling(max_tokens=12, ignore_eos=True, seed=i)
            engine.submit(request(f"{label}{i}", number=i, sampling=wanted), answers.of(f"{label}{i}"))
        if label == "alone":
            [answers.end(f"alone{i}") for i in range(3)]
            monkeypatch.setattr(sampling, "draw", draws)
        else:
            hot = Sampling(max_tokens=12, temperature=7.0)
            engine.submit(request("hot", number=9, sampling=hot), answers.of("hot"))
    assert "probability tensor" in answers.end("hot").error
    for i in range(3):
        assert answers.tokens(f"alone{i}") == answers.tokens(f"beside{i}")


@pytest.mark.parametrize("method", ["push", "finish"])
@pytest.mark.parametrize("number", [0, 4])
def test_what_turning_tokens_into_text_raises_is_its_own(start, method, number, monkeypatch):
    from haori.serve import answer_writer

    class Text(answer_writer.TextStream):
        def __init__(self, tokenizer, stop=(), *more):
            super().__init__(tokenizer, stop, *more)
            self.bad = "boom" in stop

        def push(self, token):
            if self.bad and method == "push":
                raise RAISED[number]
            return super().push(token)

        def finish(self):
            if self.bad:
                raise RAISED[number] if method == "finish" else ValueError("and again")
            return super().finish()

    monkeypatch.setattr(answer_writer, "TextStream", Text)
    engine, answers = start(), Answers()
    for i in range(4):
        bad = GREEDY.with_fields(stop=("boom",))
        engine.submit(request(f"bad{i}", number=i, sampling=bad), answers.of(f"bad{i}"))
        engine.submit(request(f"good{i}", number=i), answers.of(f"good{i}"))
    for i in range(4):
        assert (answers.end(f"bad{i}").finish, answers.end(f"good{i}").finish) == ("error", "length")
    assert engine.drain(5)


def test_a_caller_that_cannot_be_told_hurts_nobody(start):
    engine, answers = start(), Answers()
    for i in range(3):
        engine.submit(request(f"bad{i}", number=i), lambda _: 1 // 0)
        engine.submit(request(f"good{i}", number=i), answers.of(f"good{i}"))
    for i in range(3):
        assert answers.end(f"good{i}").finish == "length"
    assert engine.drain(5)


def test_an_engine_that_cannot_compute_says_so_and_goes_on_when_it_can_again(start):
    engine, answers = start(), Answers()
    stock = engine._runner.step

    def fails(runs):
        raise RuntimeError("device-side assert triggered")

    engine._runner.step = fails
    for i in range(6):
        engine.submit(request(f"r{i}", one("a1") if i % 2 else (), i), answers.of(f"r{i}"))
    for i in range(6):
        assert "device-side assert" in answers.end(f"r{i}").error
    until(lambda: engine.failure is not None)
    assert "device-side assert" in engine.failure
    engine._runner.step = stock
    until(lambda: engine.failure is None)
    engine.submit(request("again"), answers.of("again"))
    assert answers.end("again").finish == "length"


@pytest.mark.parametrize("error", [RuntimeError("the queue is broken"), SystemExit(3), PanicError("no way")])
def test_a_loop_that_has_ended_leaves_nobody_waiting(start, error):
    engine, answers, gate = start(replace(LIMITS, running=1)), Answers(), threading.Event()
    stock = engine._scheduler.step

    def step():
        if gate.is_set():
            raise error
        stock()

    engine._scheduler.step = step
    long = GREEDY.with_fields(max_tokens=200)
    for i in range(5):
        engine.submit(request(f"r{i}", number=i, sampling=long), answers.of(f"r{i}"))
    answers.wait("r0", lambda pieces: pieces)
    gate.set()
    ends = [answers.end(f"r{i}") for i in range(5)]
    assert {end.finish for end in ends} == {"error"}
    assert {end.fault for end in ends[1:]} == {"outage"}
    assert engine.drain(5)
    assert str(error) in engine.failure
    with pytest.raises(UnavailableError, match="has ended"):
        engine.submit(request("late"), answers.of("late"))


def test_a_paused_request_holds_nothing_and_goes_on_as_if_it_had_not_been(start):
    engine, answers = start(replace(LIMITS, running=2, waiting=1)), Answers()
    long = GREEDY.with_fields(max_tokens=150, temperature=0.7, seed=3)
    mixes = [(), one("a1"), one("a2", 0.5)]
    for i in range(3):
        engine.submit(request(f"alone{i}", mixes[i], i, sampling=long), answers.of(f"alone{i}"))
        answers.end(f"alone{i}")
    for i in range(3):
        engine.submit(request(f"r{i}", mixes[i], i, sampling=long), answers.of(f"r{i}"))
        engine.pause(f"r{i}")
        if i == 1:
            engine.resume("r1")
            answers.wait("r1", lambda pieces: pieces)
            engine.pause("r1")
        until(lambda: engine.status().running + engine.status().waiting == 0)
    assert engine._runner.cache.used_bytes == 0
    engine.submit(request("other"), answers.of("other"))  # though one alone may wait
    assert answers.end("other").finish == "length"
    engine.cancel("r2")
    assert answers.end("r2").finish == "cancelled"
    for name in ("r0", "r1", "r2", "unknown"):
        engine.resume(name)
        engine.resume(name)
    for i in range(2):
        assert answers.tokens(f"r{i}") == answers.tokens(f"alone{i}")
    assert engine.drain(5)
    assert not engine._scheduler.paused


def test_closing_answers_also_what_came_last(start):
    engine, answers = start(), Answers()
    with engine._condition:  # so that the engine has not taken it in yet
        engine.submit(request("last"), answers.of("last"))
        engine._closing = True
    assert answers.end("last").finish == "cancelled"
