"""Names of the modules of image transformers, against the model classes and converters of diffusers."""

import copy
from typing import Any

import pytest

from haori.library.formats.transformer_places import ALL_NAMES, OWN_NAMES
from tests.flux_models import image_transformers

FAMILIES = tuple(OWN_NAMES)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return image_transformers()


def modules_with_weights(model: Any) -> dict[str, tuple[int, ...]]:
    return {
        name.removesuffix(".weight"): tuple(p.shape) for name, p in model.named_parameters() if name.endswith(".weight")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_of_the_model_has_a_name_and_every_name_a_module(family: str, models: dict[str, Any]) -> None:
    names = OWN_NAMES[family]
    modules = modules_with_weights(models[family])
    placed: set[str] = set()
    for module in modules:
        own = names.own_name(module)
        assert own is not None, module
        for joint in (".", "_"):
            place = names.place_of(own.replace(".", joint), joint)
            assert place is not None and module in place.modules, own
            placed |= set(place.modules)
    assert placed == set(modules)
    for joint in (".", "_"):  # diffusers' names stand for themselves
        for module in modules:
            assert ALL_NAMES[family].place_of(module.replace(".", joint), joint).modules == (module,)  # type: ignore[union-attr]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_peft_adapts_has_a_name(family: str, models: dict[str, Any]) -> None:
    from peft import LoraConfig

    model = copy.deepcopy(models[family])
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear"), adapter_name="all")
    adapted = {name.removesuffix(".lora_A.all") for name, _ in model.named_modules() if name.endswith(".lora_A.all")}
    assert len(adapted) > 20
    assert all(OWN_NAMES[family].own_name(name) is not None for name in adapted)


@pytest.mark.parametrize("family", ["flux2", "z_image"])
def test_weights_lie_where_the_converters_of_diffusers_put_them(family: str, models: dict[str, Any]) -> None:
    """Each row of a checkpoint in the base's own naming is numbered, converted by diffusers, and found again."""
    import torch
    from diffusers.loaders import single_file_utils

    convert = {
        "flux2": single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
        "z_image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
    }[family]
    names = OWN_NAMES[family]
    sizes = modules_with_weights(models[family])
    own_rows: dict[str, int] = {}
    for module, shape in sizes.items():
        own = str(names.own_name(module))
        own_rows[own] = own_rows.get(own, 0) + shape[0]
    numbered, checkpoint, start = {}, {}, 0
    for own, rows in own_rows.items():
        numbered[own] = torch.arange(start, start + rows)[:, None]
        checkpoint[f"{own}.{'scale' if own.endswith(('query_norm', 'key_norm')) else 'weight'}"] = numbered[own]
        start += rows
    converted = convert(dict(checkpoint))
    for module, shape in sizes.items():
        own = str(names.own_name(module))
        place = names.place_of(own)
        assert place is not None
        rows = numbered[own].flatten()
        if place.rows == "swapped":
            rows = torch.cat([rows[shape[0] // 2 :], rows[: shape[0] // 2]])
        at = sum(sizes[other][0] for other in place.modules[: place.modules.index(module)])
        assert converted[f"{module}.weight"].flatten().tolist() == rows[at : at + shape[0]].tolist(), module
