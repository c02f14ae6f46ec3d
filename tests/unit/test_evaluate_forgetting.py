"""The shipped passages, their losses, and the paired difference between two models."""

import json
import math

import pytest
import torch

from haori.core.errors import DataError, MismatchError
from haori.evaluation import forgetting_between
from haori.tasks.causal_lm.forgetting_texts import GeneralText, general_texts, own_texts, text_losses
from haori.tasks.examination import TextLosses
from tests.library_samples import stock_model

TEXTS = [
    GeneralText("a", "Is this review positive or negative?", "", None),
    GeneralText("b", "The assistant answers the question of the user.", "", None),
    GeneralText("a", "system " * 300, "", None),
    GeneralText("a", "Is", "", None),
]


@pytest.fixture(scope="module")
def model(tiny_base_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32)


def test_the_shipped_passages_are_varied_and_licensed():
    texts = general_texts()
    assert {text.kind for text in texts} == {"knowledge", "everyday", "questions", "literature", "jargon", "code"}
    assert len({text.text for text in texts}) == len(texts) == 93
    assert {text.licence for text in texts} == {"Apache-2.0", "public domain", "PSF-2.0"}
    words = sum(len(text.text.split()) for text in texts)
    assert 10_000 < words < 15_000
    assert all(text.text.strip() == text.text and text.source for text in texts)


def test_losses_are_those_of_transformers_passage_by_passage(model, tiny_tokenizer):
    found = text_losses(model, tiny_tokenizer, TEXTS)
    assert found.kinds == ("a", "b", "a", "a")
    for text, nll, tokens in zip(TEXTS, found.nll, found.tokens, strict=True):
        ids = tiny_tokenizer(text.text, return_tensors="pt").input_ids[:, :256]  # the model's context
        assert tokens == ids.shape[1] - 1
        if tokens:
            with torch.no_grad():
                expected = float(model(ids, labels=ids).loss) * tokens
            assert math.isclose(nll, expected, rel_tol=1e-5)


def test_equal_models_forget_exactly_nothing(model, tiny_tokenizer):
    before, after = (text_losses(model, tiny_tokenizer, TEXTS) for _ in range(2))
    found = forgetting_between(before, [after, after])
    for change in (found.whole, *found.kinds.values()):
        assert change.difference == 0.0
        assert change.low in (0.0, None)
        assert change.high in (0.0, None)
    assert (found.whole.passages, found.kinds["a"].passages, found.kinds["b"].passages) == (4, 3, 1)
    assert found.kinds["b"].low is None, "one passage has no interval"


def test_an_adapter_is_measured_attached_and_off_it_is_the_base(model, tiny_base_folder, tiny_tokenizer):
    from peft import LoraConfig

    adapted = stock_model(tiny_base_folder, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), scale=0.5).train()
    before = text_losses(model, tiny_tokenizer, TEXTS)
    after = text_losses(adapted, tiny_tokenizer, TEXTS)
    assert adapted.training, "the mode is put back"
    found = forgetting_between(before, after)
    assert found.whole.difference == pytest.approx(sum(after.nll) / sum(after.tokens) - found.whole.before)
    assert found.whole.low is not None
    assert found.whole.high is not None
    assert found.whole.low <= found.whole.difference <= found.whole.high
    assert found.whole.difference != 0.0
    with adapted.disable_adapter():
        off = text_losses(adapted, tiny_tokenizer, TEXTS)
    assert forgetting_between(before, off).whole.difference == 0.0


def test_the_mean_over_seeds_is_the_mean_of_their_losses():
    before = TextLosses(kinds=("a", "a"), nll=(2.0, 4.0), tokens=(1, 3))
    runs = [before.with_fields(nll=(4.0, 8.0)), before.with_fields(nll=(2.0, 6.0))]
    found = forgetting_between(before, runs).whole
    assert (found.before, found.after, found.difference) == (1.5, 2.5, 1.0)


def test_other_passages_are_refused():
    before = TextLosses(kinds=("a",), nll=(2.0,), tokens=(1,))
    with pytest.raises(MismatchError, match="not the same"):
        forgetting_between(before, before.with_fields(tokens=(2,)))


def test_own_text_is_read_from_any_data(tmp_path, model, tiny_tokenizer):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"prompt": "Who?", "completion": "Me."}) + "\n")
    assert [text.text for text in own_texts(str(path))] == ["Who?\nMe."]
    with pytest.raises(DataError, match="two tokens"):
        text_losses(model, tiny_tokenizer, TEXTS[3:])
