"""ms-swift: the YAML of `swift sft`, or the `args.json` beside a checkpoint. Read from its argument classes (4.x, 3.x).

Datasets are written `id-or-path:subset#count`. Rows that are too long are dropped, nothing is held out, and the loss is
on the assistant's tokens.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haori.conversion.draft import Draft
from haori.conversion.origin import SEVERAL_ADAPTERS
from haori.conversion.peft_config import BIAS
from haori.conversion.rules import (
    Carried,
    Fact,
    Left,
    Outcome,
    Rule,
    choice,
    fact,
    group,
    lacks,
    of_the_tool,
    same,
    same_if,
    to,
)
from haori.conversion.tool import Tool
from haori.conversion.training_arguments import DEFAULTS, TRAINING_ARGUMENTS, early_stopping
from haori.conversion.values import UnfitValueError, flag, hub_or_file, modules, number, text, whole, words

__all__ = ["MS_SWIFT"]

_COLUMNS = {
    "query": "prompt", "prompt": "prompt", "instruction": "prompt", "response": "completion", "output": "completion",
    "answer": "completion", "completion": "completion", "system": "system", "messages": "messages",
}  # fmt: skip
_OTHER_TUNERS = {"vera": "VERA", "boft": "BOFT", "fourierft": "FOURIERFT"}
_IMAGES = lacks("images, sounds and films are not trained on")
_PREFERENCE = lacks("preference training has no such term here")
_READ_BESIDE = "read only beside another way to train"


def _tuner(value: Any) -> Outcome:
    spelt = str(value).lower()
    if spelt in ("lora", "full", "adalora"):
        return Fact("kind", spelt)
    other = f"; method.kind=peft with method.type={_OTHER_TUNERS[spelt]} is near it" if spelt in _OTHER_TUNERS else ""
    return Left(f"there is no {value!r} here by that name", f"method.kind; LoRA is taken{other}")


def _task(value: Any) -> Outcome:
    return Fact("task", "" if value == "causal_lm" else str(value))


def _rlhf(value: Any) -> Outcome:
    return Fact("task", str(value).lower())


def _dataset(value: Any) -> Outcome:
    return Fact("datasets", words(value))


def _columns(value: Any) -> Outcome:
    try:
        table = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        table = None
    if not isinstance(table, dict) or not all(isinstance(role, str) for role in table.values()):
        raise UnfitValueError("be a table of column names")
    ours = {f"data.columns.{_COLUMNS[role]}": column for column, role in table.items() if role in _COLUMNS}
    others = [f"{column}: {role}" for column, role in table.items() if role not in _COLUMNS]
    if not ours or len(ours) + len(others) < len(table):
        return Left("these columns have no place here", "data.columns.prompt, completion, system, messages, text")
    return Carried(ours, f"without {', '.join(others)}" if others else "")


def _quant_bits(value: Any) -> Outcome:
    bits = number(value) if str(value).isdigit() else 0
    return (
        Fact(f"{bits:g}bit", True)
        if bits in (4, 8)
        else Left(f"a base is not quantised to {value} bits", "method.bits")
    )


def _loss_scale(value: Any) -> Outcome:
    base = {"default": "assistant", "all": "all"}.get(str(value).split("+")[0])
    if base is None or "+" in str(value):
        return Left(f"tokens are not weighed by {value!r}", 'data.train_on, or "loss": false in messages')
    return Carried({"data.train_on": base})


def _regex(value: Any) -> Outcome:
    return Carried({"method.target": text(value)})


_KEYS: dict[str, Rule] = {
    **TRAINING_ARGUMENTS,
    "model": fact("base", "base", read=hub_or_file),
    "model_revision": to("revision", text),
    "task_type": Rule(_task, ("task",)),
    "rlhf_type": Rule(_rlhf, ("task", "loss.kind")),
    "train_type": Rule(_tuner, ("method.kind",)),
    "tuner_type": Rule(_tuner, ("method.kind",)),
    "lora_rank": to("method.rank", whole),
    "lora_alpha": to("method.alpha", number),
    "lora_dropout": to("method.dropout", number),
    "lora_bias": choice("method.bias", BIAS, "there is no {value} here", "method.bias is none, adapted or all"),
    "target_regex": Rule(_regex, ("method.target",)),
    "target_modules": to("method.target", modules),
    "target_parameters": lacks("parameters of experts are not adapted", "method.kind=peft, method.options"),
    "modules_to_save": to("method.modules_to_save", words),
    "lorap_lr_ratio": to("method.lr_ratio", number),
    "use_rslora": to("method.rslora", flag),
    "use_dora": fact("dora", "method.kind", read=flag),
    "init_weights": fact("init", "method.init"),
    "adalora_target_r": fact("target_r", "method.rank", read=whole),
    "adalora_init_r": fact("init_r", "method.initial_rank", read=whole),
    "adalora_orth_reg_weight": fact("orthogonality", "method.orthogonality", read=number),
    "quant_bits": Rule(_quant_bits, ("method.kind", "method.bits")),
    "quant_method": same_if(("bnb",), "bitsandbytes, as here", "a base is quantised by bitsandbytes, not by {value}",
                            "method.kind=qlora"),
    "bnb_4bit_quant_type": same_if(("nf4",), "NF4, as here", "4 bits are NF4 here, not {value}", "method.bits=4"),
    "bnb_4bit_use_double_quant": fact("double_quantization", "method.double_quantization", read=flag),
    "adapters": SEVERAL_ADAPTERS,
    "torch_dtype": fact("dtype", "training.dtype", read=text),
    "dataset": Rule(_dataset, ("data.path", "data.max_rows")),
    "val_dataset": fact("validation_sets", "data.validation", read=words),
    "split_dataset_ratio": fact("validation_size", "data.validation_share", read=number),
    "columns": Rule(_columns, ("data.columns",)),
    "system": to("data.system", text),
    "max_length": to("data.max_length", whole),
    "truncation_strategy": choice("data.too_long", {"delete": "drop", "right": "truncate"},
                                  "rows are dropped or cut off at their end, not {value}", "data.too_long"),
    "loss_scale": Rule(_loss_scale, ("data.train_on",)),
    "packing": fact("packing", read=flag),
    "early_stop_interval": Rule(early_stopping, ("training.patience",)),
    "template": lacks("prompts are rendered by the base's own chat template", "`haori data check --show 3` shows how"),
    "template_backend": same("prompts are rendered by the base's own chat template"),
    "agent_template": lacks("calls of tools are written by the base's chat template"),
    "use_chat_template": same_if((True,), "prompts are rendered by the base's chat template", "chat templates are used",
                                 "data.columns.text for plain text"),
    "model_name": lacks("names are not put into data", "write them into the data"),
    "model_author": lacks("names are not put into data", "write them into the data"),
    "new_special_tokens": lacks("no tokens are added to a base", "method.trainable_tokens"),
    "rope_scaling": lacks("contexts are not extended", "the base's config.json"),
    "interleave_prob": lacks("one dataset is read", "put the files into one folder, as data.path"),
    "streaming": lacks("data is read whole, and kept on disk"),
    "strict": same("rows that cannot be read are counted and named; data.too_long=error refuses long ones"),
    "enable_dft_loss": lacks("the loss is cross-entropy"),
    "loss_type": fact("loss_name", "loss.kind", read=text),
    "beta": fact("beta", "loss.beta", read=number), "simpo_gamma": fact("gamma", "loss.gamma", read=number),
    "label_smoothing": fact("label_smoothing", "loss.label_smoothing", read=number),
    "desirable_weight": fact("desirable", "loss.desirable_weight",
        read=number), "undesirable_weight": fact("undesirable", "loss.undesirable_weight", read=number),
    "ref_model": lacks("the reference is the base without its adapter"),
    "optimizer": lacks("there is only AdamW here", "optimizer.lr", off=("lorap",)),
    "use_galore": lacks("there is no GaLore here"),
    "lisa_activated_layers": lacks("there is no LISA here", "method.layers"),
    **group(lacks("parts of the base are not trained in full", "method.layers, method.modules_to_save"),
            "freeze_parameters_ratio", "freeze_parameters", "freeze_parameters_regex", "trainable_parameters",
            "trainable_parameters_regex"),
    **group(lacks("data prepared by that tool is not read", "data.path"), "cached_dataset", "cached_val_dataset"),
    "init_strategy": lacks("a base has all of its weights"),
    "enable_channel_loss": lacks("the loss is not kept by channel"),
    "callbacks": lacks("plug-ins of that tool are not run"),
    "metric": lacks("validation loss chooses the best state", "haori evaluate"),
    "num_labels": fact("label_count", read=whole),
    "problem_type": fact("problem", read=text),
    "external_plugins": lacks("plug-ins of that tool are not run"),
    "custom_register_path": lacks("plug-ins of that tool are not run"),
    "custom_dataset_info": lacks("datasets are named by their path", "data.path"),
    "use_ray": lacks("one machine trains", "torchrun for several GPUs"),
    "device_groups": lacks("one machine trains", "torchrun for several GPUs"),
    "padding_side": same("what fills a batch has no influence here"),
    "router_aux_loss_coef": lacks("routers of experts are not balanced by a loss"),
    **group(lacks("a row is computed on one device", off=(1,)), "sequence_parallel_size", "expert_parallel_size",
            "context_parallel_size"),
    **group(same(_READ_BESIDE), "galore_rank", "galore_scale", "galore_update_proj_gap", "galore_proj_type",
            "galore_optim_per_parameter", "galore_with_embedding", "galore_quantization", "galore_proj_quant",
            "galore_proj_bits", "galore_proj_group_size", "galore_cos_threshold", "galore_gamma_proj",
            "galore_queue_size",
            "boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "vera_rank", "vera_dropout",
            "vera_projection_prng_key", "vera_d_initial", "fourier_n_frequency", "fourier_scaling", "adapter_act",
            "adapter_length", "reft_rank", "reft_intervention_type", "llamapro_num_new_blocks", "lisa_step_interval",
            "galore_target_modules", "llamapro_num_groups", "reft_layer_key", "reft_layers", "reft_args", "hqq_axis",
            "eval_dataset_args", "eval_generation_config", "extra_eval_args", "zero_hpz_partition_size",
            "deepspeed_autotp_size", "swanlab_workspace", "swanlab_exp_name", "swanlab_notification_method",
            "swanlab_sender_email", "swanlab_receiver_email", "swanlab_smtp_server", "swanlab_smtp_port",
            "adalora_tinit", "adalora_tfinal", "adalora_deltaT", "adalora_beta1", "adalora_beta2", "lora_ga_batch_size",
            "lora_ga_iters", "lora_ga_max_length", "lora_ga_direction", "lora_ga_scale", "lora_ga_stable_gamma"),
    **group(_IMAGES, "max_pixels", "vit_lr", "aligner_lr", "norm_bbox"),
    **group(same("there are no images here"), "freeze_llm", "freeze_vit", "freeze_aligner",
        "vit_gradient_checkpointing"),
    **group(_PREFERENCE, "rpo_alpha", "cpo_alpha", "reward_model"),
    **group(TRAINING_ARGUMENTS["tf32"], "attn_impl", "padding_free", "dataset_num_proc", "load_from_cache_file",
            "use_logits_to_keep", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "tuner_backend", "lora_dtype",
            "packing_length", "packing_num_proc", "lazy_tokenize", "experts_impl", "device_map", "max_memory"),
    **group(TRAINING_ARGUMENTS["logging_steps"], "swanlab_project", "swanlab_mode", "swanlab_email_language"),
    **of_the_tool(
        "is_binary_loss_scale", "disable_ignore_empty_think", "local_repo_path", "use_flash_ckpt",
        "swift_version", "model_type", "model_dir", "model_suffix", "model_info", "model_meta", "hub", "use_hf",
        "load_args",
        "load_data_args", "check_model", "add_version", "create_checkpoint_symlink", "ignore_args_error",
        "use_swift_lora",
        "rank", "global_world_size", "local_world_size", "ckpt_dir", "training_args", "dataset_shuffle",
        "max_new_tokens",
        "val_dataset_shuffle", "shuffle_buffer_size", "stopping_strategy", "download_mode", "temperature",
        "acc_strategy",
        "train_dataloader_shuffle", "args_type", "num_beams", "stream", "logprobs", "stop_words", "top_logprobs",
        "top_k",
        "top_p", "repetition_penalty", "eval_use_evalscope", "eval_dataset", "eval_limit", "enable_npu_model_patch",
        "disable_auto_column_mapping", "add_non_thinking_prefix", "ds3_gather_for_generation", "resume_only_model",
        "model_kwargs", "packing_strategy", "preserve_thinking", "enable_thinking", "response_prefix", "max_model_len",
    ),
}  # fmt: skip


def _defaults(document: Mapping[str, Any]) -> dict[str, Any]:
    rows = document.get("per_device_train_batch_size", 1)
    given: dict[str, Any] = {
        **DEFAULTS, "lr_scheduler_type": "cosine", "weight_decay": 0.1, "adam_beta2": 0.95, "split_dataset_ratio": 0.0,
        "per_device_train_batch_size": 1, "seed": 42,
        "gradient_accumulation_steps": max(1, -(-16 // rows)) if isinstance(rows, int) and rows > 0 else 1,
    }  # fmt: skip
    tuner = document.get("train_type") or document.get("tuner_type") or "lora"
    given["learning_rate"] = 1e-5 if tuner == "full" else 1e-4
    if tuner == "lora":
        given |= {"lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05}
    if document.get("val_dataset"):
        del given["split_dataset_ratio"]
    if document.get("warmup_ratio"):
        del given["warmup_steps"]
    return given


def _combine_data(draft: Draft) -> None:
    if draft.ours.get("method.kind") == "adalora":
        names = {"target_r": "rank", "init_r": "initial_rank", "orthogonality": "orthogonality"}
        for name, key in names.items():
            if draft.has(name):
                draft.ours.pop(f"method.{key}", None)
                draft.carry(name, {f"method.{key}": draft.value(name)})
    for name in ("target_r", "init_r", "orthogonality"):
        draft.unneeded(name, _READ_BESIDE)
    sets = draft.value("datasets")
    if sets and "data.path" not in draft.ours:
        path, ours, remark = _parts(sets[0])
        others = f"without {', '.join(sets[1:])}: put the files into one folder and name it" if len(sets) > 1 else ""
        draft.carry("datasets", {"data.path": path, **ours}, "; ".join(part for part in (remark, others) if part))
    draft.unneeded("datasets", "--data says another")
    more = draft.value("validation_sets", [])
    if len(more) == 1:
        draft.carry("validation_sets", {"data.validation": _parts(more[0])[0]})
    draft.leave("validation_sets", "rows to validate on are in one file or folder", "data.validation")


def _parts(dataset: str) -> tuple[str, dict[str, Any], str]:
    """Return path, keys that follow, and a remark, of `path:subset#count`."""
    path, _, count = dataset.partition("#")
    head, colon, subset = path.rpartition(":")
    remarks = []
    if colon and head and head.upper() not in ("HF", "MS") and "/" not in subset and "\\" not in subset:
        path = head
        remarks.append(f"the subset {subset} is not chosen")
    for hub in ("HF::", "MS::", "hf::", "ms::"):
        path = path.removeprefix(hub)
    if not dataset.upper().startswith("HF::") and not Path(path).exists():
        remarks.append("looked for as a file, then on the Hugging Face hub, not on ModelScope")
    ours = {"data.max_rows": int(count)} if count.isdigit() else {}
    if ours:
        remarks.append(f"the first {count} rows, not {count} at random")
    return path, ours, "; ".join(remarks)


MS_SWIFT = Tool(
    name="ms-swift", title="ms-swift", command="swift sft {file}", keys=_KEYS,
    signs=frozenset({
        "train_type", "tuner_type", "split_dataset_ratio", "swift_version", "rlhf_type", "attn_impl", "lorap_lr_ratio",
        "dataset_num_proc", "loss_scale", "truncation_strategy", "quant_bits", "model_author", "init_weights",
        "tuner_backend",
    }),
    defaults=_defaults, combine_data=_combine_data,
)  # fmt: skip
