"""Which modules of an adapter fit a base: real model folders, and shapes that torch computes."""

from pathlib import Path
from typing import Any

import pytest

from haori.bases.pipeline import read_base_folder
from haori.core.errors import MismatchError
from haori.library.fit import BaseWeight, component_weights, match
from haori.library.updates import AdapterUpdates, ModuleUpdate
from tests.flux_models import write_flux_pipeline

CLIP = "text_encoder.text_model.encoder.layers.1.mlp.fc1"


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, BaseWeight]]:
    return weights_of(write_flux_pipeline(tmp_path_factory.mktemp("flux")))


def weights_of(path: Path) -> dict[str, dict[str, BaseWeight]]:
    return {name: component_weights(folder) for name, folder in read_base_folder(path).models.items()}


def lora(out: int, inner: int, *kernel: int, rank: int = 4, **more: Any) -> ModuleUpdate:
    import torch

    a, b = torch.ones(rank, inner, *kernel), torch.ones(out, rank, *[1] * len(kernel))
    return ModuleUpdate("lora", {"A": a, "B": b}, **more)


def test_modules_find_their_weights_under_the_names_of_the_files(flux: dict[str, dict[str, BaseWeight]]) -> None:
    import torch

    fit = match(
        AdapterUpdates(
            {
                "transformer.transformer_blocks.1.ff.net.0.proj": lora(128, 32, bias=torch.ones(128)),
                "transformer.single_transformer_blocks.0.proj_out": lora(32, 160),
                CLIP: lora(40, 20),
                "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q": lora(24, 24),
            }
        ),
        flux,
    )
    assert fit.is_whole and not fit.unchecked
    assert fit.weights[CLIP].name == "encoder.layers.1.mlp.fc1.weight"  # as transformers 5 stores it
    assert fit.weights[CLIP].shape == (40, 20)
    assert {name: weight.name for name, weight in fit.biases.items()} == {
        "transformer.transformer_blocks.1.ff.net.0.proj": "transformer_blocks.1.ff.net.0.proj.bias"
    }
    fit.require("style", "tiny-flux")


def test_every_misfit_is_named_with_its_shape(flux: dict[str, dict[str, BaseWeight]]) -> None:
    import torch

    q = "transformer.transformer_blocks.0.attn.to_q"
    fit = match(
        AdapterUpdates(
            {
                q: lora(32, 32),
                "transformer.transformer_blocks.0.attn.to_k": lora(32, 31),
                "transformer.transformer_blocks.9.attn.to_q": lora(32, 32),
                "unet.conv_in": lora(32, 4, 3, 3),
                "text_encoder_2.encoder.block.0.layer.0.SelfAttention.k": lora(24, 24, bias=torch.ones(24)),
                "transformer.transformer_blocks.0.attn.to_v": lora(32, 32, bias=torch.ones(31)),
            }
        ),
        flux,
    )
    assert {str(misfit) for misfit in fit.misfits} == {
        "transformer.transformer_blocks.0.attn.to_k: the update is 32 x 31, the base has 32 x 32",
        "transformer.transformer_blocks.9.attn.to_q: there is no such module in the base's 'transformer'",
        "unet.conv_in: the base has no component 'unet', only text_encoder, text_encoder_2, transformer",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.k.bias: the module has no bias in the base",
        "transformer.transformer_blocks.0.attn.to_v.bias: the update is 31, the base has 32",
    }
    assert [misfit.base for misfit in fit.misshapen] == [(32, 32), (32,)]
    with pytest.raises(MismatchError, match="5 of its 6 modules do not fit"):
        fit.require("style", "tiny-flux")


def test_an_adapter_of_which_nothing_fits_is_an_error(flux: dict[str, dict[str, BaseWeight]]) -> None:
    updates = AdapterUpdates({"unet.mid_block.attentions.0.proj_in": lora(64, 64, 1, 1), "unet.conv_in": lora(4, 4)})
    with pytest.raises(MismatchError, match=r"for the base 'tiny-flux'.+None of its modules fits"):
        match(updates, flux).require("style", "tiny-flux")
    with pytest.raises(MismatchError, match="changes no module"):
        match(AdapterUpdates({}), flux).require("style", "tiny-flux")


def test_kernels_of_one_and_flattened_convolutions_are_the_same_shape() -> None:
    of = {"unet": {"a.weight": BaseWeight("a.weight", (8, 4, 3, 3)), "b.weight": BaseWeight("b.weight", (8, 4))}}
    good = {"unet.a": lora(8, 36), "unet.b": lora(8, 4, 1, 1)}
    assert match(AdapterUpdates(good), of).is_whole
    bad = {"unet.a": lora(8, 4, 1, 1), "unet.b": lora(4, 8)}
    assert len(match(AdapterUpdates(bad), of).misshapen) == 2
    # 8 x 4 x 9 x 1 has as many values as 8 x 4 x 3 x 3, and is another convolution.
    assert len(match(AdapterUpdates({"unet.a": lora(8, 4, 9, 1)}), of).misshapen) == 1


@pytest.mark.parametrize("bare", [False, True])
def test_models_of_text_fit_with_and_without_the_first_part_of_their_names(tmp_path: Path, bare: bool) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=8, bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip
    (model.transformer if bare else model).save_pretrained(tmp_path)
    weights = weights_of(tmp_path)
    # Updates of GPT-2's layers are read as the base keeps its weights, [in, out].
    names = {"model.transformer.h.0.attn.c_attn": lora(16, 48), "model.transformer.h.0.mlp.c_proj": lora(64, 16)}
    fit = match(AdapterUpdates(names | {"model.lm_head": lora(50, 16)}), weights)
    assert fit.is_whole, fit.misfits
    assert fit.weights["model.lm_head"].tied and fit.weights["model.lm_head"].name.endswith("wte.weight")
    assert len(match(AdapterUpdates({"model.transformer.h.0.mlp.c_proj": lora(16, 64)}), weights).misshapen) == 1


def test_a_quantised_base_tells_names_and_no_shapes(tiny_base_folder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "quantised"
    shutil.copytree(tiny_base_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    fit = match(AdapterUpdates({"model.model.layers.0.self_attn.q_proj": lora(1, 1)}), weights_of(folder))
    assert fit.is_whole and fit.unchecked == ("model.model.layers.0.self_attn.q_proj",)


def test_a_bias_alone_has_its_place(flux: dict[str, dict[str, BaseWeight]]) -> None:
    import torch

    name = "transformer.transformer_blocks.0.attn.to_q"
    fit = match(AdapterUpdates({name: ModuleUpdate("diff", {}, bias=torch.ones(32))}), flux)
    assert fit.is_whole and not fit.weights and fit.biases[name].shape == (32,)
