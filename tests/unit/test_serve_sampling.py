"""Sampling: each filter against transformers' own, and rows that know nothing of one another."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from haori.core.errors import InputError
from haori.serve.request import Sampling
from haori.serve.sampling import draw as drawing
from haori.serve.sampling.draw import Filters, draw
from haori.serve.sampling.sampler import Choice, SamplerState, choose

NO_STOPS: frozenset[int] = frozenset()

FILTERS = st.builds(
    Filters,
    temperature=st.sampled_from([0.01, 0.3, 0.7, 1.0, 2.0, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 40, 300, 10_000]),
    top_p=st.sampled_from([1.0, 1.0, 0.05, 0.5, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.2, 1.0]),
)


def random_logits(rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def oracle(logits: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Return the probabilities (V,) that transformers' warpers leave, in the order temperature, min-p, top-k, top-p."""
    scores = TemperatureLogitsWarper(filters.temperature)(None, logits.double()[None])
    if filters.min_p > 0:
        scores = MinPLogitsWarper(filters.min_p)(None, scores)
    if filters.top_k:
        scores = TopKLogitsWarper(filters.top_k)(None, scores)
    if filters.top_p < 1:
        scores = TopPLogitsWarper(filters.top_p)(None, scores)
    return scores.softmax(-1)[0]


def assert_inverts(token: int, uniform: float, probabilities: torch.Tensor) -> None:
    sums = probabilities.cumsum(0)
    below = float(sums[token] - probabilities[token])
    assert probabilities[token] > 0
    assert below - 1e-5 <= uniform <= float(sums[token]) + 1e-5


def sampler(sampling: Sampling, prompt: tuple[int, ...] = (), vocabulary: int = 50, **more) -> SamplerState:
    return SamplerState(sampling, prompt, vocabulary, more.pop("stops", NO_STOPS), **more)


def edited(state: SamplerState, logits: torch.Tensor) -> torch.Tensor:
    row = logits.clone()
    state.edit(row)
    return row


