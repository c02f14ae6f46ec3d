"""The README's commands and its Python example, run as written: only the base is a tiny one and the data are ours."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
BASE = "smollm2-135m-instruct"
TOPICS = (
    "password", "invoice", "parcel", "refund", "address", "warranty", "battery", "screen", "cable", "voucher",
    "account", "delivery", "receipt", "printer", "keyboard", "headset", "charger", "router", "update", "backup",
    "licence", "discount", "newsletter", "repair",
)  # fmt: skip


def block(section: str, language: str) -> list[str]:
    """Return the code blocks of one language in a section, or on the first screen."""
    text = re.split(rf"^## {section}$", README, flags=re.M)[1] if section else README
    return re.findall(rf"^```{language}\n(.*?)^```$", text.split("\n## ")[0], re.M | re.S)


def write_rows(path: Path, ask: str) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": ask.format(topic)},
                {"role": "assistant", "content": f"Open the page {topic}."},
            ]
        }
        for topic in TOPICS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """Return a folder with the files that the README speaks of."""
    folder = tmp_path / "desk"
    folder.mkdir()
    write_rows(folder / "my.jsonl", "Where do I find my {}?")
    write_rows(folder / "test.jsonl", "I am looking for the {}.")
    return folder


def run(words: list[str], desk: Path, typed: str = "") -> str:
    done = subprocess.run(
        words, cwd=desk, input=typed, capture_output=True, text=True, check=False, timeout=240,
        env={**os.environ, "COLUMNS": "200", "PYTHONWARNINGS": "default"},
    )  # fmt: skip
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_commands_of_the_first_screen(desk: Path, haori_home: Path, tiny_base_folder: Path):
    lines = block("", "shell")[0].splitlines()
    assert [line.split()[1] for line in lines] == ["data", "train", "chat", "evaluate", "merge"]
    own = [line for text in block("Train on your own JSONL", "shell") for line in text.splitlines()]
    assert set(own) < set(lines)
    said = {}
    for line in lines:
        words = [str(tiny_base_folder) if word == BASE else word for word in shlex.split(line)[1:]]
        if words[0] == "data":
            words += ["--base", str(tiny_base_folder)]  # by default the README's base, which is 93 MB
        typed = "Where?\n/base\n/reset\nWhere?\n/quit\n" if words[0] == "chat" else ""
        said[words[0]] = run([sys.executable, "-m", "haori.cli.app", *words], desk, typed)
    assert f"{len(TOPICS)}" in said["data"]
    assert "[[Open the page" in said["data"]
    assert "support@1" in said["train"]
    assert "bare base" in said["chat"]
    assert "Perplexity" in said["evaluate"]
    assert (desk / "support-merged" / "model.safetensors").is_file()
    check_card(next((haori_home / "library").rglob("card.json")))
    folders = {path.name for path in haori_home.iterdir() if not path.name.startswith(".")}
    assert folders == {"library", "runs", "evaluations", "cache"}
    files = {path.name for path in next((haori_home / "runs").iterdir()).iterdir()}
    assert files == documented_run_files()


def check_card(path: Path) -> None:
    card = json.loads(path.read_text("utf-8"))
    assert card["names"] == ["support@1"]
    assert card["verification"]["passed"]
    assert len(card["evaluations"]) == 1
    page = (ROOT / "docs/guide/proof.md").read_text("utf-8")
    always = re.findall(r"^\| `(\w+)` \| (?!only for )", page.partition("\n## ")[0], re.M)
    assert [check["name"] for check in card["verification"]["checks"]] == always
    assert not [check for check in card["verification"]["checks"] if check["detail"].startswith("skipped")]


def documented_run_files() -> set[str]:
    page = (ROOT / "docs/guide/resuming.md").read_text("utf-8")
    return {name.rstrip("/") for name in re.findall(r"^\| `([\w./]+)` \|", page, re.M)}


def test_the_example_of_following_a_run(desk: Path, haori_home: Path, tiny_base_folder: Path):
    page = (ROOT / "docs/guide/following.md").read_text("utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    said = run([sys.executable, "-c", example.replace(BASE, str(tiny_base_folder))], desk).splitlines()
    assert re.fullmatch(r"step 1 of \d+: loss \d\.\d{3}, \d+ tokens/s", next(x for x in said if x.startswith("step")))
    assert any(re.fullmatch(r"after 1\.0 epochs: \{'loss': .*'train_loss': .*\}", line) for line in said)
    assert re.fullmatch(r"adapter in .*/adapter", said[-1])


def test_the_python_example(desk: Path, haori_home: Path, tiny_base_folder: Path):
    (example,) = block("In Python", "python")
    code = example.replace(BASE, str(tiny_base_folder)).replace("test.jsonl", str(desk / "test.jsonl"))
    # Twice: a function must not change its meaning by being called.
    said = run([sys.executable, "-c", code + code], desk)
    assert said.count("evaluation.html") == 2
    cards = [json.loads(path.read_text("utf-8")) for path in (haori_home / "library").rglob("card.json")]
    assert "support@1" in {name for card in cards for name in card["names"]}
