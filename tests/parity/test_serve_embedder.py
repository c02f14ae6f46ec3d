"""What the embedder gives against stock transformers, stock PEFT and merged weights, in batches of every mixture."""

import copy
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, DebertaV2Config, DebertaV2Model

from haori.bases import find_base
from haori.core.errors import (
    BaseError,
    FileFormatError,
    HaoriError,
    InputError,
    LibraryError,
    OverloadedError,
    UnavailableError,
)
from haori.library import inspect_adapter
from haori.serve.adapters.reading import AdapterWeights, ModuleUpdate
from haori.serve.embedding.embedder import EmbedderLimits, TextEmbedder
from haori.serve.embedding.layout import EmbeddingLayout, is_encoder
from haori.serve.embedding.opening import open_embedder
from haori.serve.models.encoder import AdaptedEncoder, Row
from haori.serve.request import BASE, TextRequest
from tests.encoder_models import TEXTS, adapted, build_tiny_encoder, stock_encoder, stock_vectors
from tests.server_samples import until

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "few": {"target_modules": ["query"], "r": 2},
    "rslora": {"use_rslora": True, "r": 3},
    "patterns": {"rank_pattern": {"query": 2, "output.dense": 6}, "alpha_pattern": {"key": 1}},
    "dora": {"use_dora": True},
    "dora_rslora": {"use_dora": True, "use_rslora": True, "target_modules": ["value", "intermediate.dense"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["query", "value"]},
    "biases": {"bias": "all"},
    "norms": {"modules_to_save": ["LayerNorm"], "target_modules": ["key"]},
    "tokens": {"trainable_token_indices": {"word_embeddings": [6, 7, 20]}, "target_modules": ["query"]},
}
FAR = 0.02  # two mixes differ by more than this, and equal vectors by much less
NEAR = {"atol": 2e-6, "rtol": 0.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return build_tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny-encoder")


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    return {
        kind: stock_encoder(base, place / kind, seed=number, **options)
        for number, (kind, options) in enumerate(KINDS.items(), start=1)
    }


def opened(base: Path, folders: dict[str, Path], **limits: Any) -> TextEmbedder:
    def files(adapter: str) -> Any:
        if adapter not in folders:
            raise LibraryError(f"There is no adapter {adapter!r}.")
        return inspect_adapter(folders[adapter])

    return open_embedder(find_base(str(base)), files, EmbedderLimits(**{"longest": 512, **limits}))


@pytest.fixture
def embedder(base, folders):
    found = opened(base, folders)
    yield found
    found.close()


def vectors(embedder: TextEmbedder, texts: Any, mix: Any) -> torch.Tensor:
    return torch.tensor(embedder.embed(texts, mix).result(20).vectors)


def test_the_base_is_stock_transformers_with_mean_pooling(base, embedder):
    found, counts = embedder.embed(TEXTS, BASE).result()
    wanted = stock_vectors(base, AutoModel.from_pretrained(base).eval())
    torch.testing.assert_close(torch.tensor(found), wanted, **NEAR)
    assert counts == [len(text.split()) + 2 for text in TEXTS]


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_stock_peft(kind, base, folders, embedder):
    found = vectors(embedder, TEXTS, ((kind, 1.0),))
    torch.testing.assert_close(found, stock_vectors(base, adapted(base, folders[kind])), **NEAR)
    assert (found - vectors(embedder, TEXTS, BASE)).norm(dim=1).min() > FAR


def merged(base: Path, mix: Any, folders: dict[str, Path]) -> Any:
    """Add to every weight of the base what each adapter, merged by PEFT, changes, times its strength."""
    model = AutoModel.from_pretrained(base).eval()
    plain = copy.deepcopy(model.state_dict())
    change = {name: torch.zeros_like(value) for name, value in plain.items()}
    for kind, strength in mix:
        whole = adapted(base, folders[kind]).merge_and_unload().state_dict()
        for name, value in whole.items():
            change[name] += strength * (value - plain[name])
    model.load_state_dict({name: value + change[name] for name, value in plain.items()})
    return model


@pytest.mark.parametrize(
    "mix",
    [
        (("lora", 0.4), ("rslora", 0.6)),
        (("dora", 0.7), ("few", -0.5)),
        (("dora", 0.5), ("dora_rslora", 0.5), ("biases", 1.5)),
        (("norms", 0.5), ("lora_bias", 0.25)),
        (("lora", 0.0),),
    ],
)
def test_a_blend_is_the_base_with_all_changes_merged(mix, base, folders, embedder):
    torch.testing.assert_close(
        vectors(embedder, TEXTS, mix), stock_vectors(base, merged(base, mix, folders)), atol=1e-5, rtol=0.0
    )


def test_one_batch_of_every_mixture_gives_each_row_what_it_is_alone(embedder):
    mixes = [BASE, *(((kind, 1.0),) for kind in KINDS), (("lora", 0.4), ("dora", 0.6)), BASE, (("lora", 0.5),)]
    for mix in mixes:
        embedder.embed(["cat"], mix).result()  # brings the adapters into memory
    encoder = embedder._encoder
    tokens = embedder._texts.embedded(TEXTS)
    rows = [Row(tokens[(i + j) % len(tokens)], mix) for i, mix in enumerate(mixes) for j in range(3)]
    together = encoder.compute(rows)
    for row, found in zip(rows, together, strict=True):
        torch.testing.assert_close(found, encoder.compute([row])[0], **NEAR)


def test_requests_that_come_together_share_batches(embedder):
    mixes = [BASE, *(((kind, 1.0),) for kind in KINDS)]
    alone = [vectors(embedder, TEXTS, mix) for mix in mixes]
    before = embedder.status().steps
    assert before == len(mixes)
    gate, count = threading.Event(), 4
    stock = embedder._encoder.compute

    def slow(rows):
        gate.wait(5)
        return stock(rows)

    embedder._encoder.compute = slow
    first = embedder.embed(["cat"], BASE)
    wanted = [embedder.embed(TEXTS, mixes[number % len(mixes)]) for number in range(count * len(mixes))]
    gate.set()
    assert len(first.result(20).vectors) == 1
    for number, future in enumerate(wanted):
        torch.testing.assert_close(torch.tensor(future.result(20).vectors), alone[number % len(mixes)], **NEAR)
    assert embedder.status().steps <= before + 8
    assert embedder.drain(1.0)


def test_padding_and_order_change_nothing(embedder):
    mix = (("dora", 1.0),)
    alone = torch.cat([vectors(embedder, [text], mix) for text in TEXTS])
    torch.testing.assert_close(vectors(embedder, TEXTS, mix), alone, **NEAR)
    torch.testing.assert_close(vectors(embedder, TEXTS[::-1], mix), alone.flip(0), **NEAR)
    assert vectors(embedder, ["  the cat sat on the mat \n"], mix)[0] == pytest.approx(alone[0], abs=2e-6)


def test_many_texts_go_through_several_batches(embedder, monkeypatch):
    monkeypatch.setattr("haori.serve.embedding.embedder._BATCH_TOKENS", 50)
    mix = (("lora", 1.0),)
    texts = [" ".join(["cat"] * (1 + number % 30)) for number in range(60)]
    found = vectors(embedder, texts, mix)
    assert embedder.status().steps > 10
    for number in (0, 29, 30, 59):
        torch.testing.assert_close(found[number], vectors(embedder, [texts[number]], mix)[0], **NEAR)


def test_more_adapters_than_memory_take_turns(base, folders):
    size = opened_size(base, folders)
    embedder = opened(base, folders, adapter_bytes=2 * size)
    try:
        for kind in ("lora", "rslora", "dora", "lora", "rslora"):
            mix = ((kind, 1.0),)
            found = vectors(embedder, TEXTS[:1], mix)
            torch.testing.assert_close(found, stock_vectors(base, adapted(base, folders[kind]), TEXTS[:1]), **NEAR)
            assert embedder.status().adapter_used_bytes <= 2 * size
        assert embedder.status().adapter_evictions > 0
        with pytest.raises(InputError, match="--adapter-memory"):
            embedder.embed(TEXTS, (("lora", 0.3), ("rslora", 0.3), ("dora", 0.4))).result()
    finally:
        embedder.close()


def test_an_adapter_asked_for_without_end_does_not_keep_others_out(base, folders, monkeypatch):
    monkeypatch.setattr("haori.serve.embedding.embedder._PATIENCE_S", 0.2)
    monkeypatch.setattr("haori.serve.embedding.embedder._ROUND_TOKENS", 60)
    embedder = opened(base, folders, adapter_bytes=int(1.5 * opened_size(base, folders)))
    hot = [embedder.embed(TEXTS, (("lora", 1.0),))]
    try:
        hot[0].result(20)
        hot += [embedder.embed(TEXTS, (("lora", 1.0),)) for _ in range(8)]
        cold = embedder.embed(TEXTS[:1], (("rslora", 1.0),))
        end = time.monotonic() + 20
        while not cold.done():
            assert time.monotonic() < end
            if sum(not future.done() for future in hot) < 8:
                hot.append(embedder.embed(TEXTS, (("lora", 1.0),)))
            time.sleep(0.0005)
        assert sum(not future.done() for future in hot) > 0  # it is still asked for
        assert embedder.status().adapter_evictions >= 1
    finally:
        embedder.close()


def opened_size(base: Path, folders: dict[str, Path]) -> int:
    embedder = opened(base, folders)
    embedder.embed(["cat"], (("dora", 1.0),)).result()
    size = embedder.status().adapter_used_bytes
    embedder.close()
    return size


@pytest.mark.parametrize("pooling", ["cls_token", None])
def test_other_layouts(pooling, tmp_path):
    folder = build_tiny_encoder(tmp_path / "other", pooling=pooling)
    embedder = opened(folder, {})
    try:
        wanted = stock_vectors(folder, AutoModel.from_pretrained(folder), pooling="cls" if pooling else "mean")
        torch.testing.assert_close(vectors(embedder, TEXTS, BASE), wanted, **NEAR)
        assert embedder.limits.longest == (40 if pooling else 64)
    finally:
        embedder.close()


def test_without_a_normalising_step_vectors_keep_their_length(tmp_path):
    folder = build_tiny_encoder(tmp_path / "long")
    text = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(text[: text.rindex(", {")] + "]")
    embedder = opened(folder, {})
    try:
        found = vectors(embedder, TEXTS, BASE)
        assert (found.norm(dim=1) - 1).abs().min() > 0.1
        wanted = stock_vectors(folder, AutoModel.from_pretrained(folder))
        torch.testing.assert_close(found / found.norm(dim=1, keepdim=True), wanted, **NEAR)
    finally:
        embedder.close()


REFUSED: dict[str, tuple[str, str, type[Exception], str]] = {
    "dense": ("modules.json", '[{"path": "", "type": "x.Transformer"}, {"path": "2_Dense", "type": "x.Dense"}]',
              BaseError, "Transformer, Dense"),
    "max": ("1_Pooling/config.json", '{"pooling_mode_max_tokens": true}', BaseError, "pools by max_tokens"),
    "two": ("1_Pooling/config.json", '{"pooling_mode_max_tokens": true, "pooling_mode_mean_tokens": true}', BaseError,
            "max_tokens and mean_tokens"),
    "none": ("1_Pooling/config.json", "{}", BaseError, "pools by nothing"),
    "prompt": ("config_sentence_transformers.json", '{"default_prompt_name": "query"}', BaseError, "'query'"),
    "damaged": ("modules.json", "[3", FileFormatError, "damaged"),
    "outside": ("modules.json", '[{"path": "", "type": "Transformer"}, {"path": "../x", "type": "Pooling"}]',
                FileFormatError, "not beside it"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_layouts_that_are_not_known_are_refused(name, tmp_path):
    file, text, error, sentence = REFUSED[name]
    folder = build_tiny_encoder(tmp_path / "odd")
    (folder / file).write_text(text)
    with pytest.raises(error, match=sentence):
        opened(folder, {})


def test_a_decoder_is_refused(tiny_base_folder, tmp_path, base):
    assert is_encoder(find_base(str(base)))
    assert not is_encoder(find_base(str(tiny_base_folder)))
    with pytest.raises(BaseError, match="it is a decoder"):
        headless(tiny_base_folder)


def headless(folder: Path) -> AdaptedEncoder:
    return AdaptedEncoder(AutoModel.from_pretrained(folder).eval(), EmbeddingLayout(), pad=0, name="tiny")


def test_modules_that_see_what_rows_share_are_told_apart():
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True,
        position_biased_input=False, pad_token_id=0,
    )  # fmt: skip
    encoder = AdaptedEncoder(DebertaV2Model(config).eval(), EmbeddingLayout(), pad=0, name="tiny")
    layer = "encoder.layer.0.attention.self"
    assert encoder.bank.linear(f"{layer}.value_proj") == (32, 32)
    assert encoder.bank.linear(f"{layer}.key_proj") == (32, 32)
    for module, is_shared in (("key_proj", True), ("value_proj", False)):  # keys are made of the positions too
        update = ModuleUpdate(bias=torch.ones(32))
        encoder.bank.put(AdapterWeights("it", {f"{layer}.{module}": update}, {}, {}, 0))
        assert encoder.bank.acts_on_shared((("it", 1.0),)) is is_shared
        encoder.bank.drop("it")


def test_what_cannot_be_embedded_is_a_sentence(embedder, base, folders, tmp_path):
    with pytest.raises(InputError, match=r"Text 2 has 43 tokens; the base 'tiny-encoder' embeds at most 40"):
        embedder.embed(["cat", "cat " * 41], BASE)
    with pytest.raises(LibraryError, match="no adapter"):
        embedder.embed(TEXTS, (("absent", 1.0),)).result()
    with pytest.raises(InputError, match="writes no text"):
        embedder.submit(TextRequest("a", (1,)), lambda _: None)
    with pytest.raises(InputError, match="cannot be 'int8'"):
        open_embedder(find_base(str(base)), lambda _: None, EmbedderLimits(64), weights="int8")
    other = build_tiny_encoder(tmp_path / "deep", seed=3)
    foreign = stock_encoder(other, tmp_path / "foreign", layers_to_transform=[1], target_modules=["query"])
    config = (foreign / "adapter_config.json").read_text()
    (foreign / "adapter_config.json").write_text(config.replace('"r": 4', '"r": 5'))
    folders = {**folders, "foreign": foreign}
    other_embedder = opened(base, folders)
    with pytest.raises(InputError, match="rank 5"):
        other_embedder.embed(TEXTS, (("foreign", 1.0),)).result()
    assert vectors(other_embedder, TEXTS, (("lora", 1.0),)).shape == (4, 32)  # it goes on
    with pytest.raises(InputError, match="no text to embed"):
        other_embedder.embed([], BASE)
    other_embedder.close()
    with pytest.raises(OverloadedError, match="shutting down"):
        other_embedder.embed(TEXTS, BASE)


def test_a_failure_of_the_model_reaches_the_caller_and_nobody_else(embedder):
    stock = embedder._encoder.compute

    def fails(rows):
        raise RuntimeError("out of paper")

    embedder._encoder.compute = fails
    with pytest.raises(HaoriError, match=r"could not be embedded .*out of paper"):
        embedder.embed(TEXTS, BASE).result()
    until(lambda: embedder.failure is not None)
    embedder._encoder.compute = stock
    until(lambda: embedder.failure is None)
    assert vectors(embedder, TEXTS, BASE).shape == (4, 32)


class PanicError(BaseException):
    """As code in Rust raises it: no Exception."""


@pytest.mark.parametrize("error", [OverflowError("inf"), MemoryError(), PanicError("bounds"), OSError(5, "I/O")])
def test_what_reading_an_adapter_raises_is_its_own(base, folders, error):
    found = opened(base, folders)
    read = found._tiers._read

    def reads(files, adapter):
        if adapter == "few":
            raise error
        return read(files, adapter)

    found._tiers._read = reads
    expected = vectors(found, TEXTS, (("lora", 1.0),))
    bad = [found.embed(TEXTS, mix) for mix in ((("few", 1.0),), (("lora", 1.0), ("few", 0.5))) * 4]
    good = [found.embed(TEXTS, (("lora", 1.0),)) for _ in range(4)]
    for future in bad:
        with pytest.raises(HaoriError, match="few"):
            future.result(20)
    for future in good:
        torch.testing.assert_close(torch.tensor(future.result(20).vectors), expected, **NEAR)
    assert found.failure is None
    found.close()


@pytest.mark.parametrize("spoilt", ["width", "nan", "inf"])
def test_a_text_that_cannot_be_computed_fails_alone(base, folders, spoilt):
    found = opened(base, folders)
    alone = vectors(found, TEXTS, (("lora", 1.0),))
    vectors(found, TEXTS, (("tokens", 1.0),))
    held = found._encoder.bank.held["tokens"]
    ((table, (_, rows)),) = held.token_rows.items()
    changed = torch.ones(len(rows), 7) if spoilt == "width" else rows * float(spoilt)
    held.token_rows[table] = torch.arange(30), changed[:1].repeat(30, 1)
    futures = [found.embed(TEXTS, ((name, 1.0),)) for name in ("lora", "tokens") * 5]
    for number, future in enumerate(futures):
        if number % 2:
            with pytest.raises(HaoriError, match="could not be embedded" if spoilt == "width" else "not numbers"):
                future.result(20)
        else:
            torch.testing.assert_close(torch.tensor(future.result(20).vectors), alone, **NEAR)
    assert found.failure is None
    found.close()


def test_an_embedder_that_has_ended_leaves_nobody_waiting(base, folders):
    found = opened(base, folders)

    def ends(rows):
        raise SystemExit(3)

    found._encoder.compute = ends
    with pytest.raises(UnavailableError, match=r"has ended .*start the server again"):
        found.embed(TEXTS, BASE).result(20)
    until(lambda: found._ended)
    with pytest.raises(UnavailableError, match="has ended"):
        found.embed(TEXTS, BASE)
    assert "has ended" in found.failure
    found.close()


@pytest.fixture
def held(base, folders):
    """Return an embedder with room for two waiting requests, whose model waits for the gate, which runs one request."""
    embedder, gate = opened(base, folders, waiting=2), threading.Event()
    stock = embedder._encoder.compute
    embedder._encoder.compute = lambda rows: gate.wait(10) and stock(rows)
    first = embedder.embed(TEXTS, BASE)
    while not embedder.status().running:
        assert not first.done()
    yield embedder, gate, first
    gate.set()
    embedder.close()


def test_a_full_queue_refuses(held):
    embedder, gate, first = held
    waiting = [embedder.embed(TEXTS, BASE) for _ in range(2)]
    with pytest.raises(OverloadedError, match="--max-queue"):
        embedder.embed(TEXTS, BASE)
    assert not embedder.drain(0.01)
    gate.set()
    assert {len(future.result(10).vectors) for future in (first, *waiting)} == {len(TEXTS)}


def test_who_cancels_is_not_computed(held):
    embedder, gate, first = held
    gone, other = embedder.embed(["cat"] * 500, (("lora", 1.0),)), embedder.embed(["dog"], BASE)
    assert gone.cancel()
    assert first.cancel()
    gate.set()
    assert len(other.result(10).vectors) == 1
    assert embedder.drain(5.0)
    assert embedder.status().steps == 2


def test_the_end_tells_those_who_wait(held):
    embedder, gate, first = held
    waiting = embedder.embed(TEXTS, (("lora", 1.0),))
    threading.Timer(0.1, gate.set).start()
    embedder.close()
    assert len(first.result(1).vectors) == len(TEXTS)
    with pytest.raises(OverloadedError, match="shutting down"):
        waiting.result(1)


def test_a_long_request_does_not_hold_up_a_short_one(base, folders, monkeypatch):
    monkeypatch.setattr("haori.serve.embedding.embedder._ROUND_TOKENS", 60)
    embedder = opened(base, folders)
    ended: list[str] = []
    long = embedder.embed(TEXTS * 50, BASE)
    long.add_done_callback(lambda _: ended.append("long"))
    short = embedder.embed(TEXTS[:1], BASE)
    short.add_done_callback(lambda _: ended.append("short"))
    assert len(long.result(20).vectors) == 200
    embedder.close()
    assert ended == ["short", "long"]
