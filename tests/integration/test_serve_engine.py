"""The engine on a tiny base: answers in a crowd equal answers alone, and everything is freed."""

import json
import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch

from haori.bases import find_base, load_tokenizer
from haori.core.errors import FileFormatError, InputError, OverloadedError
from haori.core.settings import settings
from haori.serve.adapters.reading import AdapterWeights, ModuleUpdate
from haori.serve.engine.engine import TextEngine
from haori.serve.engine.runner import Run
from haori.serve.engine.scheduler import EngineLimits
from haori.serve.models.reference_runner import ReferenceRunner
from haori.serve.opening import open_runner
from haori.serve.request import Sampling, TextRequest

LIMITS = EngineLimits(context_length=256, running=4, waiting=100, chunk_tokens=32)
GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)


class Answers:
    """Collects the pieces of every request."""

    def __init__(self):
        self.pieces = {}
        self.told = threading.Condition()

    def of(self, name):
        self.pieces[name] = []

        def deliver(chunk):
            with self.told:
                self.pieces[name].append(chunk)
                self.told.notify_all()

        return deliver

    def wait(self, name, until=lambda pieces: pieces and pieces[-1].finish):
        with self.told:
            assert self.told.wait_for(lambda: until(self.pieces[name]), 30)
        return self.pieces[name]

    def tokens(self, name):
        return [token for chunk in self.wait(name) for token in chunk.tokens]

    def end(self, name):
        return self.wait(name)[-1]


def without_files(read):
    """What an engine is given to find files and to read them, of adapters that have none."""
    return str, lambda _, adapter: read(adapter)


def read_adapter(opened):
    def read(adapter):
        if adapter == "damaged":
            raise FileFormatError("The adapter is damaged.")
        draw = torch.Generator().manual_seed(int(adapter.removeprefix("a")))
        updates = {
            name: ModuleUpdate(torch.randn(4, width, generator=draw) * 0.3, torch.randn(4, out, generator=draw) * 0.3)
            for name, (out, width) in opened.tensors._linears.items()
        }
        return AdapterWeights(adapter, updates, {}, {}, 0)

    return read


@pytest.fixture
def start(tiny_base_folder):
    engines = []

    def begin(limits=LIMITS, cache_bytes=8 << 20, runner=None):
        base = find_base(str(tiny_base_folder))
        opened = open_runner(base, limits, weights="fp32", cache_bytes=cache_bytes)
        engine = TextEngine(
            base, load_tokenizer(base), runner or opened.runner, *without_files(read_adapter(opened)),
            stop_tokens=frozenset({2}), limits=limits, vocabulary=opened.vocabulary,
        )  # fmt: skip
        engine.opened = opened
        engines.append(engine)
        return engine

    yield begin
    for engine in engines:
        engine.close()


def prompt(number, length=20):
    return tuple((number * 31 + 7 * i) % 250 + 5 for i in range(length))


def request(name, mix=(), number=0, length=20, sampling=GREEDY, queue=None):
    return TextRequest(name, prompt(number, length), mix, sampling, queue if queue is not None else str(mix))


MIXES = [(), (("a1", 1.0),), (("a2", 1.0),), (("a1", 0.4), ("a3", 0.6)), (("a1", -0.5),)]


