"""The keys of `TrainingArguments` of transformers, which LLaMA-Factory, TRL, Unsloth and ms-swift hand through.

Read from transformers 5.23; names of version 4 (`warmup_ratio`, `evaluation_strategy`, `overwrite_output_dir`,
`group_by_length`, `save_safetensors`) are taken too.
"""

from collections.abc import Mapping
from typing import Any

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
from haori.conversion.values import flag, number, whole, words

__all__ = ["DEFAULTS", "TRAINING_ARGUMENTS", "early_stopping", "grad_norm", "optimizer", "schedule", "trackers"]

_ADAMW = {
    "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_xla", "adamw_torch_npu_fused",
    "adamw_anyprecision", "paged_adamw_32bit", "paged_adamw", "adamw",
}  # fmt: skip
_ADAMW_8BIT = {
    "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "adamw_torch_8bit", "adamw_torch_4bit", "ao_adamw_8bit",
    "ao_adamw_4bit", "adamw_fp8", "ao_adamw_fp8",
}  # fmt: skip
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
_NO_CLIPPING = 1e9

DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 5e-5, "lr_scheduler_type": "linear", "warmup_steps": 0, "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
}  # fmt: skip
"""What TrainingArguments takes by itself where ours differs."""


def optimizer(value: Any) -> Outcome:
    """Take AdamW in its spellings."""
    spelt = str(value).lower().removeprefix("optimizernames.")
    if spelt in _ADAMW:
        return Unneeded("AdamW, as here")
    if spelt in _ADAMW_8BIT:
        return Unneeded("AdamW, as here; its moments are kept in 32 bits, which takes little for an adapter")
    return Left(f"there is no optimizer {value!r} here, only AdamW", "check optimizer.lr, which fits another optimizer")


def schedule(value: Any) -> Outcome:
    """Carry the shape of the learning rate."""
    spelt = str(value).lower().removeprefix("schedulertype.")
    if spelt not in _SCHEDULES:
        return Left(f"there is no schedule {value!r} here", "schedule.kind is cosine, linear or constant")
    if spelt == "constant":
        return Carried({"schedule.kind": "constant", "schedule.warmup_ratio": 0.0}, "without warm-up, as there")
    return Carried({"schedule.kind": _SCHEDULES[spelt]})


def grad_norm(value: Any) -> Outcome:
    """Carry the limit of the gradient's norm; 0 is none."""
    limit = number(value)
    if limit > 0:
        return Carried({"optimizer.max_grad_norm": limit})
    return Carried({"optimizer.max_grad_norm": _NO_CLIPPING}, "no clipping there; a limit that nothing reaches")


def trackers(value: Any) -> Outcome:
    """Carry the experiment trackers that are known here."""
    named = [item.lower() for item in words(value)]
    if set(named) <= {"none"}:
        return Carried({"training.trackers": []})
    known = [item for item in named if item in _TRACKERS]
    others = [item for item in named if item not in (*_TRACKERS, "none")]
    if not known:
        return Left(f"there is no tracker {', '.join(others)} here", f"training.trackers: {', '.join(_TRACKERS)}")
    return Carried({"training.trackers": known}, f"without {', '.join(others)}" if others else "")


def early_stopping(value: Any) -> Outcome:
    """Carry the number of validations without improvement after which a run ends."""
    return Carried({"training.patience": whole(value)})


def _strategy(value: Any) -> Outcome:
    by = str(value).lower().removeprefix("intervalstrategy.").removeprefix("savestrategy.")
    return Fact("saves_by_steps", by == "steps")


def _evaluation(value: Any) -> Outcome:
    by = str(value).lower().removeprefix("intervalstrategy.")
    if by == "epoch":
        return Carried({"training.evaluations_per_epoch": 1})
    if by == "no":
        return Fact("no_validation", True)
    return Unneeded("validation is measured within epochs here")


def _best(value: Any) -> Outcome:
    if flag(value):
        return Unneeded("the best state is restored here")
    return Left("the best state by validation loss is kept here, not the last", "data.validation_share=0")


def _best_by(value: Any) -> Outcome:
    if str(value).lower() in ("loss", "eval_loss"):
        return Unneeded("the loss, as here")
    return Left(f"the best state is chosen by validation loss, not by {value}", "haori evaluate measures the rest")


_LOGS = same("metrics, a loss plot and a diagnosis are written into the run folder")
_HUB = lacks("nothing is uploaded", "haori library export writes a folder for the hub")
_KEPT = same("runs are kept under HAORI_HOME, adapters in the library by name")
_SPEED = same("about speed and memory; the fastest way that computes the same is chosen here")

