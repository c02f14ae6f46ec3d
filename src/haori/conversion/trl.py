"""TRL: the YAML of its command line, or the arguments of an `SFTTrainer` as JSON. Read from TRL 1.x.

What `ModelConfig`, `ScriptArguments` and `SFTConfig` add to the arguments of transformers. Without `use_peft` every
weight is trained. Rows longer than `max_length` are cut off, and of conversations all tokens are trained unless
`assistant_only_loss` is set.
"""

from collections.abc import Mapping
from typing import Any

from haori.conversion.data import combine_files
from haori.conversion.draft import Draft, Entry
from haori.conversion.rules import (
    Carried,
    Fact,
    Left,
    Outcome,
    Rule,
    Unneeded,
    fact,
    group,
    lacks,
    of_the_tool,
    same,
    same_if,
    to,
)
from haori.conversion.tool import Tool
from haori.conversion.training_arguments import DEFAULTS, TRAINING_ARGUMENTS
from haori.conversion.values import flag, hub_or_file, modules, number, text, whole, words

__all__ = ["TRL"]

_PREFERENCE = lacks("preference training has no such term here")
_WHOLE_ROWS = "a row is as long as data.max_length allows, whatever of it is the prompt"


def _use_peft(value: Any) -> Outcome:
    return Fact("kind", "lora" if flag(value) else "full")


def _only(value: Any) -> Outcome:
    return Carried({"data.train_on": "assistant" if flag(value) else "all"})


def _task_type(value: Any) -> Outcome:
    return Fact("task", {"CAUSAL_LM": ""}.get(str(value), str(value)))


def _length(value: Any) -> Outcome:
    if value is None:
        return Left("rows are not left at any length", "data.max_length; `auto` is the base's context, at most 2,048")
    return Carried({"data.max_length": whole(value)})


def _loss(value: Any) -> Outcome:
    spelt = str(value).lower()
    if spelt in ("nll", "chunked_nll"):
        return Unneeded("cross-entropy, as here")
    if spelt in ("sigmoid", "hinge", "ipo", "simpo", "kto"):
        return Fact("task", spelt)
    return Left(f"there is no loss {value!r} here", "loss.kind of the task preference, or cross-entropy")


def _test_split(value: Any) -> Outcome:
    if value in ("test", "validation"):
        return Left("a validation split is found by its name, a test split is kept for `haori evaluate`",
                    "data.validation, a file of its own")  # fmt: skip
    return Left(f"the split {value!r} is not found by itself", "data.validation, a file of its own")


