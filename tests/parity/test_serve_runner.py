"""The fast runner against the slow one: any mix of rows, adapters, blends, lengths, joins and leaves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haori.serve.adapters.reading import AdapterWeights
from haori.serve.engine.runner import Run
from haori.serve.kernels.native import compiled, native_kernels
from haori.serve.models.llama_plan import why_not_llama
from haori.serve.models.reference_runner import ReferenceRunner
from tests.serve_models import KINDS, build, random_adapter, runners, zoo

ADAPTERS = [adapter.id for adapter in zoo(build("llama"))]
STRENGTHS = st.sampled_from([1.0, 0.4, -0.5, 2.0])
MIXES = st.lists(st.tuples(st.sampled_from(ADAPTERS), STRENGTHS), max_size=3, unique_by=lambda part: part[0]).map(tuple)


@pytest.fixture(scope="module")
def pair():
    return runners("llama")


class Play:
    """Sequences that go through both runners side by side."""

    def __init__(self, pair):
        self.pair = pair
        self.sequences = []

    def join(self, mix, prompt):
        places = [runner.cache.open(len(prompt) + 1) for runner in self.pair]
        self.sequences.append({"mix": mix, "tokens": list(prompt), "read": 0, "places": places})

    def leave(self, number):
        gone = self.sequences.pop(number % len(self.sequences))
        for runner, place in zip(self.pair, gone["places"], strict=True):
            runner.cache.close(place)

    def step(self, chunks):
        runs, speaking = ([], []), []
        for sequence, chunk in zip(self.sequences, chunks, strict=False):
            count = min(chunk, len(sequence["tokens"]) - sequence["read"])
            if not count:
                continue
            stop = sequence["read"] + count
            wanted = stop == len(sequence["tokens"])
            for side, runner, place in zip(runs, self.pair, sequence["places"], strict=True):
                assert runner.cache.extend(place, stop)
                tokens = sequence["tokens"][sequence["read"] : stop]
                side.append(Run(place, sequence["read"], tokens, sequence["mix"], wanted))
            sequence["read"] = stop
            if wanted:
                speaking.append(sequence)
        if not runs[0]:
            return
        fast, slow = (runner.step(side) for runner, side in zip(self.pair, runs, strict=True))
        if speaking:
            torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
            assert fast.argmax(-1).tolist() == slow.argmax(-1).tolist()
            for sequence, token in zip(speaking, fast.argmax(-1).tolist(), strict=True):
                sequence["tokens"].append(token)

    def close(self):
        while self.sequences:
            self.leave(0)


@settings(max_examples=25)
@given(data=st.data())
def test_any_course_of_events_gives_what_the_slow_runner_gives(pair, data):
    play = Play(pair)
    try:
        for _ in range(data.draw(st.integers(1, 12), label="steps")):
            for _ in range(data.draw(st.integers(0, 3), label="joining")):
                prompt = data.draw(st.lists(st.integers(0, 95), min_size=1, max_size=40), label="prompt")
                play.join(data.draw(MIXES, label="mix"), prompt)
            if play.sequences and data.draw(st.integers(0, 4), label="leaving") == 0:
                play.leave(data.draw(st.integers(0, 50)))
            # 0 lets a sequence sit the step out.
            sizes = st.sampled_from([0, 1, 1, 2, 7, 8, 20, 40])
            play.step(data.draw(st.lists(sizes, min_size=len(play.sequences), max_size=len(play.sequences))))
    finally:
        play.close()


@pytest.mark.parametrize("kind", KINDS)
def test_each_model_and_adapter_alone_and_in_a_crowd(kind):
    play = Play(runners(kind))
    names = [adapter.id for adapter in zoo(build(kind))]
    for number, mix in enumerate([(), *(((name, 1.0),) for name in names), (("plain0", 0.4), ("plain1", 0.6))]):
        play.join(mix, [(7 * number + i) % 96 for i in range(5 + 3 * number)])
    for _ in range(2):
        play.step([50] * len(play.sequences))
    for _ in range(60):  # past the first shelf's 64 tokens
        play.step([1] * len(play.sequences))


def test_many_rows_of_one_adapter_beside_single_rows_of_others():
    play = Play(runners("llama"))
    for number in range(14):
        play.join((("plain2", 1.0),) if number < 9 else ((f"plain{number % 4}", 0.5),), [number, 3, 4])
    for _ in range(6):
        play.step([3] * 14)


def test_an_adapter_that_was_dropped_and_others_moved_into_its_place():
    fast, slow = runners("llama")
    play = Play((fast, slow))
    for name in ("plain0", "plain1"):
        for runner in (fast, slow):
            runner.bank.drop(name)
    late = random_adapter(build("llama"), "late", 99)
    for runner in (fast, slow):
        runner.bank.put(runner.bank.prepare(late))
    for mix in ((("plain3", 1.0),), (("late", 1.0),), ()):
        play.join(mix, [1, 2, 3])
    for _ in range(4):
        play.step([3, 3, 3])


NATIVE = pytest.param("native", marks=pytest.mark.skipif(native_kernels() is None, reason=compiled().reason))


@pytest.mark.parametrize("short", [512, 4])  # chunks longer than that are batched products in any case
@pytest.mark.parametrize("kernels", ["torch", NATIVE])
@pytest.mark.parametrize("kind", ["llama", "llama-wide", "qwen3"])
def test_bf16_stays_within_its_rounding(kind, kernels, short, monkeypatch):
    monkeypatch.setattr("haori.serve.kernels.torch_kernels._SHORT", short)
    fast, slow = runners(kind, dtype=torch.bfloat16, kernels=native_kernels() if kernels == "native" else None)
    exact, _ = runners(kind)
    mixes = [(("plain0", 0.4), ("uneven", 0.6)), *(((adapter, 1.0),) for adapter in ADAPTERS), ()]
    errors = [[], []]
    for off, runner in zip(errors, (fast, slow), strict=True):
        places = [[side.cache.open(40) for _ in mixes] for side in (runner, exact)]
        for start, stop in ((0, 9), *((n, n + 1) for n in range(9, 30))):
            tokens = [(5 * i) % 96 for i in range(start, stop)]
            found = []
            for side, held in zip((runner, exact), places, strict=True):
                runs = [Run(place, start, tokens, mix) for place, mix in zip(held, mixes, strict=True)]
                found.append(side.step(runs).float())
            off.append(float((found[0] - found[1]).square().mean().sqrt() / found[1].std()))
    assert max(errors[0]) < 1.3 * max(errors[1]) + 0.01


def test_the_tokens_of_one_sequence_read_in_other_chunks_are_the_same():
    fast, _ = runners("llama")
    tokens = [(5 * i) % 96 for i in range(150)]
    found = []
    for chunk in (150, 1, 64, 7):
        place = fast.cache.open(1)
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            assert fast.cache.extend(place, start + len(part))
            logits = fast.step([Run(place, start, part, (("plain1", 1.0),))])
        found.append(logits)
        fast.cache.close(place)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


def test_keys_and_values_taken_out_and_put_into_another_sequence():
    fast, _ = runners("llama")
    tokens = [(11 * i) % 96 for i in range(70)]
    first, second = fast.cache.open(70), fast.cache.open(200)
    whole = fast.step([Run(first, 0, tokens, ())])
    fast.cache.put(second, 0, fast.cache.take(first, 0, 64))
    rest = fast.step([Run(second, 64, tokens[64:], ())])
    torch.testing.assert_close(rest, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("mistral", lambda m: setattr(m.model.layers[0].self_attn, "sliding_window", 16), "looks back 16 tokens"),
        ("llama", lambda m: setattr(m.model.layers[1].mlp, "act_fn", torch.nn.GELU()), "activation"),
        ("llama", lambda m: setattr(m.model.layers[0], "extra", torch.nn.Linear(1, 1)), "parts of their own"),
        ("llama", lambda m: setattr(m.model.rotary_emb, "rope_type", "dynamic"), "rotary"),
    ],
)
def test_a_model_that_is_otherwise_is_not_taken_for_a_llama(kind, change, reason):
    model = build(kind)
    assert why_not_llama(model) is None
    change(model)
    assert reason in (why_not_llama(model) or "")


def test_the_slow_runner_applies_weight_and_bias_of_a_layer_norm():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model, changed = (GPT2LMHeadModel(config).eval() for _ in range(2))
    changed.load_state_dict(model.state_dict())
    names = ["transformer.h.0.ln_1.weight", "transformer.h.1.ln_2.bias", "transformer.ln_f.bias"]
    vectors = {name: torch.randn(32) * 0.3 for name in names}
    with torch.no_grad():
        for name, vector in vectors.items():
            changed.get_parameter(name).add_(0.5 * vector)
    runner = ReferenceRunner(model, cache_bytes=1 << 20)
    runner.bank.put(runner.bank.prepare(AdapterWeights("norms", {}, vectors, {}, 0)))
    tokens = [3, 1, 4, 1, 5, 9]
    for mix, oracle in (((("norms", 0.5),), changed), ((), model)):
        logits = runner.step([Run(runner.cache.open(6), 0, tokens, mix)])[0]
        torch.testing.assert_close(logits, oracle(torch.tensor([tokens])).logits[0, -1])
