"""Any method of PEFT by the name of its type, such as IA3, LOHA, OFT, VERA or PREFIX_TUNING, with its own options.

The options are the fields of its configuration in PEFT. What the rest of the recipe says already (targets, task,
modules trained in full) is set from there. Methods that have a kind of their own are asked for by that.
"""

import copy
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from haori.adapters.behaviour import Behaviour
from haori.adapters.insertion import Insertion, check_named, insert_config, norm_modules, saved_modules, token_ids
from haori.adapters.patterns import exact_patterns, refuse_clash
from haori.core.errors import InputError, nearest
from haori.core.methods import PeftMethod

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["behaviour", "check", "insert"]

_KINDS = {"LORA": "lora", "ADALORA": "adalora", "ARD_LORA": "ard_lora"}
_REFUSED = {
    "ADAPTION_PROMPT": "it wraps whole attention blocks, which method.target cannot name",
    "CPT": "it is trained on token types that only its own data set supplies",
    "MULTITASK_PROMPT_TUNING": "it needs a task id with every row",
    "POLY": "it needs a task id with every row",
    "PROMPT_TUNING": "it lengthens every row by tokens that have no labels; PREFIX_TUNING does not",
    "P_TUNING": "it lengthens every row by tokens that have no labels; PREFIX_TUNING does not",
    "SHADOW": "what its layers return is no tensor, and the attention of transformers needs one",
    "XLORA": "it mixes adapters that exist already",
}
_SET_ELSEWHERE = {
    "auto_mapping": "PEFT itself",
    "base_model_name_or_path": "base",
    "inference_mode": "training",
    "modules_to_save": "method.modules_to_save",
    "peft_type": "method.type",
    "peft_version": "PEFT itself",
    "revision": "revision",
    "runtime_config": "PEFT itself",
    "target_modules": "method.target",
    "task_type": "task",
}
_MISFITS = (ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError)


def check(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", method: PeftMethod, targets: Sequence[str]
) -> None:
    """Check type, options and modules against a base; see `check_method`.

    Raises:
        InputError: PEFT has no such type, the type no such option, or PEFT refuses to build it for this base.
    """
    check_named(model, tokenizer, method, targets)
    task_type = _task_type_of(model)
    config = _config(model, tokenizer, method, targets, task_type)
    if config.is_prompt_learning and task_type is None:
        raise InputError(
            f"The method {method.type.upper()} puts trained tokens before a text, and a denoiser reads none; take "
            "LOKR, LOHA or another method that changes weights."
        )
    try:
        # A skeleton has no weights to start from, which some methods want and find only later.
        insert_config(copy.deepcopy(model), config, seed=0)
    except _MISFITS as error:
        raise _refusal(method, error) from error
    except (RuntimeError, NotImplementedError):
        return