def test_answers_in_a_crowd_equal_answers_alone_and_those_of_the_slow_runner(start):
    from haori.bases import load_model

    engine, answers = start(), Answers()
    asked = [(f"r{i}", MIXES[i % 5], i // 2, 3 + 11 * (i % 9)) for i in range(25)]
    for name, mix, number, length in asked:
        engine.submit(request(name, mix, number, length), answers.of(name))
    crowd = {name: answers.tokens(name) for name, *_ in asked}
    for i, (name, mix, number, length) in enumerate(asked):
        engine.submit(request(f"alone{i}", mix, number, length), answers.of(f"alone{i}"))
        assert answers.tokens(f"alone{i}") == crowd[name]
    slow = ReferenceRunner(load_model(engine.base, dtype="fp32", device="cpu"), cache_bytes=1 << 30)
    other = start(runner=slow)
    for name, mix, number, length in asked[:10]:
        other.submit(request(name, mix, number, length), answers.of(f"slow-{name}"))
        assert answers.tokens(f"slow-{name}") == crowd[name]
    assert engine.drain(5)
    assert engine.opened.runner.cache.used_bytes == 0


def test_adapters_beyond_the_budget_take_turns(start):
    engine = start()
    read = read_adapter(engine.opened)
    size = engine.opened.runner.bank.prepare(read("a1")).size_bytes
    engine, answers = start(replace(LIMITS, adapter_bytes=2 * size)), Answers()
    for number in range(10):
        engine.submit(request(f"r{number}", ((f"a{number}", 1.0),), number), answers.of(f"r{number}"))
    for number in range(10):
        assert answers.end(f"r{number}").finish == "length"
    status = engine.status()
    assert (status.adapter_loads, len(status.resident_adapters)) == (10, 2)
    assert status.adapter_used_bytes <= 2 * size


def test_a_damaged_adapter_fails_its_own_requests_only(start):
    engine, answers = start(), Answers()
    for number in range(20):
        engine.submit(request(f"bad{number}", (("damaged", 1.0),), number), answers.of(f"bad{number}"))
        engine.submit(request(f"good{number}", (("a1", 1.0),), number), answers.of(f"good{number}"))
    for number in range(20):
        end = answers.end(f"bad{number}")
        assert (end.finish, end.error, end.fault) == ("error", "The adapter is damaged.", "request")
        assert answers.end(f"good{number}").finish == "length"


def test_cancelling_frees_at_once_wherever_the_request_is(start):
    engine, answers = start(), Answers()
    long = replace_sampling(max_tokens=200)
    for number in range(8):
        engine.submit(request(f"r{number}", MIXES[number % 2], number, sampling=long), answers.of(f"r{number}"))
    answers.wait("r0", lambda pieces: pieces)
    for number in range(8):
        engine.cancel(f"r{number}")
        engine.cancel(f"r{number}")
    assert engine.drain(5)
    assert {answers.end(f"r{number}").finish for number in range(8)} == {"cancelled"}
    assert engine.opened.runner.cache.used_bytes == 0
    engine.submit(request("r0", number=3), answers.of("again"))
    assert answers.end("again").finish == "length"


def replace_sampling(**changes):
    return GREEDY.with_fields(**changes)


def test_little_memory_for_keys_and_values_interrupts_but_changes_no_answer(start):
    asked = [(f"r{i}", MIXES[i % 5], i) for i in range(6)]
    roomy, tight, answers = start(), start(cache_bytes=3 * 64 * 1024), Answers()
    long = replace_sampling(max_tokens=150)
    for engine, label in ((roomy, "roomy"), (tight, "tight")):
        for name, mix, number in asked:
            engine.submit(request(name, mix, number, sampling=long), answers.of(f"{label}-{name}"))
        for name, *_ in asked:
            assert answers.end(f"{label}-{name}").finish == "length"
    assert tight.status().preemptions > 0
    for name, *_ in asked:
        assert answers.tokens(f"tight-{name}") == answers.tokens(f"roomy-{name}")


def test_a_prompt_that_never_fits_is_an_error_and_others_go_on(start):
    engine, answers = start(cache_bytes=64 * 1024), Answers()
    engine.submit(request("big", length=200), answers.of("big"))
    engine.submit(request("small", length=5), answers.of("small"))
    assert "--kv-memory" in answers.end("big").error
    assert answers.end("big").fault == "request"
    assert answers.end("small").finish == "length"


def test_a_prompt_seen_before_is_not_read_again_and_another_adapter_reads_its_own(start):
    engine, answers = start(), Answers()
    for name, mix in (("first", MIXES[1]), ("again", MIXES[1]), ("other", MIXES[2]), ("third", MIXES[1])):
        engine.submit(request(name, mix, number=4, length=100), answers.of(name))
        answers.wait(name)
    assert [answers.end(name).cached_tokens for name in ("first", "again", "other", "third")] == [0, 96, 0, 96]
    assert answers.tokens("first") == answers.tokens("again") == answers.tokens("third")
    assert answers.tokens("other") != answers.tokens("first")


def test_prompts_are_found_again_by_their_owner_alone(start):
    engine, answers = start(), Answers()
    for name, owner in (("first", "one"), ("again", "one"), ("other", "two"), ("nobody", "")):
        asked = replace(request(name, MIXES[1], number=4, length=100), owner=owner)
        engine.submit(asked, answers.of(name))
        answers.wait(name)
    assert [answers.end(name).cached_tokens for name in ("first", "again", "other", "nobody")] == [0, 96, 0, 0]


def test_a_long_prompt_does_not_hold_up_answers(start):
    engine, answers = start(), Answers()
    engine.submit(request("talking", sampling=replace_sampling(max_tokens=100), length=5), answers.of("talking"))
    answers.wait("talking", lambda pieces: pieces)
    before = engine.status().steps
    engine.submit(
        request("reading", number=9, length=230, sampling=replace_sampling(max_tokens=1)), answers.of("reading")
    )
    answers.wait("reading")
    # 230 tokens in chunks of 32: the answer had a step with each.
    assert engine.status().steps - before >= 7
    assert len(answers.tokens("talking")) == 100


def test_too_many_waiting_requests_are_turned_away(start):
    engine, answers = start(replace(LIMITS, waiting=3, running=1)), Answers()
    long = replace_sampling(max_tokens=200)
    refused = None
    for number in range(10):
        try:
            engine.submit(request(f"r{number}", number=number, sampling=long), answers.of(f"r{number}"))
        except OverloadedError as error:
            refused = error
            break
    assert refused is not None
    assert refused.retry_after_s >= 1
    assert "--max-queue" in str(refused)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (TextRequest("x", ()), "empty"),
        (TextRequest("x", tuple(range(5, 205)) * 2), "no room"),
        (TextRequest("x", (5, 100_000)), "vocabulary"),
        (TextRequest("x", (5, -1)), "vocabulary"),
    ],
)
def test_what_cannot_be_answered_is_refused(start, wanted, said):
    with pytest.raises(InputError, match=said):
        start().submit(wanted, lambda _: None)


