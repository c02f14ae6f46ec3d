"""Which components of a base the PEFT folder of an adapter changes, and what their modules are called in it.

An adapter of a pipeline is kept as one PEFT folder over the model that training puts the components into, whose modules
are called `unet.mid_block...` and `text_encoder.encoder...`. Stock PEFT knows no pipelines: for it every component is a
model and has a folder of its own, named as in PEFT's DreamBooth example.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haori.core.records import MODEL_COMPONENT
from haori.library.adapter_files import CONFIG_NAME
from haori.library.formats.unet_names import canonical_clip

__all__ = [
    "MODEL_CLASSES",
    "PIPELINE_CLASS",
    "canonical_name",
    "component_folders",
    "component_of",
    "installed_name",
    "is_of_pipeline",
]

PIPELINE_CLASS = "DiffusionModel"
"""The model that training puts the components of a pipeline into (`bases.diffusion`)."""

MODEL_CLASSES = {
    "UNet2DConditionModel": "unet", "FluxTransformer2DModel": "transformer", "SD3Transformer2DModel": "transformer",
    "QwenImageTransformer2DModel": "transformer", "Flux2Transformer2DModel": "transformer",
    "ZImageTransformer2DModel": "transformer", "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}  # fmt: skip
"""The component of a pipeline that a class of diffusers is, as PEFT notes it in `auto_mapping`."""

_COMPONENT = re.compile(r"unet|transformer|text_encoder(_[234])?")


def is_of_pipeline(config: Mapping[str, Any]) -> bool:
    """Say whether a configuration of PEFT is that of an adapter of a whole pipeline."""
    return _class(config) == PIPELINE_CLASS


def component_of(config: Mapping[str, Any]) -> str | None:
    """Return the component that an adapter changes; None where the names of its modules begin with it."""
    return None if is_of_pipeline(config) else MODEL_CLASSES.get(_class(config), MODEL_COMPONENT)


def component_folders(path: Path) -> dict[str, Path]:
    """Return the PEFT folders of a pipeline's components that lie in one folder, by component; none if it is one."""
    if not path.is_dir() or (path / CONFIG_NAME).exists():
        return {}
    found = sorted(folder.parent for folder in path.glob(f"*/{CONFIG_NAME}"))
    return {folder.name: folder for folder in found if _COMPONENT.fullmatch(folder.name)}


def canonical_name(component: str | None, name: str) -> str:
    """Return the neutral name of a module that a component, or the model of a whole pipeline, calls `name`."""
    if component is None:
        component, _, name = name.partition(".")
    return f"{component}.{canonical_clip(name) if component.startswith('text_encoder') else name}"


def installed_name(architecture: str, name: str) -> str:
    """Return what the installed transformers or diffusers calls the module `name` of a model of this class.

    transformers 5 left `text_model.` out of the modules of CLIPTextModel.
    """
    if architecture != "CLIPTextModel" or not name.startswith("text_model."):
        return name
    return name if _keeps_text_model() else name.removeprefix("text_model.")


def _keeps_text_model() -> bool:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        config = CLIPTextConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, bos_token_id=0, eos_token_id=1
        )
        model = CLIPTextModel(config)
    return any(name == "text_model" for name, _ in model.named_children())


def _class(config: Mapping[str, Any]) -> str:
    mapping = config.get("auto_mapping")
    return str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""
