"""Mixes of adapters against stock diffusers, and files of other trainers against the changes that those computed."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from haori.images.adapters import PictureAdapter, read_picture_adapter
from haori.images.mixing import Mixer, Strength
from haori.library.formats.registry import format_named, read_updates
from haori.library.update_shapes import weight_shape
from haori.library.updates import AdapterUpdates, ModuleUpdate
from tests.diffusion_pipelines import FAMILIES

FILES = Path(__file__).parents[1] / "fixtures" / "image_adapters"


def skeleton_of(file: str, weights: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Return components that hold what a file changes, linear layers and convolutions, with the given weights."""
    numbers = torch.Generator().manual_seed(3)
    components: dict[str, nn.Module] = {}
    for name, update in read_updates(FILES / f"{file}.safetensors").modules.items():
        component, _, path = name.partition(".")
        given = weights.get(f"{path}.weight")
        shape = tuple(given.shape) if given is not None else weight_shape(update)
        assert shape is not None
        layer = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2], padding=1)
        # Small, so that fp32 keeps what is added to them.
        layer.weight.data = 0.02 * torch.randn(shape, generator=numbers) if given is None else given.float()
        at = components.setdefault(component, nn.Module())
        for part in path.split(".")[:-1]:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.add_module(path.rpartition(".")[2], layer)
    return components


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("file", ["kohya_sd15_r8_a4", "lycoris_sd15_loha_r4_a2", "diffusers_flux_r4_a8"])
def test_files_of_other_trainers_change_weights_by_their_strength(file: str) -> None:
    components = skeleton_of(file, {})
    adapter = read_picture_adapter(FILES / f"{file}.safetensors", components, base="tiny")
    expected = load_file(FILES / f"{file}.expected.safetensors")
    assert expected
    for key, change in expected.items():
        component, _, path = key.removesuffix(".weight").partition(".")
        layer: Any = components[component].get_submodule(path)
        own = layer.weight.detach().clone()
        with Mixer(components).merged((Strength(adapter, 0.7, 0.3),)):
            merged = layer.weight.detach().clone()
        strength = 0.3 if component.startswith("text_encoder") else 0.7
        assert error(merged - own, strength * change) < 1e-4
        assert torch.equal(layer.weight, own)


def test_blends_of_every_kind_of_lycoris_are_the_sum_of_what_its_forward_makes() -> None:
    """With DoRA on both axes, which change the weight by what each would do alone, at its strength."""
    expected = load_file(FILES / "lycoris_kinds.expected.safetensors")
    others = load_file(FILES / "lycoris_rs_lora.expected.safetensors")
    components = skeleton_of("lycoris_kinds", expected)
    adapters = [
        read_picture_adapter(FILES / f"{name}.safetensors", components, base="tiny")
        for name in ("lycoris_kinds", "lycoris_rs_lora")
    ]
    mix = (Strength(adapters[0], 0.4), Strength(adapters[1], 0.6))
    unet = components["unet"]
    layers: dict[str, Any] = {
        path: unet.get_submodule(path)
        for path in (key.removesuffix(".change") for key in expected if key.endswith(".change"))
        # What was made on another weight is left out: its DoRA needs that.
        if torch.equal(others.get(f"{path}.weight", expected[f"{path}.weight"]), expected[f"{path}.weight"])
    }
    assert len(layers) > 20 and any(f"{path}.change" in others for path in layers)
    own = {path: layer.weight.detach().clone() for path, layer in layers.items()}
    seen = {path: input_of(layer) for path, layer in layers.items()}
    with torch.no_grad():
        base = {path: layer(seen[path]) for path, layer in layers.items()}
        with Mixer(components).merged(mix):
            merged = {path: layer.weight.detach().clone() for path, layer in layers.items()}
        found = []
        for copies in (1 << 30, 0):
            with Mixer(components, copies_bytes=copies).on_the_fly([mix]):
                found.append({path: layer(seen[path]) for path, layer in layers.items()})
        for path, layer in layers.items():
            change = 0.4 * expected[f"{path}.change"].double()
            if f"{path}.change" in others:
                change += 0.6 * others[f"{path}.change"].double()
            assert error(merged[path] - own[path], change) < 1e-4, path
            assert torch.equal(layer.weight, own[path])
            layer.weight.data = (own[path].double() + change).float()
            wanted = layer(seen[path]) - base[path]
            for outputs in found:
                assert error(outputs[path] - base[path], wanted) < 1e-4, path


