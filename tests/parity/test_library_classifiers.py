"""Classifiers of stock PEFT in the library: read, proved, stored, exported and merged; and planted faults."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from haori.bases import find_base, load_model
from haori.core.errors import FileFormatError, MismatchError
from haori.core.records import Head
from haori.library import (
    Library,
    attach_files,
    export_stored,
    import_adapter,
    inspect_adapter,
    live_probe_logits,
    merge_stored,
    verify_adapter,
    verify_stored,
)
from haori.library.cards import adapter_id
from haori.library.head_files import HEAD_NAME, write_head
from haori.library.proof import merging
from tests.classifier_models import ARCHITECTURES, build_classifier_base, scores, stock_classifier, stock_scores
from tests.library_samples import change_tensors

ROWS = [[2, 7, 9, 11, 3], [2, 12, 6, 3], [2, 15, 15, 8, 22, 14, 3]]
MOODS = Head(kind="sequence_classification", labels=("bad", "good", "so so"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: build_classifier_base(name, root / name) for name in ARCHITECTURES}


def saved_head(name: str) -> list[str] | None:
    return ["pooler", "classifier"] if name in ("bert_without_pooler", "deberta") else None


def classifier(base: Path, folder: Path, name: str, **options) -> Path:
    options.setdefault("modules_to_save", saved_head(name))
    return stock_classifier(base, folder, **options)


def failures(verification) -> list[str]:
    return [check.name for check in verification.failures]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_stock_classifier_is_stored_exported_and_merged(name, bases, tmp_path):
    folder = classifier(bases[name], tmp_path / "stock", name)
    wanted = stock_scores(bases[name], folder, ROWS)
    base = find_base(str(bases[name]))
    stored = import_adapter(folder, base, name="mood")
    assert stored.card.head == Head(kind="sequence_classification", labels=("LABEL_0", "LABEL_1", "LABEL_2"))
    assert stored.card.task == "classification"
    assert verify_stored(Library(), "mood", base_spec=str(bases[name])).passed
    export_stored("mood", tmp_path / "out", base=base)
    assert torch.equal(stock_scores(bases[name], tmp_path / "out", ROWS), wanted)
    merge_stored("mood", tmp_path / "merged", base_spec=str(bases[name]), dtype="fp16")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", dtype="float32"
    ).eval()
    assert torch.allclose(scores(merged, ROWS), wanted, atol=0.02 * float(wanted.std()))


def test_labels_go_with_the_adapter_into_what_is_merged(bases, tmp_path):
    folder = classifier(bases["bert"], tmp_path / "stock", "bert")
    plain = adapter_id(inspect_adapter(folder))
    write_head(folder, MOODS)
    assert adapter_id(inspect_adapter(folder)) != plain
    base = find_base(str(bases["bert"]))
    stored = import_adapter(folder, base, name="mood")
    assert stored.card.head == MOODS
    out = export_stored("mood", tmp_path / "out", base=base)
    assert json.loads((out / HEAD_NAME).read_text())["labels"] == list(MOODS.labels)
    assert import_adapter(out, base, name="mood").name == "mood@1"
    merge_stored("mood", tmp_path / "merged", base_spec=str(bases["bert"]))
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path / "merged"))
    of_merged = {answer["label"] for answer in pipeline("the cat sat", top_k=None)}
    assert of_merged == set(MOODS.labels)


def test_token_classifiers_are_proved_and_merged(bases, tmp_path):
    for name in ("bert", "modernbert", "llama"):
        folder = stock_classifier(bases[name], tmp_path / name, task_type="TOKEN_CLS")
        wanted = stock_scores(bases[name], folder, ROWS, of_tokens=True)
        stored = import_adapter(folder, find_base(str(bases[name])), name=f"tags-{name}")
        assert stored.card.head is not None and stored.card.head.kind == "token_classification"
        merge_stored(f"tags-{name}", tmp_path / f"{name}-merged", base_spec=str(bases[name]), dtype="fp16")
        model = transformers.AutoModelForTokenClassification.from_pretrained(
            tmp_path / f"{name}-merged", dtype="float32"
        ).eval()
        assert torch.allclose(scores(model, ROWS), wanted, atol=0.02 * float(wanted.std()))


def live(base: Path, folder: Path, change=lambda adapted: None):
    """The logits that a training would have left: of the adapter before somebody damaged it."""
    found = find_base(str(base))
    probes = [list(row) for row in ROWS]
    files = inspect_adapter(folder)
    adapted = attach_files(load_model(found, dtype="fp32", head=files.head), files, base_name="tiny")
    change(adapted)
    return {"probes": probes, "live_logits": live_probe_logits(adapted, probes), "dtype": "fp32"}


def head_keys(tensors) -> list[str]:
    return [key for key in tensors if key.startswith(("base_model.model.classifier", "base_model.model.score"))]


@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
def test_planted_faults_fail_the_proof(name, bases, tmp_path):
    honest = classifier(bases[name], tmp_path / "honest", name, scale=0.02)
    base, trained = find_base(str(bases[name])), live(bases[name], honest)
    assert failures(verify_adapter(base, honest, **trained)) == []

    def planted(fault, change) -> list[str]:
        folder = change_tensors(Path(shutil.copytree(honest, tmp_path / fault)), change)
        return failures(verify_adapter(base, folder, **trained))

    def without_head(tensors):
        for key in head_keys(tensors):
            del tensors[key]

    def permuted(tensors):
        for key in head_keys(tensors):
            if tensors[key].shape[0] == 3:
                tensors[key] = tensors[key][[1, 0, 2]]

    def scaled(part, factor):
        def change(tensors):
            for key in tensors:
                if part in key:
                    tensors[key] = tensors[key] * factor

        return change

    assert planted("not-saved", without_head) == ["files"]
    assert planted("permuted", permuted) == ["reload"]
    assert planted("dropped", scaled("lora_B", 0)) == ["delta", "effect", "reload", "merge"]
    assert planted("weaker", scaled("lora_B", 0.9)) == ["reload"]


def test_labels_that_are_not_those_trained_fail(bases, tmp_path):
    folder = classifier(bases["bert"], tmp_path / "a", "bert")
    base = find_base(str(bases["bert"]))
    assert failures(verify_adapter(base, folder, head=MOODS)) == ["labels"]
    write_head(folder, MOODS.with_fields(labels=("good", "bad", "so so")))
    assert failures(verify_adapter(base, folder, head=MOODS)) == ["labels"]
    write_head(folder, MOODS)
    assert failures(verify_adapter(base, folder, head=MOODS)) == []


def test_lora_that_is_dropped_fails_without_a_live_model_too(bases, tmp_path):
    """The head alone moves the logits; it must not pass for the rest of the adapter."""

    def dropped(tensors):
        for key in tensors:
            if "lora_B" in key:
                tensors[key] = tensors[key] * 0

    folder = change_tensors(classifier(bases["bert"], tmp_path / "a", "bert"), dropped)
    found = verify_adapter(find_base(str(bases["bert"])), folder)
    assert failures(found) == ["delta", "effect", "merge"]


def test_a_merge_that_forgets_the_head_fails(bases, tmp_path, monkeypatch):
    folder = classifier(bases["bert"], tmp_path / "a", "bert")
    base = find_base(str(bases["bert"]))

    def forgetting(adapted):
        model = adapted.get_base_model()
        model.classifier = model.classifier.original_module

    monkeypatch.setattr(merging, "_unwrap", forgetting)
    assert failures(verify_adapter(base, folder)) == ["merge"]


def test_a_head_that_would_begin_at_random_fails(bases, tmp_path):
    """Stock PEFT saves the classifier of BERT alone; this base has no pooler to put under it."""
    folder = classifier(bases["bert_without_pooler"], tmp_path / "a", "bert", modules_to_save=None)
    found = verify_adapter(find_base(str(bases["bert_without_pooler"])), folder)
    assert failures(found) == ["head"]
    assert "bert.pooler.dense.weight" in found.failures[0].detail


def test_a_head_alone_is_proved(bases, tmp_path):
    from peft.tuners.tuners_utils import DUMMY_TARGET_MODULES

    folder = classifier(bases["bert"], tmp_path / "a", "bert", target_modules=DUMMY_TARGET_MODULES)
    base = find_base(str(bases["bert"]))
    assert failures(verify_adapter(base, folder, **live(bases["bert"], folder))) == []
    untrained = classifier(bases["bert"], tmp_path / "b", "bert", target_modules=DUMMY_TARGET_MODULES)
    fresh = load_model(base, dtype="fp32", head=inspect_adapter(untrained).head).state_dict()

    def begun(tensors):
        for key in tensors:
            tensors[key] = fresh[key.removeprefix("base_model.model.")]

    found = verify_adapter(base, change_tensors(untrained, begun), dtype="fp32")
    assert failures(found) == ["delta", "effect", "merge"]


def test_one_label_that_holds_or_does_not_is_proved(bases, tmp_path):
    folder = classifier(bases["bert"], tmp_path / "a", "bert", labels=1)
    base = find_base(str(bases["bert"]))
    assert inspect_adapter(folder).head == Head(kind="sequence_classification", labels=("LABEL_0",), multi_label=True)
    assert failures(verify_adapter(base, folder, **live(bases["bert"], folder))) == []


def test_what_the_folder_says_of_labels_is_checked(bases, tmp_path):
    folder = classifier(bases["bert"], tmp_path / "a", "bert")
    path = folder / HEAD_NAME
    for text, said in (
        ("{", "not what describes a head"),
        ('{"kind": "sequence_classification", "labels": ["a", "a", "b"]}', "not what describes a head"),
        ('{"kind": "sequence_classification", "labels": ["a", "b"]}', "describes 2 labels"),
        ('{"kind": "token_classification", "labels": ["a", "b", "c"]}', "of a token classification"),
    ):
        path.write_text(text)
        with pytest.raises(FileFormatError, match=said):
            inspect_adapter(folder)
    path.unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": None}))
    write_head(folder, MOODS)
    with pytest.raises(FileFormatError, match="task_type"):
        inspect_adapter(folder)


def test_labels_changed_in_the_library_are_noticed(bases, tmp_path):
    folder = classifier(bases["bert"], tmp_path / "a", "bert")
    write_head(folder, MOODS)
    stored = import_adapter(folder, find_base(str(bases["bert"])), name="mood")
    write_head(stored.path, MOODS.with_fields(labels=("good", "bad", "so so")))
    assert "were changed" in Library().rebuild().problems[0]


def test_a_head_of_another_base_is_refused(bases, tmp_path):
    folder = classifier(bases["bert"], tmp_path / "a", "bert")
    files = inspect_adapter(folder)
    other = find_base(str(bases["roberta"]))
    with pytest.raises(MismatchError):
        attach_files(load_model(other, head=files.head), files, base_name="other")
