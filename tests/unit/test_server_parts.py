"""The server's parts alone: pieces cross from threads, tokens become bytes, names are taken apart, sizes are read."""

import asyncio
import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haori.core.errors import InputError
from haori.serve.request import StreamChunk, TokenLogprob
from haori.server import parse_size
from haori.server.access import is_loopback, part_names
from haori.server.answer_streams import ChunkQueue, StreamBridge
from haori.server.answers import _other_seed
from haori.server.errors import without_folders
from haori.server.openai.token_texts import TokenTexts


def test_pieces_from_several_threads_arrive_whole_and_in_order():
    async def collect() -> dict[int, list[str]]:
        room = StreamBridge(asyncio.get_running_loop())
        queue = ChunkQueue()

        def send(number: int) -> None:
            deliver = room.sender(queue, number)
            for i in range(500):
                deliver(StreamChunk(text=str(i)))

        threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        found: dict[int, list[str]] = {number: [] for number in range(4)}
        for _ in range(2000):
            piece = await asyncio.wait_for(queue.get(), 5)
            found[piece.choice].append(piece.chunk.text)
        return found

    found = asyncio.run(collect())
    assert all(texts == [str(i) for i in range(500)] for texts in found.values())


def test_a_piece_for_a_loop_that_has_ended_is_dropped():
    async def make() -> StreamBridge:
        return StreamBridge(asyncio.get_running_loop())

    room = asyncio.run(make())
    room.sender(ChunkQueue(), 0)(StreamChunk(text="late"))


@given(text=st.text(max_size=20))
def test_the_bytes_of_tokens_are_those_of_the_text(tiny_tokenizer, text):
    texts = TokenTexts(tiny_tokenizer)
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(texts.bytes_of(token) for token in ids) == text.encode()


def test_tokens_that_are_no_whole_character_show_their_bytes(tiny_tokenizer):
    texts = TokenTexts(tiny_tokenizer)
    first = tiny_tokenizer("é", add_special_tokens=False)["input_ids"][0]
    assert texts.text_of(first) == "bytes:\\xc3"
    assert texts.text_of(tiny_tokenizer.eos_token_id) == "<|im_end|>"


def test_a_logprob_that_json_cannot_hold_is_the_least(tiny_tokenizer):
    texts = TokenTexts(tiny_tokenizer)
    logprob = TokenLogprob(5, -math.inf, ((5, -math.inf),))
    found = texts.chat([logprob]).content[0]
    assert found.logprob == found.top_logprobs[0].logprob == -9999.0
    plain = texts.plain([logprob, logprob], tops=1, offset=3)
    assert plain.text_offset == [3, 3 + len(plain.tokens[0])]
    assert plain.token_logprobs == [-9999.0, -9999.0]
    assert texts.plain([logprob], tops=0, offset=0).top_logprobs is None


def test_names_in_a_model_name():
    assert part_names("tiny", "tiny") == ["tiny"]
    assert part_names("org/base:v1+x", "org/base:v1+x") == ["org/base:v1+x"]
    assert part_names("a:0.4+b@2:-0.6", "tiny") == ["a", "b@2"]
    with pytest.raises(InputError, match="no model name"):
        part_names("a + b", "tiny")


@pytest.mark.parametrize(
    ("host", "local"),
    [("localhost", True), ("127.0.0.9", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("10.0.0.1", False),
     ("example.org", False)],
)  # fmt: skip
def test_addresses_of_this_machine(host, local):
    assert is_loopback(host) is local


@given(seed=st.integers(-(2**63), 2**63 - 1), choice=st.integers(1, 200))
def test_seeds_of_further_choices_differ_and_stay_in_range(seed, choice):
    assert _other_seed(seed, choice) != seed
    assert -(2**63) <= _other_seed(seed, choice) < 2**63


@pytest.mark.parametrize(("text", "size"), [("1GB", 10**9), ("512 mb", 512 * 10**6), ("1.5G", 15 * 10**8), ("7", 7)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1 potato", "1e9"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="amount of memory"):
        parse_size(text)


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        ("The file '/home/me/.local/keys.json' is damaged.", "The file 'keys.json' is damaged."),
        ("[Errno 2] No such file or directory: '/srv/a b/c'", "[Errno 2] No such file or directory: 'c'"),
        ("\"/home/it's/keys.json\" and '/a/b/'", "\"keys.json\" and 'b'"),
        (r"'C:\Users\me\keys.json' is damaged", "'keys.json' is damaged"),
        ("'support' and 'org/tiny' are names; 'a' / 'b'", "'support' and 'org/tiny' are names; 'a' / 'b'"),
        ("the address '/v1/models'", "the address 'models'"),
    ],
)
def test_where_files_lie_is_not_told(sentence, told):
    assert without_folders(sentence) == told


@given(st.lists(st.from_regex(r"[a-z .@-]{1,8}", fullmatch=True), min_size=2, max_size=6))
def test_no_part_of_a_path_but_the_last_is_told(parts):
    path = "/" + "/".join(f"{i}{part}" for i, part in enumerate(parts))
    assert without_folders(f"The file {path!r} is damaged.") == f"The file {path.rpartition('/')[2]!r} is damaged."
