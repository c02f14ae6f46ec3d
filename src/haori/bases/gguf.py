"""Converts a GGUF file once into a model folder with safetensors weights, configuration and tokenizer.

Quantised weights are unpacked and stored as bf16; files in 32 or 16 bits keep their format. The same file gives the
same bytes on every machine. transformers knows the architectures; this module knows what its reader leaves out.
"""

import contextlib
import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from haori.bases.conversion_steps import conversion_steps
from haori.bases.folder import read_model_folder
from haori.bases.licence import to_spdx
from haori.bases.quiet import quiet_transformers
from haori.core.errors import BaseError, FileFormatError

__all__ = ["convert_gguf", "gguf_licence", "is_gguf"]

_READ_ERRORS = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RuntimeError, OSError, MemoryError,
    AssertionError, struct.error,
)  # fmt: skip
# Vocabularies that split every digit from its neighbours before merging (llama.cpp's names for them).
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")
_NOT_CONFIG = ("quantization_config", "_name_or_path", "_model_name_or_path", "architectures", "transformers_version")


def is_gguf(path: Path) -> bool:
    """Say whether the file `path` is GGUF, by its first bytes."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def gguf_licence(path: Path) -> str | None:
    """Return the licence that a GGUF file states."""
    licence = _metadata(path).get("general.license")
    return to_spdx(licence) if isinstance(licence, str) else None


def convert_gguf(path: Path, out: Path, label: str) -> None:
    """Write the model in the GGUF file `path` into the existing empty folder `out`.

    Args:
        path: The GGUF file.
        out: Where config.json, model.safetensors and the tokenizer go.
        label: What the progress display calls the model.

    Raises:
        FileFormatError: The file is truncated or malformed.
        BaseError: transformers does not know its architecture.
    """
    with conversion_steps(label, 4) as (step, _):
        step("reading the file")
        metadata = _metadata(path)
        architecture = metadata.get("general.architecture")
        with _explained(path, architecture), quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            model = _load(path, step)
            step("converting the tokenizer")
            tokenizer = _tokenizer(path, str(metadata.get("tokenizer.ggml.pre")))
        step("writing")
        with quiet_transformers():
            model.save_pretrained(out, max_shard_size="4GB")
            tokenizer.save_pretrained(out)
    # mkstemp-like modes of some writers would hide the model from other users of the machine.
    for file in out.iterdir():
        file.chmod(0o644)
    read_model_folder(out)


def _load(path: Path, step: Callable[[str], None]) -> Any:
    """Return the unpacked model as an ordinary one, with a configuration that says nothing of GGUF."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig
    from transformers.integrations.gguf import GgufHeader

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    dtype = GgufHeader.from_file(str(path)).dtype or torch.bfloat16
    step("unpacking the weights")
    packed = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=dtype, trust_remote_code=False,
        quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip
    state = packed.state_dict()
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise FileFormatError(f"{str(path)!r} holds NaN or infinity in the weight {name!r}; it is damaged.")
    values = {key: _short(value) for key, value in packed.config.to_dict().items() if key not in _NOT_CONFIG}
    with torch.device("meta"):
        model = type(packed)(type(packed.config)(**values)).to(dtype)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model


def _tokenizer(path: Path, pre: str) -> Any:
    """Return the tokenizer, with the digit splitting that transformers' reader leaves out."""
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    if pre in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _short(value: Any) -> Any:
    """Write a float as it was before GGUF kept it in 32 bits: 9.999999747378752e-06 is 1e-05."""
    import numpy as np

    return float(str(np.float32(value))) if isinstance(value, float) and abs(value) < 1e30 else value


def _metadata(path: Path) -> dict[str, Any]:
    from transformers.integrations.gguf import read_gguf_metadata

    if not is_gguf(path):
        raise FileFormatError(f"{str(path)!r} is not a GGUF file: it does not begin with the letters GGUF.")
    with _explained(path, None):
        metadata, _ = read_gguf_metadata(str(path))
    return dict(metadata)


@contextmanager
def _explained(path: Path, architecture: Any) -> Iterator[None]:
    """Turn what the readers raise into one sentence."""
    try:
        yield
    except _READ_ERRORS as error:
        if architecture is not None and "not supported" in str(error):
            raise BaseError(
                f"{str(path)!r} is a {architecture} model, which transformers cannot read from GGUF; use its "
                "safetensors version instead."
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
        raise FileFormatError(
            f"{str(path)!r} cannot be read as GGUF; it is truncated or malformed ({reason})."
        ) from error