TRAINING_ARGUMENTS: dict[str, Rule] = {
    "learning_rate": to("optimizer.lr", number),
    "weight_decay": to("optimizer.weight_decay", number),
    "adam_beta1": to("optimizer.beta1", number),
    "adam_beta2": to("optimizer.beta2", number),
    "adam_epsilon": to("optimizer.eps", number),
    "max_grad_norm": Rule(grad_norm, ("optimizer.max_grad_norm",)),
    "lr_scheduler_type": Rule(schedule, ("schedule.kind",)),
    "warmup_ratio": fact("warmup_ratio", "schedule.warmup_ratio", read=number),
    "warmup_steps": fact("warmup_steps", "schedule.warmup_ratio", read=number),
    "num_train_epochs": fact("epochs", "training.epochs", read=number),
    "max_steps": fact("max_steps", "training.max_steps", read=whole),
    "per_device_train_batch_size": fact(
        "rows", "training.micro_batch_tokens", "training.batch_tokens", read=whole
    ),
    "gradient_accumulation_steps": fact("accumulation", "training.batch_tokens", read=whole),
    "seed": to("training.seed", whole),
    "bf16": fact("bf16", "training.dtype"),
    "fp16": fact("fp16", "training.dtype"),
    "gradient_checkpointing": to("training.gradient_checkpointing", flag),
    "eval_strategy": Rule(_evaluation, ("training.evaluations_per_epoch", "data.validation_share")),
    "evaluation_strategy": Rule(_evaluation, ("training.evaluations_per_epoch", "data.validation_share")),
    "eval_steps": fact("eval_steps", "training.evaluations_per_epoch", read=number),
    "save_strategy": Rule(_strategy, ("training.save_every",)),
    "save_steps": fact("save_steps", "training.save_every", read=number),
    "save_total_limit": to("training.keep_checkpoints", whole),
    "report_to": Rule(trackers, ("training.trackers",)),
    "load_best_model_at_end": Rule(_best),
    "metric_for_best_model": Rule(_best_by),
    "greater_is_better": same_if((False,), "the lowest loss is the best here too", "the lowest loss is the best here"),
    "optim": Rule(optimizer),
    "label_smoothing_factor": lacks("labels are not smoothed here"),
    "neftune_noise_alpha": lacks("no noise is added to embeddings here", "method.dropout acts against over-fitting"),
    "lr_scheduler_kwargs": lacks("schedules have no options here", "schedule.kind"),
    "optim_args": lacks("AdamW is set by optimizer.beta1, beta2, eps and weight_decay"),
    "optim_target_modules": lacks("there is no GaLore here", "method.target says what LoRA adapts"),
    "data_seed": lacks("order and initialisation follow one seed here", "training.seed", off=()),
    "resume_from_checkpoint": lacks(
        "runs of other tools cannot be continued", "haori library add takes a finished adapter"
    ),
    "deepspeed": lacks("DeepSpeed is not supported",
        "training.gradient_checkpointing and method.kind=qlora save memory"),
    "fsdp_config": same("read only beside fsdp"),
    "fsdp": lacks("FSDP is not supported", "training.gradient_checkpointing and method.kind=qlora save memory"),
    "use_cpu": lacks("the device is found by itself", "CUDA_VISIBLE_DEVICES= hides the GPUs"),
    "auto_find_batch_size": lacks(
        "the batch is not changed during a run", "training.micro_batch_tokens"
    ),
    "do_train": same_if((True,), "haori train trains", "haori train trains; that file does not", "haori evaluate"),
    "do_eval": same("validation is measured where there are rows for it"),
    "do_predict": lacks("nothing is predicted while training", "haori evaluate"),
    "max_epochs": lacks("the epochs are the limit", "training.epochs"),
    "activation_offloading": lacks("activations are not moved to the CPU", "training.gradient_checkpointing"),
    "average_tokens_across_devices": same("the loss is divided by the trained tokens of the whole step here"),
    "include_num_input_tokens_seen": _LOGS,
    "full_determinism": same("a run is repeated exactly with the same seed on the same machine"),
    **group(
        _KEPT, "output_dir", "overwrite_output_dir", "run_name", "logging_dir", "project", "save_only_model",
        "save_on_each_node", "save_safetensors", "enable_jit_checkpoint",
    ),
    **group(
        _LOGS, "logging_steps", "logging_strategy", "logging_first_step", "logging_nan_inf_filter", "log_level",
        "log_level_replica", "log_on_each_node", "disable_tqdm", "include_tokens_per_second", "skip_memory_metrics",
    ),
    **group(
        _HUB, "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision",
        "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    ),
    **group(
        _SPEED, "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel",
        "liger_kernel_config", "group_by_length", "length_column_name", "train_sampling_strategy", "use_cache",
        "gradient_checkpointing_kwargs", "torch_empty_cache_steps", "dataloader_num_workers", "dataloader_pin_memory",
        "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_drop_last", "dataloader_in_order",
        "dataloader_multiprocessing_context", "bf16_full_eval", "fp16_full_eval", "activation_checkpointing",
        "activation_checkpointing_kwargs", "per_device_eval_batch_size", "eval_accumulation_steps", "fp16_opt_level",
        "half_precision_backend", "fp16_backend",
    ),
    **of_the_tool(
        "local_rank", "ddp_timeout", "ddp_backend", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
        "ddp_static_graph",
        "ddp_broadcast_buffers", "accelerator_config", "parallelism_config", "debug", "remove_unused_columns",
        "label_names", "prediction_loss_only", "eval_on_start", "eval_delay", "eval_do_concat_batches",
        "eval_use_gather_object", "include_for_metrics", "batch_eval_metrics", "ignore_data_skip", "ray_scope",
        "restore_callback_states_from_checkpoint", "predict_with_generate", "generation_max_length",
        "generation_num_beams", "generation_config", "sortish_sampler",
    ),
}  # fmt: skip
"""What becomes of each key of TrainingArguments."""
