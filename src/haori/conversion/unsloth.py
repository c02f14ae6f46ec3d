"""Unsloth: the YAML of its command line and Studio, or the keywords of `get_peft_model`. Read from its configuration.

The YAML has the tables `data`, `training`, `lora` and `logging`; keywords stand alone, beside arguments of an
`SFTTrainer` if there are any. A base is loaded in 4 bits unless `load_in_4bit` is false, and all tokens are trained
unless `train_on_completions` is set.
"""

from collections.abc import Mapping
from typing import Any

from haori.conversion.data import carry_alpaca, carry_messages
from haori.conversion.draft import Draft
from haori.conversion.peft_config import BIAS
from haori.conversion.rules import Carried, Fact, Left, Outcome, Rule, choice, fact, group, lacks, same, same_if, to
from haori.conversion.tool import Tool
from haori.conversion.training_arguments import DEFAULTS, TRAINING_ARGUMENTS, optimizer, schedule
from haori.conversion.values import flag, hub_or_file, modules, number, text, whole, words

__all__ = ["UNSLOTH"]

_CHECKPOINTING = {"unsloth": True, True: True, False: False, "none": False, "1": True, "0": False}
_IMAGES = lacks("images are not trained on", off=(False,))
_PARTS = same_if((True,), "method.target says which modules", "modules are chosen by method.target", "method.target")


def _training_type(value: Any) -> Outcome:
    spelt = str(value).strip().lower()
    if spelt in ("lora", "full"):
        return Fact("kind", spelt)
    return Left(f"there is no method {value!r} here", "method.kind; LoRA is taken")


def _full(value: Any) -> Outcome:
    return Fact("kind", "full" if flag(value) else "lora")


def _completions(value: Any) -> Outcome:
    return Carried({"data.train_on": "assistant" if flag(value) else "all"})


def _steps(value: Any) -> Outcome:
    return Fact("save_steps", number(value))


def _tracker(name: str) -> Rule:
    return Rule(lambda value: Fact(name if flag(value) else f"no_{name}", name), ("training.trackers",))


_BASE = fact("base", "base", read=hub_or_file)
_TRAINING: dict[str, Rule] = {
    "training_type": Rule(_training_type, ("method.kind",)),
    "max_seq_length": to("data.max_length", whole),
    "load_in_4bit": fact("4bit", "method.kind", "method.bits", read=flag),
    "load_in_8bit": fact("8bit", "method.kind", "method.bits", read=flag),
    "num_epochs": fact("epochs", "training.epochs", read=number),
    "learning_rate": to("optimizer.lr", number),
    "batch_size": fact("rows", "training.micro_batch_tokens", "training.batch_tokens", read=whole),
    "gradient_accumulation_steps": TRAINING_ARGUMENTS["gradient_accumulation_steps"],
    "warmup_steps": TRAINING_ARGUMENTS["warmup_steps"],
    "warmup_ratio": TRAINING_ARGUMENTS["warmup_ratio"],
    "max_steps": TRAINING_ARGUMENTS["max_steps"],
    "save_steps": Rule(_steps, ("training.save_every",)),
    "eval_steps": TRAINING_ARGUMENTS["eval_steps"],
    "weight_decay": to("optimizer.weight_decay", number),
    "random_seed": to("training.seed", whole),
    "packing": fact("packing", read=flag),
    "train_on_completions": Rule(_completions, ("data.train_on",)),
    "gradient_checkpointing": choice("training.gradient_checkpointing", _CHECKPOINTING, "it cannot be {value} here"),
    "optim": Rule(optimizer),
    "lr_scheduler_type": Rule(schedule, ("schedule.kind",)),
    "output_dir": TRAINING_ARGUMENTS["output_dir"],
    "trust_remote_code": lacks("code from the hub is not run", "a base that transformers knows"),
}  # fmt: skip
_LORA: dict[str, Rule] = {
    "lora_r": to("method.rank", whole),
    "lora_alpha": to("method.alpha", number),
    "lora_dropout": to("method.dropout", number),
    "target_modules": to("method.target", modules),
    "use_rslora": to("method.rslora", flag),
    "use_loftq": fact("loftq", "method.init", read=flag),
    "use_dora": fact("dora", "method.kind", read=flag),
    "vision_all_linear": _IMAGES,
    "finetune_vision_layers": same("there are no images here"),
    "finetune_language_layers": _PARTS, "finetune_attention_modules": _PARTS, "finetune_mlp_modules": _PARTS,
}  # fmt: skip
_LOGGING: dict[str, Rule] = {
    "enable_wandb": _tracker("wandb"),
    "enable_tensorboard": _tracker("tensorboard"),
    **group(TRAINING_ARGUMENTS["logging_steps"], "wandb_project", "tensorboard_dir", "log_frequency"),
}
_KEYWORDS: dict[str, Rule] = {
    "model_name": _BASE,
    "r": to("method.rank", whole),
    "lora_alpha": _LORA["lora_alpha"], "lora_dropout": _LORA["lora_dropout"],
    "target_modules": _LORA["target_modules"], "use_rslora": _LORA["use_rslora"], "use_dora": _LORA["use_dora"],
    "bias": choice("method.bias", BIAS, "there is no {value} here", "method.bias is none, adapted or all"),
    "layers_to_transform": to("method.layers"),
    "modules_to_save": to("method.modules_to_save", words),
    "init_lora_weights": fact("init", "method.init"),
    "loftq_config.loftq_bits": fact("loftq_bits", "method.init", "method.bits", read=whole),
    "loftq_config.loftq_iter": same("how often LoftQ repeats is chosen here"),
    "use_gradient_checkpointing": _TRAINING["gradient_checkpointing"],
    "random_state": to("training.seed", whole),
    "max_seq_length": _TRAINING["max_seq_length"],
    "load_in_4bit": _TRAINING["load_in_4bit"], "load_in_8bit": _TRAINING["load_in_8bit"],
    "full_finetuning": Rule(_full, ("method.kind",)),
    "dtype": fact("dtype", "training.dtype", read=text),
    "packing": _TRAINING["packing"],
    "dataset": fact("data", "data.path", read=hub_or_file),
    "dataset_text_field": fact("text_column", "data.columns.text", read=text),
    "finetune_vision_layers": _LORA["finetune_vision_layers"],
    "finetune_language_layers": _PARTS, "finetune_attention_modules": _PARTS, "finetune_mlp_modules": _PARTS,
    "layers_pattern": same("layers are found by their numbers"),
    "target_parameters": lacks("parameters of experts are not adapted", "method.kind=peft, method.options"),
    "rope_scaling": lacks("contexts are not extended", "the base's config.json"),
    "resize_model_vocab": lacks("no tokens are added to a base", "method.trainable_tokens"),
    "trust_remote_code": _TRAINING["trust_remote_code"],
    **group(same("about loading in that tool"), "device_map", "use_exact_model_name", "fix_tokenizer", "fast_inference",
            "gpu_memory_utilization", "max_lora_rank", "float8_kv_cache", "disable_log_stats", "temporary_location",
            "dataset_num_proc", "use_cache", "attn_implementation"),
}  # fmt: skip

