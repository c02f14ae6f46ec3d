"""What Haori writes is loaded by stock pipelines of diffusers: each layer changes by what the neutral form says."""

from pathlib import Path
from typing import Any

import pytest
import torch

from haori.library.combining.converting import as_lora
from haori.library.formats.registry import format_named, read_updates
from haori.library.updates import AdapterUpdates, ModuleUpdate
from tests.unet_models import adapter, layers, pipeline

NOT_IN_STOCK = (".embeddings.", "text_projection")


def loaded_changes(pipe: Any, path: Path) -> dict[str, torch.Tensor]:
    """Load a file as users do, and return what PEFT's layers add to their weights."""
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="it")
    return {
        name.removesuffix(".base_layer"): layer.get_delta_weight("it").detach()
        for name, layer in layers(pipe, ("Linear", "Conv2d"))
        if hasattr(layer, "lora_A")
    }


def assert_same(found: dict[str, torch.Tensor], updates: AdapterUpdates) -> None:
    assert sorted(found) == sorted(updates.modules)
    for name, change in found.items():
        expected = updates.modules[name].delta()
        assert torch.allclose(change.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())), name


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("format_name", ["diffusers", "kohya"])
def test_every_layer_has_its_strength_in_a_stock_pipeline(tmp_path: Path, family: str, format_name: str) -> None:
    pipe = pipeline(family)
    updates = adapter(pipe, family, lambda name: not any(part in name for part in NOT_IN_STOCK))
    before = {name: layer.weight.detach().clone() for name, layer in layers(pipe)}
    path = tmp_path / "style.safetensors"
    format_named(format_name).write(updates, path)
    assert_same(loaded_changes(pipe, path), updates)
    assert_output_is_of_the_sum(pipe, family, before, updates)


def test_loha_is_loaded_by_a_stock_pipeline_once_it_is_lora(tmp_path: Path) -> None:
    pipe = pipeline("sd15")
    modules = {
        name: loha_for(layer, at) for at, (name, layer) in enumerate(layers(pipe))
        if name.startswith(("unet.mid_block", "unet.down_blocks.0", "text_encoder")) and ".embeddings." not in name
    }  # fmt: skip
    trained, path = tmp_path / "loha.safetensors", tmp_path / "lora" / "a.safetensors"
    format_named("kohya").write(AdapterUpdates(modules, family="sd15"), trained)
    converted = as_lora(read_updates(trained), 4)
    assert converted.energy.share == pytest.approx(1.0)
    format_named("diffusers").write(converted.updates, path)
    found = loaded_changes(pipe, path)
    assert sorted(found) == sorted(modules)
    for name, change in found.items():
        expected = modules[name].delta()
        assert torch.allclose(change.double().flatten(), expected.flatten(), atol=1e-5 * float(expected.abs().max())), (
            name
        )


def loha_for(layer: Any, seed: int) -> ModuleUpdate:
    """Return LoHa of rank 2, whose kernels are flattened as LyCORIS does it."""
    numbers = torch.Generator().manual_seed(seed)
    out, inner = layer.weight.flatten(1).shape
    factors = {f"w{n}_a": torch.randn(out, 2, generator=numbers) for n in (1, 2)}
    factors |= {f"w{n}_b": torch.randn(2, inner, generator=numbers) for n in (1, 2)}
    return ModuleUpdate("loha", factors, alpha=1.0)


@pytest.mark.parametrize("part", ["text_projection", "text_encoder.text_model.encoder.layers.1.mlp"])
def test_text_encoders_without_attention_are_loaded_too(tmp_path: Path, part: str) -> None:
    pipe = pipeline("sdxl")
    updates = adapter(pipe, "sdxl", lambda name: part in name or name == "unet.conv_in")
    format_named("diffusers").write(updates, tmp_path / "a.safetensors")
    assert_same(loaded_changes(pipe, tmp_path / "a.safetensors"), updates)


def assert_output_is_of_the_sum(
    pipe: Any, family: str, before: dict[str, torch.Tensor], updates: AdapterUpdates
) -> None:
    plain = pipeline(family)
    with torch.no_grad():
        unchanged = run(plain.unet, family)
        for name, layer in layers(plain):
            if name in updates.modules:
                layer.weight.copy_(
                    before[name] + 0.05 * updates.modules[name].delta().float().reshape(layer.weight.shape)
                )
        pipe.set_adapters("it", 0.05)
        expected, found = run(plain.unet, family), run(pipe.unet, family)
    assert (expected - unchanged).norm() > 0.05 * unchanged.norm()
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def run(unet: Any, family: str) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(3)
    width = unet.config.cross_attention_dim
    more = {}
    if family == "sdxl":
        more = {"added_cond_kwargs": {"text_embeds": torch.ones(1, 12), "time_ids": torch.ones(1, 6)}}
    image, text = torch.randn(1, 4, 8, 8, generator=numbers), torch.randn(1, 5, width, generator=numbers)
    output: torch.Tensor = unet(image, 10, text, **more).sample
    return output
