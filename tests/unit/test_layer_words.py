"""Above the tasks nothing is tied to text generation by name, and training knows no unit but the task's."""

import re
from pathlib import Path

import pytest

import haori

SOURCE = Path(haori.__file__).parent
ABOVE = ("training", "evaluation", "jobs", "serve", "server", "cli", "api.py")
NAMES = re.compile("CAUSAL_LM|CausalLM|causal_lm")

# File and words of the line, with the reason why the name may stand there.
ALLOWED = {
    ("cli/demo.py", 'task_of("causal_lm")'): "the demonstration is of text generation",
    ("jobs/fine_tuning/recipe.py", '"task": "causal_lm"'): "OpenAI's method `supervised` is that task",
    ("jobs/tenants/files.py", "TaskType.CAUSAL_LM"): "the training API is of text generation, and PEFT's files say so",
}

# What training says of tokens, file by file: all of it of text tasks, or a name in files that are kept.
TOKENS = {
    "checkpoint.py": ("epoch_tokens", '"tokens"', "tokens, pixels, residues"),
    "loop.py": ("labelled tokens, rows, pairs",),
    "diagnosis.py": ("nats per token, row or pair",),
    "out_of_memory.py": ("tokens, pixels",),
    "preparation.py": ("trainable_tokens", "eva_tokens", "too_few_tokens", "modules and tokens trained in full"),
    "continuing.py": ("trainable_tokens", "names of trained tokens", "convert_ids_to_tokens"),
}


def files_above() -> list[Path]:
    found = [path for part in ABOVE for path in (sorted((SOURCE / part).rglob("*.py")) or [SOURCE / part])]
    return [path for path in found if path.is_file()]


def test_the_places_that_are_searched_are_there():
    assert {path.relative_to(SOURCE).parts[0] for path in files_above()} == set(ABOVE)
    assert NAMES.search((SOURCE / "tasks" / "causal_lm" / "task.py").read_text())


def test_no_file_above_the_tasks_names_text_generation():
    found = [
        (path.relative_to(SOURCE).as_posix(), line.strip())
        for path in files_above()
        for line in path.read_text(encoding="utf-8").splitlines()
        if NAMES.search(line)
    ]
    excused = {(name, words) for name, line in found for place, words in ALLOWED if place == name and words in line}
    assert [item for item in found if not any(item[0] == at and words in item[1] for at, words in excused)] == []
    assert excused == set(ALLOWED), "an exception that is needed no more"


def test_the_name_of_a_task_stands_in_its_folder_and_the_registry():
    """A recipe's name of a task is said by its folder and by one line of the registry."""
    tasks = SOURCE / "tasks"
    named = {
        path.relative_to(tasks).as_posix()
        for path in tasks.rglob("*.py")
        if re.search('"causal_lm"', path.read_text(encoding="utf-8")) and path.parent.name != "causal_lm"
    }
    assert named == {"registry.py"}


@pytest.mark.parametrize("path", sorted((SOURCE / "training").rglob("*.py")), ids=lambda path: path.name)
def test_training_speaks_of_cost_and_not_of_tokens(path: Path):
    text = path.read_text(encoding="utf-8")
    for words in TOKENS.get(path.name, ()):
        assert words in text, "an exception that is needed no more"
        text = text.replace(words, "")
    assert re.findall(r".*tokens?\b(?!izer).*", text, re.IGNORECASE) == []
