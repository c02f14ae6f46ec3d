"""Whatever is wrong with what was given: one sentence, exit code 2, and nothing left behind."""

import json
import os
import pickle
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import haori
from tests.conftest import build_tiny_base

GOOD = [{"prompt": f"question {i}", "completion": f"answer {i % 3}"} for i in range(20)]


def write(path: Path, rows: list[object] | bytes | str) -> Path:
    if isinstance(rows, bytes):
        path.write_bytes(rows)
    elif isinstance(rows, str):
        path.write_text(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def left_behind(home: Path) -> list[str]:
    """Files that are not caches: runs, library, half-written things."""
    return [
        str(path.relative_to(home))
        for path in home.rglob("*")
        if path.is_file() and ("cache" not in path.relative_to(home).parts or "/." in str(path.relative_to(home)))
    ]


def refused(capsys, home: Path, *arguments: object) -> str:
    done = haori(capsys, *arguments)
    assert done.code == 2, done
    assert done.err.count("Error: ") == 1
    sentence = done.err[done.err.index("Error: ") :].strip()
    assert "Traceback" not in done.err
    assert len(sentence.splitlines()) == 1, sentence
    assert left_behind(home) == []
    return sentence


ROWS = json.dumps(GOOD[0]) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.jsonl", None, "missing.jsonl"),
        ("empty.jsonl", "", "empty"),
        ("broken.jsonl", ROWS * 2 + '{"prompt": "a", \n' + ROWS, "broken.jsonl:3"),
        ("unknown.xyz", ROWS, "unknown.xyz"),
        ("columns.jsonl", [{"frage": "a", "antwort": "b"}] * 3, "columns.prompt"),
        ("field.jsonl", [*GOOD, {"prompt": "a", "completion": 3}], "field.jsonl:21"),
        ("binary.jsonl", bytes(range(256)) * 20, "binary.jsonl"),
        ("latin.jsonl", ROWS.encode() + '{"prompt": "é", "completion": "b"}\n'.encode("latin-1"), "UTF-8"),
        ("one.jsonl", GOOD[:1], "one row"),
        (
            "masked.jsonl",
            [{"messages": [{"role": "user", "content": f"a{i}"}, {"role": "assistant", "content": "b", "loss": False}]}
             for i in range(9)],
            "loss",
        ),
        ("long.jsonl", [{"prompt": f"{i} " * 600, "completion": "b"} for i in range(5)], "5 too long"),
    ],
)  # fmt: skip
def test_bad_data(capsys, haori_home, tiny_base_folder, tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    sentence = refused(capsys, haori_home, "train", "--base", tiny_base_folder, "--data", path, "--name", "x")
    assert said in sentence


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.rankk=4", "did you mean 'rank'"),
        ("method.rank=four", "'method.rank' cannot be 'four'"),
        ("method.rank=0", "'method.rank' cannot be 0"),
        ("method.target=q_porj", "q_proj"),
        ("method.modules_to_save=[lm_haed]", "lm_head"),
        ("method.trainable_tokens=[several words here]", "tokens in this base"),
        ("training.dtype=fp16", "CPU"),
        ("training.trackers=[wandb]", "pip install wandb"),
    ],
)
def test_bad_settings(capsys, haori_home, tiny_base_folder, tmp_path, override, said):
    path = write(tmp_path / "good.jsonl", GOOD)
    sentence = refused(
        capsys, haori_home, "train", "--base", tiny_base_folder, "--data", path, "--name", "x", "--set", override
    )
    assert said in sentence


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("smollm2-135m-instrct", "smollm2-135m-instruct"),
        ("someone/some-model", "HF_HUB_OFFLINE"),
        ("/nowhere", "/nowhere"),
    ],
)
def test_bad_base(capsys, haori_home, tmp_path, base, said):
    path = write(tmp_path / "good.jsonl", GOOD)
    assert said in refused(capsys, haori_home, "train", "--base", base, "--data", path, "--name", "x")


def damaged(folder: Path, kind: str) -> Path:
    weights = folder / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "header":
        weights.write_bytes(struct.pack("<Q", 2 << 30) + b"{" * 100)
    elif kind == "pickle":
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    return folder


@pytest.mark.parametrize(
    ("kind", "said"), [("truncated", "truncated"), ("header", "2,147,483,648"), ("pickle", "safetensors")]
)
def test_damaged_base(capsys, haori_home, tmp_path, kind, said):
    base = damaged(build_tiny_base(tmp_path / "base"), kind)
    path = write(tmp_path / "good.jsonl", GOOD)
    assert said in refused(capsys, haori_home, "train", "--base", base, "--data", path, "--name", "x")


def test_missing_flags_and_recipe(capsys, haori_home, tmp_path):
    assert "--base, --data and --name" in refused(capsys, haori_home, "train")
    assert "no recipe file" in refused(capsys, haori_home, "train", tmp_path / "none.yaml")
    assert "not a run folder" in refused(capsys, haori_home, "train", "--resume", tmp_path)


def test_output_folder_in_use(capsys, haori_home, tiny_base_folder, tmp_path):
    path = write(tmp_path / "good.jsonl", GOOD)
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    arguments = ["train", "--base", tiny_base_folder, "--data", path, "--name", "x", "--out"]
    assert "not an empty folder" in refused(capsys, haori_home, *arguments, out)
    assert "Cannot write" in refused(capsys, haori_home, *arguments, path / "below-a-file")
    assert (out / "precious.txt").read_text() == "keep me"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, which takes root to mount."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk(capsys, monkeypatch, small_disk, tiny_base_folder, tmp_path):
    from haori.core.settings import settings

    monkeypatch.setenv("HAORI_HOME", str(small_disk))
    settings.cache_clear()
    path = write(tmp_path / "good.jsonl", GOOD)
    sentence = refused(
        capsys, small_disk, "train", "--base", tiny_base_folder, "--data", path, "--name", "x",
        "--set", "method.rank=64", "--set", "training.epochs=1",
    )  # fmt: skip
    assert "disk is full" in sentence


def test_read_only_home(capsys, monkeypatch, tiny_base_folder, tmp_path):
    from haori.core.settings import settings

    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("HAORI_HOME", str(blocked / "home"))
    settings.cache_clear()
    path = write(tmp_path / "good.jsonl", GOOD)
    assert "Cannot write" in refused(
        capsys, blocked, "train", "--base", tiny_base_folder, "--data", path, "--name", "x"
    )
