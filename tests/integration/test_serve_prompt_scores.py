"""Log-probabilities of prompts: equal to transformers', however the engine reads the prompt, and for nobody else."""

import itertools
from dataclasses import replace

import pytest
import torch

from haori.bases import find_base, load_model, load_tokenizer
from haori.serve.engine.engine import TextEngine
from haori.serve.engine.runner import LOGIT_ROWS, Run
from haori.serve.engine.scheduler import EngineLimits
from haori.serve.models.reference_runner import ReferenceRunner
from haori.serve.opening import open_runner
from haori.serve.request import Sampling, TextRequest
from haori.serve.sampling.prompt_scores import PromptScores
from tests.integration.test_serve_engine import Answers, prompt, read_adapter, without_files
from tests.server_samples import until

LIMITS = EngineLimits(context_length=256, running=4, waiting=100, chunk_tokens=32)
SCORE = Sampling(max_tokens=0, prompt_logprobs=3)
NUMBERS = itertools.count()
MIXES = [(), (("a1", 1.0),), (("a1", -0.5),), (("a1", 0.4), ("a2", 0.6))]


@pytest.fixture
def start(tiny_base_folder):
    engines = []

    def begin(limits=LIMITS, cache_bytes=8 << 20, slow=False):
        base = find_base(str(tiny_base_folder))
        opened = open_runner(base, limits, weights="fp32", cache_bytes=cache_bytes)
        runner = opened.runner
        if slow:
            runner = ReferenceRunner(load_model(base, dtype="fp32", device="cpu"), cache_bytes=1 << 30)
        engine = TextEngine(
            base, load_tokenizer(base), runner, *without_files(read_adapter(opened)),
            stop_tokens=frozenset({2}), limits=limits, vocabulary=opened.vocabulary,
        )  # fmt: skip
        engine.opened = opened
        engines.append(engine)
        return engine

    yield begin
    for engine in engines:
        engine.close()


@pytest.fixture
def truth(tiny_base_folder):
    """The log-probabilities (T V) of a prompt by transformers, with the updates added to the weights in float64."""

    def compute(engine, ids, mix=()):
        model = load_model(engine.base, dtype="fp32", device="cpu")
        with torch.no_grad():
            for adapter, strength in mix:
                for name, update in read_adapter(engine.opened)(adapter).updates.items():
                    change = strength * (update.b.double().T @ update.a.double())
                    model.get_submodule(name).weight.copy_(model.get_submodule(name).weight.double() + change)
            return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)

    return compute


def score(engine, ids, mix=(), sampling=SCORE):
    answers, name = Answers(), f"r{next(NUMBERS)}"
    engine.submit(TextRequest(name, tuple(ids), mix, sampling, str(mix)), answers.of(name))
    return answers.wait(name)


def check(found, table, ids):
    """Compare with a table (T V): chosen, likeliest and rank at every place."""
    assert [one.token for one in found] == list(ids[1:])
    for place, one in enumerate(found):
        row = table[place]
        assert one.logprob == pytest.approx(row[one.token].item(), abs=1e-4)
        assert [value for _, value in one.top] == pytest.approx(row.topk(len(one.top)).values.tolist(), abs=1e-4)
        assert all(row[token].item() == pytest.approx(value, abs=1e-4) for token, value in one.top)
        assert abs(one.rank - 1 - int((row > row[one.token]).sum())) <= int((row - row[one.token]).abs().lt(1e-4).sum())


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("mix", MIXES)
def test_scores_equal_those_of_transformers(start, truth, mix, slow):
    engine = start(slow=slow)
    for length in (1, 2, LOGIT_ROWS, LOGIT_ROWS + 1, 100):  # of one piece, several pieces, several chunks
        ids = prompt(length, length)
        pieces = score(engine, ids, mix)
        assert [(piece.text, piece.tokens, piece.finish) for piece in pieces] == [("", (), "length")]
        assert len(pieces[0].prompt_logprobs) == length - 1
        check(pieces[0].prompt_logprobs, truth(engine, ids, mix), ids)


def test_a_prefix_that_was_read_before_is_read_again_for_scores_alone(start, truth):
    engine, ids = start(), prompt(3, 120)
    score(engine, ids, sampling=Sampling(max_tokens=1, temperature=0.0))
    check(score(engine, ids)[-1].prompt_logprobs, truth(engine, ids), ids)
    score(engine, ids, sampling=Sampling(max_tokens=1, temperature=0.0))
    until(lambda: engine.status().generated_tokens == 2)  # it is told as of the last step
    assert 0 < engine.status().prefix_hits < 120  # of the last request alone


