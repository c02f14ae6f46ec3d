"""Every task through every command: the shipped ones, and one that is added by a folder and a line.

The commands of a task run in one process of their own, over a copy of the package to which the toy was added.
"""

import filecmp
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "haori"
LINE = '    "toy": "haori.tasks.toy",\n'

# What the process does: commands as a user would type them; each must end with 0.
SCRIPT = """
import json, sys
from haori.cli.app import main

def haori(*words):
    sys.argv = ["haori", *words]
    print("$", *words, flush=True)
    try:
        main()
    except SystemExit as end:
        if end.code not in (0, None):
            sys.exit(f"{words} ended with {end.code}")

if __name__ == "__main__":
    for command in json.load(open(sys.argv[1])):
        haori(*command)
"""


def toy_rows(count: int) -> list[dict[str, object]]:
    return [{"text": f"{'good' if i % 2 else 'bad'} number {i}", "sign": 1 if i % 2 else -1} for i in range(count)]


def text_rows(count: int) -> list[dict[str, object]]:
    return [
        {"prompt": f"what is number {i}?", "completion": f"it is {'odd' if i % 2 else 'even'}"} for i in range(count)
    ]


def preference_rows(count: int) -> list[dict[str, object]]:
    sides = (" it is odd", " it is even")
    return [
        {"prompt": f"what is number {i}?", "chosen": sides[1 - i % 2], "rejected": sides[i % 2]} for i in range(count)
    ]


def labelled_rows(count: int) -> list[dict[str, object]]:
    return [
        {"text": f"number {i} is {'odd' if i % 2 else 'even'}", "label": ("even", "odd")[i % 2]} for i in range(count)
    ]


ROWS = {"causal_lm": text_rows, "classification": labelled_rows, "preference": preference_rows, "toy": toy_rows}


