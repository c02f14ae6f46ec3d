"""Classifiers through the command line: trained, asked, measured, and refused where a command makes no sense."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import haori as package
from tests.classification_samples import animals, write_csv, write_jsonl
from tests.classifier_models import build_classifier_base, stock_scores
from tests.command_line import haori

LABELS = ["cat", "dog", "other"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return build_classifier_base("bert", tmp_path_factory.mktemp("bases") / "bert")


@pytest.fixture
def mood(capsys, base, tmp_path) -> str:
    data = write_csv(tmp_path / "reviews.csv", animals(40))
    keys = ["--set", "training.max_steps=3", "--set", "method.rank=4", "--set", "optimizer.lr=0.01"]
    done = haori(capsys, "train", "--task", "classification", "--base", base, "--data", data, "--name", "mood", *keys)
    assert done.code == 0, done.err
    assert "haori classify mood@1 --text" in done.out
    assert "data.labels = cat, dog, other" in done.err
    return "mood"


def stock_shares(base: Path, text: str) -> dict[str, float]:
    """What stock PEFT says of a text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    folder = package.Library().get("mood").path
    scores = stock_scores(base, folder, [tokenizer(text)["input_ids"]])[0]
    return dict(zip(LABELS, torch.softmax(scores.double(), -1).tolist(), strict=True))


def test_a_text_is_answered_as_by_stock_peft(capsys, mood, base):
    done = haori(capsys, "classify", "mood", "--text", "the cat sat", "--json")
    answer = json.loads(done.out)
    wanted = stock_shares(base, "the cat sat")
    assert answer["text"] == "the cat sat"
    assert answer["probabilities"] == pytest.approx(wanted, abs=1e-6)
    assert answer["label"] == max(wanted, key=wanted.__getitem__) == next(iter(answer["probabilities"]))
    plain = haori(capsys, "classify", "mood", "--text", "the cat sat")
    assert plain.code == 0 and all(label in plain.out for label in LABELS) and "%" in plain.out


def test_every_row_of_a_file_is_answered_in_its_order(capsys, mood, tmp_path):
    rows = animals(30, seed=3)
    for file in (
        write_csv(tmp_path / "a.csv", rows),
        write_jsonl(tmp_path / "a.jsonl", [{"text": r["text"]} for r in rows]),
    ):
        done = haori(capsys, "classify", "mood", "--file", file, "--json")
        answers = [json.loads(line) for line in done.out.splitlines()]
        assert [answer["text"] for answer in answers] == [row["text"] for row in rows]
    alone = json.loads(haori(capsys, "classify", "mood", "--text", rows[7]["text"], "--json").out)
    assert answers[7]["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-6)
    table = haori(capsys, "classify", "mood", "--file", file)
    assert table.code == 0 and table.out.count("%") == 30
    named = write_jsonl(tmp_path / "b.jsonl", [{"said": "the cat"}])
    assert "name it with --column" in haori(capsys, "classify", "mood", "--file", named).err
    assert haori(capsys, "classify", "mood", "--file", named, "--column", "said").code == 0


def test_pairs_and_python(capsys, mood, base):
    done = haori(capsys, "classify", "mood", "--text", "the cat", "--text-pair", "a dog", "--json")
    answer = json.loads(done.out)
    assert answer["text_pair"] == "a dog"
    found = package.open_classifier("mood").classify([("the cat", "a dog"), "the cat"])
    assert found[0].probabilities == pytest.approx(answer["probabilities"], abs=1e-6)
    assert found[0].probabilities != pytest.approx(found[1].probabilities, abs=1e-9)


def test_mistakes_get_a_sentence(capsys, mood, tmp_path):
    blank = write_jsonl(tmp_path / "blank.jsonl", [{"text": "the cat"}, {"text": " "}])
    for arguments, said in (
        ((), "Give texts with --text, or a file"),
        (("--text", " "), "is blank"),
        (("--text", "a", "--text", "b", "--text-pair", "c"), "beside one --text"),
        (("--file", blank), "blank.jsonl:2:text: this must be a text that is not blank"),
        (("--file", blank, "--column", "x"), "has no column 'x'"),
    ):
        done = haori(capsys, "classify", "mood", *arguments)
        assert done.code == 2 and said in done.err.replace("\n", " "), done


def test_commands_for_text_refuse_a_classifier_and_the_other_way_round(capsys, mood, tiny_base_folder, tmp_path):
    for arguments in (("chat", "mood"), ("generate-text", "mood", "--prompt", "hello")):
        done = haori(capsys, *arguments)
        assert done.code == 2
        assert "'mood@1' is a classifier (cat, dog, other) and writes no text" in done.err
    with pytest.raises(package.HaoriError, match="writes no text"):
        package.open_adapter("mood").answer("hello")
    rows = [{"prompt": f"what is {n}?", "completion": "odd" if n % 2 else "even"} for n in range(20)]
    data = write_jsonl(tmp_path / "text.jsonl", rows)
    keys = ["--set", "training.max_steps=1", "--set", "method.rank=2"]
    assert haori(capsys, "train", "--base", tiny_base_folder, "--data", data, "--name", "writer", *keys).code == 0
    done = haori(capsys, "classify", "writer", "--text", "hello")
    assert done.code == 2 and "'writer@1' is no classifier: it writes text" in done.err


def test_it_is_measured_with_every_metric_and_its_interval(capsys, mood, tmp_path):
    test = write_jsonl(tmp_path / "test.jsonl", animals(30, seed=5))
    done = haori(capsys, "evaluate", "mood", "--data", test)
    assert done.code == 0, done.err
    for title in ("Accuracy", "Macro F1", "Micro F1", "MCC", "AUROC", "AUPR", "Calibration error", "Recall, cat"):
        assert title in done.out
    assert "has no head for these labels" in " ".join(done.out.split())
    metrics = package.Library().get("mood").card.evaluations[0].metrics
    assert metrics["accuracy"].base is None and metrics["accuracy"].low is not None
    answers = package.open_classifier("mood").classify([row["text"] for row in animals(30, seed=5)])
    right = sum(a.labels == (r["label"],) for a, r in zip(answers, animals(30, seed=5), strict=True))
    assert metrics["accuracy"].value == pytest.approx(right / 30)
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [{"text": "the cat", "label": "catt"}, {"text": "a", "label": "dog"}])
    assert "did you mean 'cat'" in haori(capsys, "evaluate", "mood", "--data", wrong).err