def test_scores_come_once_before_the_answer_which_is_the_same_as_without(start, truth):
    engine, ids = start(), prompt(5, 70)
    wanted = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=2)
    plain = score(engine, ids, sampling=wanted)
    scored = score(engine, ids, sampling=wanted.model_copy(update={"prompt_logprobs": 2}))
    assert [token for piece in scored for token in piece.tokens] == [token for piece in plain for token in piece.tokens]
    assert [len(piece.prompt_logprobs) for piece in scored] == [69] + [0] * (len(scored) - 1)
    check(scored[0].prompt_logprobs, truth(engine, ids), ids)
    assert all(not piece.prompt_logprobs for piece in plain)


def test_scores_of_requests_that_are_interrupted_are_whole(start, truth):
    engine, answers = start(replace(LIMITS, chunk_tokens=8), cache_bytes=3 * 64 * 1024), Answers()
    wanted = Sampling(max_tokens=60, temperature=0.0, ignore_eos=True, prompt_logprobs=1)
    asked = {f"r{i}": (prompt(i, 40 + 30 * i), MIXES[i % 4]) for i in range(6)}
    for name, (ids, mix) in asked.items():
        engine.submit(TextRequest(name, ids, mix, wanted, name), answers.of(name))
    for name, (ids, mix) in asked.items():
        found = [one for piece in answers.wait(name) for one in piece.prompt_logprobs]
        assert len(answers.tokens(name)) == min(60, 256 - len(ids))
        check(found, truth(engine, ids, mix), ids)
    assert engine.drain(5)
    until(lambda: engine.status().preemptions > 0)


def test_a_request_that_is_paused_while_its_prompt_is_read_is_scored_whole(start, truth):
    engine, answers, ids = start(replace(LIMITS, chunk_tokens=4)), Answers(), prompt(1, 200)
    for name in map(str, range(5)):
        engine.submit(TextRequest(name, ids, (), SCORE), answers.of(name))
        engine.pause(name)
        engine.resume(name)
        check(answers.end(name).prompt_logprobs, truth(engine, ids), ids)


@pytest.mark.parametrize("slow", [False, True])
def test_the_logits_of_a_whole_prompt_are_never_there_at_once(start, monkeypatch, slow):
    engine, seen = start(replace(LIMITS, chunk_tokens=100), slow=slow), []
    stock = PromptScores.take

    def take(self, first, logits):
        seen.append(len(logits))
        stock(self, first, logits)

    monkeypatch.setattr(PromptScores, "take", take)
    score(engine, prompt(1, 200))
    assert sum(seen) == 200
    assert max(seen) <= LOGIT_ROWS
    seen.clear()
    score(engine, prompt(1, 200), sampling=Sampling(max_tokens=2))
    assert not seen  # nobody else pays


@pytest.mark.parametrize("slow", [False, True])
def test_logits_that_are_not_numbers_end_their_own_request(start, truth, slow):
    engine, answers = start(slow=slow), Answers()
    ids = prompt(2, 100)
    for number in range(3):
        engine.submit(TextRequest(f"bad{number}", ids, (("a1", 1e30),), SCORE, "bad"), answers.of(f"bad{number}"))
        engine.submit(TextRequest(f"good{number}", ids, (), SCORE, "good"), answers.of(f"good{number}"))
    for number in range(3):
        end = answers.end(f"bad{number}")
        assert (end.finish, end.prompt_logprobs) == ("error", ())
        assert "not numbers" in end.error
        check(answers.end(f"good{number}").prompt_logprobs, truth(engine, ids), ids)


def test_models_that_read_a_prompt_at_once_give_the_logits_of_all_of_it():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2)).eval()
    ids = [(7 * place) % 50 for place in range(40)]
    with torch.no_grad():
        table = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    runner, scores = ReferenceRunner(model, cache_bytes=1 << 20), PromptScores(ids, 3)
    place = runner.cache.open(50)
    for start, stop in ((0, 15), (15, 39), (39, 40)):
        runner.step([Run(place, start, ids[start:stop], (), wants_logits=stop == 40, take_logits=scores.take)])
    assert scores.complete
    check(scores.found, table, ids)
