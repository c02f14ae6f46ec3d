"""Configurations of other tasks than text: carried to a recipe of the task where there is one, refused where not."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from haori.conversion import import_config
from haori.core.errors import RecipeError
from haori.tasks.registry import TASKS

PAIRS = {"path": "pairs.jsonl"}
AXOLOTL = {"base_model": "b/m", "datasets": [PAIRS], "adapter": "lora", "sequence_len": 64, "micro_batch_size": 2}
FACTORY = {"model_name_or_path": "b/m", "finetuning_type": "lora", "dataset": "pairs", "template": "qwen"}
SWIFT = {"model": "b/m", "train_type": "lora", "dataset": "pairs.jsonl", "max_length": 64}
TRL = {"model_name_or_path": "b/m", "dataset_name": "pairs.jsonl", "use_peft": True}

PREFERENCE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (AXOLOTL | {"rl": "dpo", "rl_beta": 0.2}, {"kind": "dpo", "beta": 0.2}),
    (AXOLOTL | {"rl": "dpo", "dpo_label_smoothing": 0.1}, {"kind": "dpo", "label_smoothing": 0.1}),
    (AXOLOTL | {"rl": "ipo"}, {"kind": "ipo"}),
    (AXOLOTL | {"rl": "orpo", "orpo_alpha": 0.3}, {"kind": "orpo", "beta": 0.3}),
    (AXOLOTL | {"rl": "simpo"}, {"kind": "simpo", "beta": 0.1, "gamma": 0.5}),  # TRL's own, which differ from ours
    (AXOLOTL | {"rl": "kto", "kto_desirable_weight": 2.0}, {"kind": "kto", "desirable_weight": 2.0}),
    (FACTORY | {"stage": "dpo", "pref_loss": "hinge", "pref_beta": 0.3}, {"kind": "hinge", "beta": 0.3}),
    (FACTORY | {"stage": "dpo"}, {"kind": "dpo"}),
    (FACTORY | {"stage": "dpo", "pref_loss": "orpo", "pref_beta": 0.1}, {"kind": "orpo", "beta": 0.1}),
    (FACTORY | {"stage": "kto", "kto_rejected_weight": 0.5}, {"kind": "kto", "undesirable_weight": 0.5}),
    (SWIFT | {"rlhf_type": "dpo", "beta": 0.5, "loss_type": "ipo"}, {"kind": "ipo", "beta": 0.5}),
    (SWIFT | {"rlhf_type": "simpo", "simpo_gamma": 1.5}, {"kind": "simpo", "gamma": 1.5}),
    (TRL | {"loss_type": "sigmoid", "beta": 0.05}, {"kind": "dpo", "beta": 0.05}),
]


def written(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "theirs.yml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


@pytest.mark.parametrize(("document", "loss"), PREFERENCE)
def test_preference_training_is_carried_to_its_task(document: dict[str, Any], loss: dict[str, Any], tmp_path: Path):
    conversion = import_config(written(tmp_path, document), data="pairs.jsonl")
    assert (conversion.document["task"], conversion.document["loss"]) == ("preference", loss)
    assert conversion.recipe.task == "preference"
    assert "too_long" not in conversion.document["data"]  # pairs are not cut off


def test_columns_of_pairs_are_carried_and_what_pairs_have_no_key_for_is_left(tmp_path: Path):
    kinds = {"field_prompt": "q", "field_chosen": "good", "field_rejected": "bad", "prompt_format": "{prompt}"}
    more = {"rl": "dpo", "train_on_inputs": True, "simpo_gamma": 1.0, "datasets": [PAIRS | {"type": kinds}]}
    conversion = import_config(written(tmp_path, AXOLOTL | more))
    assert conversion.document["data"]["columns"] == {"prompt": "q", "chosen": "good", "rejected": "bad"}
    left = dict(conversion.left())
    assert set(left) == {"train_on_inputs", "simpo_gamma", "datasets[0].type.prompt_format"}
    assert "data.train_on is no key" in left["train_on_inputs"]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (AXOLOTL | {"rl": "grpo"}, "reinforcement"),
        (AXOLOTL | {"reward_model": True}, "reward model"),
        (FACTORY | {"stage": "ppo"}, "reinforcement"),
        (SWIFT | {"task_type": "embedding"}, "another task"),
        ({"peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "base_model_name_or_path": "b/m"}, "another task"),
    ],
)
def test_tasks_that_recipes_do_not_have_are_refused(document: dict[str, Any], words: str, tmp_path: Path):
    with pytest.raises(RecipeError, match=words):
        import_config(written(tmp_path, document), data="rows.jsonl")


@pytest.mark.skipif("classification" not in TASKS, reason="recipes have no such task")
@pytest.mark.parametrize(("kind", "problem"), [("SEQ_CLS", None), ("TOKEN_CLS", "token")])
def test_a_classifier_is_carried_to_its_task(kind: str, problem: str | None, tmp_path: Path):
    document = {"peft_type": "LORA", "task_type": kind, "base_model_name_or_path": "b/m", "r": 4}
    conversion = import_config(written(tmp_path, document), data="rows.csv")
    assert (conversion.recipe.task, conversion.document["method"]["rank"]) == ("classification", 4)
    assert conversion.document["data"].get("problem") == problem


@pytest.mark.skipif("classification" not in TASKS, reason="recipes have no such task")
@pytest.mark.parametrize(
    ("more", "problem", "left"),
    [
        ({"problem_type": "multi_label_classification", "num_labels": 4}, "multi_label", set()),
        ({"problem_type": "single_label_classification"}, "single_label", set()),
        ({"problem_type": "regression"}, None, {"problem_type"}),
    ],
)
def test_the_problem_of_a_classifier_is_carried(more: dict[str, Any], problem: Any, left: set[str], tmp_path: Path):
    document = SWIFT | {"task_type": "seq_cls"} | more
    conversion = import_config(written(tmp_path, document), data="rows.csv")
    assert conversion.recipe.task == "classification"
    assert conversion.document["data"].get("problem") == problem
    assert set(dict(conversion.left())) == left


@pytest.mark.skipif("classification" in TASKS, reason="recipes have the task")
def test_a_classifier_is_refused_where_recipes_have_none(tmp_path: Path):
    document = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "b/m"}
    with pytest.raises(RecipeError, match="asks for classification"):
        import_config(written(tmp_path, document), data="rows.csv")


def test_a_preference_file_of_llama_factory_brings_its_columns(tmp_path: Path):
    (tmp_path / "data").mkdir()
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad", "query": "more"}
    described = {"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(described), encoding="utf-8")
    conversion = import_config(written(tmp_path, FACTORY | {"stage": "dpo", "pref_ftx": 0.2}))
    assert conversion.document["data"] == {
        "path": str(tmp_path / "data/pairs.json"), "columns": {"prompt": "ask", "chosen": "good", "rejected": "bad"},
        "max_length": 2048, "validation_share": 0.0,
    }  # fmt: skip
    assert {"pref_ftx", "dataset_info.columns.query"} <= dict(conversion.left()).keys()


def test_options_of_preference_training_beside_text_are_left(tmp_path: Path):
    left = dict(import_config(written(tmp_path, AXOLOTL | {"rl_beta": 0.1})).left())
    assert "preference training" in left["rl_beta"]


ORIGINS: list[tuple[dict[str, Any], str]] = [
    (AXOLOTL | {"lora_model_dir": "out/first"}, "lora_model_dir"),
    (FACTORY | {"adapter_name_or_path": "out/first"}, "adapter_name_or_path"),
    (FACTORY | {"adapter_name_or_path": ["out/first"], "create_new_adapter": False}, "adapter_name_or_path"),
    (SWIFT | {"adapters": ["out/first"]}, "adapters"),
    (SWIFT | {"adapters": "out/first"}, "adapters"),
]


@pytest.mark.parametrize(("document", "key"), ORIGINS)
def test_the_adapter_to_go_on_from_is_carried_and_its_shape_is_its_own(
    document: dict[str, Any], key: str, tmp_path: Path
):
    conversion = import_config(written(tmp_path, document | {"lora_alpha": 64}), data="pairs.jsonl")
    assert conversion.recipe.from_ == "out/first"
    assert conversion.document["method"] == {"kind": "lora"}  # none of the tool's own defaults of rank and alpha either
    assert dict(conversion.carried())[key] == 'from = "out/first"'
    assert "has its own method.alpha" in dict(conversion.left())["lora_alpha"]
    assert not [word for word, _ in conversion.assumed() if word.startswith("lora_")]
    assert import_config(written(tmp_path, document | {key: None}), data="pairs.jsonl").recipe.from_ is None


@pytest.mark.parametrize(
    ("document", "key", "why"),
    [
        (FACTORY | {"adapter_name_or_path": "a/x,b/y"}, "adapter_name_or_path", "not a/x, b/y"),
        (SWIFT | {"adapters": ["a/x", "b/y"]}, "adapters", "not a/x, b/y"),
        (FACTORY | {"adapter_name_or_path": "a/x", "create_new_adapter": True}, "adapter_name_or_path", "merged there"),
        (AXOLOTL | {"lora_model_dir": "a/x", "adapter": "full"}, "lora_model_dir", "'full'"),
    ],
)
def test_adapters_that_a_run_cannot_go_on_from_are_left_by_name(
    document: dict[str, Any], key: str, why: str, tmp_path: Path
):
    conversion = import_config(written(tmp_path, document), data="pairs.jsonl")
    assert conversion.recipe.from_ is None
    assert why in dict(conversion.left())[key]
    if document.get("create_new_adapter"):
        assert "create_new_adapter" in dict(conversion.left())
