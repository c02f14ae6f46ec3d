"""Axolotl: one YAML file. Read from its configuration schemas (0.13 and later; names since renamed are taken too).

A batch is `micro_batch_size` rows, `gradient_accumulation_steps` times, of `sequence_len` tokens. Rows that are too
long are dropped, nothing is held out, and the loss is on the assistant's tokens unless `train_on_inputs` is set.
"""

from collections.abc import Mapping
from typing import Any

from haori.conversion.data import carry_alpaca, carry_messages, combine_files, combine_pairs, combine_system
from haori.conversion.draft import Draft
from haori.conversion.origin import ONE_ADAPTER
from haori.conversion.rules import (
    Carried,
    Fact,
    Left,
    Outcome,
    Rule,
    Unneeded,
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
from haori.conversion.training_arguments import TRAINING_ARGUMENTS, early_stopping, optimizer, schedule
from haori.conversion.values import flag, hub_or_file, modules, number, text, whole, words

__all__ = ["AXOLOTL"]

_ALPACA = {"alpaca", "alpaca_chat", "alpaca_w_system", "alpaca_instruct", "alpaca_chat.load_qa"}
_CHAT = {"chat_template", "chatml", "messages", "openai"}
_STANDARD = {"field_instruction": "instruction", "field_input": "input", "field_output": "output"}
_TRACKERS = ("wandb", "mlflow", "tensorboard", "trackio")
_RENDERED = lacks("prompts are rendered by the base's own chat template", "the template in the base's folder")
_PREFERENCE = lacks("preference training has no such term here")
_TEMPLATES = ("tokenizer_default", "tokenizer_default_fallback_chatml")


def _adapter(value: Any) -> Outcome:
    spelt = str(value).lower()
    if spelt in ("lora", "qlora", "full"):
        return Fact("kind", spelt)
    return Left(f"there is no adapter {value!r} here", "method.kind; LoRA is taken")


def _weight_dtype(value: Any) -> Outcome:
    if value in ("nf4", "int8"):
        return Fact("4bit" if value == "nf4" else "8bit", True)
    return Left(f"weights of the base are not held as {value!r}", "method.bits is 4 (NF4) or 8")


def _target_linear(value: Any) -> Outcome:
    if flag(value):
        return Carried({"method.target": "all-linear"})
    return Unneeded("lora_target_modules says which")


def _rl(value: Any) -> Outcome:
    return Fact("task", str(value).lower())


def _tracker(name: str) -> Rule:
    return Rule(lambda _: Fact(f"tracker_{name}", name), ("training.trackers",))


def _use_tracker(name: str) -> Rule:
    return Rule(lambda value: Fact(f"tracker_{name}" if flag(value) else f"no_{name}", name), ("training.trackers",))


def _wandb_mode(value: Any) -> Outcome:
    if str(value).lower() == "disabled":
        return Fact("no_wandb", "wandb")
    return Unneeded("the variable WANDB_MODE says it here")


def _properties(value: Any) -> Outcome:
    names = [value.get("role", "role"), value.get("content", "content")] if isinstance(value, dict) else []
    if names in (["role", "content"], ["from", "value"]):
        return Unneeded("role and content, from and value are read as they are")
    return Left("messages are read with role and content, or from and value", "rename the fields of the messages")


def _roles_trained(value: Any) -> Outcome:
    if set(words(value)) <= {"assistant", "gpt"}:
        return Carried({"data.train_on": "assistant"})
    return Left("the assistant's tokens are trained, or all", 'data.train_on=all, or "loss": false in messages')


_DATASET: dict[str, Rule] = {
    "path": fact("data", "data.path", read=hub_or_file),
    "data_files": fact("files", "data.path"),
    "type": fact("type", "data.format", "data.columns"),
    "type.field_instruction": fact("field_instruction", "data.columns.prompt", read=text),
    "type.field_input": fact("field_input", read=text),
    "type.field_output": fact("field_output", "data.columns.completion", read=text),
    "type.field_system": fact("field_system", "data.columns.system", read=text),
    **{f"type.field_{name}": fact(f"column_{name}", f"data.columns.{name}", read=text)
       for name in ("prompt", "chosen", "rejected", "completion")},
    "type.prompt_format": _RENDERED, "type.chosen_format": _RENDERED, "type.rejected_format": _RENDERED,
    "type.completion_format": _RENDERED,
    "type.system_prompt": to("data.system", text),
    "type.format": _RENDERED, "type.no_input_format": _RENDERED, "type.system_format": _RENDERED,
    "ds_type": same("the kind of a file is seen from its name"),
    "field": fact("field", "data.columns.text", read=text),
    "field_messages": fact("field_messages", "data.columns.messages", read=text),
    "split": to("data.split", text),
    "revision": to("data.revision", text),
    "conversation": _RENDERED,
    "chat_template": same_if(
        _TEMPLATES, "prompts are rendered by the base's chat template",
        "prompts are rendered by the base's own chat template, not by {value}", "the template in the base's folder",
    ),
    "chat_template_jinja": _RENDERED,
    "message_property_mappings": Rule(_properties),
    "message_field_role": same_if(("role", "from"), "read as it is", "the field of the role is role or from"),
    "message_field_content": same_if(("content", "value"), "read as it is",
        "the field of the text is content or value"),
    "message_field_training": same_if(
        ("train", "training", "loss", "trainable", "weight"), "such a flag is followed here",
        "the flag {value} of messages is not known", '"loss": false in messages',
    ),
    "message_field_training_detail": lacks("parts of a message are not trained apart", '"loss": false in messages'),
    "roles_to_train": Rule(_roles_trained, ("data.train_on",)),
    "train_on_eos": same_if(("turn", "all"), "the end of each trained turn is trained here",
        "ends of turns are trained"),
    "roles": same("user, human, assistant, gpt and other usual names of roles are known here"),
    "field_tools": same_if(("tools",), "read as it is", "the column of tools is named tools", "rename the column"),
    "field_thinking": same_if(
        ("reasoning_content", "reasoning", "thinking"), "read as it is", "reasoning is read from reasoning_content"
    ),
    "name": lacks("a configuration of a hub dataset cannot be chosen", "download it and name the folder in data.path"),
    "drop_system_message": lacks("system messages of the data are kept", "take them out of the data"),
    "trust_remote_code": lacks("code from the hub is not run", "download the data and name the files in data.path"),
    **group(
        lacks("only whole files are read", "data.max_rows limits the rows"), "shards", "shards_idx", "preprocess_shards"
    ),
}  # fmt: skip

_KEYS: dict[str, Rule] = {
    **TRAINING_ARGUMENTS,
    "base_model": fact("base", "base", read=hub_or_file),
    "revision_of_model": to("revision", text),
    "adapter": Rule(_adapter, ("method.kind",)),
    "load_in_4bit": fact("4bit", "method.kind", "method.bits", read=flag),
    "load_in_8bit": fact("8bit", "method.kind", "method.bits", read=flag),
    "lora_r": to("method.rank", whole),
    "lora_alpha": to("method.alpha", number),
    "lora_dropout": to("method.dropout", number),
    "lora_target_modules": to("method.target", modules),
    "lora_target_linear": Rule(_target_linear, ("method.target",)),
    "lora_modules_to_save": to("method.modules_to_save", words),
    "peft_layers_to_transform": to("method.layers"),
    "peft_use_dora": fact("dora", "method.kind", read=flag),
    "peft_use_rslora": to("method.rslora", flag),
    "peft_init_lora_weights": fact("init", "method.init"),
    "peft.loftq_config.loftq_bits": fact("loftq", "method.init", "method.bits", read=whole),
    "peft.weight_dtype": Rule(_weight_dtype, ("method.kind", "method.bits")),
    "peft.backend": same("quantisation is done by bitsandbytes here"),
    "peft.group_size": lacks("blocks of quantised weights have their usual size"),
    "loraplus_lr_ratio": to("method.lr_ratio", number),
    "loraplus_lr_embedding": lacks("embeddings have no learning rate of their own"),
    "lora_target_parameters": lacks("parameters of experts are not adapted", "method.kind=peft, method.options"),
    "peft_layers_pattern": same("layers are found by their numbers"),
    "peft_layer_replication": lacks("layers are not replicated"),
    "peft_trainable_token_indices": lacks("tokens are named by their text", "method.trainable_tokens"),
    "peft_ensure_weight_tying": lacks("tied weights stay as the base has them"),
    "peft_autocast_adapter_dtype": same_if((True,), "the adapter is fp32 here", "the adapter is fp32 here"),
    "lora_fan_in_fan_out": same("found from the base"),
    "lora_model_dir": ONE_ADAPTER,
    "gptq": lacks("a base quantised by GPTQ is not trained on", "method.kind=qlora over the 16-bit base"),
    "bnb_config_kwargs": lacks("NF4 is taken", "method.double_quantization"),
    **{f"datasets[].{key}": rule for key, rule in _DATASET.items()},
    "test_datasets[].path": fact("validation", "data.validation", read=hub_or_file),
    **{f"test_datasets[].{key}": same("as for the training data") for key in ("type", "ds_type", "split")},
    "pretraining_dataset": lacks("data is not streamed", "haori train --data with a column text"),
    "sequence_len": to("data.max_length", whole),
    "excess_length_strategy": choice(
        "data.too_long", {"drop": "drop", "truncate": "truncate", "raise": "error"}, "there is no {value} here"
    ),
    "sample_packing": fact("packing", read=flag),
    "train_on_inputs": choice("data.train_on", {True: "all", False: "assistant"}, "it cannot be {value} here"),
    "default_system_message": to("data.system", text),
    "val_set_size": fact("validation_size", "data.validation_share", read=number),
    "micro_batch_size": fact("rows", "training.micro_batch_tokens", "training.batch_tokens", read=whole),
    "batch_size": fact("step_rows", "training.batch_tokens", read=whole),
    "num_epochs": fact("epochs", "training.epochs", read=number),
    "optimizer": Rule(optimizer),
    "lr_scheduler": Rule(schedule, ("schedule.kind",)),
    "evals_per_epoch": to("training.evaluations_per_epoch", whole),
    "saves_per_epoch": same_if((1,), "a checkpoint is saved after each epoch here",
                               "a checkpoint is saved after each epoch", "training.save_every counts steps"),
    "early_stopping_patience": Rule(early_stopping, ("training.patience",)),
    "gradient_checkpointing": choice(
        "training.gradient_checkpointing",
        {True: True, False: False, "offload": True, "offload_disk": True, "unsloth": True}, "it cannot be {value} here",
    ),
    "bfloat16": fact("bf16", "training.dtype"), "float16": fact("fp16", "training.dtype"),
    "float32": fact("fp32", "training.dtype", read=flag),
    "use_wandb": _use_tracker("wandb"), "wandb_project": _tracker("wandb"),
    "wandb_mode": Rule(_wandb_mode),
    "use_mlflow": _use_tracker("mlflow"), "mlflow_experiment_name": _tracker("mlflow"),
    "use_tensorboard": _use_tracker("tensorboard"), "use_trackio": _use_tracker("trackio"),
    "trackio_project_name": _tracker("trackio"),
    "rl": Rule(_rl, ("task", "loss.kind")),
    "reward_model": Rule(lambda value: Fact("task", "reward model") if flag(value) else Unneeded("off")),
    "process_reward_model": Rule(lambda value: Fact("task",
        "process reward model") if flag(value) else Unneeded("off")),
    "num_labels": fact("label_count", read=whole),
    "rl_beta": fact("beta", "loss.beta", read=number), "dpo_beta": fact("beta", "loss.beta", read=number),
    "orpo_alpha": fact("orpo_alpha", "loss.beta", read=number), "simpo_gamma": fact("gamma", "loss.gamma", read=number),
    "dpo_label_smoothing": fact("label_smoothing", "loss.label_smoothing", read=number),
    "kto_desirable_weight": fact("desirable", "loss.desirable_weight",
        read=number), "kto_undesirable_weight": fact("undesirable", "loss.undesirable_weight", read=number),
    "max_prompt_len": same("a row is as long as data.max_length allows, whatever of it is the prompt"),
    **group(_PREFERENCE, "rpo_alpha", "cpo_alpha", "trl", "dpo_use_weighting", "dpo_use_logits_to_keep"),
    "chat_template": _DATASET["chat_template"], "chat_template_jinja": _RENDERED,
    "special_tokens": lacks("special tokens are the base's own", "change them in the base's tokenizer files"),
    "tokens": lacks("no tokens are added to a base", "method.trainable_tokens trains single tokens that are there"),
    "added_tokens_overrides": lacks("no tokens are added to a base", "method.trainable_tokens"),
    "eot_tokens": same("the chat template says which tokens end a turn"),
    "tokenizer_config": lacks("the tokenizer is the base's own", "a folder of a base with another tokenizer"),
    "trust_remote_code": lacks("code from the hub is not run", "a base that transformers knows"),
    "unfrozen_parameters": lacks("parameters are not chosen by name", "method.modules_to_save, method.layers"),
    "lr_groups": lacks("there is one learning rate", "method.lr_ratio"),
    "embedding_lr": lacks("embeddings have no learning rate of their own"),
    "cosine_min_lr_ratio": lacks("the schedule ends near zero"),
    "cosine_constant_lr_ratio": lacks("the schedule ends near zero"),
    "relora": lacks("there is no ReLoRA here"), "relora_steps": lacks("there is no ReLoRA here"),
    "min_sample_len": lacks("short rows are kept", "take them out of the data"),
    "dataset_exact_deduplication": same("exact duplicates are dropped here"),
    "shuffle_merged_datasets": same_if((True,), "rows are shuffled here", "rows are always shuffled here"),
    "noisy_embedding_alpha": TRAINING_ARGUMENTS["neftune_noise_alpha"],
    "loss_watchdog_threshold": same("a loss that is not finite ends a run here"),
    "loss_watchdog_patience": same("a loss that is not finite ends a run here"),
    "use_pose": lacks("contexts are not extended"),
    "curriculum_sampling": lacks("rows are shuffled"),
    "plugins": lacks("plug-ins of that tool are not run"),
    "auto_resume_from_checkpoints": lacks("a run is resumed when asked", "haori train --resume with its folder"),
    **group(lacks("vocabulary and embeddings are the base's own"), "mean_resizing_embeddings", "shrink_embeddings",
            "embeddings_skip_upcast", "fix_untrained_tokens"),
    **group(lacks("the base is trained as it is", "method.kind=qlora"), "qat", "quantization",
        "model_quantization_config",
            "model_quantization_config_kwargs", "overrides_of_model_config", "overrides_of_model_kwargs",
            "rope_scaling",
            "llama4_linearized_experts"),
    **group(lacks("one whole dataset is read", "data.max_rows"), "dataset_shard_num", "dataset_shard_idx", "streaming"),
    **group(lacks("answers are not written while training", "haori evaluate"), "eval_max_new_tokens",
        "do_causal_lm_eval",
            "eval_causal_lm_metrics"),
    **group(lacks("a row is computed on one device", "torchrun for several GPUs", off=(False, 0, 1)),
            "sequence_parallel_degree", "context_parallel_size", "tensor_parallel_size", "dp_shard_size",
            "dp_replicate_size", "use_ray"),
    **group(lacks("AdamW has two decays and one epsilon"), "adam_epsilon2", "adam_beta3", "embedding_lr_scale"),
    **group(lacks("the schedule has a shape and a warm-up", "schedule.kind"), "lr_quadratic_warmup", "lr_div_factor"),
    **group(lacks("there is no LISA here", "method.layers"), "lisa_n_layers", "lisa_step_interval",
        "lisa_layers_attribute"),
    **group(lacks("images are not trained on"), "is_multimodal", "image_size", "image_resize_algorithm"),
    "use_comet": lacks("there is no Comet here", "training.trackers"),
    **group(same("read only beside another key"), "relora_prune_ratio", "relora_prune_method", "relora_cpu_offload",
            "pose_split_on_token_ids", "pose_max_context_len", "pose_num_chunks", "fsdp_final_state_dict_type",
            "fsdp_version", "heads_k_stride", "ring_attn_func", "comet_workspace", "comet_project_name", "bench_split",
            "flex_attn_compile_kwargs", "ray_run_name", "ray_num_workers", "resources_per_worker"),
    "fp8": lacks("training in fp8 is not supported", "training.dtype=bf16"),
    **group(
        same("the attention that computes the same fastest is chosen here"), "flash_attention", "sdp_attention",
        "xformers_attention", "flex_attention", "eager_attention", "attn_implementation", "flash_attn_cross_entropy",
        "flash_attn_rms_norm", "flash_attn_fuse_qkv", "flash_attn_fuse_mlp", "s2_attention", "batch_flattening",
    ),
    **group(
        TRAINING_ARGUMENTS["tf32"], "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "pad_to_sequence_len",
        "eval_sample_packing", "sample_packing_group_size", "sample_packing_bin_size", "eval_batch_size",
        "low_cpu_mem_usage",
        "lora_on_cpu", "gpu_memory_limit", "max_memory", "device_map", "gc_steps", "dataset_processes", "use_kernels",
        "dataset_num_proc", "dataset_keep_in_memory", "cut_cross_entropy", "qlora_sharded_model_loading",
        "sample_packing_sequentially", "pretraining_sample_concatenation", "pretrain_multipack_buffer_size",
        "pretrain_multipack_attn", "sample_packing_drop_attention_mask", "unsloth_lora_mlp", "unsloth_lora_qkv",
        "unsloth_lora_o", "unsloth_rms_norm", "unsloth_rope", "flash_optimum", "sample_packing_eff_est",
        "multipack_real_batches", "liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_layer_norm",
        "liger_fused_linear_cross_entropy", "unsloth_cross_entropy_loss",
    ),
    **group(
        TRAINING_ARGUMENTS["logging_steps"], "wandb_name", "wandb_run_id", "wandb_entity", "wandb_watch",
        "wandb_log_model", "mlflow_tracking_uri", "mlflow_run_name", "hf_mlflow_log_artifacts", "eval_table_size",
        "trackio_run_name",
    ),
    **of_the_tool(
        "is_preprocess", "preprocess_iterable", "total_num_tokens", "total_supervised_tokens", "torchdistx_path",
        "cls_model_config", "tokenizer_use_mistral_common", "tokenizer_save_jinja_files", "gradio_title",
        "gradio_share",
        "experimental_skip_move_to_device", "gradio_server_name", "gradio_server_port", "gradio_max_new_tokens",
        "gradio_temperature", "type_of_model", "model_type", "tokenizer_type", "tokenizer_use_fast",
        "tokenizer_legacy", "base_model_config", "strict",
        "device",
        "is_llama_derived_model", "is_mistral_derived_model", "is_falcon_derived_model", "is_qwen_derived_model",
        "dataset_prepared_path", "push_dataset_to_hub", "hf_use_auth_token", "world_size", "ddp", "save_first_step",
        "profiler_steps", "special_tokens_use_fast", "skip_prepare_dataset", "processor_type", "axolotl_config_path",
        "resize_token_embeddings_to_32x", "merge_lora", "merge_method", "vllm", "bench_dataset", "do_bench_eval",
    ),
}  # fmt: skip


def _defaults(document: Mapping[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {
        "lr_scheduler": "cosine", "warmup_ratio": 0.03, "num_epochs": 1.0, "sequence_len": 512, "micro_batch_size": 1,
        "gradient_accumulation_steps": 1, "val_set_size": 0.0,
    }  # fmt: skip
    if any(document.get(key) for key in ("warmup_steps", "warmup_ratio")) or document.get("warmup_steps") == 0:
        del given["warmup_ratio"]
    if document.get("test_datasets"):
        del given["val_set_size"]
    if document.get("batch_size"):
        del given["gradient_accumulation_steps"]
    if document.get("rl") == "simpo":
        given |= {"rl_beta": 0.1, "simpo_gamma": 0.5}
    if not document.get("adapter"):
        given["adapter"] = "full"
    return given


def _combine_data(draft: Draft) -> None:
    combine_files(draft)
    _combine_format(draft)
    if draft.has("validation"):
        draft.carry("validation", {"data.validation": draft.value("validation")})
    _combine_trackers(draft)


def _combine_trackers(draft: Draft) -> None:
    for name in _TRACKERS:
        if draft.has(f"no_{name}"):
            draft.unneeded(f"no_{name}", "off, and off here")
            draft.unneeded(f"tracker_{name}", "it is switched off")
    found = [name for name in _TRACKERS if draft.has(f"tracker_{name}")]
    if found:
        draft.carry([f"tracker_{name}" for name in found], {"training.trackers": found}, "under the project haori")


def _combine_format(draft: Draft) -> None:
    if draft.ours.get("task") == "preference":
        combine_pairs(draft)
        return
    kind = str(draft.value("type", "")).split(":")[0]
    if draft.has("field_instruction") or draft.has("field_output"):
        _combine_fields(draft)
    elif kind in _ALPACA:
        carry_alpaca(draft, "type")
    elif kind in ("completion", "pretrain"):
        column = draft.value("field", "text")
        draft.carry(("type", "field"), {"data.columns.text": column} if column != "text" else {"data.format": "text"})
    elif kind in _CHAT or kind == "sharegpt":
        own = "conversations" if kind == "sharegpt" else "messages"
        carry_messages(draft, ("type", "field_messages"), draft.value("field_messages", own))
    else:
        draft.leave(
            "type", f"there is no prompt strategy {kind!r} here; the format is found from the columns",
            "data.format or data.columns; `haori data check` shows what is read",
        )  # fmt: skip


def _combine_fields(draft: Draft) -> None:
    names = {name: draft.value(name, own) for name, own in _STANDARD.items()}
    if names == _STANDARD:
        carry_alpaca(draft, *_STANDARD)
    else:
        draft.carry("field_instruction", {"data.columns.prompt": names["field_instruction"]})
        draft.carry("field_output", {"data.columns.completion": names["field_output"]})
        draft.leave(
            "field_input", "a prompt is one column", "join the columns, or name them instruction, input, output"
        )
    combine_system(draft, "field_system")


AXOLOTL = Tool(
    name="axolotl", title="Axolotl", command="axolotl train {file}", keys=_KEYS,
    signs=frozenset({
        "base_model", "micro_batch_size", "sequence_len", "adapter", "num_epochs", "lora_target_linear", "val_set_size",
        "sample_packing", "dataset_prepared_path", "lr_scheduler", "train_on_inputs", "peft_use_dora",
    }),
    defaults=_defaults, combine_data=_combine_data,
)  # fmt: skip
