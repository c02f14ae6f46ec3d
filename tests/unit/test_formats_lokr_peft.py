"""LoKr to PEFT and back over linear layers and convolutions of many widths, against the file's own tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoKrConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from haori.library.formats.format import open_source
from haori.library.formats.registry import format_named, format_of

WIDTHS = [4, 8, 12, 13, 16, 32, 36, 45, 48, 64, 72, 90, 97, 127, 144, 320, 640]


class Net(nn.Module):
    """A linear layer, and convolutions of 1 and 3 pixels, of each width."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        for width in widths:
            self.add_module(f"to_q_{width}", nn.Linear(width, width, bias=False))
            self.add_module(f"proj_in_{width}", nn.Conv2d(width, width, 1))
            self.add_module(f"conv_{width}", nn.Conv2d(width, 2 * width, 3, padding=1))


def stored(folder: Path, widths: list[int], **keys: Any) -> Net:
    """Write a LoKr of stock PEFT in which nothing is zero, and return its base."""
    torch.manual_seed(0)
    base = Net(widths)
    names = [name for name, module in base.named_modules() if name]
    model = get_peft_model(base, LoKrConfig(target_modules=names, init_weights=True, **keys))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lokr_" in name:
                parameter.normal_()
    model.save_pretrained(str(folder))
    return Net(widths)


def expected(folder: Path, name: str, shape: torch.Size, scale: float) -> torch.Tensor:
    """The Kronecker product in float64, from the tensors of the file (LyCORIS' formula, as PEFT has it)."""
    held = {
        key.rpartition("lokr_")[2]: value.double()
        for key, value in load_file(folder / "adapter_model.safetensors").items()
        if key.startswith(f"base_model.model.{name}.")
    }
    first = held["w1"] if "w1" in held else held["w1_a"] @ held["w1_b"]
    if "t2" in held:
        second = torch.einsum("ijkl,ip,jq->pqkl", held["t2"], held["w2_a"], held["w2_b"]).flatten(1)
    else:
        second = (held["w2"] if "w2" in held else held["w2_a"] @ held["w2_b"]).flatten(1)
    second = second.reshape(shape[0] // first.shape[0], shape[1] // first.shape[1], *shape[2:])
    return scale * torch.kron(first.reshape(*first.shape, *[1] * (len(shape) - 2)), second)


@pytest.mark.parametrize("keys", [
    {"r": 2, "alpha": 3}, {"r": 4, "alpha": 4, "decompose_factor": 4}, {"r": 2, "alpha": 1, "decompose_factor": 8},
    {"r": 16, "alpha": 8}, {"r": 2, "alpha": 2, "decompose_both": True},
    {"r": 2, "alpha": 2, "use_effective_conv2d": True},
    {"r": 2, "alpha": 2, "rank_pattern": {"conv_64": 5, "to_q_320": 7}, "alpha_pattern": {"conv_64": 2}},
])  # fmt: skip
def test_peft_adapts_each_weight_as_the_file_says(tmp_path: Path, keys: dict[str, Any]) -> None:
    base = stored(tmp_path / "one", WIDTHS, **keys)
    source = open_source(tmp_path / "one")
    updates = format_of(source).read(source)
    format_named("peft").write(updates, tmp_path / "two")
    model: Any = PeftModel.from_pretrained(base, tmp_path / "two")
    compared = 0
    for name, module in base.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        rank = keys.get("rank_pattern", {}).get(name, keys["r"])
        scale = keys.get("alpha_pattern", {}).get(name, keys["alpha"]) / rank
        wanted = expected(tmp_path / "one", name.removeprefix("base_model.model."), module.weight.shape, scale)
        found = module.get_delta_weight("default").double()
        assert found.shape == wanted.shape
        assert (found - wanted).norm() < 1e-5 * wanted.norm(), name
        compared += 1
    assert compared == 3 * len(WIDTHS)
    assert model is not None


def test_a_split_that_peft_does_not_make_is_refused(tmp_path: Path) -> None:
    from haori.core.errors import InputError
    from haori.library.formats.lokr_layout import peft_factors
    from haori.library.updates import ModuleUpdate

    def update(*shapes: tuple[int, int]) -> ModuleUpdate:
        return ModuleUpdate("lokr", {f"w{at}": torch.ones(shape) for at, shape in enumerate(shapes, start=1)})

    with pytest.raises(
        InputError, match=r"none gives the shapes of this adapter, such as \[2, 2\] and \[6, 6\] of 'a'"
    ):
        peft_factors({"a": update((2, 2), (6, 6)), "b": update((4, 4), (3, 3))})
