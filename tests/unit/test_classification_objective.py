"""Losses of classification against their formulas in float64; padding, parts and blank batches change nothing."""

import math

import pytest
import torch

from haori.bases import find_base, load_model, load_tokenizer
from haori.core.records import Head
from haori.tasks.classification.encoding import TextEncoder
from haori.tasks.classification.objective import ClassificationObjective
from haori.tasks.classification.recipe import ClassificationData
from haori.tasks.classification.rows import load_rows
from tests.classification_samples import animals, write_jsonl
from tests.classifier_models import ARCHITECTURES, build_classifier_base

LABELS = ("cat", "dog", "other")
WEIGHTS = {"cat": 3.0, "other": 0.5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {name: build_classifier_base(name, root / name) for name in ARCHITECTURES}


def rows_of(kind: str) -> list[dict]:
    rows = animals(24)
    if kind == "several":
        return [{"text": r["text"], "labels": [label for label in LABELS if label in r["text"]]} for r in rows]
    if kind == "words":
        sentences = [row["text"].split() for row in rows]
        return [{"tokens": s, "tags": [w if w in LABELS else "other" for w in s]} for s in sentences]
    return rows


def head_of(kind: str) -> Head:
    of_words = kind == "words"
    return Head(
        kind="token_classification" if of_words else "sequence_classification", labels=LABELS,
        multi_label=kind == "several",
    )  # fmt: skip


def made(name, kind, folders, tmp_path, weights=None):
    base = find_base(str(folders[name]))
    tokenizer = load_tokenizer(base)
    section = ClassificationData(path=str(write_jsonl(tmp_path / "rows.jsonl", rows_of(kind))), labels=LABELS)
    split = load_rows(section, TextEncoder(tokenizer, 32), embeddings=None)
    head = head_of(kind)
    return load_model(base, head=head, dtype="fp32"), ClassificationObjective(
        split.train, head, tokenizer.pad_token_id, weights
    )


def by_hand(model, objective, row: int, weights) -> list[float]:
    """The losses of a row alone, from its logits in float64 by the formulas."""
    data = objective.data[row]
    inputs = {"input_ids": torch.tensor([data["input_ids"]])}
    if data["token_type_ids"] is not None:
        inputs["token_type_ids"] = torch.tensor([data["token_type_ids"]])
    with torch.no_grad():
        logits = model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).logits[0].double()
    weight = {label: (weights or {}).get(label, 1.0) for label in LABELS}

    def softmax(scores, label):
        return -weight[label] * float(scores[LABELS.index(label)] - scores.exp().sum().log())

    if objective.head.kind == "token_classification":
        return [softmax(logits[t], label) for t, label in enumerate(data["labels"]) if label is not None]
    if objective.head.multi_label:
        terms = [
            -weight[label] * math.log(1 / (1 + math.exp(-s)))
            if label in data["labels"]
            else -math.log(1 / (1 + math.exp(s)))
            for s, label in zip(logits.tolist(), LABELS, strict=True)
        ]
        return [sum(terms) / len(terms)]
    return [softmax(logits, data["labels"][0])]


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["alike", "weighted"])
@pytest.mark.parametrize("kind", ["one", "several", "words"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_loss_is_that_of_the_formula(name, kind, weights, folders, tmp_path):
    model, objective = made(name, kind, folders, tmp_path, weights)
    batch = objective.batch([0, 3, 5, 1])
    found = objective.loss(model, batch)
    wanted = [by_hand(model, objective, row, weights) for row in (0, 3, 5, 1)]
    assert found.count == sum(map(len, wanted)) == objective.size(batch).count
    assert found.each.tolist() == pytest.approx([value for row in wanted for value in row], abs=2e-5)
    assert float(found.total) == pytest.approx(sum(map(sum, wanted)), abs=1e-4)
    assert found.row_of.tolist() == [place for place, row in enumerate(wanted) for _ in row]
    assert objective.size(batch).cost == sum(objective.costs[row] for row in (0, 3, 5, 1))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_changes_no_loss(name, folders, tmp_path):
    model, objective = made(name, "one", folders, tmp_path)
    together = objective.loss(model, objective.batch(range(8)))
    alone = [float(objective.loss(model, objective.batch([row])).total) for row in range(8)]
    assert together.each.tolist() == pytest.approx(alone, abs=1e-5)
    assert len(set(objective.costs[:8])) > 1


@pytest.mark.parametrize("kind", ["one", "several", "words"])
def test_parts_and_blank_batches(kind, folders, tmp_path):
    model, objective = made("bert", kind, folders, tmp_path)
    batch = objective.batch([4, 2, 7])
    whole = objective.loss(model, batch)
    parts = [objective.loss(model, objective.part(batch, places)) for places in ([0, 2], [1])]
    assert sum(float(part.total) for part in parts) == pytest.approx(float(whole.total), abs=1e-5)
    assert objective.part(batch, [0, 2]).rows == (4, 7)
    blank = objective.blank(batch)
    assert objective.size(blank).count == 0
    nothing = objective.loss(model, blank)
    assert (float(nothing.total), nothing.count) == (0.0, 0)
    assert objective.origins([4])[0].rpartition(":")[0].endswith("rows.jsonl")


def test_accuracy_counts_right_answers(folders, tmp_path):
    model, objective = made("bert", "one", folders, tmp_path)
    batch = objective.batch(range(10))
    with torch.no_grad():
        best = model(**batch.inputs).logits.argmax(-1).tolist()
    right = sum(LABELS[number] == row["labels"][0] for number, row in zip(best, objective.data, strict=False))
    assert float(objective.loss(model, batch).also["accuracy"]) == right