@pytest.fixture(scope="module")
def with_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with one more folder and one more line."""
    source = tmp_path_factory.mktemp("with-toy") / "haori"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests" / "toy_task", source / "tasks" / "toy", ignore=shutil.ignore_patterns("__pycache__"))
    registry = source / "tasks" / "registry.py"
    text = registry.read_text()
    place = text.index("TASKS = {\n") + len("TASKS = {\n")
    registry.write_text(text[:place] + LINE + text[place:])
    return source.parent


def different(one: Path, other: Path) -> Iterator[str]:
    """Yield what is not the same in two folders."""
    found = filecmp.dircmp(one, other, ignore=["__pycache__"])
    yield from (str(Path(found.right) / name) for name in (*found.left_only, *found.right_only))
    _, changed, failed = filecmp.cmpfiles(one, other, found.common_files, shallow=False)
    yield from (str(other / name) for name in (*changed, *failed))
    for name in found.common_dirs:
        yield from different(one / name, other / name)


def run(source: Path, home: Path, commands: list[list[str]]) -> subprocess.CompletedProcess[str]:
    (home / "script.py").write_text(SCRIPT)
    (home / "commands.json").write_text(json.dumps(commands))
    environment = {**os.environ, "PYTHONPATH": str(source), "HAORI_HOME": str(home / "home"), "HAORI_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(home / "script.py"), str(home / "commands.json")], env=environment, cwd=home,
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_recipe(folder: Path, task: str, base: str, data: str, settings: list[str]) -> str:
    document: dict[str, object] = {"name": "tried", "base": base, "task": task, "data": {"path": data}}
    for setting in settings:
        key, _, value = setting.partition("=")
        section, _, last = key.partition(".")
        document.setdefault(section, {})[last] = json.loads(value) if value[0].isdigit() else value
    (folder / "recipe.yaml").write_text(json.dumps(document))
    return str(folder / "recipe.yaml")


def test_a_task_is_added_by_one_folder_and_one_line(with_toy: Path):
    copy = with_toy / "haori"
    assert sorted(different(PACKAGE, copy)) == [str(copy / "tasks" / "registry.py"), str(copy / "tasks" / "toy")]
    before = (PACKAGE / "tasks" / "registry.py").read_text()
    after = (copy / "tasks" / "registry.py").read_text()
    assert after.replace(LINE, "", 1) == before and len(list((copy / "tasks" / "toy").iterdir())) == 1


@pytest.mark.parametrize("task", ["causal_lm", "classification", "preference", "toy"])
def test_a_task_goes_through_every_command(task: str, with_toy: Path, tmp_path: Path, tiny_base_folder: Path):
    """Check, dry run, train, prove, store, evaluate, export, go on, compare, sweep."""
    base, data = str(tiny_base_folder), write(tmp_path / "rows.jsonl", ROWS[task](60))
    test = write(tmp_path / "test.jsonl", ROWS[task](90)[60:])
    settings = [
        word for setting in ("training.epochs=2", "method.rank=4", "optimizer.lr=5e-3", "training.dtype=fp32",
                             "data.validation_share=0.2")
        for word in ("--set", setting)
    ]  # fmt: skip
    recipe = write_recipe(tmp_path, task, base, data, settings[1::2])
    train = ["train", "--task", task, "--base", base, "--data", data, *settings]
    done = run(
        with_toy,
        tmp_path,
        [
            ["data", "check", data, "--base", base, "--task", task, "--show", "1"],
            [*train, "--name", "first", "--dry-run"],
            [*train, "--name", "first", "--out", str(tmp_path / "exported")],
            ["library", "verify", "first"],
            ["library", "show", "first"],
            ["evaluate", "first", "--data", test, *(["--against", "nothing"] if task == "classification" else [])],
            ["library", "export", "first", "--out", str(tmp_path / "again")],
            ["merge", "first", "--out", str(tmp_path / "merged")],
            [*train[:-len(settings)], "--name", "second", "--set", "from=first", "--set", "training.epochs=1"],
            *([] if task == "causal_lm" else [["sweep", recipe, "--over", "method.rank=2,4", "--trials", "2"]]),
        ],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "first@1 is trained and proved" in done.stdout and "second@1" in done.stdout
    card = json.loads(next((tmp_path / "home" / "library" / "adapters").rglob("card.json")).read_text())
    assert card["task"] == task and card["verification"]["passed"]
    stock_loads(base, tmp_path / "exported", task)


def stock_loads(base: str, folder: Path, task: str) -> None:
    """The exported folder works in stock PEFT alone, and changes what the base says."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    ids = torch.arange(5, 15)[None]
    if task == "classification":
        bare = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=0)
    else:
        bare = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(bare, folder).eval()
    with torch.no_grad():
        found = model(input_ids=ids).logits
        with model.disable_adapter():
            assert not torch.equal(found, model(input_ids=ids).logits)


def test_a_comparison_of_methods_works_for_an_added_task(with_toy: Path, tmp_path: Path, tiny_base_folder: Path):
    base, data = str(tiny_base_folder), write(tmp_path / "rows.jsonl", ROWS["toy"](60))
    settings = ["training.epochs=1", "training.dtype=fp32", "data.validation_share=0.2", "method.rank=4"]
    settings = [word for setting in settings for word in ("--set", setting)]
    words = ["compare", "--task", "toy", "--base", base, "--data", data, "--name", "c", "--methods", "lora,full",
             "--seeds", "1", "--out", str(tmp_path / "compared"), *settings]  # fmt: skip
    done = run(with_toy, tmp_path, [words])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    assert [one["method"] for one in found["methods"]] == ["base", "lora", "full"]
    assert all(one["scores"] for one in found["methods"])


def test_keys_of_another_task_are_refused(with_toy: Path, tmp_path: Path, tiny_base_folder: Path):
    data = write(tmp_path / "rows.jsonl", toy_rows(20))
    words = ["train", "--task", "toy", "--base", str(tiny_base_folder), "--data", data, "--name", "x"]
    done = run(with_toy, tmp_path, [[*words, "--set", "data.too_long=drop"]])
    assert done.returncode == 1
    assert "has no key 'data.too_long' for the task 'toy'" in done.stderr
