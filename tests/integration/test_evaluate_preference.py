"""Measuring preferences: figures from stock logits in float64, both systems side by side, judged answers, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import haori
from haori.core.errors import InputError
from tests.command_line import haori as haori_command
from tests.integration.test_train_preference import train


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"what is {i}? {'x ' * (i % 7)}", "chosen": f"number {i} it is", "rejected": f"no idea {i % 5}"}
        for i in range(48)
    ]
    return write(tmp_path / "pairs.jsonl", rows)


def mean_log_probability(model, tokenizer, prompt: str, answer: str) -> float:
    asked = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                          tokenize=False)  # fmt: skip
    before = tokenizer(asked, add_special_tokens=False)["input_ids"]
    after = tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([before + after])).logits[0].double()
    places = range(len(before) - 1, len(before) + len(after) - 1)
    found = [float(torch.log_softmax(logits[p], -1)[token]) for p, token in zip(places, after, strict=True)]
    return float(np.mean(found))


def test_an_adapter_beside_its_base(capsys, tiny_base_folder, data, tmp_path):
    train(tiny_base_folder, data, "liked")
    rows = [{"prompt": f"what is {i}?", "chosen": f"number {i} it is", "rejected": f"no idea {i % 5}"}
            for i in range(100, 130)]  # fmt: skip
    test = write(tmp_path / "test.jsonl", [*rows, {"prompt": "p", "chosen": "same", "rejected": "same"}])
    done = haori_command(capsys, "evaluate", "liked", "--data", test, "--max-tokens", "4", "--out", tmp_path / "report")
    assert done.code == 0, done.err
    assert "Preference accuracy" in done.out and "Reward margin" in done.out
    report = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    opened = haori.open_adapter("liked", dtype="fp32")
    for system, adapted in (("value", True), ("base", False)):
        with opened.strength(on=adapted):
            chosen, rejected = (
                np.array([mean_log_probability(opened.model, opened.tokenizer, r["prompt"], r[side]) for r in rows])
                for side in ("chosen", "rejected")
            )
        wanted = {
            "preference_accuracy": float((chosen > rejected).mean()),
            "reward_margin": float((chosen - rejected).mean()),
            "chosen_reward": float(chosen.mean()),
            "rejected_reward": float(rejected.mean()),
        }
        for name, value in wanted.items():
            assert report["metrics"][name][system] == pytest.approx(value, abs=0.02), (name, system)
    accuracy = report["metrics"]["preference_accuracy"]
    assert accuracy["value"] > 0.9 and accuracy["low"] is not None
    assert report["metrics"]["reward_margin"]["difference_low"] > 0
    notes = " ".join(report["notes"])
    assert "1 with the same answer twice" in notes and "mean log-probability" in notes and "30 of 30 pairs" in notes
    sample = report["samples"][0]
    assert sample["reference"].startswith("number") and sample["adapter"]["text"] is not None
    assert haori.Library().get("liked").card.evaluations[0].metrics["preference_accuracy"].value == accuracy["value"]


def test_rows_that_were_trained_on_are_told(capsys, tiny_base_folder, data, tmp_path):
    train(tiny_base_folder, data, "liked", "training.epochs=1", "data.system=be brief")
    done = haori_command(
        capsys, "evaluate", "liked", "--data", data, "--samples", "0", "--against", "nothing", "--out", tmp_path / "r"
    )
    assert done.code == 0, done.err
    notes = " ".join(json.loads((tmp_path / "r" / "evaluation.json").read_text())["notes"])
    assert "was trained on" in notes and "got the one trained with: 48" in notes


def test_judged_answers_are_ranked(tiny_base_folder, data, tmp_path):
    train(tiny_base_folder, data, "liked", "loss.kind=kto")
    rows = [
        {"prompt": f"what is {i}?", "completion": f"number {i} it is" if i % 3 else f"no idea {i}", "label": i % 3 > 0}
        for i in range(100, 124)
    ]
    result, _ = haori.evaluate("liked", str(write(tmp_path / "test.jsonl", rows)), samples=3)
    opened = haori.open_adapter("liked", dtype="fp32")
    scores = [mean_log_probability(opened.model, opened.tokenizer, r["prompt"], r["completion"]) for r in rows]
    wanted = roc_auc_score([row["label"] for row in rows], scores)
    assert result.metrics["auroc"].value == pytest.approx(wanted, abs=0.05)
    assert set(result.metrics) == {"auroc", "aupr"} and not result.samples


def test_labels_have_no_meaning(capsys, tiny_base_folder, data):
    train(tiny_base_folder, data, "liked", "training.epochs=1")
    done = haori_command(capsys, "evaluate", "liked", "--data", data, "--labels", "a,b")
    assert done.code == InputError.exit_code
    assert "no meaning for the task preference" in done.err


def test_methods_are_compared(capsys, tiny_base_folder, data, tmp_path):
    flags = ["--set", "training.epochs=1", "--set", "method.rank=4", "--set", "training.dtype=fp32"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: liked\nbase: {tiny_base_folder}\ntask: preference\ndata:\n  path: {data}\n")
    done = haori_command(
        capsys, "compare", recipe, "--methods", "base,lora", "--seeds", "1", "--out", tmp_path / "compared", *flags
    )
    assert done.code == 0, done.err + done.out
    assert "Preference accuracy" in done.out or "preference" in done.out.lower()