@example_settings(max_examples=60)
@given(filters=st.lists(FILTERS, min_size=1, max_size=5), seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 4.0]))
def test_a_draw_inverts_the_distribution_that_transformers_would_sample_from(filters, seed, scale):
    logits = random_logits(len(filters), 517, seed, scale)
    uniforms = torch.rand(len(filters), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    tokens = draw(logits.clone(), filters, uniforms)
    for row, token in enumerate(tokens):
        probabilities = oracle(logits[row], filters[row])
        if not ends_in_a_tie(logits[row], filters[row].temperature, probabilities):
            assert_inverts(token, uniforms[row], probabilities)


def ends_in_a_tie(logits: torch.Tensor, temperature: float, probabilities: torch.Tensor) -> bool:
    """Say whether the last token kept and the first one dropped, told apart in float64, are as likely in float32."""
    kept = probabilities > 0
    if bool(kept.all()):
        return False
    last, first = ((logits[part] - logits.max()) / temperature for part in (kept, ~kept))
    return bool(last.min().exp() == first.max().exp())


def test_tokens_that_float32_cannot_tell_apart_are_kept_together():
    logits = torch.tensor([[0.5, 0.25, 0.25, 0.1]])
    logits[0, 2] = torch.nextafter(logits[0, 2], torch.tensor(0.0))  # the next smaller number
    one = Filters(100.0, top_p=0.4)  # two of four almost equally likely ones
    assert int((oracle(logits[0], one) > 0).sum()) == 2
    assert ends_in_a_tie(logits[0], 100.0, oracle(logits[0], one))
    assert {draw(logits.clone(), [one], [place / 30])[0] for place in range(30)} == {0, 1, 2}
    apart = torch.tensor([[0.5, 0.17, 0.16, 0.1]])
    assert not ends_in_a_tie(apart[0], 100.0, oracle(apart[0], one))
    assert {draw(apart.clone(), [one], [place / 30])[0] for place in range(30)} == {0, 1}


@pytest.mark.parametrize("one", [Filters(0.7, top_k=5), Filters(0.7, top_p=0.8), Filters(0.7, min_p=0.1)])
def test_every_kept_token_can_be_drawn_and_no_other(one):
    logits = random_logits(1, 60, seed=3, scale=2.0)
    uniforms = [place / 3000 for place in range(3000)]
    tokens = draw(logits.repeat(3000, 1), [one] * 3000, uniforms)
    probabilities = oracle(logits[0], one)
    assert set(tokens) == set(probabilities.nonzero()[:, 0].tolist())
    assert 1 < len(set(tokens)) < 60


@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
def test_the_end_of_top_p_is_the_same_however_much_was_sorted(scale, monkeypatch):
    logits = random_logits(6, 9001, seed=1, scale=scale)
    filters = [Filters(0.9, top_p=share) for share in (0.01, 0.3, 0.6, 0.9, 0.99, 0.9999)]
    uniforms = [0.0, 0.2, 0.4, 0.6, 0.8, 1 - 2**-53]
    found = []
    for head in (1, 64, 9001):
        monkeypatch.setattr(drawing, "_HEAD", head)
        found.append(draw(logits.clone(), filters, uniforms))
    assert found[0] == found[1] == found[2]
    for row, token in enumerate(found[0]):
        assert_inverts(token, uniforms[row], oracle(logits[row], filters[row]))


def test_equally_likely_tokens_are_kept_together():
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    for one in (Filters(1.0, top_k=1), Filters(1.0, top_p=0.1), Filters(1.0, min_p=1.0)):
        assert [draw(logits.clone(), [one], [uniform])[0] for uniform in (0.0, 0.49, 0.51, 0.99)] == [1, 1, 2, 2]


def test_the_greatest_uniform_number_draws_a_token_of_the_vocabulary():
    logits = random_logits(2000, 31, seed=8, scale=0.01)
    tokens = draw(logits, [Filters(1.0)] * 2000, [1 - 2**-53] * 2000)
    assert set(tokens) == {30}


def test_frequencies_fit_the_probabilities():
    from scipy.stats import chisquare

    logits, sampling = random_logits(1, 12, seed=5, scale=1.5), Sampling(temperature=0.8, top_p=0.95, seed=11)
    states = [sampler(sampling.with_fields(seed=seed), vocabulary=12) for seed in range(20)]
    drawn = Counter(
        choice.token for _ in range(200) for choice in choose(logits.expand(20, -1), states)
    )  # 20 requests, 200 tokens each
    expected = oracle(logits[0], Filters(0.8, top_p=0.95))
    kept = expected.nonzero()[:, 0].tolist()
    assert set(drawn) <= set(kept)
    assert chisquare([drawn[token] for token in kept], (expected[kept] * 4000).tolist()).pvalue > 0.001


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 7, 100]),
    top_p=st.sampled_from([1.0, 0.3, 0.95]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
    logit_bias=st.sampled_from([{}, {3: 4.0, 5: -100.0}]),
    min_tokens=st.sampled_from([0, 2]),
    logprobs=st.sampled_from([None, 0, 4]),
    seed=st.integers(-(2**63), 2**63 - 1),
)


@example_settings(max_examples=40)
@given(data=st.data(), samplings=st.lists(SAMPLINGS, min_size=2, max_size=12), vocabulary=st.sampled_from([37, 517]))
def test_a_row_is_what_it_would_be_alone(data, samplings, vocabulary):
    steps = [random_logits(len(samplings), vocabulary, seed=step).bfloat16() for step in range(3)]
    order = data.draw(st.permutations(range(len(samplings))))

    def fresh(row: int) -> SamplerState:
        return sampler(samplings[row], (1, 2, row), vocabulary, stops=frozenset({0, 4}))

    together = [fresh(row) for row in order]
    mixed = [choose(logits[order], together) for logits in steps]
    for place, row in enumerate(order):
        state = fresh(row)
        alone = [choose(logits[row : row + 1], [state])[0] for logits in steps]
        assert [step[place] for step in mixed] == alone


def test_a_large_batch_is_what_its_rows_would_be_alone():
    samplings = [Sampling(temperature=0.9, top_p=1 - row % 3 / 10, top_k=row % 2 * 50, seed=row) for row in range(21)]
    logits = random_logits(21, 49_152, scale=2.0).bfloat16()
    together = choose(logits, [sampler(one, vocabulary=49_152) for one in samplings])
    alone = [choose(logits[row : row + 1], [sampler(one, vocabulary=49_152)])[0] for row, one in enumerate(samplings)]
    assert together == alone
    assert len({choice.token for choice in together}) > 15