def test_the_same_id_twice_is_refused(start):
    engine, answers = start(), Answers()
    engine.submit(request("x", sampling=replace_sampling(max_tokens=200)), answers.of("x"))
    with pytest.raises(InputError, match="under way"):
        engine.submit(request("x"), answers.of("y"))


def test_a_hot_name_does_not_starve_the_others(start):
    engine, answers = start(replace(LIMITS, running=2)), Answers()
    order = []
    for number in range(30):
        engine.submit(request(f"hot{number}", (("a1", 1.0),), number, queue="hot"), answers.of(f"hot{number}"))
    for number in range(3):
        name = f"cold{number}"
        engine.submit(request(name, (("a2", 1.0),), number, queue="cold"), answers.of(name))
    deadline = time.monotonic() + 30
    while engine.status().running + engine.status().waiting and time.monotonic() < deadline:
        done = [name for name, pieces in answers.pieces.items() if pieces and pieces[-1].finish and name not in order]
        order += done
        time.sleep(0.002)
    answers.wait("hot29")
    order += [name for name in answers.pieces if name not in order]
    assert max(order.index(f"cold{number}") for number in range(3)) < 15


def test_closing_ends_what_runs_and_takes_nothing_more(start):
    engine, answers = start(), Answers()
    for number in range(6):
        engine.submit(
            request(f"r{number}", number=number, sampling=replace_sampling(max_tokens=230)), answers.of(f"r{number}")
        )
    engine.close()
    assert {answers.end(f"r{number}").finish for number in range(6)} <= {"cancelled", "length"}
    with pytest.raises(OverloadedError):
        engine.submit(request("late"), answers.of("late"))


def test_stop_tokens_end_an_answer_and_are_not_in_its_text(start):
    engine, answers = start(), Answers()
    engine.submit(request("free", number=1, sampling=replace_sampling(max_tokens=30)), answers.of("free"))
    free = answers.tokens("free")
    bias = Sampling(max_tokens=30, temperature=0.0, logit_bias={2: 100.0})
    engine.submit(request("biased", number=1, sampling=bias), answers.of("biased"))
    assert answers.tokens("biased") == [2]
    assert (answers.end("biased").finish, answers.end("biased").text) == ("stop", "")
    text = "".join(piece.text for piece in answers.pieces["free"])
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    wanted = replace_sampling(max_tokens=30, stop=(stop,))
    engine.submit(request("stopped", number=1, sampling=wanted), answers.of("stopped"))
    assert answers.end("stopped").finish == "stop"
    assert "".join(piece.text for piece in answers.pieces["stopped"]) == text[: text.index(stop)]
    assert len(answers.tokens("stopped")) < len(free)


def first_logits(opened):
    place = opened.runner.cache.open(4)
    return opened.runner.step([Run(place, 0, [3, 1, 4, 1], ())])[0].float()


def no_model(*_, **__):
    raise AssertionError("the model was built")


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
def test_the_second_opening_of_a_base_reads_its_weights_without_building_the_model(
    tiny_base_folder, monkeypatch, weights
):
    base = find_base(str(tiny_base_folder))
    first = open_runner(base, LIMITS, weights=weights, cache_bytes=8 << 20)
    monkeypatch.setattr("haori.bases.load_model", no_model, raising=False)
    second = open_runner(base, LIMITS, weights=weights, cache_bytes=8 << 20)
    assert torch.equal(first_logits(first), first_logits(second))
    for name in ("vocabulary", "end_tokens", "dtype", "form", "slow_because"):
        assert getattr(first, name) == getattr(second, name)
    assert first.tensors._linears == second.tensors._linears


def test_a_base_that_computes_otherwise_than_remembered_is_opened_by_its_model(tiny_base_folder, monkeypatch):
    base = find_base(str(tiny_base_folder))
    wanted = first_logits(open_runner(base, LIMITS, weights="fp32", cache_bytes=8 << 20))
    [place] = (settings().cache / "remembered").glob("llama-fp32-*.json")
    document = json.loads(place.read_text())
    for change in ({"probe": document["probe"][::-1]}, {"plan": {**document["plan"], "epsilon": 10.0}}):
        place.write_text(json.dumps({**document, **change}))
        opened = open_runner(base, LIMITS, weights="fp32", cache_bytes=8 << 20)
        assert torch.equal(first_logits(opened), wanted)
        assert json.loads(place.read_text()) == document
    monkeypatch.setattr("haori.bases.load_model", no_model, raising=False)
    assert open_runner(base, LIMITS, weights="fp32", cache_bytes=8 << 20).slow_because is None


def test_a_base_whose_files_name_weights_otherwise_is_served_fast_too(tiny_base_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    wanted = first_logits(open_runner(find_base(str(tiny_base_folder)), LIMITS, weights="fp32", cache_bytes=8 << 20))
    folder = shutil.copytree(tiny_base_folder, tmp_path / "bare")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    for _ in range(2):
        opened = open_runner(find_base(str(folder)), LIMITS, weights="fp32", cache_bytes=8 << 20)
        assert opened.slow_because is None
        assert torch.equal(first_logits(opened), wanted)
