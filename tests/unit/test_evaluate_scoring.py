"""Scores of a real tiny Llama against slow twins that treat each row alone."""

import math

import numpy as np
import pytest
import torch

from haori.core.errors import VerificationError
from haori.data import Conversation, render_prompt, render_row
from haori.metrics.likelihood import perplexity
from haori.tasks.causal_lm import scoring

QUESTIONS = [
    "Good?",
    "Is this review positive or negative?",
    "a",
    "A longer question, with more words than the others!",
]
LABEL_SETS = {
    "one token each": [[40], [41], [90]],
    "one and many": [[40], [41, 50, 60], [90, 91], [41, 50, 61, 70]],
    "one begins another": [[40, 2], [40, 41, 2]],
}


@pytest.fixture
def model(tiny_base_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32).eval()
    with torch.no_grad():  # random weights, but large: every position matters and nothing is near uniform
        for layer in model.model.layers:
            for parameter in layer.parameters():
                parameter.mul_(12 if parameter.dim() == 2 else 1)
        model.model.norm.weight.mul_(8)
    return model


@pytest.fixture
def rows(tiny_tokenizer):
    answers = ["yes", "no, it is not", "maybe so and maybe not", "y"]
    made = []
    for question, answer in zip(QUESTIONS, answers, strict=True):
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        made.append(render_row(tiny_tokenizer, Conversation(messages=messages, origin="")))
    return made


def alone(model, ids, labels):
    """Sum -log p of the labelled tokens of one row, from full logits."""
    with torch.no_grad():
        logs = model(torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)
    return -sum(logs[place - 1, label].item() for place, label in enumerate(labels) if label != -100 and place > 0)


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_rows_equal_each_row_alone(model, rows, budget) -> None:
    found = scoring.score_rows(model, rows, budget=budget)
    assert found.tokens.tolist() == [sum(label != -100 for label in row.labels) for row in rows]
    np.testing.assert_allclose(found.nll, [alone(model, row.input_ids, row.labels) for row in rows], rtol=1e-5)
    assert perplexity(found.nll, found.tokens) == pytest.approx(math.exp(found.nll.sum() / found.tokens.sum()))


def test_first_token_is_never_scored(model) -> None:
    class Row:
        input_ids = (5, 6, 7)
        labels = (5, 6, 7)

    found = scoring.score_rows(model, [Row()])
    assert found.tokens.tolist() == [2]
    assert found.nll[0] == pytest.approx(alone(model, (5, 6, 7), (5, 6, 7)), rel=1e-5)


@pytest.mark.parametrize("labels", LABEL_SETS.values(), ids=LABEL_SETS.keys())
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_labels_equal_prompt_and_label_alone(model, tiny_tokenizer, labels, budget) -> None:
    prompts = [render_prompt(tiny_tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    found = scoring.score_labels(model, prompts, labels, budget=budget)
    expected = [[-alone(model, prompt + label, [-100] * len(prompt) + label) for label in labels] for prompt in prompts]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scoring.score_labels_slow(model, prompts, labels), expected, rtol=1e-5, atol=1e-5)


def test_left_padding_gives_right_positions_to_learned_positions() -> None:
    # GPT-2 adds an embedding per position: a wrong position cannot go unnoticed, unlike with rotary embeddings.
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(50)
    prompts, labels = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10], [11, 12, 13]], [[20], [21, 22, 23]]
    expected = [[-alone(model, prompt + label, [-100] * len(prompt) + label) for label in labels] for prompt in prompts]
    np.testing.assert_allclose(scoring.score_labels(model, prompts, labels), expected, rtol=1e-4, atol=1e-4)


def test_cache_that_cannot_be_repeated_takes_the_slow_path(model, tiny_tokenizer, monkeypatch) -> None:
    prompts = [render_prompt(tiny_tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    labels = LABEL_SETS["one and many"]
    fast = scoring.score_labels(model, prompts, labels)
    called = []
    slow = scoring.score_labels_slow
    monkeypatch.setattr(scoring, "_can_continue", lambda cache: False)
    monkeypatch.setattr(scoring, "score_labels_slow", lambda *a, **k: called.append(1) or slow(*a, **k))
    np.testing.assert_allclose(scoring.score_labels(model, prompts, labels), fast, rtol=1e-5)
    assert called


def test_logits_exist_only_for_scored_tokens(model, rows) -> None:
    shapes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    scoring.score_rows(model, rows, budget=80)
    scored = sum(label != -100 for row in rows for label in row.labels)
    assert len(shapes) > 1  # several batches, so a sum would show
    assert sum(shape[0] * shape[1] for shape in shapes) == scored
    shapes.clear()
    scoring.score_labels(model, [row.input_ids[: row.prompt_length] for row in rows], [[40], [41], [90]])
    assert shapes == [(1, len(rows), model.config.vocab_size)]


def test_a_row_without_labels_is_not_scored(model) -> None:
    class Row:
        input_ids = (5, 6, 7)
        labels = (-100, -100, -100)

    found = scoring.score_rows(model, [Row()])
    assert (found.nll.tolist(), found.tokens.tolist()) == ([0], [0])


def test_weights_that_are_not_numbers_are_an_error(model, rows) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(VerificationError, match="not numbers on 4 of 4 rows"):
        scoring.score_rows(model, rows)
    with pytest.raises(VerificationError, match="not numbers"):
        scoring.score_labels(model, [row.input_ids for row in rows], [[40], [41]])
