"""Adapters of other kinds as LoRA: exact where the rank suffices, the best approximation and its energy where not."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings

from haori.core.errors import InputError
from haori.library.combining.converting import as_lora
from haori.library.updates import AdapterUpdates, ModuleUpdate
from tests.update_samples import module_updates

NAME = "unet.mid_block.resnets.0.conv1"


@settings(max_examples=60, deadline=None)
@given(update=module_updates())
def test_a_rank_that_suffices_loses_nothing(update: ModuleUpdate) -> None:
    update = ModuleUpdate(update.kind, update.factors, update.alpha, update.rslora, bias=update.bias)
    delta = update.delta()
    assume(float(delta.norm()) > 0)
    found = as_lora(AdapterUpdates({NAME: update}), 200)
    made = found.updates.modules[NAME]
    assert torch.allclose(made.delta().flatten(), delta.flatten(), rtol=1e-6, atol=1e-6 * float(delta.abs().max()))
    assert made.bias is update.bias
    assert found.energy.share == pytest.approx(1.0, abs=1e-12)
    assert made.kind == ("lora" if delta.dim() > 1 else "diff")


def test_lokr_of_a_tucker_core_of_rank_one_is_converted() -> None:
    numbers = torch.Generator().manual_seed(0)
    factors = {"w1": torch.randn(2, 2, generator=numbers), "w2_a": torch.randn(1, 3, generator=numbers)}
    factors |= {"w2_b": torch.randn(1, 2, generator=numbers), "t2": torch.randn(1, 1, 3, 3, generator=numbers)}
    update = ModuleUpdate("lokr", factors, 2.0)
    second = torch.einsum("kl,p,q->pqkl", factors["t2"][0, 0], factors["w2_a"][0], factors["w2_b"][0])
    expected = 2 * torch.einsum("ab,pqkl->apbqkl", factors["w1"], second).reshape(6, 4, 3, 3)
    assert torch.allclose(update.delta().float(), expected, rtol=1e-5)
    assert torch.allclose(
        as_lora(AdapterUpdates({NAME: update}), 8).updates.modules[NAME].delta().float(), expected, atol=1e-5
    )


def sample(**fields: Any) -> ModuleUpdate:
    numbers = torch.Generator().manual_seed(0)
    factors = {name: torch.randn(20, 3, generator=numbers) for name in ("w1_a", "w2_a")}
    factors |= {name: torch.randn(3, 36, generator=numbers) for name in ("w1_b", "w2_b")}
    return ModuleUpdate("loha", factors, 2.0, **fields)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_lower_rank_keeps_the_largest_singular_values_and_says_their_share(rank: int) -> None:
    update = sample(shape=(20, 4, 3, 3))
    found = as_lora(AdapterUpdates({NAME: update, "unet.conv_in": update}), rank)
    u, s, v = torch.linalg.svd(update.delta().flatten(1), full_matrices=False)
    made = found.updates.modules[NAME]
    assert made.factors["A"].shape == (rank, 4, 3, 3) and made.factors["B"].shape == (20, rank, 1, 1)
    assert torch.allclose(made.delta().flatten(1), (u[:, :rank] * s[:rank]) @ v[:rank], rtol=1e-5, atol=1e-5)
    share = float(s[:rank].square().sum() / s.square().sum())
    assert found.energy.share == pytest.approx(share) and found.energy.modules[NAME].share == pytest.approx(share)


def test_lora_of_a_lower_rank_stays_to_the_bit() -> None:
    lora = ModuleUpdate("lora", {"A": torch.randn(4, 8).half(), "B": torch.randn(8, 4).half()}, alpha=3.0)
    found = as_lora(AdapterUpdates({NAME: lora}, family="sd15"), 4)
    assert found.updates.modules[NAME] is lora and not found.energy.modules and found.updates.family == "sd15"
    assert as_lora(AdapterUpdates({NAME: lora}), 2).updates.modules[NAME].rank == 2


def test_dora_is_converted_on_the_weights_of_its_base_and_refused_without() -> None:
    magnitude = torch.rand(20, 1) + 0.5
    adapter = AdapterUpdates({NAME: sample(magnitude=magnitude)})
    with pytest.raises(InputError, match=r"conv1 is of DoRA.*base"):
        as_lora(adapter, 8)
    weight = torch.randn(20, 36)
    found = as_lora(adapter, 20, {NAME: weight}.__getitem__).updates.modules[NAME]
    changed = weight.double() + sample().delta()
    expected = magnitude.double() * changed / changed.square().sum(1, keepdim=True).sqrt() - weight.double()
    assert found.magnitude is None
    assert torch.allclose(found.delta(), expected, rtol=1e-5, atol=1e-5)


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="at least 1, not 0"):
        as_lora(AdapterUpdates({}), 0)
