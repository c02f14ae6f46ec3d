"""What is wrong with data is found by `haori data check`, before training and before measuring, in one sentence."""

import json
from pathlib import Path

import pytest

from tests.command_line import haori
from tests.conftest import build_tiny_base

EXTRA = [{"prompt": f"Q {i} <|extra_a|>", "completion": f"A {i} <|extra_b|>"} for i in range(12)]
PLAIN = [{"prompt": f"question {i}", "completion": f"answer {i % 3}"} for i in range(20)]
SMALL = ["--set", "training.epochs=1", "--set", "method.rank=2", "--set", "training.max_steps=2"]


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """Make a base whose tokenizer got tokens, one of them for padding, that its weights did not."""
    from transformers import AutoTokenizer

    folder = build_tiny_base(tmp_path / "narrow")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|extra_a|>", "<|extra_b|>"])
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(folder)
    return folder


def train(capsys, base: Path, data: Path, name: str, *more: object):
    return haori(capsys, "train", "--base", base, "--data", data, "--name", name, *SMALL, *more)


def test_tokens_without_embedding_are_found_before_training(capsys, narrow, tmp_path):
    data = write(tmp_path / "extra.jsonl", EXTRA)
    for more in ([], ["--dry-run"]):
        done = train(capsys, narrow, data, "x", *more)
        assert done.code == 2, done
        assert "extra.jsonl:1: the token '<|extra_b|>' has the id 314" in done.err.replace("\n", "")
        assert "embeddings for ids 0 to 312 only" in done.err
        assert "Traceback" not in done.err
    done = haori(capsys, "data", "check", data, "--base", narrow)
    assert done.code == 1
    assert "12 broken (100% of the rows read)" in done.out
    assert "extra.jsonl:12: the token" in done.out
    data = write(tmp_path / "some.jsonl", [*PLAIN, EXTRA[0]])
    done = haori(capsys, "data", "check", data, "--base", narrow)
    assert done.code == 0
    assert "1 broken (5% of the rows read)" in done.out


def test_a_padding_token_without_embedding_trains_and_measures(capsys, narrow, tmp_path):
    data = write(tmp_path / "plain.jsonl", [*PLAIN, {"prompt": "a much longer question", "completion": "yes " * 9}])
    done = train(capsys, narrow, data, "plain")
    assert done.code == 0, done.err
    test = write(tmp_path / "test.jsonl", [*EXTRA[:2], *({"prompt": "new", "completion": c * 5} for c in "abc")])
    done = haori(capsys, "evaluate", "plain", "--data", test)
    assert done.code == 0, done.err
    assert "2 of 5 rows hold a token without embedding" in " ".join(done.out.split())
    done = haori(capsys, "evaluate", "plain", "--data", write(tmp_path / "extra.jsonl", EXTRA))
    assert done.code == 2
    assert "No row can be measured. 12 of 12 rows hold a token without embedding" in done.err
    assert haori(capsys, "generate-text", "plain", "--prompt", "hello", "--max-tokens", 3).code == 0
    done = haori(capsys, "generate-text", "plain", "--prompt", "hello <|extra_a|>", "--max-tokens", 3)
    assert done.code == 2
    assert "The prompt cannot be read: the token '<|extra_a|>' has the id 313" in done.err


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "", "completion": "a"}] * 3, "3 empty (100% of the rows read)"),
        ([{"prompt": "q", "completion": "word " * 400}] * 2, "1 exact duplicates, 1 too long (100% of the rows read)"),
        ([PLAIN[0]], "has one row; training needs at least two"),
    ],
)
def test_a_check_fails_when_nothing_can_be_trained(capsys, tiny_base_folder, tmp_path, rows, said):
    done = haori(capsys, "data", "check", write(tmp_path / "d.jsonl", rows), "--base", tiny_base_folder)
    assert done.code == 1
    assert said in " ".join(done.out.split())
    assert "No problems found" not in done.out


