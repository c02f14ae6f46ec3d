"""Kinds of adapter that cannot be served per request, each with its name and what to do instead."""

from typing import TYPE_CHECKING, Any

from haori.core.errors import InputError

if TYPE_CHECKING:
    from haori.library import AdapterFiles

__all__ = ["not_applied", "refuse_unsupported"]

_SERVED = ("LORA", "ADALORA", "ARD_LORA")
# Fields of PEFT's LoraConfig (0.21) that change what the layer computes, when they are set.
_VARIANTS = {
    "alora_invocation_tokens": "an activated LoRA, which begins to act at its invocation tokens",
    "kasa_config": "KaSA, which changes the base's own weights",
    "layer_replication": "replicated layers, which make another model of the base",
    "monteclora_config": "MonteCLoRA, which samples its factors",
    "target_parameters": "updates of single parameters (target_parameters)",
    "use_bdlora": "block-diagonal factors (BD-LoRA)",
    "use_qalora": "QA-LoRA, which pools the inputs of a quantised base",
    "velora_config": "VeLoRA, which keeps compressed activations",
}
# PiSSA, OLoRA, CorDA and LoftQ take a part of the base's weights away when PEFT loads them; what LoRA-GA took is lost.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse_unsupported(files: "AdapterFiles", label: str) -> None:
    """Refuse an adapter by what its configuration says.

    Raises:
        InputError: One sentence: what it is, and what to do.
    """
    config: dict[str, Any] = files.config
    merge = "merge it with `haori merge` and serve the merged model"
    if files.peft_type not in _SERVED:
        raise InputError(
            f"The adapter {label} is of the method {files.method}, which the engine does not serve; it serves lora, "
            f"dora, adalora and ard_lora. Instead, {merge}."
        )
    for field, meaning in _VARIANTS.items():
        if config.get(field):
            raise InputError(f"The adapter {label} is {meaning}; the engine does not serve that. Instead, {merge}.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise InputError(
            f"The adapter {label} was trained over a base that its start {start!r} had changed, so it does not act on "
            f"the base as it is. Save it as a plain LoRA (PEFT: path_initial_model_for_weight_conversion), or {merge}."
        )


def not_applied(label: str, what: str) -> str:
    """Return the sentence that refuses an adapter for something in its file."""
    return (
        f"The adapter {label} holds {what}, which the engine does not apply per request; merge it with `haori merge` "
        "and serve the merged model."
    )