@pytest.mark.parametrize("temperature", [0.0, 1e-9])
def test_greedy_takes_the_first_likeliest_token_and_leaves_the_logits(temperature):
    logits = torch.tensor([[0.0, 5.0, 5.0], [7.0, 1.0, 2.0]])
    states = [sampler(Sampling(temperature=temperature), vocabulary=3) for _ in range(2)]
    assert choose(logits, states) == [Choice(1), Choice(0)]
    assert logits.tolist() == [[0.0, 5.0, 5.0], [7.0, 1.0, 2.0]]


def test_a_seed_repeats_and_no_seed_does_not():
    logits = torch.zeros(1, 50)

    def tokens(seed: int | None) -> list[int]:
        state = sampler(Sampling(seed=seed))
        return [choose(logits, [state])[0].token for _ in range(20)]

    assert tokens(-5) == tokens(-5)
    assert tokens(5) != tokens(-5)
    assert tokens(None) != tokens(None)


def test_repetition_penalty_is_the_one_of_transformers():
    state, logits = sampler(Sampling(repetition_penalty=1.4), prompt=(1, 2, 2)), random_logits(1, 50)[0]
    answer = [*range(9, 50), 9, *range(3, 9)] * 2  # more tokens than there was room for at first
    for token in answer:
        state.accept(token)
    oracle_row = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([[1, 2, 2, *answer]]), logits[None].clone())[0]
    assert torch.equal(edited(state, logits), oracle_row)
    assert edited(state, logits)[0] == logits[0]


def test_presence_and_frequency_count_the_answer_alone():
    state, logits = sampler(Sampling(presence_penalty=0.5, frequency_penalty=0.25), prompt=(7,)), torch.zeros(50)
    for token in (3, 4, 3):
        state.accept(token)
    assert {row: float(value) for row, value in enumerate(edited(state, logits)) if value} == {3: -1.0, 4: -0.75}


def test_penalties_grow_past_the_first_room():
    state = sampler(Sampling(frequency_penalty=1.0), vocabulary=300)
    for token in range(200):
        state.accept(token)
    assert edited(state, torch.zeros(300)).tolist() == [-1.0] * 200 + [0.0] * 100


def test_min_tokens_is_the_one_of_transformers():
    state, logits = sampler(Sampling(temperature=0, min_tokens=2), stops=frozenset({4, 6})), random_logits(1, 50)
    logits[0, 4] = 99.0
    ids = torch.tensor([[1]])
    for _ in range(3):
        row = MinNewTokensLengthLogitsProcessor(1, 2, [4, 6])(ids, logits.clone())
        choice = choose(logits, [state])[0]
        assert choice.token == int(row.argmax())
        ids = torch.cat([ids, torch.tensor([[choice.token]])], dim=1)
    assert choice.token == 4
    assert state.ended


def test_an_ignored_end_token_does_not_end():
    state = sampler(Sampling(temperature=0, ignore_eos=True, min_tokens=5), stops=frozenset({4}))
    logits = torch.zeros(1, 50).index_fill_(1, torch.tensor([4]), 1.0)
    assert choose(logits, [state]) == [Choice(4)]
    assert not state.ended


def test_logit_bias_is_added():
    state = sampler(Sampling(temperature=0, logit_bias={3: 2.0, 9: 2.5}))
    assert choose(torch.zeros(1, 50), [state]) == [Choice(9)]


@pytest.mark.parametrize(
    ("bias", "message"),
    [({50: 1.0}, r"names token 50; this model's tokens are 0 to 49"), ({-1: 1.0}, "names token -1"),
     ({1: math.nan}, "is nan; it must be from -100 to 100"), ({1: 101.0}, "is 101.0; it must be")],
)  # fmt: skip
def test_a_bias_that_cannot_be_used_is_refused(bias, message):
    with pytest.raises(InputError, match=message):
        sampler(Sampling(logit_bias=bias))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bias", [{}, {1: 1.0}])
def test_a_row_that_is_not_numbers_fails_alone(bad, temperature, bias):
    logits = random_logits(3, 50)
    logits[1, 17] = bad
    sampling = Sampling(temperature=temperature, seed=1, logit_bias=bias)
    states = [sampler(sampling) for _ in range(3)]
    choices = choose(logits, states)
    assert choices[1].token == -1
    assert "not numbers" in choices[1].error
    assert [state.accepted for state in states] == [1, 0, 1]
    assert choices[::2] == choose(logits[::2], [sampler(sampling) for _ in range(2)])


