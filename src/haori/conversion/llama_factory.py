"""LLaMA-Factory: one YAML or JSON file. Read from its argument classes (0.9.4).

A dataset is a name in `dataset_info.json`, in the folder `dataset_dir`; where that file is found, it tells the path,
format and columns. Rows that are too long are cut off, nothing is held out, and the loss is on the assistant's tokens
unless `train_on_prompt` is set.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haori.conversion.data import carry_alpaca, carry_messages, combine_pairs, combine_system
from haori.conversion.draft import Draft
from haori.conversion.origin import SEVERAL_ADAPTERS
from haori.conversion.reading import read_document
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
from haori.conversion.training_arguments import DEFAULTS, TRAINING_ARGUMENTS, early_stopping
from haori.conversion.values import flag, hub_or_file, modules, number, text, whole, words

__all__ = ["LLAMA_FACTORY"]

_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
_IMAGES = lacks("images, sounds and films are not trained on")
_PREFERENCE = lacks("preference training has no such term here")
_OTHER_OPTIMIZER = lacks("there is only AdamW here", "optimizer.lr, optimizer.weight_decay")
_ROLE = same_if(("from", "role"), "read as it is", "the field of the role is role or from", "rename the field")


def _finetuning(value: Any) -> Outcome:
    spelt = str(value).lower()
    if spelt in ("lora", "full"):
        return Fact("kind", spelt)
    if spelt == "oft":
        return Fact("peft_type", "OFT")
    return Left(f"there is no method {value!r} here", "method.kind; LoRA is taken")


def _stage(value: Any) -> Outcome:
    return Fact("task", {"sft": "", "pt": "pretraining"}.get(str(value).lower(), str(value).lower()))


def _template(value: Any) -> Outcome:
    return Left(
        f"prompts are rendered by the base's own chat template, not by {value!r}",
        "`haori data check --show 3` shows how; for a base without a template, give its folder one",
    )


def _bits(value: Any) -> Outcome:
    bits = whole(value)
    if bits in (4, 8):
        return Fact(f"{bits}bit", True)
    return Left(f"a base is not quantised to {bits} bits here", "method.kind=qlora with method.bits 4 or 8")


def _no_checkpointing(value: Any) -> Outcome:
    return Carried({"training.gradient_checkpointing": not flag(value)})


def _option(name: str) -> Rule:
    return Rule(lambda value: Carried({f"method.options.{name}": number(value)}), ("method.options",))


def _rank(value: Any) -> Outcome:
    if whole(value) == 0:
        return Unneeded("oft_block_size says it")
    return Carried({"method.options.r": whole(value)})


def _tracker(name: str) -> Rule:
    return Rule(lambda value: Left(f"there is no {name} here", "training.trackers") if flag(value) else Unneeded("off"))


_KEYS: dict[str, Rule] = {
    **TRAINING_ARGUMENTS,
    "model_name_or_path": fact("base", "base", read=hub_or_file),
    "model_revision": to("revision", text),
    "stage": Rule(_stage, ("task", "loss.kind")),
    "finetuning_type": Rule(_finetuning, ("method.kind",)),
    "quantization_bit": Rule(_bits, ("method.kind", "method.bits")),
    "quantization_method": same_if(
        ("bitsandbytes", "bnb", "QuantizationMethod.BNB"), "bitsandbytes, as here",
        "a base is quantised by bitsandbytes here, not by {value}", "method.kind=qlora",
    ),
    "quantization_type": same_if(("nf4",), "NF4, as here", "4 bits are NF4 here, not {value}", "method.bits=4"),
    "double_quantization": fact("double_quantization", "method.double_quantization", read=flag),
    "lora_rank": to("method.rank", whole),
    "lora_alpha": to("method.alpha", number),
    "lora_dropout": to("method.dropout", number),
    "lora_target": to("method.target", modules),
    "additional_target": to("method.modules_to_save", words),
    "oft_target": to("method.target", modules),
    "oft_rank": Rule(_rank, ("method.options",)),
    "oft_block_size": _option("oft_block_size"),
    "module_dropout": _option("module_dropout"),
    "loraplus_lr_ratio": to("method.lr_ratio", number),
    "loraplus_lr_embedding": lacks("embeddings have no learning rate of their own"),
    "use_rslora": to("method.rslora", flag),
    "use_dora": fact("dora", "method.kind", read=flag),
    "pissa_init": fact("pissa", "method.init", read=flag),
    "pissa_iter": same("PiSSA starts from an exact decomposition here"),
    "pissa_convert": same("PiSSA is saved as an ordinary LoRA adapter here"),
    "create_new_adapter": fact("new_adapter", read=flag),
    "adapter_name_or_path": SEVERAL_ADAPTERS,
    "dataset": fact("names", "data.path", read=words),
    "dataset_dir": same("where the datasets are described"),
    "eval_dataset": lacks("a second dataset is named by its path", "data.validation"),
    "dataset_info.(path)": fact("data", "data.path", read=text),
    "dataset_info.formatting": fact("formatting", "data.format", read=text),
    "dataset_info.split": to("data.split", text),
    "dataset_info.hf_hub_url": fact("hub", "data.path", read=text),
    "dataset_info.file_name": same("joined with dataset_dir"),
    "dataset_info.ranking": Rule(lambda value: Fact("ranking", True) if flag(value) else Unneeded("off")),
    "dataset_info.num_samples": to("data.max_rows", whole),
    "dataset_info.subset": lacks("a configuration of a hub dataset cannot be chosen", "name its folder in data.path"),
    "dataset_info.folder": lacks("a folder of a hub dataset cannot be chosen", "name its folder in data.path"),
    "dataset_info.ms_hub_url": lacks("ModelScope is not asked", "download it and name the folder in data.path"),
    "dataset_info.script_url": lacks("code of a dataset is not run", "name its files in data.path"),
    **{f"dataset_info.columns.{name}": fact(f"column_{name}", f"data.columns.{ours}", read=text) for name, ours in
       (("prompt", "prompt"), ("response", "completion"), ("messages", "messages"), ("system", "system"))},
    **{f"dataset_info.columns.{name}": fact(f"column_{name}", read=text) for name in ("query", "history")},
    "dataset_info.columns.tools": same_if(("tools",), "read as it is", "the column of tools is named tools"),
    **{f"dataset_info.columns.{name}": fact(f"column_{name}", f"data.columns.{name}", read=text)
       for name in ("chosen", "rejected")},
    "dataset_info.columns.kto_tag": fact("column_label", "data.columns.label", read=text),
    **{f"dataset_info.columns.{name}": _IMAGES for name in ("images", "videos", "audios")},
    "dataset_info.tags.role_tag": _ROLE,
    "dataset_info.tags.content_tag": same_if(("value", "content"), "read as it is", "the text is in value or content"),
    **{f"dataset_info.tags.{name}": same("the usual names of roles are known here") for name in
       ("user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")},
    "template": Rule(_template),
    "default_system": to("data.system", text),
    "cutoff_len": to("data.max_length", whole),
    "max_samples": to("data.max_rows", whole),
    "val_size": fact("validation_size", "data.validation_share", read=number),
    "train_on_prompt": choice("data.train_on", {True: "all", False: "assistant"}, "it cannot be {value} here"),
    "mask_history": lacks("all answers of a conversation are trained", '"loss": false in the messages before the last'),
    "packing": fact("packing", read=flag),
    "neat_packing": fact("neat_packing", read=flag),
    "early_stopping_steps": Rule(early_stopping, ("training.patience",)),
    "disable_gradient_checkpointing": Rule(_no_checkpointing, ("training.gradient_checkpointing",)),
    "pure_bf16": fact("bf16", "training.dtype", read=flag),
    "train_from_scratch": lacks("a base has weights"),
    "resize_vocab": lacks("the vocabulary is the base's own", "method.trainable_tokens trains tokens that are there"),
    "add_tokens": lacks("no tokens are added to a base", "method.trainable_tokens trains tokens that are there"),
    "add_special_tokens": lacks("no tokens are added to a base", "method.trainable_tokens"),
    "new_special_tokens_config": lacks("no tokens are added to a base", "method.trainable_tokens"),
    "rope_scaling": lacks("contexts are not extended", "the base's config.json"),
    "shift_attn": lacks("there is no shifted sparse attention here"),
    "mixture_of_depths": lacks("models are trained as they are"),
    "moe_aux_loss_coef": lacks("routers of experts are not balanced by a loss"),
    "use_dft_loss": lacks("the loss is cross-entropy"),
    "use_llama_pro": lacks("there is no LLaMA Pro here", "method.layers chooses layers"),
    "use_swanlab": _tracker("SwanLab"),
    "streaming": lacks("data is read whole, and kept on disk"),
    "mix_strategy": lacks("one dataset is read", "put the files into one folder, as data.path", off=("concat",)),
    "interleave_probs": lacks("one dataset is read", "put the files into one folder, as data.path"),
    "tool_format": lacks("calls of tools are written by the base's chat template"),
    "compute_accuracy": lacks("tokens are not counted right or wrong", "haori evaluate"),
    "trust_remote_code": lacks("code from the hub is not run", "a base that transformers knows"),
    "disable_shuffling": lacks("rows are always shuffled"),
    "fp8": lacks("training in fp8 is not supported", "training.dtype=bf16"),
    "upcast_layernorm": same("normalisation is computed in fp32 here"),
    "enable_thinking": lacks("the base's chat template decides", "`haori data check --show 3` shows what is trained"),
    **group(_OTHER_OPTIMIZER, "use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon"),
    "pref_loss": fact("loss_name", "loss.kind", read=text),
    "pref_beta": fact("beta", "loss.beta", read=number), "simpo_gamma": fact("gamma", "loss.gamma", read=number),
    "dpo_label_smoothing": fact("label_smoothing", "loss.label_smoothing", read=number),
    "kto_chosen_weight": fact("desirable", "loss.desirable_weight",
        read=number), "kto_rejected_weight": fact("undesirable", "loss.undesirable_weight", read=number),
    "ref_model": lacks("the reference is the base without its adapter"),
    **group(_PREFERENCE, "pref_ftx", "pref_bco_weight", "reward_model", "reward_model_type", "ld_alpha"),
    **group(lacks("single layers are not trained in full", "method.layers, method.modules_to_save"),
            "freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"),
    **group(same("read only beside another key"), "init_special_tokens", "fp8_backend", "galore_target", "galore_rank",
            "galore_update_interval", "galore_scale", "galore_proj_type", "galore_layerwise", "apollo_target",
            "apollo_rank", "apollo_update_interval", "apollo_scale", "apollo_proj", "apollo_proj_type",
            "apollo_scale_type", "apollo_layerwise", "apollo_scale_front", "badam_mode", "badam_start_block",
            "badam_switch_mode", "badam_switch_interval", "badam_update_ratio", "badam_mask_mode", "badam_verbose",
            "fp8_enable_fsdp_float8_all_gather", "ppo_buffer_size", "ppo_epochs", "ppo_score_norm", "ppo_target",
            "ppo_whiten_rewards", "ref_model_adapters", "ref_model_quantization_bit", "reward_model_adapters",
            "reward_model_quantization_bit"),
    **group(same("about answers, not training; haori chat and haori serve have such options"), "do_sample",
        "temperature",
            "top_p", "top_k", "num_beams", "max_length", "max_new_tokens", "repetition_penalty", "length_penalty",
            "skip_special_tokens"),
    **group(lacks("a recipe trains, and does not export", "haori merge, haori library export"), "export_dir",
        "export_size",
            "export_device", "export_quantization_bit", "export_quantization_dataset", "export_quantization_nsamples",
            "export_quantization_maxlen", "export_legacy_format", "export_hub_model_id"),
    **group(_IMAGES, "media_dir", "image_do_pan_and_scan", "crop_to_patches", "video_min_pixels", "use_audio_in_video",
            "audio_sampling_rate", "image_max_pixels", "video_max_pixels", "freeze_vision_tower",
            "freeze_multi_modal_projector", "freeze_language_model", "image_min_pixels", "video_fps", "video_maxlen"),
    **group(TRAINING_ARGUMENTS["tf32"], "flash_attn", "use_unsloth", "use_unsloth_gc", "enable_liger_kernel",
            "use_reentrant_gc", "low_cpu_mem_usage", "upcast_lmhead_output", "use_v1_kernels",
            "preprocessing_num_workers", "preprocessing_batch_size", "use_kv_cache", "quantization_device_map"),
    **group(TRAINING_ARGUMENTS["logging_steps"], "plot_loss", "include_effective_tokens_per_second",
            "print_param_status"),
    **of_the_tool(
        "adapter_folder", "vllm_maxlen", "vllm_gpu_util", "vllm_enforce_eager", "vllm_max_lora_rank", "vllm_config",
        "overwrite_cache", "tokenized_path", "cache_dir", "use_fast_tokenizer", "split_special_tokens", "infer_backend",
        "buffer_size", "ignore_pad_token_for_loss", "eval_on_each_dataset", "eval_num_beams", "infer_dtype",
        "ray_run_name",
        "ray_storage_path", "ray_num_workers", "resources_per_worker", "placement_strategy", "ray_init_kwargs",
        "data_shared_file_system", "offload_folder", "use_mca", "swanlab_project", "swanlab_run_name", "swanlab_mode",
        "swanlab_workspace", "swanlab_logdir",
    ),
}  # fmt: skip


def _defaults(document: Mapping[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {**DEFAULTS, "cutoff_len": 2048, "val_size": 0.0}
    if document.get("finetuning_type", "lora") == "lora":
        rank = document.get("lora_rank")
        rank = number(rank) if isinstance(rank, (int, float, str)) and rank != "" else 8
        given |= {"lora_rank": 8, "lora_alpha": 2 * rank, "lora_dropout": 0.0}
    if document.get("pref_loss") == "simpo":
        given |= {"pref_beta": 0.1, "simpo_gamma": 0.5}
    if document.get("warmup_ratio"):
        del given["warmup_steps"]
    return given


def _prepare(document: dict[str, Any], path: Path) -> dict[str, Any]:
    """Add the description of the first dataset, where it is found."""
    names = document.get("dataset")
    listed = names.split(",") if isinstance(names, str) else names
    first = listed[0] if isinstance(listed, list) and listed else None
    if not isinstance(first, str) or not first.strip():
        return document
    folder = str(document.get("dataset_dir") or "data")
    for place in dict.fromkeys((Path(folder), path.parent / folder)):
        described = place / "dataset_info.json"
        if described.is_file():
            entry = read_document(described).get(first.strip())
            if isinstance(entry, dict):
                file = entry.get("file_name")
                where = {"(path)": str(place / file)} if isinstance(file, str) and not entry.get("hf_hub_url") else {}
                return {**document, "dataset_info": {"formatting": "alpaca", **entry, **where}}
    return document


def _combine_data(draft: Draft) -> None:
    names = draft.value("names", [])
    if draft.has("hub"):
        draft.carry(("hub", "data"), {"data.path": draft.value("hub")})
    found = draft.has("data") or "data.path" in draft.ours
    if not found and names:
        draft.no_data = f"{names[0]!r} is not described, with a file, in the dataset_info.json of its dataset_dir"
    if names and "data.path" not in draft.ours and draft.has("data"):
        draft.carry(("names", "data"), {"data.path": draft.value("data")}, _others(names))
    elif names and len(names) > 1:
        draft.leave(
            "names", f"one dataset is read, not {', '.join(names)}", "put the files into one folder, as data.path"
        )
    draft.unneeded("names", "data.path says where it is")
    draft.unneeded("neat_packing", "rows are never joined here")
    _combine_format(draft)


def _others(names: list[str]) -> str:
    return f"without {', '.join(names[1:])}: put the files into one folder and name it" if len(names) > 1 else ""


def _combine_format(draft: Draft) -> None:
    if draft.ours.get("task") == "preference":
        combine_pairs(draft)
        return
    kind = draft.value("formatting", "alpaca")
    if kind in ("sharegpt", "openai"):
        own = "conversations" if kind == "sharegpt" else "messages"
        carry_messages(draft, ("formatting", "column_messages"), draft.value("column_messages", own))
    elif draft.value("task") == "pretraining" and draft.has("formatting"):
        draft.carry(("formatting", "column_prompt"), {"data.columns.text": draft.value("column_prompt", "text")})
    elif draft.has("formatting"):
        names = {name: draft.value(f"column_{name}", own) for name, own in _COLUMNS.items()}
        if names == _COLUMNS:
            carry_alpaca(draft, "formatting", *(f"column_{name}" for name in _COLUMNS))
        else:
            draft.carry(("formatting", "column_prompt"), {"data.columns.prompt": names["prompt"]})
            draft.carry(("column_response",), {"data.columns.completion": names["response"]})
            draft.leave("column_query", "a prompt is one column", "join the columns, or name them as Alpaca does")
    combine_system(draft, "column_system")
    if draft.value("column_history") == "history" and draft.ours.get("data.format") == "alpaca":
        draft.unneeded("column_history", "the column history is read")
    draft.leave("column_history", "a history is read from the column history of Alpaca rows")


LLAMA_FACTORY = Tool(
    name="llama-factory", title="LLaMA-Factory", command="llamafactory-cli train {file}", keys=_KEYS,
    signs=frozenset({
        "finetuning_type", "stage", "template", "cutoff_len", "lora_target", "dataset_dir", "quantization_bit",
        "overwrite_cache", "preprocessing_num_workers", "plot_loss", "max_samples", "pissa_init", "additional_target",
    }),
    defaults=_defaults, habits={"data.too_long": ("truncate", "longer rows are cut off")}, prepare=_prepare,
    combine_data=_combine_data,
)  # fmt: skip