_KEYS: dict[str, Rule] = {
    **TRAINING_ARGUMENTS,
    **_KEYWORDS,
    "model": _BASE,
    "data.dataset": fact("data", "data.path", read=hub_or_file),
    "data.local_dataset": fact("files", "data.path", read=words),
    "data.format_type": fact("format", "data.format", read=text),
    **{f"training.{key}": rule for key, rule in _TRAINING.items()},
    **{f"lora.{key}": rule for key, rule in _LORA.items()},
    **{f"logging.{key}": rule for key, rule in _LOGGING.items()},
}


def _defaults(document: Mapping[str, Any]) -> dict[str, Any]:
    training = document.get("training")
    if not isinstance(training, dict):
        keywords: dict[str, Any] = {"random_state": 3407}
        if not document.get("full_finetuning"):
            keywords |= {"r": 16, "lora_alpha": 16, "load_in_4bit": True}
        return keywords | (dict(DEFAULTS) if document.keys() & DEFAULTS.keys() else {})
    given: dict[str, Any] = {
        "training.max_seq_length": 2048, "training.num_epochs": 3, "training.learning_rate": 2e-4,
        "training.batch_size": 2, "training.gradient_accumulation_steps": 4, "training.warmup_steps": 5,
        "training.weight_decay": 0.01, "training.random_seed": 3407, "training.train_on_completions": False,
        "training.lr_scheduler_type": "linear",
    }  # fmt: skip
    if training.get("training_type", "lora") == "lora":
        given |= {"training.load_in_4bit": True, "lora.lora_r": 64, "lora.lora_alpha": 16, "lora.lora_dropout": 0.0}
    return given


def _combine_data(draft: Draft) -> None:
    files = draft.value("files")
    if files and "data.path" not in draft.ours:
        remark = f"without {', '.join(files[1:])}: put the files into one folder and name it" if len(files) > 1 else ""
        draft.carry("files", {"data.path": files[0]}, remark)
        draft.leave("data", "a recipe reads one dataset", "data.path")
    kind = str(draft.value("format", "")).strip().lower()
    if kind == "alpaca":
        carry_alpaca(draft, "format")
    elif kind == "sharegpt":
        carry_messages(draft, ("format",), "conversations")
    elif kind == "raw":
        draft.carry("format", {"data.format": "text"})
    elif kind == "auto":
        draft.unneeded("format", "found from the columns, as here")
    draft.leave("format", f"the column with the messages of {kind!r} is found by its name", "data.columns.messages")
    if draft.has("text_column"):
        draft.carry("text_column", {"data.columns.text": draft.value("text_column")})
    trackers = [name for name in ("wandb", "tensorboard") if draft.has(name)]
    if trackers:
        draft.carry(trackers, {"training.trackers": trackers})
    for name in ("no_wandb", "no_tensorboard"):
        draft.unneeded(name, "off, and off here")


UNSLOTH = Tool(
    name="unsloth", title="Unsloth", command="unsloth train --config {file}", keys=_KEYS,
    signs=frozenset({
        "training", "lora", "data", "use_gradient_checkpointing", "random_state", "full_finetuning", "max_seq_length",
        "finetune_language_layers", "finetune_attention_modules", "finetune_mlp_modules", "max_lora_rank", "model_name",
    }),
    defaults=_defaults, habits={"data.too_long": ("truncate", "longer rows are cut off")}, combine_data=_combine_data,
)  # fmt: skip
