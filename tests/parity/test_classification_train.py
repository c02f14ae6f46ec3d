"""Classifiers trained here are what stock transformers and PEFT load: every architecture, method and kind of label."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import haori
from haori.bases import find_base
from haori.core.errors import HaoriError, RecipeError
from haori.core.records import Head
from haori.library import attach, export_stored, inspect_adapter, merge_stored
from haori.tasks.recipe import kept_recipe, recipe_from
from haori.training.loop import Loop
from tests.classification_samples import animals, write_jsonl
from tests.classifier_models import ARCHITECTURES, build_classifier_base, scores, stock_scores

SHORT = ("training.max_steps=3", "training.evaluations_per_epoch=1", "optimizer.lr=0.01")
METHODS: dict[str, tuple[str, ...]] = {
    "dora": ("method.kind=dora", "method.rank=4"),
    "adalora": ("method.kind=adalora", "method.rank=1", "method.initial_rank=3"),
    "ard_lora": ("method.kind=ard_lora", "method.rank=4"),
    "lora+ with rslora": ("method.rank=4", "method.lr_ratio=16", "method.rslora=true"),
    "attention": ("method.rank=4", "method.target=attention"),
    "norms": ("method.rank=4", "method.train_norms=true"),
    "pissa": ("method.rank=4", "method.init=pissa"),
    "ia3": ("method.kind=peft", "method.type=IA3"),
    "loha": ("method.kind=peft", "method.type=LOHA", "method.options.r=4"),
    "qlora": ("method.kind=qlora", "method.rank=4"),
    "head": ("method.kind=head",),
}
ROWS = [[2, 7, 9, 11, 3], [2, 12, 6, 3], [2, 15, 15, 8, 22, 14, 3]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: build_classifier_base(name, root / name) for name in ARCHITECTURES}


@pytest.fixture
def data(tmp_path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", animals(40))


def trained(base: Path, data: Path, *overrides: str) -> Any:
    return haori.train(
        base=str(base), data=str(data), name="mood", task="classification", overrides=[*SHORT, *overrides],
        progress=False,
    )  # fmt: skip


def ours(base: Path, folder: Path) -> torch.Tensor:
    return scores(attach(find_base(str(base)), folder, dtype="fp32").eval(), ROWS)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_loaded_by_stock_peft_with_equal_scores(name, bases, data, tmp_path):
    run = trained(bases[name], data, "method.rank=4")
    card = run.adapter.card
    assert card.task == "classification"
    assert card.head == Head(kind="sequence_classification", labels=("cat", "dog", "other"))
    export_stored("mood", tmp_path / "out", base=find_base(str(bases[name])))
    of_stock = stock_scores(bases[name], tmp_path / "out", ROWS)
    assert torch.equal(of_stock, ours(bases[name], run.adapter.path))
    assert of_stock.std() > 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_loaded_by_stock_peft_with_equal_scores(method, bases, data, tmp_path):
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    run = trained(bases["bert"], data, *METHODS[method])
    assert all(check.passed for check in run.verification.checks)
    assert {"bert.pooler", "classifier"} <= set(kept_recipe(run.adapter.card).method.modules_to_save)
    out = export_stored("mood", tmp_path / "out", base=find_base(str(bases["bert"])))
    assert torch.allclose(stock_scores(bases["bert"], out, ROWS), ours(bases["bert"], run.adapter.path), atol=1e-5)
    merge_stored("mood", tmp_path / "merged", base_spec=str(bases["bert"]), dtype="fp16")
    answers = transformers.pipeline("text-classification", model=str(tmp_path / "merged"))("the cat", top_k=None)
    assert {answer["label"] for answer in answers} == {"cat", "dog", "other"}


def test_a_head_alone_leaves_the_base_as_it_is(bases, data):
    run = trained(bases["bert"], data, "method.kind=head")
    files = inspect_adapter(run.adapter.path)
    assert (files.method, files.ranks) == ("head", {})
    assert {key.split(".")[2] for key in files.tensors} == {"bert", "classifier"}
    assert all("pooler" in key or "classifier" in key for key in files.tensors)


def test_a_full_fine_tuning_is_a_classifier_of_transformers(bases, data):
    run = trained(bases["roberta"], data, "method.kind=full")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run.record.model)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "other"}
    answers = transformers.pipeline("text-classification", model=run.record.model)("the cat", top_k=None)
    assert {answer["label"] for answer in answers} == {"cat", "dog", "other"}


def test_a_trained_classifier_is_a_base_whose_head_is_kept(bases, data, tmp_path):
    run = trained(bases["bert"], data, "method.kind=full")
    again = trained(Path(run.record.model), data, "method.rank=4", "training.max_steps=1", "optimizer.lr=1e-5")
    first = transformers.AutoModelForSequenceClassification.from_pretrained(run.record.model).eval()
    assert torch.allclose(scores(first, ROWS), ours(Path(run.record.model), again.adapter.path), atol=1e-2)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_classifier_goes_on_from_a_stored_one(name, bases, data, tmp_path):
    first = trained(bases[name], data, "method.rank=4")
    again = trained(bases[name], data, "from=mood@1")
    assert again.adapter.card.parents == (first.adapter.card.id,)
    assert again.record.initial_validation_loss == pytest.approx(first.record.validation_loss, abs=1e-6)
    other = write_jsonl(tmp_path / "other.jsonl", [{**row, "label": row["label"].upper()} for row in animals(40)])
    with pytest.raises(HaoriError, match="tells apart cat, dog, other; the data has the labels CAT, DOG, OTHER"):
        trained(bases[name], other, "from=mood@1")


def several(path: Path) -> Path:
    rows = [{"text": r["text"], "labels": [w for w in ("cat", "dog") if w in r["text"]]} for r in animals(40)]
    return write_jsonl(path, rows)


def words(path: Path) -> Path:
    sentences = [row["text"].split() for row in animals(40)]
    tags = [["B-X" if word in ("cat", "dog") else "O" for word in words] for words in sentences]
    rows = [{"tokens": words, "ner_tags": named} for words, named in zip(sentences, tags, strict=True)]
    return write_jsonl(path, rows)


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama"])
def test_several_labels_and_words_are_trained(name, bases, tmp_path):
    run = trained(bases[name], several(tmp_path / "several.jsonl"), "loss.class_weights=balanced", "method.rank=4")
    assert run.adapter.card.head.multi_label
    weights = kept_recipe(run.adapter.card).loss.class_weights
    assert set(weights) == {"cat", "dog"} and all(weight > 1 for weight in weights.values())
    of_words = trained(bases[name], words(tmp_path / "words.jsonl"), "method.rank=4")
    assert of_words.adapter.card.head == Head(kind="token_classification", labels=("O", "B-X"))
    out = export_stored(of_words.adapter.name, tmp_path / "out", base=find_base(str(bases[name])))
    stock = stock_scores(bases[name], out, ROWS, labels=2, of_tokens=True)
    assert torch.equal(stock, ours(bases[name], of_words.adapter.path))


def test_training_learns(bases, tmp_path):
    rows = [{"text": f"{animal} {row['text']}", "label": animal} for row in animals(40) for animal in ("cat", "bird")]
    run = haori.train(
        base=str(bases["llama"]), data=str(write_jsonl(tmp_path / "rows.jsonl", rows)), name="mood",
        task="classification", overrides=["optimizer.lr=0.005", "training.epochs=4"], progress=False,
    )  # fmt: skip
    assert run.record.validation_loss < 0.7 * run.record.initial_validation_loss


def test_a_resumed_run_equals_one_that_was_not_interrupted(bases, data, monkeypatch):
    keys = ("method.rank=4", "training.max_steps=6", "training.save_every=2")
    whole = trained(bases["bert"], data, *keys)
    step, taken = Loop.step, []

    def interrupted(self, *arguments, **named):
        step(self, *arguments, **named)
        taken.append(1)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Loop, "step", interrupted)
    stopped = trained(bases["bert"], data, *keys)
    monkeypatch.undo()
    assert stopped.record.status == "stopped"
    resumed = haori.resume(stopped.folder, progress=False)
    tensors = [load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (whole, resumed)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])


def test_words_on_what_cannot_be_trained(bases, tiny_base_folder, data, tmp_path):
    for keys, said in (
        (["data.problem=token", "data.label_separator=;"], "label_separator"),
        (["data.labels=[a, a]"], "names a label twice"),
        (["data.labels=[cat, dog, other]", "loss.class_weights.catt=2.0"], "did you mean 'cat'"),
        (["loss.class_weights.catt=2.0"], "did you mean 'cat'"),
        (["data.system=be brief"], "no key 'data.system'"),
        (["data.max_length=9999"], "reads at most 64 tokens"),
        (["method.modules_to_save=[klassifier]"], "did you mean 'classifier'"),
    ):
        with pytest.raises(HaoriError, match=said):
            trained(bases["bert"], data, *keys)
    with pytest.raises(RecipeError, match="cannot be 'head' here: text generation has no head"):
        haori.train(
            base=str(tiny_base_folder), data=str(write_jsonl(tmp_path / "t.jsonl", [
                {"prompt": str(n), "completion": "yes"} for n in range(8)])),
            name="t", overrides=["method.kind=head"], progress=False,
        )  # fmt: skip


def test_a_recipe_is_read_back_as_it_was_resolved(bases, data):
    from haori.tasks.recipe import load_recipe

    run = trained(bases["bert"], data, "method.rank=4")
    kept = load_recipe(run.folder / "recipe.yaml")
    assert kept.data.labels == ("cat", "dog", "other")
    assert (kept.data.problem, kept.data.max_length, kept.loss.class_weights) == ("single_label", 64, "none")
    assert recipe_from(kept.model_dump(mode="json")) == kept
