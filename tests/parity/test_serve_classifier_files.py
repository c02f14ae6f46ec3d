"""Files of classifiers that leave a part out, hold more, or do not fit; and encoders whose texts padding changes."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import DUMMY_TARGET_MODULES
from safetensors.torch import load_file, save_file
from transformers import AutoModel, FNetConfig, FNetModel

from haori.bases import find_base
from haori.core.errors import FileFormatError, HaoriError, InputError, MismatchError
from haori.library import inspect_adapter
from haori.serve.embedding.classified import ClassifierInputs
from haori.serve.embedding.embedder import EmbedderLimits, TextEmbedder
from haori.serve.embedding.opening import open_embedder
from haori.serve.request import BASE
from tests.classifier_adapters import SAVED, TARGETS, stock_classifier, stock_logits, whole_classifier
from tests.classifier_models import build_classifier_base
from tests.encoder_models import TEXTS, build_tiny_encoder, stock_vectors

NEAR = {"atol": 1e-5, "rtol": 0.0}
MIX = (("it", 1.0),)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return a function that builds a base of an architecture once."""
    built: dict[str, Path] = {}

    def base(architecture: str) -> Path:
        if architecture not in built:
            built[architecture] = build_classifier_base(architecture, tmp_path_factory.mktemp("base") / architecture)
        return built[architecture]

    return base


@pytest.fixture
def opened():
    """Return a function that opens an embedder, which is closed in the end."""
    found: list[TextEmbedder] = []

    def open_it(base: Path, folder: Path | None = None, longest: int = 64) -> TextEmbedder:
        limits = EmbedderLimits(longest)
        found.append(open_embedder(find_base(str(base)), lambda _: inspect_adapter(folder), limits))
        return found[-1]

    yield open_it
    for embedder in found:
        embedder.close()


def logits(embedder: TextEmbedder, mix: Any = MIX, texts: Any = TEXTS) -> torch.Tensor:
    return torch.tensor(embedder.classify(ClassifierInputs(texts, activated=False), mix).result(20).scores)


def changed(folder: Path, change: Any) -> Path:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key: value.contiguous() for key, value in change(tensors).items()}, path)
    return folder


