"""Configurations of other tools become recipes; every key of a file is told of, and carried keys have an effect."""

import copy
import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from haori.conversion import TOOLS, Conversion, import_config, report_lines
from haori.conversion.rules import Carried, Left
from haori.core.errors import RecipeError
from haori.tasks.recipe import load_recipe
from tests.command_line import haori

FIXTURES = Path(__file__).parents[1] / "fixtures" / "conversion"
FILES = sorted(path for path in FIXTURES.rglob("*") if path.is_file() and path.name != "dataset_info.json")


def named(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


def convert(path: Path) -> Conversion:
    """Convert a sample; PEFT's files and the arguments of a Trainer name no data."""
    silent = path.parent.name == "peft" or path.name == "training_args.json"
    return import_config(
        path,
        data="rows.jsonl" if silent else None,
        base="some/base" if path.name == "training_args.json" else None,
    )


# What a person who knows both tools writes for these files.
QLORA = {"kind": "qlora", "bits": 4}
EXPECTED: dict[str, dict[str, Any]] = {
    "axolotl-qlora": {
        "name": "qlora", "base": "NousResearch/Llama-3.2-1B",
        "data": {"path": "teknium/GPT4-LLM-Cleaned", "format": "alpaca", "max_length": 2048, "validation_share": 0.1},
        "method": {**QLORA, "rank": 32, "alpha": 16, "dropout": 0.05,
                   "target": ["gate_proj", "down_proj", "up_proj", "q_proj", "v_proj", "k_proj", "o_proj"]},
        "optimizer": {"lr": 2e-4, "weight_decay": 0.0}, "schedule": {"kind": "cosine", "warmup_ratio": 0.1},
        "training": {"epochs": 1, "micro_batch_tokens": 4096, "batch_tokens": 16384, "dtype": "auto",
                     "gradient_checkpointing": True, "evaluations_per_epoch": 4},
    },
    "axolotl-chat_dora": {
        "name": "chat_dora", "base": "Qwen/Qwen2.5-0.5B-Instruct", "revision": "main",
        "data": {"path": "talks.jsonl", "format": "sharegpt", "split": "train", "train_on": "assistant",
                 "system": "Answer in one sentence.", "validation": "held_out.jsonl", "max_length": 4096,
                 "too_long": "truncate"},
        "method": {"kind": "dora", "rank": 16, "alpha": 32, "target": "all-linear", "rslora": True, "lr_ratio": 16,
                   "modules_to_save": ["embed_tokens", "lm_head"], "layers": [0, 1, 2]},
        "optimizer": {"lr": 1e-4, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-6, "max_grad_norm": 0.3},
        "schedule": {"kind": "linear", "warmup_ratio": 0.1},
        "training": {"epochs": 3, "max_steps": 600, "micro_batch_tokens": 16384, "batch_tokens": 131072,
                     "dtype": "bf16", "gradient_checkpointing": True, "evaluations_per_epoch": 2, "save_every": 200,
                     "keep_checkpoints": 3, "patience": 5, "seed": 7, "trackers": ["wandb", "tensorboard"]},
    },
    "axolotl-full_text": {
        "name": "full_text", "base": "EleutherAI/pythia-70m",
        "data": {"path": "roneneldan/TinyStories", "columns": {"text": "story"}, "revision": "refs/convert/parquet",
                 "train_on": "all", "max_length": 512, "validation_share": 0.02},
        "method": {"kind": "full"}, "optimizer": {"lr": 1e-5},
        "schedule": {"kind": "constant", "warmup_ratio": 0.02},
        "training": {"epochs": 4, "micro_batch_tokens": 4096, "batch_tokens": 4096, "dtype": "fp32",
                     "evaluations_per_epoch": 2},
    },
    "llama-factory-lora_sft": {
        "name": "lora_sft", "base": "meta-llama/Meta-Llama-3-8B-Instruct",
        "data": {"path": str(FIXTURES / "llama-factory/data/identity.json"), "format": "alpaca", "max_length": 2048,
                 "max_rows": 1000, "too_long": "truncate", "validation_share": 0.0},
        "method": {"kind": "lora", "rank": 8, "alpha": 16, "dropout": 0.0, "target": "all-linear"},
        "optimizer": {"lr": 1e-4}, "schedule": {"kind": "cosine", "warmup_ratio": 0.1},
        "training": {"epochs": 3, "micro_batch_tokens": 2048, "batch_tokens": 16384, "dtype": "bf16",
            "save_every": 500},
    },
    "llama-factory-qlora_pissa": {
        "name": "qlora_pissa", "base": "Qwen/Qwen2.5-7B-Instruct", "revision": "main",
        "data": {"path": str(FIXTURES / "llama-factory/data/tickets.json"),
                 "columns": {"prompt": "question", "completion": "reply", "system": "role_text"},
                 "system": "You are kind.", "train_on": "all", "max_length": 1024, "too_long": "truncate",
                 "validation_share": 0.1},
        "method": {**QLORA, "double_quantization": False, "rank": 16, "alpha": 64, "dropout": 0.1, "rslora": True,
                   "lr_ratio": 16.0, "target": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        "optimizer": {"lr": 5e-5, "max_grad_norm": 1e9, "weight_decay": 0.05}, "schedule": {"kind": "linear"},
        "training": {"epochs": 3, "micro_batch_tokens": 2048, "batch_tokens": 8192, "dtype": "fp16", "patience": 4,
                     "gradient_checkpointing": False, "seed": 11, "trackers": ["wandb"]},
    },
    "llama-factory-full": {
        "name": "full", "base": "Qwen/Qwen2.5-0.5B",
        "data": {"path": "example/talks", "format": "messages", "split": "train", "max_length": 512,
                 "too_long": "truncate", "validation_share": 0.0},
        "method": {"kind": "full"}, "optimizer": {"lr": 1e-5}, "schedule": {"kind": "cosine", "warmup_ratio": 0.1},
        "training": {"epochs": 3, "micro_batch_tokens": 512, "batch_tokens": 1024, "dtype": "bf16"},
    },
    "trl-sft_cli": {
        "name": "sft_cli", "base": "Qwen/Qwen2.5-0.5B",
        "data": {"path": "stanfordnlp/imdb", "max_length": 1024, "too_long": "truncate", "validation_share": 0.0},
        "method": {"kind": "full"}, "optimizer": {"lr": 1e-4}, "schedule": {"kind": "cosine", "warmup_ratio": 0.0},
        "training": {"epochs": 3, "micro_batch_tokens": 8192, "batch_tokens": 8192, "trackers": []},
    },
    "trl-lora": {
        "name": "lora", "base": "HuggingFaceTB/SmolLM2-360M", "revision": "main",
        "data": {"path": "trl-lib/Capybara", "split": "train", "train_on": "assistant", "max_length": 2048,
                 "too_long": "truncate"},
        "method": {**QLORA, "double_quantization": True, "rank": 64, "alpha": 128, "dropout": 0.1, "rslora": True,
                   "target": "all-linear", "modules_to_save": ["lm_head"]},
        "optimizer": {"lr": 2e-4, "beta2": 0.95}, "schedule": {"warmup_ratio": 0.1},
        "training": {"epochs": 1, "max_steps": 500, "micro_batch_tokens": 4096, "batch_tokens": 32768, "dtype": "bf16",
                     "gradient_checkpointing": True, "evaluations_per_epoch": 1, "save_every": 100, "seed": 3,
                     "trackers": ["tensorboard", "trackio"]},
    },
    "trl-training_args": {
        "name": "trl", "base": "some/base",
        "data": {"path": "rows.jsonl", "columns": {"text": "body"}, "train_on": "all", "max_length": 256,
                 "too_long": "truncate", "validation_share": 0.0},
        "method": {"kind": "lora", "rank": 4},
        "optimizer": {"lr": 3e-5, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-7, "max_grad_norm": 0.5},
        "schedule": {"kind": "constant", "warmup_ratio": 0.0},
        "training": {"epochs": 2, "micro_batch_tokens": 1024, "batch_tokens": 2048, "dtype": "fp32", "seed": 5,
                     "gradient_checkpointing": False, "save_every": 50, "keep_checkpoints": 4},
    },
    "peft-adapter_config": {
        "name": "peft", "base": "HuggingFaceTB/SmolLM2-135M-Instruct", "data": {"path": "rows.jsonl"},
        "method": {"kind": "lora", "rank": 16, "alpha": 32, "dropout": 0.05, "rslora": True, "init": "olora",
                   "target": ["q_proj", "v_proj", "down_proj"], "bias": "adapted", "layers": [3, 4],
                   "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"down_proj": 64}},
    },
    "peft-loftq": {
        "name": "loftq", "base": "mistralai/Mistral-7B-v0.3", "data": {"path": "rows.jsonl"},
        "method": {**QLORA, "init": "loftq", "rank": 8, "alpha": 16, "dropout": 0.0,
                   "target": r"model\.layers\.(1|2)\..*_proj"},
    },
    "peft-ia3": {
        "name": "ia3", "base": "Qwen/Qwen2.5-0.5B", "data": {"path": "rows.jsonl"},
        "method": {"kind": "peft", "type": "IA3", "target": ["k_proj", "v_proj", "down_proj"],
                   "options": {"fan_in_fan_out": False, "feedforward_modules": ["down_proj"],
                               "init_ia3_weights": True}},
    },
    "peft-adalora": {
        "name": "adalora", "base": "Qwen/Qwen2.5-0.5B", "data": {"path": "rows.jsonl"},
        "method": {"kind": "adalora", "rank": 8, "initial_rank": 12, "interval": 10, "orthogonality": 0.4, "alpha": 32,
                   "dropout": 0.1, "target": ["q_proj", "v_proj"]},
    },
    "unsloth-lora_text": {
        "name": "lora_text", "base": "unsloth/Qwen2.5-0.5B",
        "data": {"path": "tatsu-lab/alpaca", "max_length": 2048, "train_on": "all", "too_long": "truncate"},
        "method": {**QLORA, "rank": 64, "alpha": 16, "dropout": 0.0, "rslora": False,
                   "target": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
        "optimizer": {"lr": 2e-4, "weight_decay": 0.01}, "schedule": {"kind": "linear"},
        "training": {"epochs": 1, "micro_batch_tokens": 4096, "batch_tokens": 16384, "gradient_checkpointing": True,
                     "seed": 3407},
    },
    "unsloth-full": {
        "name": "full", "base": "unsloth/Qwen2.5-0.5B",
        "data": {"path": "mine.jsonl", "format": "sharegpt", "max_length": 1024, "train_on": "assistant",
                 "too_long": "truncate"},
        "method": {"kind": "full"}, "optimizer": {"lr": 2e-5, "weight_decay": 0.02},
        "schedule": {"kind": "cosine", "warmup_ratio": 0.2},
        "training": {"epochs": 100, "max_steps": 30, "micro_batch_tokens": 1024, "batch_tokens": 4096, "save_every": 10,
                     "gradient_checkpointing": False, "seed": 8, "trackers": ["wandb", "tensorboard"]},
    },
    "unsloth-keywords": {
        "name": "keywords", "base": "unsloth/Llama-3.2-1B-Instruct",
        "data": {"path": "mine.jsonl", "max_length": 2048, "too_long": "truncate"},
        "method": {**QLORA, "init": "loftq", "rank": 32, "alpha": 64, "dropout": 0.1, "rslora": True, "bias": "all",
                   "target": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        "optimizer": {"lr": 2e-4, "weight_decay": 0.01}, "schedule": {"kind": "linear", "warmup_ratio": 5 / 60},
        "training": {"epochs": 100, "max_steps": 60, "micro_batch_tokens": 4096, "batch_tokens": 16384,
                     "gradient_checkpointing": True, "seed": 17},
    },
    "ms-swift-sft": {
        "name": "sft", "base": "Qwen/Qwen2.5-7B-Instruct",
        "data": {"path": "swift/self-cognition", "max_rows": 1000, "max_length": 2048, "validation_share": 0.0},
        "method": {"kind": "lora", "rank": 8, "alpha": 32, "dropout": 0.05,
                   "target": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        "optimizer": {"lr": 1e-4, "weight_decay": 0.1, "beta2": 0.95},
        "schedule": {"kind": "cosine", "warmup_ratio": 0.05},
        "training": {"epochs": 5, "micro_batch_tokens": 2048, "batch_tokens": 16384, "dtype": "bf16", "seed": 42,
                     "save_every": 1000, "keep_checkpoints": 5},
    },
    "ms-swift-qlora": {
        "name": "qlora", "base": "Qwen/Qwen2.5-1.5B-Instruct", "revision": "master",
        "data": {"path": "mine.jsonl", "max_rows": 500, "validation": "held.jsonl", "system": "Be brief.",
                 "columns": {"prompt": "ask", "completion": "reply"}, "max_length": 1024, "too_long": "truncate",
                 "train_on": "all"},
        "method": {**QLORA, "init": "loftq", "double_quantization": False, "rank": 16, "alpha": 64, "dropout": 0.1,
                   "bias": "all", "lr_ratio": 16, "rslora": True, "target": r"model\.layers\..*\.(q|v)_proj",
                   "modules_to_save": ["embed_tokens"]},
        "optimizer": {"lr": 2e-4, "weight_decay": 0.05, "beta1": 0.8, "beta2": 0.99, "eps": 1e-7, "max_grad_norm": 0.7},
        "schedule": {"kind": "linear", "warmup_ratio": 0.1},
        "training": {"epochs": 2, "max_steps": 300, "micro_batch_tokens": 2048, "batch_tokens": 8192, "dtype": "fp16",
                     "gradient_checkpointing": False, "save_every": 100, "keep_checkpoints": 4, "patience": 6,
                     "seed": 9, "trackers": ["wandb"]},
    },
    "ms-swift-args": {
        "name": "ms-swift", "base": "Qwen/Qwen2.5-0.5B-Instruct",
        "data": {"path": "example/talks", "max_rows": 200, "too_long": "drop", "train_on": "assistant",
                 "validation_share": 0.05},
        "method": {"kind": "adalora", "rank": 4, "initial_rank": 6, "orthogonality": 0.3, "alpha": 32, "dropout": 0.05,
                   "target": "all-linear"},
        "optimizer": {"lr": 1e-4, "weight_decay": 0.1, "beta2": 0.95},
        "schedule": {"kind": "cosine", "warmup_ratio": 0.05},
        "training": {"epochs": 1, "dtype": "fp32", "seed": 42},
    },
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_configuration_becomes_the_recipe_that_a_person_writes(path: Path):
    assert convert(path).document == EXPECTED[named(path)]


@pytest.mark.parametrize("path", FILES, ids=named)
def test_the_tool_is_seen_from_the_keys(path: Path):
    assert convert(path).tool.name == path.parent.name


def test_there_are_three_samples_of_each_tool():
    assert {tool: sum(path.parent.name == tool for path in FILES) >= 3 for tool in TOOLS} == dict.fromkeys(TOOLS, True)


def leaves(value: Any, prefix: str = "") -> Iterator[str]:
    """Yield the path of each value in a document that says something."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{prefix}[{number}]")
    elif value not in (None, "", [], {}):
        yield prefix


def read(path: Path) -> dict[str, Any]:
    text = path.read_text("utf-8")
    return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_every_key_is_told_of(path: Path):
    conversion = convert(path)
    told = {entry.key for entry in conversion.entries if not entry.assumed}
    words = " ".join(f"{key} {said}" for key, said in conversion.left())
    for leaf in leaves(read(path)):
        above = [leaf[:end] for end in range(1, len(leaf) + 1) if leaf[end : end + 1] in (".", "[", "")]
        table = next((part for part in above if part in told), None)
        assert table is not None, leaf
        if table != leaf and any(isinstance(e.outcome, Left) for e in conversion.entries if e.key == table):
            assert leaf.removeprefix(table).lstrip(".").split(".")[0] in words, leaf


OTHER = {
    "cosine": "linear", "linear": "cosine", "constant": "linear", "constant_with_warmup": "linear",
    "lora": "full", "qlora": "lora", "bf16": "fp16", "bfloat16": "float32", "float32": "bfloat16", "truncate": "drop",
    "right": "delete", "delete": "right", "all": "default", "none": "unsloth", "unsloth": "none",
        "alpaca": "completion",
    "chat_template": "alpaca", "completion": "alpaca", "olora": "pissa", "loftq": True, "lora_only": "all",
        "IA3": "LOHA",
    "LORA": "ADALORA", "ADALORA": "LORA", "full": "lora", "adalora": "lora", "epoch": "steps", "offload": False,
    "sharegpt": "alpaca", "steps": "epoch", "no": "epoch", "default": "all", "all-linear": ["q_proj"],
    "roneneldan/TinyStories": "other/rows", "auto": True, "conversations": "messages",
}  # fmt: skip


def changed(value: Any) -> Any:
    """Return another value that the key can have."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1 if value != 4 else 8
    if isinstance(value, float):
        return value + 2 if value >= 1 else value * 0.45 or 0.2
    if isinstance(value, str):
        try:
            return float(value) * 0.45 or 0.2
        except ValueError:
            return OTHER.get(value, f"{value}x")
    if isinstance(value, dict):
        return {f"{key}x": inner for key, inner in value.items()}
    return [changed(value[0]), *value[1:]]


def replaced(document: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the document with another value of a key."""
    copied = copy.deepcopy(document)
    *parents, last = key.replace("[0]", ".0").split(".")
    place: Any = copied
    for parent in parents:
        place = place[int(parent)] if parent.isdigit() else place[parent]
    place[last] = changed(place[last])
    return copied


# Keys beside which another key says the same.
MUTE = {
    "axolotl-qlora": {"load_in_4bit", "adapter"},
    "llama-factory-lora_sft": {"dataset"},  # its second name changes
    "axolotl-full_text": {"float32", "bf16", "fp16"},
    "axolotl-chat_dora": {"datasets[0].path", "datasets[0].roles_to_train"},
    "unsloth-keywords": {"load_in_4bit"},
    "trl-training_args": {"bf16", "fp16"},
}


@pytest.mark.parametrize("path", FILES, ids=named)
def test_another_value_of_a_carried_key_makes_another_recipe(path: Path, tmp_path: Path):
    document = read(path)
    plain = convert(path)
    carried = [e.key for e in plain.entries if isinstance(e.outcome, Carried) and not e.assumed]
    place = tmp_path / path.parent.name
    place.mkdir()
    if (path.parent / "data").is_dir():
        (place / "data").symlink_to(path.parent / "data")
    other, without_effect = place / path.name, []
    for key in carried:
        if key.startswith(("dataset_info.", "(")) or key in MUTE.get(named(path), ()):
            continue
        other.write_text(json.dumps(replaced(document, key)), encoding="utf-8")
        try:
            found = convert(other).document
        except RecipeError as error:
            assert key.rpartition(".")[2] in str(error) or key == "dataset", key
            continue
        found["data"]["path"] = found["data"]["path"].replace(str(place), str(path.parent))
        if found == plain.document:
            without_effect.append(key)
    assert without_effect == []


def written(folder: Path, document: Any, name: str = "theirs.yml") -> Path:
    path = folder / name
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document), encoding="utf-8")
    return path


AXOLOTL = {"base_model": "b/m", "datasets": [{"path": "rows.jsonl", "type": "alpaca"}], "adapter": "lora"}


def test_what_stock_peft_saves_is_read_with_the_same_meaning(tmp_path: Path):
    from peft import LoraConfig

    config = LoraConfig(
        r=12, lora_alpha=24, lora_dropout=0.2, target_modules=["q_proj"], bias="lora_only",
        init_lora_weights="pissa_niter_4", layers_to_transform=[1], rank_pattern={"q_proj": 3}, task_type="CAUSAL_LM",
        modules_to_save=["lm_head"], base_model_name_or_path="b/m",
    )  # fmt: skip
    config.save_pretrained(str(tmp_path))
    conversion = import_config(tmp_path / "adapter_config.json", data="rows.jsonl", name="a")
    assert conversion.document["method"] == {
        "kind": "lora", "rank": 12, "alpha": 24, "dropout": 0.2, "target": ["q_proj"], "bias": "adapted",
        "rslora": False, "init": "pissa", "layers": [1], "rank_pattern": {"q_proj": 3}, "modules_to_save": ["lm_head"],
    }  # fmt: skip
    assert conversion.left() == []


def test_every_key_of_the_arguments_of_a_trainer_is_known(tmp_path: Path):
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=3e-4, lr_scheduler_type="cosine", use_cpu=True
    )
    path = written(tmp_path, json.loads(arguments.to_json_string()), "trainer.yml")
    conversion = import_config(path, base="b/m", data="rows.jsonl")
    assert conversion.tool.name == "trl"
    assert conversion.recipe.optimizer.lr == 3e-4
    left = dict(conversion.left())
    assert not [key for key, said in left.items() if "known here" in said]
    assert "CUDA_VISIBLE_DEVICES" in left["use_cpu"]


def test_keywords_of_a_lora_config_are_all_known():
    from peft import AdaLoraConfig, LoraConfig

    for config in (LoraConfig(), AdaLoraConfig(total_step=10)):
        unknown = [key for key in config.to_dict() if key not in TOOLS["peft"].keys]
        nested = [key for key in unknown if not any(known.startswith(f"{key}.") for known in TOOLS["peft"].keys)]
        assert nested == []


@pytest.mark.parametrize(
    ("more", "method"),
    [
        ({"adapter": None}, {"kind": "full"}),
        ({"adapter": "qlora", "load_in_4bit": True}, {"kind": "qlora", "bits": 4}),
        ({"load_in_8bit": True}, {"kind": "qlora", "bits": 8}),
        ({"peft_use_dora": True}, {"kind": "dora"}),
        ({"peft_use_dora": True, "load_in_4bit": True}, {"kind": "qlora", "bits": 4}),
        ({"peft_init_lora_weights": "olora"}, {"kind": "lora", "init": "olora"}),
        ({"peft_init_lora_weights": "eva"}, {"kind": "lora", "init": "eva"}),
        ({"peft_init_lora_weights": True}, {"kind": "lora"}),
        ({"peft_init_lora_weights": "gaussian"}, {"kind": "lora"}),
        ({"peft": {"loftq_config": {"loftq_bits": 4}}}, {"kind": "qlora", "bits": 4, "init": "loftq"}),
        ({"peft": {"backend": "bnb", "weight_dtype": "nf4"}}, {"kind": "qlora", "bits": 4}),
        ({"lora_target_modules": "q_proj|v_proj"}, {"kind": "lora", "target": "q_proj|v_proj"}),
        ({"lora_r": "8"}, {"kind": "lora", "rank": 8}),
    ],
)
def test_variants_become_kinds_of_method(more: dict[str, Any], method: dict[str, Any], tmp_path: Path):
    conversion = import_config(written(tmp_path, AXOLOTL | more))
    assert conversion.document["method"] == method
    named_keys = {entry.key.split(".")[0] for entry in conversion.entries}
    assert {key for key, value in more.items() if value is not None} <= named_keys


def test_dora_over_a_quantised_base_and_unknown_starts_are_left_by_name(tmp_path: Path):
    more = {"peft_use_dora": True, "load_in_4bit": True, "peft_init_lora_weights": "gaussian"}
    left = dict(import_config(written(tmp_path, AXOLOTL | more)).left())
    assert set(left) == {"peft_use_dora", "peft_init_lora_weights"}


@pytest.mark.parametrize(
    ("dataset", "path", "left"),
    [
        ({"path": "json", "data_files": "a.jsonl"}, "a.jsonl", set()),
        ({"path": "json", "data_files": ["a.jsonl"]}, "a.jsonl", set()),
        ({"path": "org/rows", "data_files": "part.jsonl"}, "org/rows", {"datasets[0].data_files"}),
    ],
)
def test_files_beside_the_name_of_a_builder_are_the_data(dataset: Any, path: str, left: set[str], tmp_path: Path):
    conversion = import_config(written(tmp_path, AXOLOTL | {"datasets": [dataset]}))
    assert conversion.document["data"]["path"] == path
    assert set(dict(conversion.left())) == left


def test_several_files_of_a_builder_are_refused_by_what_to_do(tmp_path: Path):
    dataset = {"path": "json", "data_files": ["a.jsonl", "b.jsonl"]}
    with pytest.raises(RecipeError, match="put them into one folder; say which with --data"):
        import_config(written(tmp_path, AXOLOTL | {"datasets": [dataset]}))


def test_a_tracker_that_is_switched_off_stays_off(tmp_path: Path):
    on = import_config(written(tmp_path, AXOLOTL | {"wandb_project": "p"}))
    off = import_config(written(tmp_path, AXOLOTL | {"wandb_project": "p", "wandb_mode": "disabled"}))
    assert on.document["training"]["trackers"] == ["wandb"]
    assert "trackers" not in off.document["training"]


SECRET = "hf_abcdefghijklmnopqrstuv"
ODD = [
    None,
    [],
    {},
    "x",
    "",
    -1,
    0,
    1e30,
    2**70,
    "1e999",
    True,
    [1],
    [{}],
    [["a"]],
    [None],
    {"a": {"b": 1}},
    SECRET,
    [SECRET],
]


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*above, key)
        yield from places(inner, (*above, key))


@pytest.mark.parametrize("path", FILES, ids=named)
def test_odd_values_end_in_a_recipe_or_a_sentence_and_secrets_in_neither(path: Path, tmp_path: Path):
    document, draw = read(path), random.Random(path.name)
    for place in places(document):
        for odd in draw.sample(ODD, 3):
            other = copy.deepcopy(document)
            inner = functools.reduce(lambda table, key: table[key], place[:-1], other)
            inner[place[-1]] = odd
            (tmp_path / path.name).write_text(json.dumps(other), encoding="utf-8")
            try:
                found = import_config(tmp_path / path.name, path.parent.name, data="d.jsonl", base="b/m")
            except RecipeError as error:
                assert SECRET not in str(error)
            else:
                assert SECRET not in json.dumps(found.document) + " ".join(report_lines(found))


def test_steps_of_warm_up_need_the_steps_of_the_run(tmp_path: Path):
    unknown = import_config(written(tmp_path, AXOLOTL | {"warmup_steps": 10, "num_epochs": 2}))
    assert "warmup_steps" in dict(unknown.left())
    assert "warmup_ratio" not in unknown.document["schedule"]
    known = import_config(written(tmp_path, AXOLOTL | {"warmup_steps": 10, "max_steps": 40}))
    assert known.document["schedule"]["warmup_ratio"] == 0.25


def test_what_the_tool_does_by_itself_is_said(tmp_path: Path):
    conversion = import_config(written(tmp_path, AXOLOTL))
    assumed = dict(conversion.assumed())
    assert {"lr_scheduler", "num_epochs", "sequence_len", "val_set_size", "micro_batch_size"} <= assumed.keys()
    assert conversion.recipe.data.max_length == 512  # Axolotl's own
    assert conversion.recipe.data.validation_share == 0.0
    assert conversion.recipe.training.batch_tokens == 512


SECRETS = {
    "wandb_api_key": "0123456789abcdef0123456789abcdef01234567",
    "hub_token": "plain-looking-token",
    "hf_token": ["hf_abcdefghijklmnopqrstuv"],
    "s3": {"secret_access_key": "wJalrXUtnFEMI", "password": "pw-value"},
    "webhook_url": "https://hooks.example/T000/secret-part",
    "note": "hf_ABCDEFGHIJKLMNOPQRSTUV",
    "mirror": "https://someone:hunter22@example.org/data.jsonl",
}


def test_secrets_are_named_and_never_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = written(tmp_path, AXOLOTL | SECRETS | {"datasets": [{"path": "rows.jsonl", "hub_token": "inner-token"}]})
    out = tmp_path / "out" / "recipe.yaml"
    done = haori(capsys, "import-config", path, "--out", out)
    assert done.code == 0
    shown = done.out + done.err + out.read_text("utf-8")
    for value in (
        "0123456789abcdef",
        "plain-looking",
        "hf_abc",
        "hf_ABC",
        "wJalr",
        "pw-value",
        "secret-part",
        "hunter22",
        "inner-token",
    ):
        assert value not in shown
    for key in (*SECRETS, "datasets[0].hub_token"):
        assert key in done.err


def test_a_secret_in_a_list_is_left_with_the_list(tmp_path: Path):
    conversion = import_config(written(tmp_path, AXOLOTL | {"lora_target_modules": ["q_proj", SECRET]}))
    assert "a secret" in dict(conversion.left())["lora_target_modules"]
    assert "target" not in conversion.document["method"]


def test_the_command_writes_a_recipe_that_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "recipe.yaml"
    done = haori(capsys, "import-config", FIXTURES / "axolotl/chat_dora.yml", "--out", out, "--name", "mine")
    assert done.code == 0
    assert load_recipe(out).name == "mine"
    assert "neftune_noise_alpha" in out.read_text("utf-8") and "neftune_noise_alpha" in done.err
    assert f"haori train {out}" in done.out
    again = haori(capsys, "import-config", FIXTURES / "axolotl/chat_dora.yml", "--out", out)
    assert (again.code, "is there already" in again.err) == (2, True)
    shown = haori(capsys, "import-config", FIXTURES / "axolotl/chat_dora.yml", "--base", "b/x", "--data", "d.jsonl")
    assert yaml.safe_load(shown.out)["base"] == "b/x"
    assert yaml.safe_load(shown.out)["data"]["path"] == "d.jsonl"


LONG = "a: [" * 3000
LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
BAD = [
    ("no-such.yml", None, "does not exist"),
    ("a.yml", "", "must hold a table"),
    ("a.yml", "- 1\n- 2\n", "must hold a table"),
    ("a.yml", "a: [1", "cannot be read"),
    ("a.yml", LONG, "nested too deeply"),
    ("a.yml", "base_model: a\nbase_model: b\n", "given twice"),
    ("a.json", '{"base_model": "a", "base_model": "b"}', "given twice"),
    ("a.json", "base_model: a", "cannot be read"),
    ("a.yml", "colour: red\n", "by which no tool is known"),
    ("a.yml", "base_model: b/m\nadapter: lora\n", "names no data; say which with --data"),
    ("a.yml", yaml.safe_dump(AXOLOTL | {"lora_r": "many"}), "'lora_r' cannot be 'many'; it should be a number"),
    ("a.yml", yaml.safe_dump(AXOLOTL | {"lora_r": 2.5}), "be a whole number"),
    ("a.yml", yaml.safe_dump(AXOLOTL | {"lora_r": 0}), "That comes from 'lora_r'"),
    ("a.yml", yaml.safe_dump(AXOLOTL | {"learning_rate": 3}), "That comes from 'learning_rate'"),
    ("a.yml", yaml.safe_dump(AXOLOTL | {"learning_rate": float("nan")}), "finite"),
    ("a.yml", yaml.safe_dump(AXOLOTL | {"load_in_4bit": "maybe"}), "be true or false"),
    ("a.yml", yaml.safe_dump(AXOLOTL | {"lora_target_modules": [1]}), "be a list of texts"),
    ("a.yml", yaml.safe_dump(AXOLOTL | {"rl": "grpo"}), "asks for reinforcement learning or distillation (grpo)"),
    ("a.yml", yaml.safe_dump({"model_name_or_path": "b", "stage": "rm", "finetuning_type": "lora"}), "reward model"),
    ("a.yml", LAUGHS, "more than"),
]


@pytest.mark.parametrize(("name", "text", "part"), BAD, ids=range(len(BAD)))
def test_bad_input_gets_a_sentence(name: str, text: str | None, part: str, tmp_path: Path, capsys: Any):
    path = tmp_path / name if text is None else written(tmp_path, text, name)
    done = haori(capsys, "import-config", path)
    assert done.code == 2
    assert done.err.startswith("Error: ") and done.err.count("\n") == 1
    assert part in done.err


def test_keys_cannot_write_into_the_recipe_or_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    evil = {"a\nbase: evil/model\n#": 1, "b\x1b[2J": {"in\nside": 2}, "special_tokens": {"x\ny": "z"}}
    done = haori(capsys, "import-config", written(tmp_path, AXOLOTL | evil))
    assert yaml.safe_load(done.out)["base"] == "b/m"
    assert "\x1b" not in done.out + done.err
    assert "\nbase: evil" not in done.err


def test_a_configuration_of_another_tool_trains(
    tmp_path: Path, haori_home: Path, tiny_base_folder: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [{"instruction": f"what is number {i}?", "output": "odd" if i % 2 else "even"} for i in range(24)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {
        "base_model": str(tiny_base_folder), "datasets": [{"path": str(data), "type": "alpaca"}], "adapter": "lora",
        "lora_r": 3, "lora_alpha": 6, "lora_target_modules": ["q_proj"], "sequence_len": 64, "micro_batch_size": 2,
        "gradient_accumulation_steps": 2, "num_epochs": 2, "learning_rate": 2e-3, "val_set_size": 0.25, "seed": 4,
        "lora_modules_to_save": ["lm_head"], "float32": True,
    }  # fmt: skip
    out = tmp_path / "recipe.yaml"
    assert haori(capsys, "import-config", written(tmp_path, config), "--out", out).code == 0
    done = haori(capsys, "train", out)
    assert done.code == 0, done.err
    saved = json.loads(next((haori_home / "library").rglob("adapter_config.json")).read_text("utf-8"))
    assert (saved["r"], saved["lora_alpha"], saved["modules_to_save"]) == (3, 6, ["lm_head"])


def test_a_tool_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = written(tmp_path, {"lora_r": 4, "base_model": "b/m", "datasets": [{"path": "a.jsonl"}]})
    assert haori(capsys, "import-config", path, "--tool", "axolotl").code == 0
    wrong = haori(capsys, "import-config", path, "--tool", "axolotlx")
    assert wrong.code == 2 and "did you mean 'axolotl'" in wrong.err


def test_names_of_rules_are_keys_of_a_recipe():
    from haori.tasks.recipe import recipe_schema

    def fields(schema: dict[str, Any], root: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for option in (schema, *schema.get("anyOf", []), *schema.get("oneOf", [])):
            if "$ref" in option:
                yield from fields(root["$defs"][option["$ref"].rpartition("/")[2]], root, prefix)
            for name, inner in option.get("properties", {}).items():
                yield f"{prefix}{name}"
                yield from fields(inner, root, f"{prefix}{name}.")

    known = set(fields(recipe_schema(), recipe_schema()))
    for tool in TOOLS.values():
        for key, rule in tool.keys.items():
            assert set(rule.ours) <= known, key
