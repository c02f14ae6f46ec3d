"""Text that comes out token by token is the text that comes out at once, for every kind of tokenizer."""

import time
from functools import cache

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from haori.bases.detokenise import TextStream

TEXT = ["the answer is yes, or no: it's a test of the spacing", "naïve café 日本語 🙂 done", "aaab abab"]
KINDS = ["byte-level", "byte-fallback", "metaspace", "word-piece"]


@cache
def build(kind: str) -> PreTrainedTokenizerFast:
    """Train a small tokenizer of a kind, with two special tokens and a plain added one."""
    specials = ["<s>", "</s>"]
    if kind == "byte-level":
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=330, special_tokens=specials, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
    elif kind == "byte-fallback":
        byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        pieces = ["<unk>", *byte_tokens, "▁", "▁the", "▁answer", "a", "b", "ab", "▁b", "日", "."]
        raw = Tokenizer(
            models.BPE(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[("a", "b"), ("▁", "b")],
                       byte_fallback=True, unk_token="<unk>")
        )  # fmt: skip
        raw.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = None
    elif kind == "metaspace":
        raw = Tokenizer(models.Unigram())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=specials, unk_token="<s>", show_progress=False)
    else:
        raw = Tokenizer(models.WordPiece(unk_token="<s>"))
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=True)
        trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=specials, show_progress=False)
    if trainer is not None:
        raw.train_from_iterator(TEXT * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken("<call it>", special=False)])
    return tokenizer


def whole(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def cut(text: str, stops: tuple[str, ...]) -> str:
    """Cut before the stop string that is complete first, the longer one of two."""
    ends = [(end, -len(stop)) for stop in stops for end in range(len(text) + 1) if text[:end].endswith(stop)]
    return text[: sum(min(ends))] if ends else text


def pieces(tokenizer: PreTrainedTokenizerFast, tokens: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stops)
    return [*(stream.push(token) for token in tokens), stream.finish()]


@pytest.mark.parametrize("kind", KINDS)
@example_settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_tokens_give_the_text_of_all_at_once(kind, data):
    tokenizer = build(kind)
    some = st.integers(0, len(tokenizer) + 2)  # the last ones are unknown to the tokenizer
    typical = st.sampled_from([token for text in TEXT for token in tokenizer.encode(text)])
    tokens = data.draw(st.lists(st.one_of(some, typical), max_size=40))
    assert "".join(pieces(tokenizer, tokens)) == whole(tokenizer, tokens)


@pytest.mark.parametrize("kind", KINDS)
@example_settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_the_text_ends_before_the_first_stop_string(kind, data):
    tokenizer = build(kind)
    usual = [token for text in TEXT for token in tokenizer.encode(text)]
    tokens = data.draw(st.lists(st.sampled_from(usual), min_size=1, max_size=40))
    text = whole(tokenizer, tokens)
    inside = st.tuples(st.integers(0, len(text)), st.integers(1, 6)).map(lambda at: text[at[0] : sum(at)])
    stops = tuple(data.draw(st.lists(st.one_of(inside, st.text("ab ", min_size=1, max_size=5)), max_size=4)))
    stops = tuple(stop for stop in stops if stop)
    found = pieces(tokenizer, tokens, stops)
    assert "".join(found) == cut(text, stops)


@example_settings(max_examples=300)
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3).map(tuple),
)
def test_stop_strings_that_overlap_themselves(text, stops):
    tokenizer = build("byte-level")
    tokens = [token for character in text for token in tokenizer.encode(character)]
    stream = TextStream(tokenizer, stops)
    sent = ""
    for token in tokens:
        sent += stream.push(token)
        assert cut(text, stops).startswith(sent)
    assert sent + stream.finish() == cut(text, stops)
    assert stream.stopped == any(stop in text for stop in stops)


def test_of_two_stop_strings_the_one_that_is_complete_first_counts():
    tokenizer = build("byte-level")
    text = "x abcd"
    for tokens in (tokenizer.encode(text), [t for character in text for t in tokenizer.encode(character)]):
        assert "".join(pieces(tokenizer, tokens, ("abcd", "bc"))) == "x a"
        assert "".join(pieces(tokenizer, tokens, ("c", "abc"))) == "x "


def test_text_is_sent_as_soon_as_it_is_certain():
    tokenizer = build("byte-level")
    tokens = [tokenizer.convert_tokens_to_ids(piece) for piece in ("a", "ð", "Ł", "Ļ", "Ĥ", "b")]
    assert pieces(tokenizer, tokens) == ["a", "", "", "", "🙂", "b", ""]
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "abac"]
    assert pieces(tokenizer, letters, ("bad",)) == ["a", "", "", "bac", ""]
    assert pieces(tokenizer, letters[:3], ("bad",)) == ["a", "", "", "ba"]


def test_nothing_follows_a_stop_string():
    tokenizer = build("byte-level")
    stream = TextStream(tokenizer, ("b",))
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "abac"]
    assert [stream.push(token) for token in letters] == ["a", "", "", ""]
    assert stream.finish() == ""
    assert stream.stopped


def test_byte_tokens_wait_for_one_another():
    tokenizer = build("byte-fallback")
    good = tokenizer.convert_tokens_to_ids(["a", "<0xE6>", "<0x97>", "<0xA5>", "b"])
    assert pieces(tokenizer, good) == ["a", "", "", "", "日b", ""]
    bad = tokenizer.convert_tokens_to_ids(["a", "<0xE6>", "<0x97>", "<0xA5>", "<0xE6>"])
    assert pieces(tokenizer, bad) == ["a", "", "", "", "", "\ufffd" * 4]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_not_shown_and_keep_the_spaces(kind):
    tokenizer = build(kind)
    tokens = [token for word in ("the", "answer") for token in (tokenizer.eos_token_id, *tokenizer.encode(word))]
    text = "".join(pieces(tokenizer, [*tokens, len(tokenizer) - 1, tokenizer.eos_token_id]))
    assert "</s>" not in text
    assert text == whole(tokenizer, [*tokens, len(tokenizer) - 1])
    assert text.endswith("<call it>")


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_that_are_part_of_the_text_are_shown(kind):
    tokenizer = build(kind)
    words = [tokenizer.encode(word) for word in ("the", "answer")]
    first, second = (whole(tokenizer, word) for word in words)
    stream = TextStream(tokenizer, (), frozenset({tokenizer.eos_token_id}))
    sent = [stream.push(token) for token in [*words[0], tokenizer.eos_token_id, *words[1]]]
    text = "".join([*sent, stream.finish()])
    assert text.startswith(f"{first}</s>")
    assert text.removeprefix(f"{first}</s>").lstrip() == second.lstrip()


@pytest.mark.parametrize(("kind", "piece"), [("byte-level", "Ł"), ("byte-fallback", "<0xE6>"), ("metaspace", "</s>")])
def test_a_long_answer_costs_no_more_per_token(kind, piece):
    tokenizer = build(kind)
    token = tokenizer.convert_tokens_to_ids(piece)

    def seconds(count: int) -> float:
        stream = TextStream(tokenizer, ("zzz",))
        start = time.process_time()
        for _ in range(count):
            stream.push(token)
        stream.finish()
        return time.process_time() - start

    seconds(100)
    assert seconds(16_000) < 24 * max(seconds(2_000), 1e-4)  # 8 times the tokens; the square would be 64