def test_data_check_and_dry_run(capsys, base, tmp_path):
    data = write_csv(tmp_path / "reviews.csv", animals(40))
    done = haori(capsys, "data", "check", data, "--base", base, "--task", "classification", "--show", 2)
    assert done.code == 0, done.err
    assert "single label" in done.out and "[[" in done.out and "other" in done.out
    dry = haori(capsys, "train", "--task", "classification", "--base", base, "--data", data, "--name", "x", "--dry-run")
    assert dry.code == 0, dry.err
    assert "trainable parameters" in dry.out


def test_words_and_several_labels_are_answered(capsys, base, tmp_path):
    sentences = [row["text"].split() for row in animals(40)]
    tags = [["B-X" if word == "cat" else "O" for word in words] for words in sentences]
    words = write_jsonl(
        tmp_path / "words.jsonl", [{"tokens": s, "ner_tags": t} for s, t in zip(sentences, tags, strict=True)]
    )
    several = write_jsonl(
        tmp_path / "several.jsonl",
        [{"text": r["text"], "labels": [w for w in ("cat", "dog") if w in r["text"]]} for r in animals(40)],
    )
    keys = ["--set", "training.max_steps=2", "--set", "method.rank=2"]
    for name, data in (("tags", words), ("many", several)):
        train = ("train", "--task", "classification", "--base", base, "--data", data, "--name", name)
        assert haori(capsys, *train, *keys).code == 0
    answer = json.loads(haori(capsys, "classify", "tags", "--text", "the cat  sat", "--json").out)
    assert [word["word"] for word in answer["words"]] == ["the", "cat", "sat"]
    assert {word["label"] for word in answer["words"]} <= {"O", "B-X"}
    answer = json.loads(haori(capsys, "classify", "many", "--text", "the cat", "--json").out)
    assert answer["labels"] == [label for label, share in answer["probabilities"].items() if share >= 0.5]
    done = haori(capsys, "classify", "tags", "--text", "a", "--text-pair", "b")
    assert done.code == 2 and "reads no pairs" in done.err
    # BERT's tokenizer leaves out the replacement character, so nothing of the last row can be measured.
    rows = [{"tokens": s, "ner_tags": t} for s, t in zip(sentences[:9], tags[:9], strict=True)]
    test = write_jsonl(tmp_path / "test.jsonl", [*rows, {"tokens": ["\ufffd"], "ner_tags": ["O"]}])
    result, _ = package.evaluate("tags", str(test), against_base=False)
    assert len(result.rows) == 9
    assert any(note.startswith("1 of 10 rows have no word") and "test.jsonl:10" in note for note in result.notes)
    done = haori(capsys, "evaluate", "tags", "--data", test, "--max-tokens", 5)
    assert done.code == 2 and "--max-tokens" in done.err


def test_compare_runs_lora_full_and_the_head_alone(capsys, base, tmp_path):
    data = write_csv(tmp_path / "reviews.csv", animals(40))
    test = write_jsonl(tmp_path / "test.jsonl", animals(30, seed=5))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: c\nbase: {base}\ntask: classification\ndata: {{path: {data}}}\ntraining: {{max_steps: 2}}\n"
    )
    done = haori(
        capsys,
        "compare",
        recipe,
        "--methods",
        "lora,full,head",
        "--test",
        test,
        "--seeds",
        1,
        "--out",
        tmp_path / "out",
    )
    assert done.code == 0, done.err
    for method in ("lora", "full", "head"):
        assert method in done.out
    assert "Accuracy" in done.out