def input_of(layer: Any) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(5)
    size = (layer.in_features,) if isinstance(layer, nn.Linear) else (layer.in_channels, 5, 5)
    return torch.randn(2, *size, generator=numbers)


def random_adapter(components: Mapping[str, Any], family: str, seed: int) -> AdapterUpdates:
    """Return a LoRA of the linear layers that the pipelines of diffusers load one for."""
    numbers = torch.Generator().manual_seed(seed)
    modules = {}
    for component, model in components.items():
        of_text = component.startswith("text_encoder")
        ends = (".q_proj", ".v_proj", ".fc1") if of_text else (".to_q", ".to_v", ".to_out.0", ".proj_mlp")
        for path, layer in model.named_modules():
            if not isinstance(layer, nn.Linear) or not path.endswith(ends):
                continue
            name = path if not of_text or path.startswith("text_model.") else f"text_model.{path}"
            a = 0.2 * torch.randn(3, layer.in_features, generator=numbers)
            b = 0.4 * torch.randn(layer.out_features, 3, generator=numbers)
            modules[f"{component}.{name}"] = ModuleUpdate("lora", {"A": a, "B": b}, alpha=2.0)
    return AdapterUpdates(modules, family=family)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux1"])
def test_a_batch_of_different_mixes_is_what_set_adapters_draws_one_after_the_other(family: str, tmp_path: Path) -> None:
    pipe = FAMILIES[family]()
    pipe.set_progress_bar_config(disable=True)
    denoiser = "transformer" if family == "flux1" else "unet"
    encoders = {"sdxl": ("text_encoder", "text_encoder_2")}.get(family, ("text_encoder",))
    components = {name: getattr(pipe, name) for name in (denoiser, *encoders)}
    adapters: list[PictureAdapter] = []
    for at in range(2):
        updates = random_adapter(components, family, at)
        format_named("diffusers").write(updates, file := tmp_path / f"{at}.safetensors")
        adapters.append(read_picture_adapter(file, components, base="tiny"))
    prompts, strengths = ("a red cat", "a dog", "tea"), ((0.7, 0.0), (0.4, 0.6), (0.0, 0.0))

    def draw(rows: list[int]) -> torch.Tensor:
        found: torch.Tensor = pipe(
            prompt=[prompts[row] for row in rows], num_inference_steps=2, guidance_scale=3.0, output_type="latent",
            height=32, width=32, generator=[torch.Generator().manual_seed(row) for row in rows],
        ).images  # fmt: skip
        return found

    base = draw([0, 1, 2])
    mixes = [tuple(Strength(adapter, m, m) for adapter, m in zip(adapters, one, strict=True) if m) for one in strengths]
    mixer = Mixer(components)
    with mixer.on_the_fly(mixes):
        ours = draw([0, 1, 2])
    with mixer.merged(mixes[1]):
        merged = draw([1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are two
        for at in range(2):
            pipe.load_lora_weights(str(tmp_path), weight_name=f"{at}.safetensors", adapter_name=f"a{at}")
    for row, weights in enumerate(strengths):
        if not any(weights):
            pipe.disable_lora()
            assert torch.allclose(ours[row], base[row], atol=1e-5)
            continue
        pipe.set_adapters(["a0", "a1"], list(weights))
        stock = draw([row])[0]
        assert error(ours[row] - base[row], stock - base[row]) < 1e-3
        if row == 1:
            assert error(merged[0] - base[row], stock - base[row]) < 1e-3
            pipe.set_adapters(["a0", "a1"], [0.4, 0.54])  # what a tenth of one adapter makes is told
            assert error(ours[row] - base[row], draw([row])[0] - base[row]) > 1e-2