def config_with(folder: Path, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def without(*ends: str) -> Any:
    return lambda tensors: {key: value for key, value in tensors.items() if not key.endswith(ends)}


def with_one(end: str, change: Any) -> Any:
    return lambda tensors: {key: change(value) if key.endswith(end) else value for key, value in tensors.items()}


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "norms": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier", "LayerNorm"]}),
    "biases": ("roberta", {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "biases and a pooler": ("bert", {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "tokens": ("distilbert", {"target_modules": ["q_lin"], "trainable_token_indices": {"word_embeddings": [6, 7]}}),
    "a regular expression": ("bert", {"target_modules": r"bert\.encoder\.layer\.[01]\.attention\.self\.(query|key)"}),
    "patterns": ("deberta", {
        "target_modules": ["query_proj", "output.dense"], "rank_pattern": {"query_proj": 2},
        "alpha_pattern": {"output.dense": 1}, "modules_to_save": ["classifier", "pooler"],
    }),
    "a head with a bias and DoRA": ("modernbert", {
        "target_modules": ["Wqkv", "head.dense"], "use_dora": True, "bias": "lora_only",
    }),
    "a pooler with DoRA": ("bert", {"target_modules": ["pooler.dense", "value"], "use_dora": True}),
    "adalora": ("bert", {"target_modules": ["query", "dense"], "peft": "ADALORA"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_else_a_classifier_may_hold(kind, bases, opened, tmp_path):
    architecture, options = KINDS[kind]
    base = bases(architecture)
    folder = stock_classifier(base, tmp_path / "it", **options)
    torch.testing.assert_close(logits(opened(base, folder)), stock_logits(base, folder, 3), **NEAR)


def test_a_head_alone_is_served_though_the_encoder_stays_as_it_is(bases, opened, tmp_path):
    base = bases("roberta")
    folder = stock_classifier(base, tmp_path / "it", target_modules=["query"])
    changed(folder, lambda found: {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in found.items()})
    torch.testing.assert_close(logits(opened(base, folder)), stock_logits(base, folder, 3), **NEAR)


def test_an_adapter_of_nothing_but_a_head(bases, opened, tmp_path):
    base = bases("deberta")
    options = {"target_modules": DUMMY_TARGET_MODULES, "modules_to_save": ["classifier", "pooler"]}
    folder = stock_classifier(base, tmp_path / "it", **options)
    assert not any("lora" in key for key in load_file(folder / "adapter_model.safetensors"))
    torch.testing.assert_close(logits(opened(base, folder)), stock_logits(base, folder, 3), **NEAR)


def test_sixteen_bit_files_keep_their_head_whole(bases, opened, tmp_path):
    base = bases("bert")
    folder = stock_classifier(base, tmp_path / "it", target_modules=TARGETS["bert"])
    changed(folder, lambda found: {key: value.bfloat16() for key, value in found.items()})
    wanted = stock_logits(base, folder, 3)
    torch.testing.assert_close(logits(opened(base, folder)), wanted, **NEAR)


REFUSED: dict[str, tuple[str, dict[str, Any], Any, type[Exception], str]] = {
    "a pooler nobody has": ("bert_without_pooler", {"modules_to_save": ["classifier"]}, None, MismatchError,
                            "bert.pooler.dense.weight.*neither in its file nor in the base's.*modules_to_save"),
    "a layer nobody has": ("deberta", {"modules_to_save": None}, None, MismatchError, "'pooler.dense.weight'.*random"),
    "a layer cut out": ("distilbert", {}, without("pre_classifier.weight"), MismatchError, "'pre_classifier.weight'"),
    "no head": ("roberta", {}, without("out_proj.weight", "out_proj.bias"), FileFormatError, "lacks the head"),
    "NaN": ("roberta", {}, with_one("out_proj.bias", lambda value: value * float("nan")), FileFormatError, "NaN"),
    "another width": ("roberta", {}, with_one("classifier.dense.weight", lambda value: value[:, :-1]), MismatchError,
                      r"\[32, 31\] is not the \[32, 32\]"),
    "labels of two sizes": ("roberta", {}, with_one("out_proj.bias", lambda value: value[:2]), MismatchError,
                            r"\[2\] is not the \[3\]"),
    "a layer missing": ("roberta", {}, without("layer.1.attention.self.query.lora_A.weight"), MismatchError,
                        "one of the two factors"),
    "another module": ("roberta", {}, lambda t: {**t, "base_model.model.score.weight": torch.ones(3, 32)},
                       MismatchError, "score"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused_when_it_is_registered_and_when_it_is_asked_for(kind, bases, opened, tmp_path):
    architecture, options, change, error, sentence = REFUSED[kind]
    base = bases(architecture)
    given = {"target_modules": TARGETS[architecture], "modules_to_save": SAVED.get(architecture), **options}
    folder = stock_classifier(base, tmp_path / "it", **given)
    if change is not None:
        changed(folder, change)
    embedder = opened(base, folder)
    with pytest.raises(error, match=sentence):
        embedder.check_adapter(inspect_adapter(folder), "sha256:it")
    with pytest.raises(HaoriError, match=sentence):
        logits(embedder)
    assert len(embedder.embed(TEXTS, BASE).result(20).vectors) == len(TEXTS)  # it goes on


def test_what_the_configuration_promises_must_be_there(bases, opened, tmp_path):
    base = bases("bert")
    folder = stock_classifier(base, tmp_path / "it", target_modules=["query"])
    config_with(folder, modules_to_save=["classifier", "LayerNorm"])
    with pytest.raises(MismatchError, match=r"LayerNorm.*does not hold it"):
        opened(base, folder).check_adapter(inspect_adapter(folder), "sha256:it")
    config_with(folder, modules_to_save=["classifier"], target_modules=["query", "key"])
    with pytest.raises(MismatchError, match=r"key.*holds nothing"):
        opened(base, folder).check_adapter(inspect_adapter(folder), "sha256:it")


def test_a_base_that_classifies_by_itself(bases, opened, tmp_path):
    """Its own head, its own pooler, also below an adapter that saves none of its own."""
    model = whole_classifier(bases("modernbert"), 4)
    base = shutil.copytree(bases("modernbert"), tmp_path / "own")
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(base)
    embedder = opened(base)
    torch.testing.assert_close(logits(embedder, BASE), stock_logits(base, None, 4), **NEAR)
    found = embedder.classify(ClassifierInputs(TEXTS), BASE).result(20)
    exact = stock_logits(base, None, 4).double().sigmoid()
    torch.testing.assert_close(torch.tensor(found.scores, dtype=torch.float64), exact, **NEAR)
    folder = stock_classifier(base, tmp_path / "it", labels=2, target_modules="all-linear")
    torch.testing.assert_close(logits(opened(base, folder)), stock_logits(base, folder, 2), **NEAR)


def test_a_base_that_predicts_a_number_has_no_labels(bases, opened, tmp_path):
    base = shutil.copytree(bases("roberta"), tmp_path / "own")
    whole_classifier(bases("roberta"), 1).save_pretrained(base)
    with pytest.raises(InputError, match="no head of its own that gives probabilities"):
        logits(opened(base), BASE)


def test_the_longest_text_is_what_the_positions_hold(bases, opened, tmp_path):
    """RoBERTa numbers positions from behind that of padding, so it reads fewer tokens than it has positions."""
    base = shutil.copytree(bases("roberta"), tmp_path / "roberta")
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": 10**30}))
    folder = stock_classifier(base, tmp_path / "it", target_modules=["query"])
    embedder = opened(base, folder, longest=512)
    longest = "cat " * 63  # and two special tokens: 66 positions less one
    torch.testing.assert_close(logits(embedder, texts=[longest]), stock_logits(base, folder, 3, [longest]), **NEAR)
    assert len(embedder.embed([longest], BASE).result(20).vectors) == 1
    with pytest.raises(InputError, match="66 tokens; the base 'roberta' classifies at most 65"):
        logits(embedder, texts=[longest + "cat"])
    with pytest.raises(InputError, match="embeds at most 65"):
        embedder.embed([longest + "cat"], BASE)


def test_texts_that_padding_would_change_share_batches_by_length(opened, tmp_path):
    """FNet mixes all tokens of a row, those that pad it too."""
    build_tiny_encoder(tmp_path / "words", pooling=None)
    base = tmp_path / "fnet"
    base.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tmp_path / "words" / name, base / name)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 66}
    model = FNetModel(FNetConfig(vocab_size=25, type_vocab_size=2, pad_token_id=0, **sizes))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = stock_classifier(base, tmp_path / "it", target_modules=["intermediate.dense"])
        embedder = opened(base, folder)
    torch.testing.assert_close(logits(embedder), stock_logits(base, folder, 3), **NEAR)
    found = torch.tensor(embedder.embed(TEXTS, BASE).result(20).vectors)
    torch.testing.assert_close(found, stock_vectors(base, AutoModel.from_pretrained(base).eval()), **NEAR)