def test_what_is_not_used_is_said_by_check_train_and_evaluate(capsys, tiny_base_folder, tmp_path):
    rows = [{**row, "source": "x"} if i > 3 else row for i, row in enumerate(PLAIN)]
    data = write(tmp_path / "d.jsonl", [*rows, rows[0]])
    note, dropped = "Columns not used: source (16 rows).", "1 exact duplicates (5% of the rows read)"
    done = haori(capsys, "data", "check", data, "--base", tiny_base_folder)
    assert note in done.out
    assert dropped in done.out
    done = train(capsys, tiny_base_folder, data, "said")
    assert done.code == 0, done.err
    assert note in done.err
    assert f"Rows dropped: {dropped}." in done.err
    done = haori(capsys, "evaluate", "said", "--data", data)
    assert done.code == 0, done.err
    assert note in done.out
    assert f"Rows dropped: {dropped}." in done.out


def test_rows_that_were_trained_on_are_found_again(capsys, haori_home, tiny_base_folder, tmp_path):
    data = write(tmp_path / "d.jsonl", PLAIN)
    assert train(capsys, tiny_base_folder, data, "seen", "--set", "data.validation_share=0").code == 0
    (run,) = (haori_home / "runs").glob("*/adapter/training_rows.npy")
    assert run.stat().st_size == 128 + 8 * len(PLAIN)
    chat = [
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": f" {row['prompt'].upper()}"},
                      {"role": "model", "content": row["completion"], "weight": 1}]}
        for row in PLAIN[3:7]
    ]  # fmt: skip
    fresh = [{"prompt": row["prompt"], "completion": f"{row['completion']}!"} for row in PLAIN[:5]]

    def notes(rows: list[object], name: str) -> str:
        test = write(tmp_path / name, rows)
        done = haori(capsys, "evaluate", "seen", "--data", test, "--against", "nothing", "--samples", 0)
        assert done.code == 0, done.err
        return " ".join(done.out.split())

    mixed = notes([*chat, *({"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "b"}]}
                            for i in range(2))], "chat.jsonl")  # fmt: skip
    assert "The adapter was trained on 4 of these 6 rows (the first:" in mixed
    assert "chat.jsonl:1): the figures are too good" in mixed
    assert "trained on 20 of these 20 rows" in notes(PLAIN, "copy.jsonl")
    unseen = notes(fresh, "fresh.jsonl")
    assert "was trained on" not in unseen
    assert "is not known" not in unseen
    assert haori(capsys, "library", "export", "seen", "--out", tmp_path / "out").code == 0
    assert not (tmp_path / "out" / "training_rows.npy").exists()
    (kept,) = (haori_home / "library").rglob("training_rows.npy")
    kept.unlink()
    assert "comes without hashes of its training rows" in notes(fresh, "fresh.jsonl")
    assert "was trained on" in notes(PLAIN, "d.jsonl")


def test_a_folder_is_measured_by_its_test_split(capsys, tiny_base_folder, tmp_path):
    repo = tmp_path / "repo" / "data"
    repo.mkdir(parents=True)
    for name in ("train", "validation", "test"):
        write(repo / f"{name}.jsonl", [{"prompt": f"{name} {i}", "completion": f"answer {i}"} for i in range(8)])
    done = train(capsys, tiny_base_folder, repo.parent, "repo")
    assert done.code == 0, done.err
    said = " ".join(done.err.split())
    assert "8 training and 8 validation rows" in said
    assert (
        "Read train (data/train.jsonl) as train, validation (data/validation.jsonl) as validation; not read: " in said
    )
    done = haori(capsys, "evaluate", "repo", "--data", repo.parent, "--against", "nothing")
    assert done.code == 0, done.err
    assert "Read test (data/test.jsonl) as test; not read:" in done.out
    assert "was trained on" not in done.out
    done = haori(capsys, "evaluate", "repo", "--data", repo.parent, "--set", "split=train", "--against", "nothing")
    assert "The adapter was trained on 8 of these 8 rows" in " ".join(done.out.split())
    done = haori(
        capsys, "train", "--base", tiny_base_folder, "--data", repo.parent, "--name", "no", "--set", "data.split=test"
    )
    assert done.code == 2
    assert "is not trained on" in " ".join(done.err.split())
