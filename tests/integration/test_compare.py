"""A whole comparison on a tiny base through the command line: rows, costs, failures, resuming, the page."""

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from haori.jobs import Comparison
from haori.jobs.compare.lines import cost_lines, metrics_of, score_lines
from tests.command_line import haori as haori_command

pytestmark = pytest.mark.timeout(900)  # six processes one after the other, on a machine that may be busy
METHODS = "base,lora,full,adalora"


def write(path: Path, rows: int, first: int) -> Path:
    data = [
        {"prompt": f"is number {n} odd or even?", "completion": "odd" if n % 2 else "even"}
        for n in range(first, first + rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return path


def command(base: Path, folder: Path, *more: object) -> list[str]:
    train, test = write(folder / "train.jsonl", 40, 0), write(folder / "test.jsonl", 20, 100)
    (folder / "general.txt").write_text("The question of the user is about the system.\n")
    words = ["--base", base, "--data", train, "--name", "numbers", "--test", test, "--general", folder / "general.txt"]
    words += ["--set", "method.rank=4", "--set", "training.epochs=1", "--set", "training.max_steps=2"]
    return [sys.executable, "-m", "haori.cli.app", "compare", *map(str, words), *map(str, more)]


def run(words: list[str], home: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(words, env={**os.environ, "HAORI_HOME": str(home)}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compared(tmp_path_factory, tiny_base_folder):
    """Compare once: LoRA and full fine-tuning with two seeds, and AdaLoRA, which refuses two steps."""
    folder = tmp_path_factory.mktemp("compared")
    done = run(command(tiny_base_folder, folder, "--methods", METHODS, "--seeds", 2), folder / "home")
    (place,) = (folder / "home" / "comparisons").iterdir()
    return done, place


def read(place: Path) -> Comparison:
    return Comparison.model_validate_json((place / "comparison.json").read_bytes())


def test_every_method_is_a_row_and_one_that_fails_makes_the_command_fail(compared):
    done, place = compared
    found = read(place)
    assert done.returncode == 1, done.stderr
    assert "1 of 3 methods failed (adalora)" in done.stderr
    assert "Traceback" not in done.stderr
    assert [result.method for result in found.methods] == ["base", "lora", "full", "adalora"]
    assert found.failed == ("adalora",)
    base, lora, full, adalora = found.methods
    assert "too few for AdaLoRA" in adalora.errors[0]
    assert adalora.errors[0] in " ".join(done.stdout.split())
    assert (adalora.scores, adalora.cost) == ({}, None)
    assert lora.seeds == full.seeds == (0, 1)
    assert not (place / "runs" / "adalora-lr-auto-seed-1").exists(), "another seed would fail alike"
    assert base.cost is None
    assert "accuracy" in base.scores


def test_scores_are_means_over_seeds_with_paired_differences(compared):
    found = read(compared[1])
    base, lora, full, _ = found.methods
    for name, score in lora.scores.items():
        assert score.value == pytest.approx(sum(score.each) / 2)
        assert len(score.each) == 2
        assert score.against["base"].value == pytest.approx(score.value - base.scores[name].value)
        assert score.against["full"].value == pytest.approx(score.value - full.scores[name].value)
    assert lora.scores["perplexity"].spread > 0
    assert lora.scores["perplexity"].low < lora.scores["perplexity"].value < lora.scores["perplexity"].high
    assert set(full.scores["perplexity"].against) == {"base"}


def test_scores_are_those_of_the_evaluation(compared, tiny_base_folder):
    from haori.bases import find_base, load_model, load_tokenizer
    from haori.data import read_conversations
    from haori.data.section import TextSection
    from haori.evaluation import evaluate_adapter
    from haori.tasks.causal_lm import TASK

    found = read(compared[1])
    base = find_base(str(tiny_base_folder))
    rows, report = read_conversations(TextSection(path=found.test.source))
    result = evaluate_adapter(
        TASK,
        load_model(base),
        load_tokenizer(base),
        rows,
        data_reference=report.reference(),
        against_base=False,
        samples=0,
    )
    for name in ("accuracy", "macro_f1", "perplexity"):
        score, metric = found.methods[0].scores[name], result.metrics[name]
        assert (score.value, score.low, score.high) == pytest.approx((metric.value, metric.low, metric.high))


def test_costs_are_those_of_the_runs(compared):
    _, place = compared
    _, lora, full, _ = read(place).methods
    records = [json.loads(path.read_text()) for path in place.glob("workspace/runs/numbers-lora-*/run.json")]
    assert lora.cost.peak_memory_bytes == max(record["peak_memory_bytes"] for record in records) > 1e8
    assert lora.cost.seconds == pytest.approx(sum(record["seconds"] for record in records) / 2)
    assert lora.cost.steps == full.cost.steps == 2
    assert lora.cost.tokens == full.cost.tokens
    assert lora.cost.trainable_parameters < full.cost.trainable_parameters == full.cost.total_parameters
    stored = next(place.glob("workspace/library/adapters/*/*/adapter_model.safetensors"))
    assert lora.cost.size_bytes == stored.stat().st_size < full.cost.size_bytes
    assert lora.lr > full.lr
    assert [point.step for point in lora.curves[0]] == [0, 2]


def test_forgetting_is_measured_on_both_sets(compared):
    _, lora, full, _ = read(compared[1]).methods
    for result in (lora, full):
        assert set(result.forgetting) == {"shipped", "own"}
        shipped = result.forgetting["shipped"]
        assert shipped.whole.passages == 93
        assert shipped.whole.difference == pytest.approx(shipped.whole.after - shipped.whole.before)
        assert shipped.whole.difference != 0
        assert set(shipped.kinds) == {"knowledge", "everyday", "questions", "literature", "jargon", "code"}
    assert lora.forgetting["shipped"].whole.before == full.forgetting["shipped"].whole.before


def test_nothing_goes_into_the_users_library(compared):
    _, place = compared
    home = place.parent.parent
    assert {path.name for path in home.iterdir() if not path.name.startswith(".")} == {"comparisons", "cache"}
    assert len(list(place.glob("workspace/library/adapters/*/*/card.json"))) == 2
    assert not list(place.rglob("checkpoints"))


def test_the_page_and_the_table_show_the_figures_of_the_file(compared):
    done, place = compared
    found = read(place)
    page = html.unescape((place / "comparison.html").read_text("utf-8"))
    cells = set(re.findall(r"<td[^>]*>([^<]*)", page)) | set(re.findall(r"<small>([^<]*)", page))
    shown = " ".join(done.stdout.split())
    for metric in metrics_of(found):
        for line in score_lines(found, metric):
            assert {line.value, line.interval, line.spread, line.against_base, line.against_full} <= cells
            assert f"{line.value} [{line.interval}]" in shown
    for cost in cost_lines(found):
        assert set(cost) <= cells
        assert {cost.time, cost.speed, cost.peak, cost.trained, cost.size} <= set(re.split(r"\s{2,}", done.stdout))
    assert found.methods[3].errors[0] in page
    assert page.count("<svg") == 4
    assert "<script" not in page
    assert not re.search(r"(src|href)=", page)


def test_resuming_runs_only_what_is_missing(compared, tmp_path, capsys):
    _, first = compared
    place = tmp_path / "copy"
    shutil.copytree(first, place)
    for path in place.rglob("job.json"):  # the copy lies elsewhere
        path.write_text(path.read_text().replace(str(first), str(place)))
    marks = {path: path.stat().st_mtime_ns for path in place.glob("runs/*/result.json")}
    done = haori_command(capsys, "compare", "--resume", place)
    assert done.code == 1, done.err
    assert done.err.count("taken from the earlier part") == 5
    changed = [path.parent.name for path, mark in marks.items() if path.stat().st_mtime_ns != mark]
    assert changed == ["adalora-lr-auto-seed-0"], "a failed run is tried again, no other"
    before, after = (json.loads((one / "comparison.json").read_text()) for one in (first, place))
    assert before.pop("time")
    assert after.pop("time")
    assert before == after


def test_an_interrupted_comparison_says_how_to_go_on_and_leaves_no_child(tiny_base_folder, tmp_path):
    words = command(tiny_base_folder, tmp_path, "--methods", "lora", "--seeds", 1, "--out", tmp_path / "out")
    process = subprocess.Popen(
        words, env={**os.environ, "HAORI_HOME": str(tmp_path / "home")}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "base" / "job.json").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"haori compare --resume {tmp_path / 'out'}" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--methods", "lora,dorra"), "no method 'dorra' to compare; did you mean 'dora'"),
        (("--methods", "base"), "no method to train"),
        (("--methods", "lora,lora"), "given twice"),
        (("--methods", "peft"), "needs a recipe that says which"),
        (("--set", "data.validation_share=0", "--lr-sweep", "--test", "x.jsonl"), "judges by validation loss"),
        (("--resume", "nowhere"), "give it alone"),
        (("--test", "no-such.jsonl"), "no-such.jsonl"),
        (("--general", "no-such.txt"), "no-such.txt"),
    ],
)
def test_mistakes_are_sentences_before_anything_runs(capsys, haori_home, tmp_path, more, sentence):
    data = write(tmp_path / "train.jsonl", 4, 0)
    done = haori_command(capsys, "compare", "--base", "b", "--data", data, "--name", "n", *more)
    assert done.code == 2
    assert sentence in done.err
    assert not haori_home.exists()


def test_a_missing_base_ends_the_comparison_with_its_sentence(capsys, haori_home, tmp_path):
    data = write(tmp_path / "train.jsonl", 4, 0)
    done = haori_command(capsys, "compare", "--base", tmp_path / "gone", "--data", data, "--name", "n")
    assert done.code == 2
    assert "There is no folder or file" in done.err
    assert not (haori_home / "comparisons").exists()
    assert haori_command(capsys, "compare", "--resume", tmp_path).code == 2