_KEYS: dict[str, Rule] = {
    **TRAINING_ARGUMENTS,
    "model_name_or_path": fact("base", "base", read=hub_or_file),
    "model": fact("base", "base", read=hub_or_file),
    "model_revision": to("revision", text),
    "dtype": fact("dtype", "training.dtype", read=text),
    "torch_dtype": fact("dtype", "training.dtype", read=text),
    "use_peft": Rule(_use_peft, ("method.kind",)),
    "lora_r": to("method.rank", whole),
    "lora_alpha": to("method.alpha", number),
    "lora_dropout": to("method.dropout", number),
    "lora_target_modules": to("method.target", modules),
    "lora_target_parameters": lacks("parameters of experts are not adapted", "method.kind=peft, method.options"),
    "lora_modules_to_save": to("method.modules_to_save", words),
    "lora_task_type": Rule(_task_type, ("task",)),
    "use_rslora": to("method.rslora", flag),
    "use_dora": fact("dora", "method.kind", read=flag),
    "load_in_4bit": fact("4bit", "method.kind", "method.bits", read=flag),
    "load_in_8bit": fact("8bit", "method.kind", "method.bits", read=flag),
    "use_bnb_nested_quant": fact("double_quantization", "method.double_quantization", read=flag),
    "bnb_4bit_quant_type": same_if(("nf4",), "NF4, as here", "4 bits are NF4 here, not {value}", "method.bits=4"),
    "dataset_name": fact("data", "data.path", read=hub_or_file),
    "dataset_train_split": to("data.split", text),
    "dataset_test_split": Rule(_test_split),
    "dataset_config": lacks("a configuration of a hub dataset cannot be chosen", "name its folder in data.path"),
    "dataset_streaming": lacks("data is read whole, and kept on disk"),
    "streaming": lacks("data is read whole, and kept on disk"),
    "test_split_size": fact("validation_size", "data.validation_share", read=number),
    "datasets[].path": fact("data", "data.path", read=hub_or_file),
    "datasets[].data_files": fact("files", "data.path"),
    "datasets[].split": to("data.split", text),
    "datasets[].name": lacks("a configuration of a hub dataset cannot be chosen", "name its folder in data.path"),
    "datasets[].data_dir": lacks("a folder of a hub dataset cannot be chosen", "name its folder in data.path"),
    "datasets[].columns": lacks("columns are known by their names or mapped", "data.columns"),
    "dataset_text_field": fact("text_column", "data.columns.text", read=text),
    "max_length": Rule(_length, ("data.max_length",), takes_null=True),
    "max_seq_length": Rule(_length, ("data.max_length",)),
    "truncation_mode": same_if(("keep_start",), "the start of longer rows is kept", "the start of longer rows is kept"),
    "packing": fact("packing", read=flag),
    "assistant_only_loss": Rule(_only, ("data.train_on",)),
    "completion_only_loss": Rule(_only, ("data.train_on",)),
    "loss_type": Rule(_loss, ("task", "loss.kind")),
    "beta": fact("beta", "loss.beta", read=number), "label_smoothing": fact("label_smoothing",
        "loss.label_smoothing", read=number),
    "simpo_gamma": fact("gamma", "loss.gamma", read=number), "desirable_weight": fact("desirable",
        "loss.desirable_weight", read=number),
    "undesirable_weight": fact("undesirable", "loss.undesirable_weight", read=number),
    "max_prompt_length": same(_WHOLE_ROWS), "max_completion_length": same(_WHOLE_ROWS),
    "precompute_ref_log_probs": same("what the base says of the answers is computed once"),
    "chat_template_path": lacks("the chat template is the base's own", "the template in the base's folder"),
    "eos_token": lacks("the chat template says what ends an answer",
        "`haori data check --show 3` shows what is trained"),
    "pad_token": same("what fills a batch has no influence here"),
    "trust_remote_code": lacks("code from the hub is not run", "a base that transformers knows"),
    "model_init_kwargs": lacks("a base is loaded as it is", "training.dtype"),
    "dataset_kwargs": lacks("data is prepared here", "`haori data check` shows how"),
    "shuffle_dataset": same("rows are shuffled here"),
    "env": lacks("the environment is not changed", "set the variables before the command"),
    **group(_PREFERENCE, "reference_free", "cpo_alpha", "loss_weights"),
    **group(TRAINING_ARGUMENTS["tf32"], "attn_implementation", "use_flash_attention_2", "padding_free",
            "pad_to_multiple_of", "dataset_num_proc", "dataset_batch_size", "eval_packing", "packing_strategy",
            "gradient_checkpointing_use_reentrant", "bnb_4bit_quant_storage"),
    **of_the_tool("model_code_revision", "ignore_bias_buffers", "base_model_revision"),
}  # fmt: skip


def _defaults(document: Mapping[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {**DEFAULTS, "learning_rate": 2e-5, "max_length": 1024, "eval_strategy": "no"}
    if "max_length" in document or document.get("max_seq_length"):
        del given["max_length"]
    if document.get("use_peft"):
        given |= {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
    elif document.get("model_name_or_path"):
        given["use_peft"] = False
    if document.get("warmup_ratio"):
        del given["warmup_steps"]
    return given


def _combine_data(draft: Draft) -> None:
    if draft.value("text_column") == "text":
        draft.unneeded("text_column", "a column text is read as text")
    draft.carry("text_column", {"data.columns.text": draft.value("text_column")} if draft.has("text_column") else {})
    combine_files(draft)
    if "data.train_on" not in draft.ours and "task" not in draft.ours:
        remark = "of conversations TRL trains all tokens, here the assistant's"
        draft.entries.append(Entry("assistant_only_loss", Left(remark, "data.train_on=all"), assumed=True))


TRL = Tool(
    name="trl", title="TRL", command="trl sft --config {file}", keys=_KEYS,
    signs=frozenset({
        "dataset_name", "use_peft", "lora_target_modules", "dataset_train_split", "dataset_test_split",
        "assistant_only_loss", "completion_only_loss", "dataset_text_field", "use_bnb_nested_quant", "lora_task_type",
    }),
    defaults=_defaults, habits={"data.too_long": ("truncate", "longer rows are cut off")}, combine_data=_combine_data,
)  # fmt: skip
