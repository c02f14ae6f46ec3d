"""Files for Flux that other trainers wrote: each module changes by as much as in the trainer itself."""

from pathlib import Path

import pytest

from haori.library.formats.registry import format_named, read_updates
from haori.library.updates import AdapterUpdates

FOLDER = Path(__file__).parent.parent / "fixtures" / "image_adapters"
FILES = sorted(path.name.removesuffix(".expected.safetensors") for path in FOLDER.glob("*flux*.expected.safetensors"))


def assert_as_expected(updates: AdapterUpdates, name: str) -> None:
    """Compare with the changes beside the file; those with a magnitude are of the weights that are there too."""
    from safetensors.torch import load_file

    expected = load_file(FOLDER / f"{name}.expected.safetensors")
    modules = {key.rpartition(".")[0] for key in expected}
    assert len(modules) >= 3
    for module in modules:
        weight, update = expected[f"{module}.weight"].double(), updates.modules[module]
        if f"{module}.change" in expected:
            change, found = expected[f"{module}.change"].double(), update.change(weight)
        else:
            change, found = weight, update.delta()
        assert (found - change).norm() <= 1e-5 * change.norm(), module


@pytest.mark.parametrize("name", FILES)
def test_a_trainers_file_is_read_as_the_trainer_means_it(name: str) -> None:
    assert_as_expected(read_updates(FOLDER / f"{name}.safetensors"), name)


@pytest.mark.parametrize("target", ["kohya", "comfyui", "onetrainer"])
@pytest.mark.parametrize("name", FILES)
def test_it_means_the_same_in_other_formats(name: str, target: str, tmp_path: Path) -> None:
    updates = read_updates(FOLDER / f"{name}.safetensors")
    format_named(target).write(updates, tmp_path / "a.safetensors")
    assert_as_expected(read_updates(tmp_path / "a.safetensors"), name)


def test_a_peft_model_around_the_own_code_is_read(tmp_path: Path) -> None:
    """As fal's trainer has it: PEFT itself wraps modules with Black Forest Labs' names, and its tensors are saved."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file
    from torch import nn

    torch.manual_seed(0)
    hidden = 16
    attention = nn.ModuleDict({"qkv": nn.Linear(hidden, 3 * hidden), "proj": nn.Linear(hidden, hidden)})
    single = nn.ModuleDict({"linear1": nn.Linear(hidden, 7 * hidden), "linear2": nn.Linear(5 * hidden, hidden)})
    blocks = {
        "double_blocks": nn.ModuleList([nn.ModuleDict({"img_attn": attention})]),
        "single_blocks": nn.ModuleList([single]),
    }
    model = get_peft_model(
        nn.ModuleDict(blocks), LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    )
    tensors = {key: tensor.contiguous() for key, tensor in get_peft_model_state_dict(model).items()}
    assert all(key.startswith("base_model.model.") for key in tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    before = {
        name: module.weight.detach().double()
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "weight")
    }
    model.merge_adapter()
    after = {
        name: module.weight.detach().double()
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "weight")
    }
    updates = read_updates(tmp_path / "a.safetensors")
    assert updates.format == "fal"
    qkv = after["double_blocks.0.img_attn.qkv"] - before["double_blocks.0.img_attn.qkv"]
    linear1 = after["single_blocks.0.linear1"] - before["single_blocks.0.linear1"]
    for module, rows in {
        "transformer_blocks.0.attn.to_k": qkv[hidden : 2 * hidden],
        "single_transformer_blocks.0.attn.to_v": linear1[2 * hidden : 3 * hidden],
        "single_transformer_blocks.0.proj_mlp": linear1[3 * hidden :],
    }.items():
        delta = updates.modules[f"transformer.{module}"].delta()
        assert (delta - rows).norm() <= 1e-5 * rows.norm(), module
