"""Heads of classifiers: fresh ones begin alike, one of the same labels is kept, nothing else may be missing."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from haori.bases import find_base, head_modules, linear_modules, load_model, load_skeleton, own_head, resolve_targets
from haori.core.errors import BaseError
from haori.core.quantization import Quantization
from haori.core.records import Head
from tests.classifier_models import ARCHITECTURES, DECODERS, build_classifier_base

MOODS = Head(kind="sequence_classification", labels=("bad", "good", "so so"))
TAGS = Head(kind="token_classification", labels=("O", "B-CAT", "I-CAT"))
MODULES = {
    "bert": ("bert.pooler", "classifier"),
    "bert_without_pooler": ("bert.pooler", "classifier"),
    "roberta": ("classifier",),
    "distilbert": ("pre_classifier", "classifier"),
    "deberta": ("pooler", "classifier"),
    "modernbert": ("head", "classifier"),
    "llama": ("score",),
    "gpt2": ("score",),
    "qwen": ("score",),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: build_classifier_base(name, root / name) for name in ARCHITECTURES}


def same(first, second) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("head", [MOODS, TAGS], ids=["texts", "tokens"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fresh_head_begins_alike_at_every_load(name, head, folders):
    base = find_base(str(folders[name]))
    first = load_model(base, head=head, dtype="fp32")
    torch.manual_seed(7)
    assert same(first, load_model(base, head=head, dtype="fp32"))
    other = load_model(base, head=head, dtype="fp32", head_seed=1).state_dict()
    changed = [key for key, value in first.state_dict().items() if not torch.equal(value, other[key])]
    assert changed and all(key.startswith(head_modules(first)) for key in changed)
    assert first.config.id2label == dict(enumerate(head.labels))
    assert not any(parameter.requires_grad for parameter in first.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_head_is_found_and_is_not_linear_for_adapters(name, folders):
    base = find_base(str(folders[name]))
    model = load_skeleton(base, head=MOODS)
    assert head_modules(model) == MODULES[name]
    linear = linear_modules(model)
    assert len(linear) == len([n for n in linear_modules(load_skeleton(base)) if ".layer" in f".{n}" or ".h." in n])
    assert resolve_targets(model, "all-linear") == linear


def test_models_without_labels_have_no_head_to_train(folders):
    for name in ("bert", "llama"):
        assert head_modules(load_skeleton(find_base(str(folders[name])))) == ()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_head_of_the_same_labels_is_kept_and_one_of_others_begins_afresh(name, folders, tmp_path):
    base = find_base(str(folders[name]))
    assert own_head(base) is None
    trained = load_model(base, head=MOODS, dtype="fp32", head_seed=5)
    trained.save_pretrained(tmp_path)
    for file in folders[name].glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    found = find_base(str(tmp_path))
    assert own_head(found) == MOODS
    assert same(load_model(found, head=MOODS, dtype="fp32"), trained)
    for labels in (("good", "bad", "so so"), ("x", "y")):  # of the same shape, and of another
        fresh = load_model(found, head=MOODS.with_fields(labels=labels), dtype="fp32")
        assert same(fresh, load_model(found, head=MOODS.with_fields(labels=labels), dtype="fp32"))
        last = [key for key in fresh.state_dict() if key.startswith(("classifier", "score")) and "weight" in key][-1]
        assert fresh.state_dict()[last].shape[0] == len(labels)
        assert not torch.equal(fresh.state_dict()[last][0], trained.state_dict()[last][0])


@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
def test_only_the_head_may_be_missing(name, folders, tmp_path):
    folder = Path(shutil.copytree(folders[name], tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    gone = next(key for key in tensors if "layers.1" in key or "layer.1" in key)
    save_file({key: value for key, value in tensors.items() if key != gone}, folder / "model.safetensors")
    with pytest.raises(BaseError, match="lack 1 of the model's weights"):
        load_model(find_base(str(folder)), head=MOODS)


def test_a_damaged_head_of_the_same_labels_is_not_begun_in_silence(folders, tmp_path):
    load_model(find_base(str(folders["bert"])), head=MOODS).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for gone in ("classifier.weight", "bert.pooler.dense.weight"):
        save_file({key: value for key, value in tensors.items() if key != gone}, tmp_path / "model.safetensors")
        with pytest.raises(BaseError, match=gone):
            load_model(find_base(str(tmp_path)), head=MOODS)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_scores_the_last_token_of_a_padded_row(name, folders):
    from haori.bases import load_tokenizer

    base = find_base(str(folders[name]))
    model, padding = load_model(base, head=MOODS, dtype="fp32"), load_tokenizer(base).pad_token_id
    ids = torch.tensor([[9, 8, 7, 6], [5, 4, padding, padding]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    together = model(input_ids=ids, attention_mask=mask).logits
    alone = model(input_ids=ids[1:, :2], attention_mask=mask[1:, :2]).logits
    assert torch.allclose(together[1:], alone, atol=1e-6)


def test_a_quantised_base_keeps_its_head_whole(folders):
    pytest.importorskip("bitsandbytes")
    for name in ("distilbert", "llama"):
        model = load_model(find_base(str(folders[name])), head=MOODS, quantization=Quantization(4))
        kinds = {type(model.get_submodule(part)).__name__ for part in head_modules(model)}
        assert kinds == {"Linear"}
        assert any(type(module).__name__ == "Linear4bit" for module in model.modules())


def test_what_cannot_classify_is_refused(folders, tmp_path):
    import transformers

    config = transformers.T5Config(vocab_size=25, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(BaseError, match="reads with one half and writes with another"):
        load_skeleton(find_base(str(tmp_path / "t5")), head=MOODS)
    vision = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    transformers.ViTModel(vision).save_pretrained(tmp_path / "vit")
    with pytest.raises(BaseError, match="cannot classify texts"):
        load_model(find_base(str(tmp_path / "vit")), head=MOODS)


def test_labels_are_different_names():
    for labels in (("one",), ("a", "a"), ("a", " ")):
        with pytest.raises(ValueError):
            Head(kind="sequence_classification", labels=labels)
    assert Head(kind="sequence_classification", labels=("one",), multi_label=True).labels == ("one",)
