"""Loads the tokenizer and the frozen model of a base, quietly and without running any code from its folder."""

from typing import TYPE_CHECKING, Any

from haori.bases.base import Base
from haori.bases.dtype import choose_dtype, default_device, torch_dtype
from haori.bases.quiet import quiet_transformers
from haori.core.errors import BaseError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_model", "load_skeleton", "load_tokenizer"]

_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError)


def load_tokenizer(base: Base) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of `base`; where it has no padding token, its end token pads.

    The vocabulary is never changed.

    Raises:
        BaseError: There is no tokenizer, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if base.fingerprint.tokenizer is None:
        raise BaseError(
            f"The base {base.name!r} has no tokenizer in {str(base.path)!r}; add its tokenizer.json and "
            "tokenizer_config.json to the folder."
        )
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    except Exception as error:
        # tokenizers raises bare Exception for a damaged tokenizer.json.
        raise BaseError(f"The tokenizer of {base.name!r} cannot be loaded: {_first_line(error)}.") from error
    return tokenizer


def load_model(base: Base, *, dtype: str = "auto", device: str | None = None) -> "PreTrainedModel":
    """Load `base` in evaluation mode with every weight frozen.

    Args:
        base: The base, from `find_base`.
        dtype: `auto`, `fp32`, `bf16` or `fp16`; see `choose_dtype`.
        device: `cpu`, `cuda`, `cuda:1`; None takes the GPU where there is one.

    Raises:
        BaseError: transformers does not know the architecture, or weights are missing or of another shape.
        InputError: The dtype is unknown, or the device is not there.
    """
    import torch

    place = device or default_device()
    try:
        target = torch.device(place)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError):
        raise InputError(f"The device {place!r} is not available on this machine; try 'cpu'.") from None
    number_format = torch_dtype(choose_dtype(dtype, place).name)
    model_class = _model_class(base)
    options: dict[str, Any] = {} if target.type == "cpu" else {"device_map": {"": place}}
    try:
        with quiet_transformers():
            model, report = model_class.from_pretrained(
                base.path, dtype=number_format, local_files_only=True, trust_remote_code=False,
                use_safetensors=True, output_loading_info=True, **options,
            )  # fmt: skip
    except torch.OutOfMemoryError:
        raise BaseError(f"The base {base.name!r} does not fit into the memory of {place!r}.") from None
    except _LOAD_ERRORS as error:
        raise BaseError(f"The base {base.name!r} cannot be loaded: {_first_line(error)}.") from error
    # A pooler is a head that many encoder checkpoints leave out; nothing here uses it.
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise BaseError(
            f"The weight files of {base.name!r} lack {len(missing)} of the model's weights, such as {missing[0]!r}; "
            "config.json and the weights do not belong together."
        )
    model.requires_grad_(False)
    model.eval()
    return model


def load_skeleton(base: Base) -> "PreTrainedModel":
    """Build the modules of `base` without weights or memory, to look at their names and shapes.

    Raises:
        BaseError: transformers does not know the architecture.
    """
    import torch
    from transformers import AutoConfig

    model_class = _model_class(base)
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
            return model_class.from_config(config, trust_remote_code=False)
    except _LOAD_ERRORS as error:
        raise BaseError(f"The base {base.name!r} cannot be built: {_first_line(error)}.") from error


def _model_class(base: Base) -> Any:
    """Choose by architecture: a causal language model keeps its head, anything else is loaded as an encoder."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architecture = base.fingerprint.architecture
    if not hasattr(transformers, architecture):
        raise BaseError(
            f"The base {base.name!r} is a {architecture}, which transformers {transformers.__version__} does not know; "
            "a newer transformers may."
        )
    causal = architecture in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModel


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".:")[:300]
