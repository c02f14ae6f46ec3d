"""Kinds of adapter that cannot be served per request, each with its name and what to do instead."""

from typing import TYPE_CHECKING, Any

from haori.core.errors import InputError

if TYPE_CHECKING:
    from haori.library import AdapterFiles

__all__ = ["not_applied", "refuse_classifier", "refuse_unsupported"]

_SERVED = ("LORA", "ADALORA", "ARD_LORA")
# Methods that `haori merge` merges. A test merges one of each; the others are not promised.
_MERGED = frozenset({
    "BOFT", "C3A", "DELORA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "RANDLORA", "ROAD", "SHIRA",
    "TRAINABLE_TOKENS", "VBLORA", "VERA",
})  # fmt: skip
# Methods that put something before the prompt or between layers, so that there are no weights to merge.
_PREPENDED = frozenset({"ADAPTION_PROMPT", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"})
_MERGE = "Instead, merge it with `haori merge` and serve the merged model."
_CHAT = "It cannot be merged either: use it with `haori chat` or `haori generate-text`."
_AGAIN = "Train it again as one of these."
# Fields of PEFT's LoraConfig (0.21) that change what the layer computes, when they are set, and what can be done then.
_VARIANTS = {
    "alora_invocation_tokens": ("an activated LoRA, which begins to act at its invocation tokens", _CHAT),
    "kasa_config": ("KaSA, which changes the base's own weights", _MERGE),
    "layer_replication": ("replicated layers, which make another model of the base", _MERGE),
    "monteclora_config": ("MonteCLoRA, which samples its factors", _MERGE),
    "target_parameters": ("updates of single parameters (target_parameters)", _MERGE),
    "use_bdlora": ("block-diagonal factors (BD-LoRA)", "Train it again as a plain LoRA."),
    "use_qalora": ("QA-LoRA, which pools the inputs of a quantised base", _MERGE),
    "velora_config": ("VeLoRA, which keeps compressed activations", _MERGE),
}
# Starts that take a part of the base's weights away. Those of PiSSA and OLoRA are found again when PEFT loads them.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FOUND_AGAIN = frozenset({"pissa", "olora"})
_CONVERTED = ("pissa", "olora", "corda", "lora_ga")
_CONVERT = "save it as a plain LoRA where it was trained (PEFT: path_initial_model_for_weight_conversion)"


def refuse_unsupported(files: "AdapterFiles", label: str) -> None:
    """Refuse an adapter by what its configuration says.

    Raises:
        InputError: What it is, and what to do.
    """
    config: dict[str, Any] = files.config
    if files.peft_type not in _SERVED:
        advice = _MERGE if files.peft_type in _MERGED else _CHAT if files.peft_type in _PREPENDED else _AGAIN
        raise InputError(
            f"The adapter {label} is of the method {files.method}, which the engine does not serve; it serves lora, "
            f"dora, adalora and ard_lora. {advice}"
        )
    for field, (meaning, advice) in _VARIANTS.items():
        if config.get(field):
            raise InputError(f"The adapter {label} is {meaning}; the engine does not serve that. {advice}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise InputError(
            f"The adapter {label} was trained over a base that its start {start!r} had changed, so it does not act on "
            f"the base as it is. {_advice_for_start(start.lower())}"
        )


def refuse_classifier(files: "AdapterFiles", label: str) -> None:
    """Refuse a classifier where text is written or embedded.

    Raises:
        InputError: It is one.
    """
    if files.head is not None:
        raise InputError(
            f"The adapter {label} is a classifier; classifiers are served over encoders, by /classify. "
            "`haori classify` answers with any."
        )


def _advice_for_start(start: str) -> str:
    if start in _FOUND_AGAIN:
        return f"Merge it with `haori merge` and serve the merged model, or {_CONVERT}."
    if start.startswith(_CONVERTED):
        return f"{_CONVERT[0].upper()}{_CONVERT[1:]}."
    return "Train it again as a plain LoRA."


def not_applied(label: str, what: str) -> str:
    """Return the sentence that refuses an adapter for something in its file that merging takes along."""
    return (
        f"The adapter {label} holds {what}, which the engine does not apply per request; merge it with `haori merge` "
        "and serve the merged model."
    )