def _task_type_of(model: "PreTrainedModel") -> str | None:
    """Return what PEFT would call the task of a model with this head; prompt learning is not built without it."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    heads = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    return next((kind for ending, kind in heads.items() if type(model).__name__.endswith(ending)), "CAUSAL_LM")


def insert(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    method: PeftMethod,
    targets: Sequence[str],
    insertion: Insertion,
) -> "PeftModel":
    """Freeze `model` and insert the method; see `insert_method`."""
    try:
        return insert_config(model, _config(model, tokenizer, method, targets, insertion.task_type), insertion.seed)
    except (*_MISFITS, RuntimeError) as error:
        raise _refusal(method, error) from error


def behaviour(model: "nn.Module", method: PeftMethod, steps: int) -> Behaviour:
    """Return the default: a method by name adds nothing to a step."""
    return Behaviour(model)


def _config(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    method: PeftMethod,
    targets: Sequence[str],
    task_type: str | None,
) -> "PeftConfig":
    """Build the configuration of the method in PEFT."""
    from dataclasses import fields

    config_class = _config_class(method.type)
    known = {field.name for field in fields(config_class)}
    for option in method.options:
        _check_option(method.type, option, known)
    patterns = {key: value for key, value in method.options.items() if key.endswith("_pattern") and value}
    given: dict[str, Any] = {**method.options, **_exact(patterns, targets), "task_type": task_type}
    if saved := saved_modules(model, method):
        _refuse_unless("modules_to_save" in known, method, "modules_to_save or train_norms")
        given["modules_to_save"] = saved
    given |= _targets(model, tokenizer, method, targets, known)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = config_class(**given)
    except _MISFITS as error:
        raise _refusal(method, error) from error
    if config.is_prompt_learning and not getattr(config, "num_virtual_tokens", None):
        raise InputError(
            f"The method {method.type.upper()} needs the number of its tokens; set "
            "method.options.num_virtual_tokens=20."
        )
    return config


def _exact(patterns: dict[str, Any], targets: Sequence[str]) -> dict[str, Any]:
    """Return tables of values by module with full names, as for LoRA."""
    tables = {key: value for key, value in patterns.items() if isinstance(value, dict)}
    for key, pattern in tables.items():
        try:
            unused = [name for name in pattern if not exact_patterns({name: pattern[name]}, targets)]
        except re.error as error:
            raise InputError(f"A key of method.options.{key} is not a valid regular expression: {error}.") from None
        if unused:
            raise InputError(f"The key {unused[0]!r} of method.options.{key} fits none of the target modules.")
        refuse_clash(f"options.{key}", pattern, targets)
    return {key: exact_patterns(pattern, targets) for key, pattern in tables.items()}


def _targets(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    method: PeftMethod,
    targets: Sequence[str],
    known: set[str],
) -> dict[str, Any]:
    """Return the fields that say where: modules or tokens, in the form that the type wants."""
    name = method.type.upper()
    untold = method.target == "all-linear"
    if name == "TRAINABLE_TOKENS":
        _refuse_unless(untold and not method.layers, method, "target or layers")
        if not method.trainable_tokens:
            raise InputError(
                "The method TRAINABLE_TOKENS trains the tokens in method.trainable_tokens; name some there."
            )
        return {"token_indices": token_ids(tokenizer, method.trainable_tokens)}
    _refuse_unless(not method.trainable_tokens, method, "trainable_tokens")
    if name == "LN_TUNING":
        _refuse_unless(untold, method, "target, since it trains the normalisation layers")
        return {"target_modules": norm_modules(model, method)}
    if "target_modules" not in known:
        _refuse_unless(untold and not method.layers, method, "target or layers")
        return {}
    if name == "IA3":
        return {"target_modules": list(targets), "feedforward_modules": _feedforward(model, method, targets)}
    return {"target_modules": list(targets)}


def _feedforward(model: "PreTrainedModel", method: PeftMethod, targets: Sequence[str]) -> list[str]:
    """Return the targets whose inputs IA3 scales rather than their outputs, by full name as the targets are.

    PEFT would add the ends of their names itself, and then refuse its own file because they are no targets.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as KNOWN

    ends = method.options.get("feedforward_modules", KNOWN.get(getattr(model.config, "model_type", None), []))
    return [name for name in targets if any(name == end or name.endswith(f".{end}") for end in ends)]


def _refuse_unless(fits: bool, method: PeftMethod, key: str) -> None:
    if not fits:
        raise InputError(f"The method {method.type.upper()} of PEFT cannot be told method.{key}; leave it out.")


def _config_class(name: str) -> "type[PeftConfig]":
    """Find the configuration of a type, whatever its case."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known: dict[str, type[PeftConfig]] = {str(key.value): value for key, value in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    wanted = name.upper()
    if wanted in _KINDS:
        raise InputError(f"The method {wanted} has a kind of its own; use method.kind={_KINDS[wanted]}.")
    if wanted in _REFUSED:
        raise InputError(f"The method {wanted} of PEFT cannot be trained here: {_REFUSED[wanted]}.")
    if wanted not in known:
        offered = sorted(set(known) - set(_KINDS) - set(_REFUSED))
        hint = nearest(wanted, offered) or f"it has {', '.join(offered)}."
        raise InputError(f"PEFT has no method {name!r}; {hint}")
    return known[wanted]


def _check_option(name: str, option: str, known: set[str]) -> None:
    if option in _SET_ELSEWHERE:
        raise InputError(f"'method.options' cannot hold {option!r}, which is set by {_SET_ELSEWHERE[option]}.")
    if option not in known:
        offered = sorted(known - set(_SET_ELSEWHERE))
        hint = nearest(option, offered) or f"it has {', '.join(offered)}."
        raise InputError(f"The method {name.upper()} of PEFT has no option {option!r}; {hint}")


def _refusal(method: PeftMethod, error: Exception) -> InputError:
    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:300]
    return InputError(f"PEFT does not build {method.type.upper()} for this base with these options: {said}.")