def test_a_token_of_no_probability_is_no_error():
    logits = torch.full((1, 50), -math.inf).index_fill_(1, torch.tensor([8]), 0.0)
    assert choose(logits, [sampler(Sampling(seed=3))]) == [Choice(8)]
    assert choose(torch.full((1, 50), -math.inf), [sampler(Sampling(seed=3))])[0].error


def test_logprobs_are_those_of_the_model():
    logits = random_logits(4, 50).bfloat16()
    logits[:, :4] = 29.0  # equally likely: named in the order of ids
    sampling = Sampling(temperature=0.2, top_k=2, logit_bias={40: 100.0}, repetition_penalty=2.0, logprobs=3)
    states = [sampler(sampling, prompt=(0, 1, 2, 3)) for _ in range(3)] + [sampler(Sampling(temperature=0))]
    choices = choose(logits, states)
    table = logits.float().log_softmax(-1)
    for row in range(3):
        logprob = choices[row].logprob
        assert logprob.token == choices[row].token == 40
        assert logprob.logprob == pytest.approx(float(table[row, 40]), abs=1e-6)
        assert [token for token, _ in logprob.top] == [0, 1, 2]
        assert [value for _, value in logprob.top] == pytest.approx(table[row, :3].tolist(), abs=1e-6)
    assert choices[3].logprob is None


class OnlyThese:
    """A constraint of a fixed order of tokens, each of which may also be the one after it."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    @property
    def finished(self) -> bool:
        return not self.tokens

    def allowed(self) -> torch.Tensor:
        flags = torch.zeros(50, dtype=torch.bool)
        flags[self.tokens[:2]] = True
        return flags

    def accept(self, token: int) -> None:
        if token not in self.tokens[:2]:
            raise InputError("not this token")
        self.tokens = self.tokens[self.tokens.index(token) + 1 :]


def test_a_constraint_rules_tokens_out_and_ends_the_answer():
    state = sampler(Sampling(temperature=0), constraint=OnlyThese([7, 3, 9]))
    logits = torch.arange(50.0)[None]
    assert choose(logits, [state]) == [Choice(7)]
    assert not state.ended
    assert choose(logits, [state]) == [Choice(9)]
    assert state.ended


def test_min_tokens_gives_way_to_a_constraint_that_allows_only_the_end():
    state = sampler(Sampling(seed=1, min_tokens=9), constraint=OnlyThese([4]), stops=frozenset({4}))
    assert choose(torch.zeros(1, 50), [state]) == [Choice(4)]


def test_a_row_without_an_allowed_token_fails_alone():
    states = [sampler(Sampling(seed=1), constraint=OnlyThese([])), sampler(Sampling(seed=1))]
    choices = choose(torch.zeros(2, 50), states)
    assert "No token may follow" in choices[0].error
    assert choices[1] == choose(torch.zeros(1, 50), [sampler(Sampling(seed=1))])[0]


class Overcome(OnlyThese):
    """A constraint that cannot go on, at one of its two ends."""

    def __init__(self, error: Exception, *, at: str) -> None:
        super().__init__([7])
        self.error, self.at = error, at

    def allowed(self) -> torch.Tensor:
        if self.at == "allowed":
            raise self.error
        return super().allowed()

    def accept(self, token: int) -> None:
        raise self.error


@pytest.mark.parametrize("at", ["allowed", "accept"])
@pytest.mark.parametrize(("error", "fault"), [(InputError("too complex"), "request"), (ValueError("no"), "engine")])
def test_what_a_constraint_refuses_is_the_fault_of_the_request(at, error, fault):
    states = [sampler(Sampling(seed=1), constraint=Overcome(error, at=at)), sampler(Sampling(seed=1))]
    choices = choose(torch.zeros(2, 50), states)
    assert str(error) in choices[0].error
    assert choices[0].fault == fault
    assert choices[1].error is None


def test_whose_fault_it_is_that_no_token_can_be_chosen():
    nothing = choose(torch.zeros(1, 50), [sampler(Sampling(), constraint=OnlyThese([]))])
    assert [choice.fault for choice in nothing] == ["request"]
    nan = choose(torch.full((1, 50), math.nan), [sampler(Sampling())])
    assert [choice.fault for choice in nan] == ["engine"]
