"""The heads of classifiers: built for a list of labels, begun alike at every load, found by their modules.

A head is everything behind the last hidden states: the classifier itself and what transformers puts between (a pooler,
a dense layer, a norm). A base that has been trained with other labels, or with none, gets a fresh one.
"""

from typing import TYPE_CHECKING, Any

from haori.bases.base import Base
from haori.bases.folder import read_json, read_model_folder
from haori.bases.tokenizer import load_tokenizer
from haori.core.errors import BaseError
from haori.core.records import Head

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["begin_head", "fresh_modules", "head_class", "head_modules", "labelled_configuration", "own_head"]

_ENDINGS = {
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
}
_IN_WORDS = {"sequence_classification": "classify texts", "token_classification": "classify tokens"}


def own_head(base: Base) -> Head | None:
    """Return the head that a base brings, by its configuration; None where it brings none, or none with labels."""
    architecture = base.fingerprint.architecture
    kind = next((kind for kind, ending in _ENDINGS.items() if architecture.endswith(ending)), None)
    config = read_json(base.path / "config.json")
    names: Any = config.get("id2label")
    if kind is None:
        return None
    if not isinstance(names, dict):
        names = {"0": "LABEL_0", "1": "LABEL_1"}  # what transformers takes where nothing is said
    try:
        labels = tuple(str(names[place]) for place in sorted(names, key=int))
        return Head.model_validate(
            {"kind": kind, "labels": labels, "multi_label": config.get("problem_type") == "multi_label_classification"}
        )
    except ValueError:
        return None


def head_class(base: Base, head: Head) -> Any:
    """Return the class of transformers that builds `base` with a head of this kind.

    Raises:
        BaseError: transformers has none for this architecture.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    of_kind = {
        "sequence_classification": (
            transformers.AutoModelForSequenceClassification,
            modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        ),
        "token_classification": (
            transformers.AutoModelForTokenClassification,
            modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        ),
    }
    found, known = of_kind[head.kind]
    model_type = read_json(base.path / "config.json").get("model_type")
    if model_type not in known:
        raise BaseError(
            f"The base {base.name!r} is a {base.fingerprint.architecture}, which transformers "
            f"{transformers.__version__} cannot {_IN_WORDS[head.kind]} with; choose an encoder such as "
            "all-minilm-l6-v2, or a decoder such as smollm2-135m-instruct."
        )
    return found


def labelled_configuration(base: Base, head: Head) -> "PreTrainedConfig":
    """Return the configuration of `base` with the labels of `head`.

    A decoder scores the last token that is no padding, so it must know which token pads: that of the tokenizer.

    Raises:
        BaseError: The model reads with one half and writes with another, and scores neither.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
    if getattr(config, "is_encoder_decoder", False):
        raise BaseError(
            f"The base {base.name!r} is a {base.fingerprint.architecture}, which reads with one half and writes with "
            "another; classify with an encoder or a decoder."
        )
    config.id2label = dict(enumerate(head.labels))
    config.label2id = {label: place for place, label in enumerate(head.labels)}
    config.problem_type = "multi_label_classification" if head.multi_label else "single_label_classification"
    if head.kind == "token_classification":
        config.problem_type = None
    else:
        padding: Any = None if base.fingerprint.tokenizer is None else load_tokenizer(base).pad_token_id
        text = config.get_text_config()
        known = [padding, text.pad_token_id, text.eos_token_id]
        text.pad_token_id = next((token for token in known if isinstance(token, int)), None)
    return config


def head_modules(model: "nn.Module") -> tuple[str, ...]:
    """Return the full names of the modules that a classifier's head consists of; none for other models.

    They are what stands beside the encoder or decoder, and the encoder's pooler: checkpoints leave it out, or keep one
    that was trained for another purpose.
    """
    if not type(model).__name__.endswith(tuple(_ENDINGS.values())):
        return ()
    prefix = str(getattr(model, "base_model_prefix", ""))
    beside = [name for name, child in model.named_children() if name != prefix and _has_weights(child)]
    pooler = getattr(getattr(model, prefix, None), "pooler", None)
    inner = [f"{prefix}.pooler"] if pooler is not None and _has_weights(pooler) else []
    return (*inner, *beside)


def fresh_modules(base: Base, head: Head, model: "nn.Module") -> tuple[str, ...]:
    """Return the modules of a head that `base` has no weights for, so that they begin at random.

    Args:
        base: The base.
        head: The head that `model` was built with; where the base brings one of other labels, all of it is fresh.
        model: The model, which may be a skeleton without weights.
    """
    if own_head(base) == head:
        return ()
    names = [
        f"{part}.{name}".rstrip(".")
        for part in head_modules(model)
        for name, module in model.get_submodule(part).named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    if base.fingerprint.architecture.endswith(tuple(_ENDINGS.values())):
        return tuple(names)
    kept = read_model_folder(base.path).tensors
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return tuple(
        name
        for name in names
        for keys in [[f"{name}.{key}" for key, _ in model.get_submodule(name).named_parameters(recurse=False)]]
        if not all(key in kept or key.removeprefix(prefix) in kept for key in keys)
    )


def begin_head(model: "PreTrainedModel", names: tuple[str, ...], seed: int) -> None:
    """Give the modules `names` the weights that transformers begins them with, the same for the same seed."""
    import torch
    from transformers.initialization import guard_torch_init_functions

    devices = sorted({parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.no_grad(), guard_torch_init_functions():
        torch.manual_seed(seed)
        for name in names:
            for module in model.get_submodule(name).modules():
                for tensor in module.parameters(recurse=False):
                    vars(tensor)["_is_hf_initialized"] = False
                model._init_weights(module)


def _has_weights(module: "nn.Module") -> bool:
    return any(True for _ in module.parameters())
