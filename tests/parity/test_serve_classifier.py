"""What classifiers give in batches of every mixture, against stock transformers and PEFT on each text alone."""

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from haori.bases import find_base
from haori.library import inspect_adapter
from haori.serve.embedding.classified import ClassifierInputs
from haori.serve.embedding.embedder import EmbedderLimits, TextEmbedder
from haori.serve.embedding.opening import open_embedder
from haori.serve.models.encoder import Row
from haori.serve.request import BASE
from tests.classifier_adapters import SAVED, TARGETS, stock_classifier, stock_logits
from tests.classifier_models import ENCODERS, build_classifier_base
from tests.encoder_models import TEXTS, adapted, stock_encoder, stock_vectors

NEAR = {"atol": 1e-5, "rtol": 0.0}
FAR = 0.05  # two classifiers differ by more than this
LABELS = {"two": 2, "three": 3, "seven": 7}


@pytest.fixture(scope="module", params=ENCODERS)
def architecture(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(architecture, tmp_path_factory) -> Path:
    return build_classifier_base(architecture, tmp_path_factory.mktemp(architecture) / f"tiny-{architecture}")


@pytest.fixture(scope="module")
def folders(architecture, base, tmp_path_factory) -> dict[str, Path]:
    """Three classifiers of different numbers of labels, ranks and kinds, and an adapter that embeds."""
    place = tmp_path_factory.mktemp("adapters")
    targets, saved = TARGETS[architecture], SAVED.get(architecture)
    kinds: dict[str, dict[str, Any]] = {"two": {"r": 2}, "three": {"use_dora": True}, "seven": {"use_rslora": True}}
    found = {
        name: stock_classifier(
            base, place / name, labels=LABELS[name], seed=seed, target_modules=targets, modules_to_save=saved,
            multi_label=name == "seven", **options,
        )
        for seed, (name, options) in enumerate(kinds.items(), start=1)
    }  # fmt: skip
    inner = targets if isinstance(targets, str) else targets[:1]
    found["embeds"] = stock_encoder(base, place / "embeds", seed=9, target_modules=inner)
    return found


def opened(base: Path, folders: dict[str, Path], **options: Any) -> TextEmbedder:
    return open_embedder(
        find_base(str(base)), lambda adapter: inspect_adapter(folders[adapter]), EmbedderLimits(longest=512), **options
    )


@pytest.fixture(scope="module")
def embedder(base, folders):
    found = opened(base, folders)
    yield found
    found.close()


def logits(embedder: TextEmbedder, mix: Any, texts: Any = TEXTS) -> torch.Tensor:
    found = embedder.classify(ClassifierInputs(texts, activated=False), mix).result(20)
    return torch.tensor(found.scores)


@pytest.mark.parametrize("name", LABELS)
def test_logits_are_those_of_stock_peft(name, base, folders, embedder):
    wanted = stock_logits(base, folders[name], LABELS[name])
    torch.testing.assert_close(logits(embedder, ((name, 1.0),)), wanted, **NEAR)
    assert (wanted[0] - wanted[1]).abs().max() > FAR  # texts differ by more than what is allowed


def test_one_batch_of_classifiers_and_embeddings_gives_each_row_what_it_is_alone(base, folders, embedder):
    for name in LABELS:
        logits(embedder, ((name, 1.0),))  # brings the adapters into memory
    embedder.embed(["cat"], (("embeds", 1.0),)).result(20)
    tokens = embedder._texts.embedded(TEXTS)
    kinds = [(((name, 1.0),), True) for name in LABELS] + [((("embeds", 1.0),), False), (BASE, False)]
    rows = [Row(tokens[(i + j) % len(tokens)], *kinds[i]) for j in range(3) for i in range(len(kinds))]
    together = embedder._encoder.compute(rows)
    for row, found in zip(rows, together, strict=True):
        torch.testing.assert_close(found, embedder._encoder.compute([row])[0], **NEAR)
    wanted = {name: stock_logits(base, folders[name], LABELS[name]) for name in LABELS}
    vectors = stock_vectors(base, adapted(base, folders["embeds"]))
    plain = stock_vectors(base, AutoModel.from_pretrained(base).eval())
    for place, found in enumerate(together):
        i, text = place % len(kinds), (place % len(kinds) + place // len(kinds)) % len(tokens)
        [(name, _)] = kinds[i][0] or (("base", 1.0),)
        expected = wanted.get(name, vectors if name == "embeds" else plain)
        torch.testing.assert_close(found, expected[text], **NEAR)


def test_probabilities_are_softmax_or_each_labels_own(base, folders, embedder):
    for name, count in LABELS.items():
        found = embedder.classify(ClassifierInputs(TEXTS), ((name, 1.0),)).result(20)
        exact = stock_logits(base, folders[name], count).double()
        wanted = exact.sigmoid() if name == "seven" else exact.softmax(1)
        torch.testing.assert_close(torch.tensor(found.scores, dtype=torch.float64), wanted, **NEAR)
        assert list(found.labels) == [f"label {number}" for number in range(count)]


def test_requests_that_come_together_share_batches(base, folders, embedder):
    mixes = [((name, 1.0),) for name in LABELS]
    alone = [logits(embedder, mix) for mix in mixes]
    before = embedder.status().steps
    gate, stock = threading.Event(), embedder._encoder.compute
    embedder._encoder.compute = lambda rows: gate.wait(10) and stock(rows)
    try:
        first = embedder.embed(["cat"], BASE)
        asked = [embedder.classify(ClassifierInputs(TEXTS, activated=False), mixes[n % 3]) for n in range(9)]
        vectors = embedder.embed(TEXTS, BASE)
        gate.set()
        first.result(20)
        for number, future in enumerate(asked):
            torch.testing.assert_close(torch.tensor(future.result(20).scores), alone[number % 3], **NEAR)
        assert len(vectors.result(20).vectors) == len(TEXTS)
    finally:
        embedder._encoder.compute = stock
    assert embedder.status().steps <= before + 4


def test_token_ids_are_taken_as_they_are_and_texts_cut_where_asked(base, folders, embedder):
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(list(TEXTS))["input_ids"]
    mix = (("three", 1.0),)
    torch.testing.assert_close(logits(embedder, mix, ids), logits(embedder, mix), **NEAR)
    cut = embedder.classify(ClassifierInputs(TEXTS, truncate=5, activated=False), mix).result(20)
    assert cut.tokens == [5, 4, 5, 3]
    short = ["the cat sat", TEXTS[1], "the small red", TEXTS[3]]
    torch.testing.assert_close(torch.tensor(cut.scores), logits(embedder, mix, short), **NEAR)
    end = embedder.classify(ClassifierInputs(TEXTS, truncate=5, keep="end", activated=False), mix).result(20)
    torch.testing.assert_close(torch.tensor(end.scores)[0], logits(embedder, mix, ["on the mat"])[0], **NEAR)
    bare = embedder.classify(ClassifierInputs(TEXTS, special_tokens=False, activated=False), mix).result(20)
    assert bare.tokens == [len(text.split()) for text in TEXTS]
    cut = embedder.classify(ClassifierInputs([ids[0]], truncate=3, activated=False), mix).result(20)
    torch.testing.assert_close(torch.tensor(cut.scores), logits(embedder, mix, [ids[0][:3]]), **NEAR)


def test_sixteen_bits_stay_near(base, folders):
    embedder = opened(base, folders, weights="bf16")
    try:
        for name, count in LABELS.items():
            wanted = stock_logits(base, folders[name], count)
            assert (logits(embedder, ((name, 1.0),)) - wanted).abs().max() < 0.15
    finally:
        embedder.close()


def test_scores_are_written_in_full_range():
    from haori.core.records import Head
    from haori.serve.embedding.classified import scores_of

    one = Head(kind="sequence_classification", labels=("a", "b"))
    several = one.with_fields(multi_label=True)
    assert scores_of(one, [1000.0, -1000.0], activated=True) == [1.0, 0.0]
    assert scores_of(several, [800.0, -800.0], activated=True) == [1.0, pytest.approx(0.0, abs=1e-300)]
    assert scores_of(several, [2.0, -2.0], activated=True) == pytest.approx(
        [1 / (1 + math.exp(-2)), 1 - 1 / (1 + math.exp(-2))]
    )
    assert json.dumps(scores_of(one, [3.0, 4.0], activated=False)) == "[3.0, 4.0]"
