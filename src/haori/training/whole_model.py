"""What a full fine-tuning writes: every weight in a checkpoint, and the finished model as a folder of its own.

The folder has Hugging Face layout, with tokenizer and chat template, so that it is a base like any other. Weights that
share one matrix (embedding and output head) are one parameter and are written once.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from haori.core.errors import FileFormatError, VerificationError
from haori.core.safetensors_header import read_safetensors_header
from haori.training.whole_pipeline import save_pipeline_folder

if TYPE_CHECKING:
    from haori.bases import Base

__all__ = ["load_parameters", "save_model_folder", "save_parameters"]

_NAME = "model.safetensors"


def save_parameters(model: torch.nn.Module, folder: Path) -> None:
    """Write every parameter and compare what is on disk with what is in memory, bit for bit.

    Raises:
        VerificationError: The file does not hold the live weights, or holds a value that is not finite.
    """
    live = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_file({name: tensor.contiguous() for name, tensor in live.items()}, folder / _NAME)
    with safe_open(folder / _NAME, framework="pt") as file:
        for name, tensor in live.items():
            saved = file.get_tensor(name)
            if not torch.isfinite(saved).all():
                raise VerificationError(f"The weight {name!r} holds values that are not finite; lower optimizer.lr.")
            if not torch.equal(saved, tensor.cpu()):
                raise VerificationError(f"The saved weight {name!r} differs from the live one.")


@torch.no_grad()
def load_parameters(folder: Path, model: torch.nn.Module) -> None:
    """Copy saved weights into the live model, each of them or none.

    Raises:
        FileFormatError: The file is missing or damaged, or its names or shapes are not the model's.
    """
    path = folder / _NAME
    try:
        saved = {name: entry.shape for name, entry in read_safetensors_header(path).tensors.items()}
    except OSError:
        raise FileFormatError(f"The checkpoint {str(folder)!r} has no {_NAME}.") from None
    live = dict(model.named_parameters())
    if saved != {name: tuple(parameter.shape) for name, parameter in live.items()}:
        raise FileFormatError(f"The weights in {str(folder)!r} do not fit this model; they are of another base.")
    with safe_open(path, framework="pt") as file:
        for name, parameter in live.items():
            parameter.copy_(file.get_tensor(name))


def save_model_folder(model: Any, tokenizer: Any, base: "Base", licence: str, folder: Path) -> None:
    """Write the finished model with its tokenizer, or the whole pipeline, into the existing `folder`.

    Args:
        model: The trained model.
        tokenizer: As it was trained with, chat template included; a pipeline keeps those of the base.
        base: The base it was trained from; the README names it.
        licence: SPDX expression of base and data together.
        folder: Where to write.
    """
    from haori.bases.quiet import quiet_transformers

    if base.pipeline is not None:
        save_pipeline_folder(model, base, folder)
    else:
        with quiet_transformers():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    text = f"A full fine-tuning of {base.name} ({base.source}, fingerprint {base.id}).\n"
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n{text}", encoding="utf-8")
