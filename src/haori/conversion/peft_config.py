"""PEFT: the `adapter_config.json` beside an adapter, or the keywords of a `LoraConfig`. Read from PEFT 0.21.

It says what was trained of which base, and nothing of data or training, for which a recipe has automatic values.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haori.conversion.reading import holds_secret
from haori.conversion.rules import Carried, Fact, Left, Outcome, Rule, choice, fact, group, lacks, of_the_tool, same, to
from haori.conversion.tool import Tool
from haori.conversion.values import UnfitValueError, flag, hub_or_file, modules, number, text, whole, words

__all__ = ["BIAS", "PEFT"]

BIAS: Mapping[str, str] = {"none": "none", "all": "all", "lora_only": "adapted"}
_OPTIONS = "(options of another method)"
_SHARED = frozenset({
    "target_modules", "layers_to_transform", "modules_to_save", "peft_type", "task_type", "base_model_name_or_path",
    "revision", "inference_mode", "auto_mapping", "peft_version", "layers_pattern", "_custom_modules",
    "exclude_modules",
})  # fmt: skip
"""Keys that have a place of their own beside a method that is taken over by its PEFT name."""


def _type(value: Any) -> Outcome:
    spelt = str(value).rpartition(".")[2].upper()
    own = {"LORA": "lora", "ADALORA": "adalora"}.get(spelt)
    return Fact("kind", own) if own else Fact("peft_type", spelt)


def _options(value: Any) -> Outcome:
    return Carried({"method.options": value}, of=tuple(value))


def _task(value: Any) -> Outcome:
    return Fact("task", {"CAUSAL_LM": ""}.get(str(value).rpartition(".")[2], str(value)))


def _layers(value: Any) -> Outcome:
    return Carried({"method.layers": [whole(item) for item in value] if isinstance(value, list) else [whole(value)]})


def _patterns(key: str) -> Rule:
    def apply(value: Any) -> Outcome:
        if not isinstance(value, dict):
            raise UnfitValueError("be a table of module names")
        if any(isinstance(inner, list) for inner in value.values()):
            return Left("the ranks that a run of AdaLoRA left; each run finds its own")
        return Carried({key: value})

    return Rule(apply, (key,))


def _tokens(_: Any) -> Outcome:
    return Left("tokens are named by their text, not their number", "method.trainable_tokens")


_KEYS: dict[str, Rule] = {
    "peft_type": Rule(_type, ("method.kind", "method.type")),
    _OPTIONS: Rule(_options, ("method.options",)),
    "task_type": Rule(_task, ("task",)),
    "base_model_name_or_path": fact("base", "base", read=hub_or_file),
    "revision": to("revision", text),
    "r": to("method.rank", whole),
    "target_r": to("method.rank", whole),
    "init_r": to("method.initial_rank", whole),
    "orth_reg_weight": to("method.orthogonality", number),
    "deltaT": to("method.interval", whole),
    "lora_alpha": to("method.alpha", number),
    "lora_dropout": to("method.dropout", number),
    "target_modules": to("method.target", modules),
    "layers_to_transform": Rule(_layers, ("method.layers",)),
    "modules_to_save": to("method.modules_to_save", words),
    "rank_pattern": _patterns("method.rank_pattern"),
    "alpha_pattern": _patterns("method.alpha_pattern"),
    "bias": choice("method.bias", BIAS, "there is no {value} here", "method.bias is none, adapted or all"),
    "use_rslora": to("method.rslora", flag),
    "use_dora": fact("dora", "method.kind", read=flag),
    "init_lora_weights": fact("init", "method.init"),
    "loftq_config.loftq_bits": fact("loftq_bits", "method.init", "method.bits", read=whole),
    "loftq_config.loftq_iter": same("how often LoftQ repeats is chosen here"),
    "eva_config": same("EVA looks at as many tokens as it needs here"),
    "trainable_token_indices": Rule(_tokens),
    "exclude_modules": lacks("modules are named, not left out", "method.target as a regular expression"),
    "layers_pattern": same("layers are found by their numbers"),
    "target_parameters": lacks("parameters of experts are not adapted", "method.kind=peft, method.options"),
    "layer_replication": lacks("layers are not replicated"),
    "lora_bias": lacks("adapters have no bias of their own", "method.bias"),
    "fan_in_fan_out": same("found from the base"),
    "ensure_weight_tying": lacks("tied weights stay as the base has them"),
    "use_qalora": lacks("there is no QA-LoRA here", "method.kind=qlora"),
    "qalora_group_size": same("read only beside use_qalora"),
    "use_bdlora": lacks("there is no BD-LoRA here"),
    "alora_invocation_tokens": lacks("activated LoRA is not trained here"),
    "tinit": lacks("the schedule of ranks is in shares of the run", "method.warmup"),
    "tfinal": lacks("the schedule of ranks is in shares of the run", "method.settle"),
    "beta1": same("sensitivities are averaged as in the paper"),
    "beta2": same("sensitivities are averaged as in the paper"),
    "total_step": same("known from the run"),
    **group(lacks("there is no such variant of LoRA here", "method.kind"), "corda_config", "arrow_config",
            "lora_ga_config", "velora_config", "monteclora_config", "kasa_config", "megatron_config"),
    **of_the_tool("megatron_core", "inference_mode", "auto_mapping", "peft_version", "runtime_config",
        "_custom_modules",
                  "lora_dtype"),
}  # fmt: skip


def _prepare(document: dict[str, Any], _: Path) -> dict[str, Any]:
    """Put the options of other methods of PEFT together, as a recipe has them."""
    kind = str(document.get("peft_type", "LORA")).rpartition(".")[2].upper()
    if kind in ("LORA", "ADALORA"):
        return document
    options = {key: value for key, value in document.items() if key not in _SHARED and value is not None
               and not holds_secret(value)}  # fmt: skip
    kept = {key: value for key, value in document.items() if key not in options}
    return {**kept, _OPTIONS: options}


def _defaults(document: Mapping[str, Any]) -> dict[str, Any]:
    if _OPTIONS in document:
        return {}
    return {"r": 8, "lora_alpha": 8} if "target_r" not in document else {}


PEFT = Tool(
    name="peft", title="PEFT", command="get_peft_model(model, config)", keys=_KEYS,
    signs=frozenset({
        "peft_type", "base_model_name_or_path", "inference_mode", "auto_mapping", "fan_in_fan_out",
        "init_lora_weights", "layers_to_transform", "rank_pattern", "alpha_pattern", "layer_replication",
    }),
    defaults=_defaults, prepare=_prepare,
)  # fmt: skip
