"""Adapters of image transformers in stock diffusers: what pipelines load has the effect that the file says."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from haori.bases.pipeline import read_base_folder
from haori.core.errors import MismatchError
from haori.library.fit import component_weights, match
from haori.library.formats.registry import format_named, read_updates
from haori.library.formats.transformer_places import OWN_NAMES
from haori.library.updates import AdapterUpdates, ModuleUpdate
from tests.flux_models import image_transformers

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = tuple(OWN_NAMES)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return image_transformers()


def adapter_of(model: Any, family: str, seed: int = 0) -> AdapterUpdates:
    """Return LoRA of every second linear layer, with three ranks and alphas."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed)
    modules = {}
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for number, (name, module) in enumerate(linear[seed % 2 :: 2]):
        rank = 1 + number % 3
        out, inner = module.weight.shape
        a = torch.randn(rank, inner, generator=generator) * 0.3
        b = torch.randn(out, rank, generator=generator) * 0.3
        modules[f"transformer.{name}"] = ModuleUpdate("lora", {"A": a, "B": b}, alpha=0.5 + number % 3)
    return AdapterUpdates(modules, family=family)


def has_weight(module: Any) -> bool:
    return getattr(module, "weight", None) is not None


def changed_weights(model: Any, before: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Return dW of every module of a model with an adapter of PEFT in it, after merging."""
    model.fuse_lora()
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            found[name] = module.base_layer.weight.detach() - before[name]
    model.unfuse_lora()
    return found


def pipeline_class(family: str) -> Any:
    import diffusers

    kinds = {"flux1": "Flux", "flux2": "Flux2", "qwen_image": "QwenImage", "z_image": "ZImage"}
    return getattr(diffusers, f"{kinds[family]}Pipeline")


def load(family: str, model: Any, path: Path) -> Any:
    """Return a stock pipeline of the family around the model, with the file loaded."""
    import diffusers

    kind = pipeline_class(family)
    parts = dict.fromkeys(kind._get_signature_keys(kind)[0])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = kind(**{**parts, "transformer": model, "scheduler": scheduler})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    return pipeline


@pytest.mark.parametrize("family", FAMILIES)
def test_what_diffusers_writes_is_read_with_its_scale(family: str, models: dict[str, Any], tmp_path: Path) -> None:
    """A pipeline's file, and the model's own without a component in its keys; every linear layer is adapted."""
    import copy

    import torch
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    model = copy.deepcopy(models[family])
    before = {key: module.weight.detach().clone() for key, module in model.named_modules() if has_weight(module)}
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="gaussian"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    layers, metadata = get_peft_model_state_dict(model), _collate_lora_metadata({"transformer": model})
    pipeline_class(family).save_lora_weights(str(tmp_path / "a"), transformer_lora_layers=layers, **metadata)
    model.save_lora_adapter(str(tmp_path / "b"))
    changes = changed_weights(model, before)
    for file in tmp_path.glob("*/*.safetensors"):
        updates = read_updates(file)
        assert (updates.format, updates.family) == ("diffusers", family)
        assert set(updates.modules) == {f"transformer.{module}" for module in changes}
        for module, change in changes.items():
            delta = updates.modules[f"transformer.{module}"].delta().float()
            assert (delta - change).norm() <= 1e-5 * change.norm(), (file, module)


@pytest.mark.parametrize(("family", "name"), [
    *((family, "diffusers") for family in FAMILIES), ("flux2", "kohya-flux"), ("qwen_image", "comfyui"),
])  # fmt: skip
def test_a_stock_pipeline_gives_every_module_its_change(
    family: str, name: str, models: dict[str, Any], tmp_path: Path
) -> None:
    import copy

    model = copy.deepcopy(models[family])
    before = {key: module.weight.detach().clone() for key, module in model.named_modules() if has_weight(module)}
    updates = adapter_of(model, family)
    if name == "kohya-flux":  # diffusers leaves out what its converter for these does not list
        left_out = ("guidance", "modulation", "norm_out")
        modules = {key: update for key, update in updates.modules.items() if not any(part in key for part in left_out)}
        updates = AdapterUpdates(modules, family=family)
    format_named(name).write(updates, tmp_path / "a.safetensors")
    load(family, model, tmp_path / "a.safetensors")
    changes = changed_weights(model, before)
    for module, change in changes.items():
        update = updates.modules.get(f"transformer.{module}")
        wanted = 0 * change if update is None else update.delta().float()
        assert (change - wanted).norm() <= 2e-5 * max(wanted.norm().item(), 1.0), module
    assert {f"transformer.{module}" for module in changes} >= set(updates.modules)


def test_outputs_of_flux_are_those_of_the_merged_weights(models: dict[str, Any], tmp_path: Path) -> None:
    """From a kohya file with A shared by the parts of fused modules, by way of diffusers' format."""
    import copy

    import torch

    model, merged = copy.deepcopy(models["flux1"]), copy.deepcopy(models["flux1"])
    format_named("kohya-flux").write(adapter_of(model, "flux1", seed=1), tmp_path / "kohya.safetensors")
    updates = read_updates(tmp_path / "kohya.safetensors")
    format_named("diffusers").write(updates, tmp_path / "diffusers.safetensors")
    inputs = {
        "hidden_states": torch.randn(1, 4, 4), "encoder_hidden_states": torch.randn(1, 3, 24),
        "pooled_projections": torch.randn(1, 20), "timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3),
    }  # fmt: skip
    with torch.no_grad():
        plain = model(**inputs).sample
        load("flux1", model, tmp_path / "diffusers.safetensors")
        adapted = model(**inputs).sample
        for name, update in updates.modules.items():
            weight = merged.get_submodule(name.removeprefix("transformer.")).weight
            weight += update.delta().to(weight.dtype)
        expected = merged(**inputs).sample
    effect = (expected - plain).norm()
    assert effect > 0.1 * plain.norm()
    assert (adapted - expected).norm() < 1e-4 * effect


def test_an_adapter_of_another_family_fits_nothing(models: dict[str, Any], tmp_path: Path) -> None:
    models["flux1"].save_pretrained(tmp_path / "flux" / "transformer")
    (tmp_path / "flux" / "model_index.json").write_text(
        '{"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}'
    )
    folders = read_base_folder(tmp_path / "flux").models
    weights = {name: component_weights(folder) for name, folder in folders.items()}
    assert match(adapter_of(models["flux1"], "flux1"), weights).is_whole
    with pytest.raises(MismatchError, match="None of its modules fits"):
        match(adapter_of(models["z_image"], "z_image"), weights).require("portrait", "flux")
