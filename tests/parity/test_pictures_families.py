"""Adapters of every family of image bases: proved, exported for diffusers, and loaded there by the stock pipeline."""

from pathlib import Path

import pytest
import torch

from haori.bases import find_base
from haori.core.errors import VerificationError
from haori.library import Library, export_in_format, import_adapter
from haori.library.formats.registry import read_updates
from haori.library.proof.stock_pipelines import prove_in_pipeline
from tests import diffusion_pipelines as pipelines
from tests.picture_adapters import TEXT, adapted, saved_adapter

ATTENTION = r"(unet|transformer)\..*\.(to_[qkv]|to_out\.0|to_qkv_mlp_proj|add_[qkv]_proj)"
FAMILIES = {
    "sdxl": (pipelines.stable_diffusion_xl, f"{ATTENTION}|{TEXT}", ("text_encoder", "text_encoder_2", "unet")),
    "flux1": (pipelines.flux1, f"{ATTENTION}|text_encoder\\..*\\.(q_proj|out_proj)", ("text_encoder", "transformer")),
    "flux2": (pipelines.flux2_klein, ATTENTION, ("transformer",)),
    "z_image": (pipelines.z_image, ATTENTION, ("transformer",)),
    "qwen_image": (pipelines.qwen_image, ATTENTION, ("transformer",)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_pipeline_does_with_the_file_what_was_trained(tmp_path: Path, family: str) -> None:
    build, targets, components = FAMILIES[family]
    base = find_base(str(pipelines.saved(build(), tmp_path / "tiny")))
    folder = saved_adapter(adapted(base, targets, alpha_pattern={"to_k": 2}), tmp_path / "a")
    card = import_adapter(folder, base, name="ours", dtype="fp32").card
    assert card.components == components and card.base.family == family
    checks = {check.name for check in card.verification.checks} if card.verification else set()
    assert {f"effect of {name}" for name in components if len(components) > 1} <= checks
    out = export_in_format("ours", tmp_path / "out.safetensors", "diffusers")  # which a stock pipeline loads
    export_in_format("ours", tmp_path / "kohya.safetensors", "kohya" if family != "z_image" else "comfyui")
    updates = read_updates(Library().get("ours").path)
    name = next(iter(updates.modules))
    factors = updates.modules[name].factors
    stronger = {**factors, "B": factors["B"] * 1.1}
    updates.modules[name].factors["B"].copy_(stronger["B"])  # one module that is off by a tenth
    with pytest.raises(VerificationError, match="differ by"):
        prove_in_pipeline(base, updates, out)
    assert all(bool(torch.isfinite(factor).all()) for factor in factors.values())


def test_layers_of_a_model_with_weights_of_its_own_are_widened_one_by_one(tmp_path: Path) -> None:
    from haori.bases import load_model
    from haori.library.proof.exact import _parts

    base = find_base(str(pipelines.saved(pipelines.z_image(), tmp_path / "tiny")))
    transformer = load_model(base, components=("transformer",)).get_submodule("transformer")
    parts, shallow = _parts(torch.nn.ModuleDict({"transformer": transformer}))
    assert shallow == {transformer} and set(transformer.layers) < set(parts)
    reached = [weight for part in parts for weight in part.parameters(recurse=part not in shallow)]
    assert len(reached) == len(set(reached)) == len(list(transformer.parameters()))
