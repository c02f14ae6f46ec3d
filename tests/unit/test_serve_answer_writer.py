"""Tokens become stream chunks: none is lost, text and log-probabilities stay with them, a stop string ends the text."""

import pytest

from haori.serve.answer_writer import AnswerWriter
from haori.serve.request import Sampling, TextRequest, TokenLogprob


def writer_of(tokenizer, **sampling):
    sent = []
    request = TextRequest("r", (1,), sampling=Sampling(**sampling))
    return AnswerWriter(request, sent.append, tokenizer, frozenset({tokenizer.eos_token_id})), sent


@pytest.mark.parametrize("cut_off", [False, True])
def test_chunks_hold_every_token_with_its_log_probability(tiny_tokenizer, cut_off):
    tokens = tiny_tokenizer("né, 🎌 ok?")["input_ids"]
    writer, sent = writer_of(tiny_tokenizer)
    for number, token in enumerate(tokens):
        writer.push(token, TokenLogprob(token, -float(number)))
        if writer.text:
            writer.send()
    writer.send(writer.complete(cut_off=cut_off), cached_tokens=3)
    assert "".join(chunk.text for chunk in sent) == "né, 🎌 ok?"
    assert [token for chunk in sent for token in chunk.tokens] == tokens
    assert [found.logprob for chunk in sent for found in chunk.logprobs] == [-float(n) for n in range(len(tokens))]
    assert all("\ufffd" not in chunk.text for chunk in sent)
    assert any(len(chunk.tokens) > 1 for chunk in sent)  # the bytes of one character
    assert (writer.ended, sent[-1].finish, sent[-1].cached_tokens) == (True, "length" if cut_off else "stop", 3)


def test_a_stop_string_that_the_rest_completes_is_no_cut(tiny_tokenizer):
    writer, sent = writer_of(tiny_tokenizer, stop=("b\ufffd",))
    for token in [*tiny_tokenizer("ab")["input_ids"], tiny_tokenizer("é")["input_ids"][0]]:
        writer.push(token)
    writer.send(writer.complete(cut_off=True))
    assert (sent[-1].text, sent[-1].finish, writer.stopped) == ("a", "stop", True)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_stop_token_has_no_text_unless_it_is_ignored(tiny_tokenizer, ignored):
    end = tiny_tokenizer.eos_token_id
    writer, sent = writer_of(tiny_tokenizer, ignore_eos=ignored, shown_tokens=frozenset({end}))
    writer.push(end)
    writer.send(writer.complete(cut_off=False))
    assert (sent[-1].text, sent[-1].tokens) == ("<|im_end|>" if ignored else "", (end,))


def test_an_answer_that_is_interrupted_keeps_what_was_held_back(tiny_tokenizer):
    writer, sent = writer_of(tiny_tokenizer, stop=("bcd",))
    for token in tiny_tokenizer("abc")["input_ids"]:
        writer.push(token)
    writer.interrupt()
    writer.send("error", "gone", "outage")
    assert (sent[-1].text, sent[-1].finish, sent[-1].error, sent[-1].fault) == ("abc", "error", "gone", "outage")
