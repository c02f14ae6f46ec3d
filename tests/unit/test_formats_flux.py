"""Adapters of image transformers in the namings of several trainers, read into the neutral form.

What the fused modules of a file mean is told by diffusers' own converters where they have one for such a file, and by
slices of dense matrices elsewhere.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from haori.core.errors import FileFormatError
from haori.library.formats.registry import format_named, read_updates
from haori.library.updates import AdapterUpdates, ModuleUpdate
from tests.adapter_files import assert_equal, noise, save

if TYPE_CHECKING:
    from torch import Tensor

HIDDEN = 3072  # what the converters of diffusers are written for


def assert_same_change(update: ModuleUpdate, a: "Tensor", b: "Tensor", name: str = "") -> None:
    """Compare dW with B A on two inputs: the matrices may be too large to be written out."""
    import torch

    x = torch.randn(a.shape[1], 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = b.double() @ (a.double() @ x)
    found = update.factors["B"].double() @ (update.factors["A"].double() @ x) * update.scale
    assert (found - expected).norm() <= 1e-6 * expected.norm(), name


def bfl_tensors(ends: tuple[str, str], *, alpha: bool, hidden: int = HIDDEN, rank: int = 2) -> "dict[str, Tensor]":
    """Return a LoRA of every module of one double and one single block of Flux.1, and of the last layer."""
    import torch

    mlp = 4 * hidden
    sizes = {
        **{f"double_blocks.0.{stream}_attn.qkv": (3 * hidden, hidden) for stream in ("img", "txt")},
        **{f"double_blocks.0.{stream}_attn.proj": (hidden, hidden) for stream in ("img", "txt")},
        **{f"double_blocks.0.{stream}_mlp.0": (mlp, hidden) for stream in ("img", "txt")},
        **{f"double_blocks.0.{stream}_mlp.2": (hidden, mlp) for stream in ("img", "txt")},
        **{f"double_blocks.0.{stream}_mod.lin": (6 * hidden, hidden) for stream in ("img", "txt")},
        "single_blocks.0.linear1": (3 * hidden + mlp, hidden),
        "single_blocks.0.linear2": (hidden, hidden + mlp),
        "single_blocks.0.modulation.lin": (3 * hidden, hidden),
        "final_layer.linear": (64, hidden),
        "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
        "img_in": (hidden, 64),
        "txt_in": (hidden, 4096),
        "time_in.in_layer": (hidden, 256),
        "vector_in.out_layer": (hidden, hidden),
        "guidance_in.in_layer": (hidden, 256),
    }
    found = {}
    for number, (name, (out, inner)) in enumerate(sizes.items()):
        found[f"{name}.{ends[0]}"] = noise(rank, inner, seed=number)
        found[f"{name}.{ends[1]}"] = noise(out, rank, seed=100 + number)
        if alpha and not name.startswith("final_layer"):  # whose alpha diffusers throws away
            found[f"{name}.alpha"] = torch.tensor(0.5 + number)
    return found


def underscored(tensors: "Mapping[str, Tensor]", prefix: str) -> "dict[str, Tensor]":
    found = {}
    for key, tensor in tensors.items():
        end = "alpha" if key.endswith(".alpha") else ".".join(key.split(".")[-2:])
        found[prefix + key.removesuffix(f".{end}").replace(".", "_") + f".{end}"] = tensor
    return found


def assert_as_converted(updates: AdapterUpdates, converted: "Mapping[str, Tensor]") -> None:
    """Compare with what diffusers makes of the file; it leaves the component out of some names."""
    expected = {
        key if key.startswith("transformer.") else f"transformer.{key}": value for key, value in converted.items()
    }
    modules = {key.removesuffix(".lora_A.weight") for key in expected if key.endswith(".lora_A.weight")}
    assert modules == set(updates.modules)
    for name in modules:
        a, b = expected[f"{name}.lora_A.weight"], expected[f"{name}.lora_B.weight"]
        assert_same_change(updates.modules[name], a, b, name)


def test_kohya_flux_means_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    tensors = underscored(bfl_tensors(("lora_down.weight", "lora_up.weight"), alpha=True), "lora_unet_")
    updates = read_updates(save(tmp_path / "a.safetensors", tensors))
    assert (updates.format, updates.family) == ("kohya-flux", "flux1")
    assert_as_converted(updates, _convert_kohya_flux_lora_to_diffusers(dict(tensors)))


def test_diffusers_makes_of_a_written_kohya_file_what_was_written(tmp_path: Path) -> None:
    """From modules with A of their own, two of which have none."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
    from safetensors.torch import load_file

    single, double = "transformer.single_transformer_blocks.0", "transformer.transformer_blocks.0.attn"
    sizes = {f"{single}.attn.to_q": HIDDEN, f"{single}.proj_mlp": 4 * HIDDEN, f"{double}.to_v": HIDDEN}
    modules = {
        name: ModuleUpdate("lora", {"A": noise(2, HIDDEN, seed=out), "B": noise(out, 2)}, alpha=out / HIDDEN)
        for name, out in sizes.items()
    }
    updates = AdapterUpdates(modules, family="flux1")
    format_named("kohya-flux").write(updates, tmp_path / "a.safetensors")
    converted = _convert_kohya_flux_lora_to_diffusers(load_file(tmp_path / "a.safetensors"))
    for key in [key for key in converted if key.endswith(".lora_A.weight")]:
        name = key.removesuffix(".lora_A.weight")
        a, b = converted[key], converted[f"{name}.lora_B.weight"]
        if name in modules:
            assert_same_change(modules[name], a, b, name)
        else:
            assert not b.any(), name
    assert set(modules) <= {key.removesuffix(".lora_A.weight") for key in converted}


def test_kohya_flux2_means_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    import torch
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux2_lora_to_diffusers

    sizes = {
        "double_blocks.0.img_attn.qkv": (96, 32), "double_blocks.0.txt_attn.proj": (32, 32),
        "double_blocks.0.img_mlp.0": (192, 32), "double_blocks.0.txt_mlp.2": (32, 96),
        "single_blocks.1.linear1": (288, 32), "single_blocks.1.linear2": (32, 128),
        "img_in": (32, 8), "final_layer.linear": (8, 32),
    }  # fmt: skip
    tensors = {}
    for name, (out, inner) in sizes.items():
        tensors |= {f"{name}.lora_down.weight": noise(2, inner), f"{name}.lora_up.weight": noise(out, 2)}
        tensors[f"{name}.alpha"] = torch.tensor(3.0)
    tensors = underscored(tensors, "lora_unet_")
    updates = read_updates(save(tmp_path / "a.safetensors", tensors))
    assert (updates.format, updates.family) == ("kohya-flux", "flux2")
    assert_as_converted(updates, _convert_kohya_flux2_lora_to_diffusers(dict(tensors)))


def test_fal_means_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_fal_kontext_lora_to_diffusers

    block = bfl_tensors(("lora_A.weight", "lora_B.weight"), alpha=False, rank=1)
    tensors = {}
    for key, tensor in block.items():  # diffusers wants every block of the whole model
        if key.startswith("double_blocks.0"):
            tensors |= {key.replace(".0.", f".{number}.", 1): tensor.clone() for number in range(19)}
        elif key.startswith("single_blocks.0"):
            tensors |= {key.replace(".0.", f".{number}.", 1): tensor.clone() for number in range(38)}
        elif key.startswith("final_layer.linear"):
            tensors[key] = tensor
    tensors = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    updates = read_updates(save(tmp_path / "a.safetensors", tensors))
    assert (updates.format, updates.family) == ("fal", "flux1")
    assert_as_converted(updates, _convert_fal_kontext_lora_to_diffusers(dict(tensors)))


def test_xlabs_means_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers

    tensors = {}
    for name, out, inner in (
        ("double_blocks.3.processor.qkv_lora1", 96, 32), ("double_blocks.3.processor.qkv_lora2", 96, 32),
        ("double_blocks.3.processor.proj_lora1", 32, 32), ("double_blocks.3.processor.proj_lora2", 32, 32),
        ("single_blocks.7.processor.qkv_lora", 96, 32), ("single_blocks.7.processor.proj_lora", 32, 160),
    ):  # fmt: skip
        tensors |= {f"{name}.down.weight": noise(4, inner), f"{name}.up.weight": noise(out, 4)}
    updates = read_updates(save(tmp_path / "a.safetensors", tensors))
    assert (updates.format, updates.family) == ("xlabs", "flux1")
    assert_as_converted(updates, _convert_xlabs_flux_lora_to_diffusers(dict(tensors)))


@pytest.mark.parametrize("ends", [("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")])
def test_comfyui_reads_like_kohya(tmp_path: Path, ends: tuple[str, str]) -> None:
    own = bfl_tensors(ends, alpha=True, hidden=16)
    kohya = underscored(bfl_tensors(("lora_down.weight", "lora_up.weight"), alpha=True, hidden=16), "lora_unet_")
    of_kohya = read_updates(save(tmp_path / "k.safetensors", kohya))
    for prefix in ("diffusion_model.", "model.diffusion_model.", ""):
        updates = read_updates(save(tmp_path / "c.safetensors", {prefix + key: value for key, value in own.items()}))
        assert (updates.format, updates.family) == ("comfyui", "flux1")
        assert_equal(updates, of_kohya)


def test_comfyui_of_z_image_and_qwen_image_mean_what_diffusers_makes_of_them(tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_qwen_lora_to_diffusers,
        _convert_non_diffusers_z_image_lora_to_diffusers,
    )

    z_image = {
        "layers.0.attention.to_q": (32, 32), "layers.0.attention.to_out.0": (32, 32),
        "context_refiner.0.feed_forward.w1": (85, 32), "noise_refiner.1.adaLN_modulation.0": (128, 32),
    }  # fmt: skip
    qwen_image = {
        "transformer_blocks.0.attn.to_q": (32, 32), "transformer_blocks.0.attn.to_out.0": (32, 32),
        "transformer_blocks.1.img_mlp.net.0.proj": (128, 32), "transformer_blocks.1.txt_mod.1": (192, 32),
    }  # fmt: skip
    for family, sizes, convert in (
        ("z_image", z_image, _convert_non_diffusers_z_image_lora_to_diffusers),
        ("qwen_image", qwen_image, _convert_non_diffusers_qwen_lora_to_diffusers),
    ):
        tensors = {}
        for name, (out, inner) in sizes.items():
            tensors |= {
                f"diffusion_model.{name}.lora_A.weight": noise(2, inner),
                f"diffusion_model.{name}.lora_B.weight": noise(out, 2),
            }
        updates = read_updates(save(tmp_path / "a.safetensors", tensors))
        assert (updates.format, updates.family) == ("comfyui", family)
        assert_as_converted(updates, convert(dict(tensors)))


def test_onetrainer_names_are_those_of_the_model(tmp_path: Path) -> None:
    import torch

    sizes = {
        "transformer_blocks.0.attn.to_q": (32, 32), "transformer_blocks.0.ff_context.net.0.proj": (128, 32),
        "single_transformer_blocks.1.proj_mlp": (128, 32), "time_text_embed.guidance_embedder.linear_1": (32, 256),
        "norm_out.linear": (64, 32),
    }  # fmt: skip
    text = {"lora_te1_text_model_encoder_layers_0_mlp_fc1": "text_encoder.text_model.encoder.layers.0.mlp.fc1"}
    text["lora_te2_encoder_block_1_layer_1_DenseReluDense_wi_0"] = (
        "text_encoder_2.encoder.block.1.layer.1.DenseReluDense.wi_0"
    )
    for prefix in ("lora_transformer_", "lycoris_"):
        tensors: dict[str, Tensor] = {}
        for name, (out, inner) in sizes.items():
            own = prefix + name.replace(".", "_")
            tensors |= {f"{own}.lora_down.weight": noise(2, inner), f"{own}.lora_up.weight": noise(out, 2)}
        for own in text:
            tensors |= {f"{own}.lora_down.weight": noise(2, 8), f"{own}.lora_up.weight": noise(8, 2)}
        tensors = {**tensors, **{f"{key.split('.')[0]}.alpha": torch.tensor(1.0) for key in tensors}}
        updates = read_updates(save(tmp_path / "a.safetensors", tensors))
        assert (updates.format, updates.family) == ("onetrainer", "flux1")
        assert set(updates.modules) == {f"transformer.{name}" for name in sizes} | set(text.values())
        for name, (out, inner) in sizes.items():
            assert_same_change(updates.modules[f"transformer.{name}"], noise(2, inner) / 2, noise(out, 2))


def test_omi_numbers_the_parts_of_a_fused_module(tmp_path: Path) -> None:
    tensors = {}
    for number, target in enumerate(("to_q", "to_k", "to_v", "mlp")):
        out = 32 if target != "mlp" else 128
        tensors |= {
            f"transformer.single_blocks.0.linear1.{number}.lora_down.weight": noise(2, 32, seed=number),
            f"transformer.single_blocks.0.linear1.{number}.lora_up.weight": noise(out, 2, seed=number),
        }
    tensors |= {
        "transformer.final_layer.adaLN_modulation.1.lora_down.weight": noise(2, 32),
        "transformer.final_layer.adaLN_modulation.1.lora_up.weight": noise(64, 2),
        "clip_l.text_model.encoder.layers.0.mlp.fc1.lora_down.weight": noise(2, 8),
        "clip_l.text_model.encoder.layers.0.mlp.fc1.lora_up.weight": noise(8, 2),
        "t5.encoder.block.0.layer.0.SelfAttention.q.lora_down.weight": noise(2, 8),
        "t5.encoder.block.0.layer.0.SelfAttention.q.lora_up.weight": noise(8, 2),
        "bundle_emb.word.clip_l": noise(1, 8),
    }
    updates = read_updates(save(tmp_path / "a.safetensors", tensors))
    assert (updates.format, updates.family, list(updates.extra)) == ("omi", "flux1", ["bundle_emb.word.clip_l"])
    block = "transformer.single_transformer_blocks.0"
    for number, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
        out = 32 if number < 3 else 128
        assert_same_change(updates.modules[f"{block}.{name}"], noise(2, 32, seed=number), noise(out, 2, seed=number))
    import torch

    shift, scale = noise(64, 2).chunk(2)
    assert_same_change(updates.modules["transformer.norm_out.linear"], noise(2, 32), torch.cat([scale, shift]))
    assert {
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
    } < set(updates.modules)


def test_attention_alone_is_of_the_family_that_the_header_names(tmp_path: Path) -> None:
    ends = {"lora_A.weight": noise(2, 32), "lora_B.weight": noise(32, 2)}
    attention = {f"diffusion_model.transformer_blocks.0.attn.to_q.{end}": factor for end, factor in ends.items()}
    path = tmp_path / "a.safetensors"
    assert read_updates(save(path, attention)).family is None
    for version, family in (("qwen_image", "qwen_image"), ("flux2_dev", "flux2"), ("flux1", "flux1")):
        updates = read_updates(save(path, attention, ss_base_model_version=version))
        assert updates.family == family
        assert list(updates.modules) == ["transformer.transformer_blocks.0.attn.to_q"]
    for width, family in ((3072, "flux1"), (4096, "flux2"), (6144, "flux2")):  # of Flux.1, and Flux.2 klein and dev
        name = "lora_unet_double_blocks_0_img_attn_proj"
        proj = {f"{name}.lora_down.weight": noise(1, width), f"{name}.lora_up.weight": noise(width, 1)}
        name = "lora_unet_double_blocks_0_img_attn_qkv"
        qkv = {f"{name}.lora_down.weight": noise(1, width), f"{name}.lora_up.weight": noise(3 * width, 1)}
        assert read_updates(save(path, {**proj, **qkv})).family == family


def test_text_encoders_of_kohya_and_comfyui(tmp_path: Path) -> None:
    names = {
        f"{prefix}_{path.replace('.', '_')}": f"{component}.{path}"
        for prefix, component, path in (
            ("lora_te1", "text_encoder", "text_model.encoder.layers.3.self_attn.out_proj"),
            ("lora_te3", "text_encoder_2", "encoder.block.0.layer.0.SelfAttention.o"),
            ("lora_te3", "text_encoder_2", "encoder.block.11.layer.1.DenseReluDense.wi_1"),
        )
    }
    tensors = {}
    for name in names:
        tensors |= {f"{name}.lora_down.weight": noise(2, 8), f"{name}.lora_up.weight": noise(8, 2)}
    assert set(read_updates(save(tmp_path / "a.safetensors", tensors)).modules) == set(names.values())
    tensors = {}
    for name in names.values():
        prefix = "clip_l" if name.startswith("text_encoder.") else "t5xxl"
        own = f"text_encoders.{prefix}.transformer.{name.partition('.')[2]}"
        tensors |= {f"{own}.lora_A.weight": noise(2, 8), f"{own}.lora_B.weight": noise(8, 2)}
    updates = read_updates(save(tmp_path / "a.safetensors", tensors))
    assert updates.format == "comfyui" and set(updates.modules) == set(names.values())


@pytest.mark.parametrize(
    "key", ["lora_unet_double_blocks_0_img_attn_qqq", "lora_unet_triple_blocks_0_img_mlp_0", "lora_te4_encoder"]
)
def test_a_module_that_is_not_known_is_named(tmp_path: Path, key: str) -> None:
    tensors = underscored(bfl_tensors(("lora_down.weight", "lora_up.weight"), alpha=False, hidden=8), "lora_unet_")
    tensors |= {f"{key}.lora_down.weight": noise(2, 8), f"{key}.lora_up.weight": noise(8, 2)}
    with pytest.raises(FileFormatError, match=key):
        read_updates(save(tmp_path / "a.safetensors", tensors))


def test_rows_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    import torch

    own = "lora_unet_double_blocks_0_img_attn_qkv"
    lora = {f"{own}.lora_down.weight": noise(2, 8), f"{own}.lora_up.weight": noise(25, 2)}
    with pytest.raises(FileFormatError, match=rf"{own}.* is fused, and its 25 rows"):
        read_updates(save(tmp_path / "a.safetensors", lora))
    lora = {f"{own}.lora_down.weight": noise(2, 8), f"{own}.lora_up.weight": noise(24, 2)}
    with pytest.raises(FileFormatError, match="magnitude is one of input columns"):
        read_updates(save(tmp_path / "a.safetensors", {**lora, f"{own}.dora_scale": torch.ones(1, 8)}))


@pytest.mark.parametrize(
    ("rows", "columns", "factored", "kind"),
    [
        (12, 12, True, "lokr"),
        (12, 12, False, "lokr"),
        (36, 12, True, "lora"),
        (18, 6, False, "loha"),
        (36, 24, False, "diff"),
    ],
)
def test_a_fused_lokr_is_divided_exactly(rows: int, columns: int, factored: bool, kind: str, tmp_path: Path) -> None:
    """With w2 of 12 rows the thirds of 72 are rows of w1; with 18 or 36 they are not, and it becomes another kind."""
    import torch

    own = "lora_unet_double_blocks_0_img_attn_qkv"
    w1, w2_a, w2_b = noise(72 // rows, 24 // columns), noise(rows, 1), noise(1, columns)
    second = {"lokr_w2_a": w2_a, "lokr_w2_b": w2_b} if factored else {"lokr_w2": w2_a @ w2_b}
    tensors = {f"{own}.lokr_w1": w1, **{f"{own}.{name}": factor for name, factor in second.items()}}
    modules = read_updates(save(tmp_path / "a.safetensors", {**tensors, f"{own}.alpha": torch.tensor(0.5)})).modules
    scale = 0.5 if factored else 1.0  # LyCORIS takes no alpha where nothing is factored
    whole = torch.kron(w1.double(), (w2_a @ w2_b).double()) * scale
    for place, name in enumerate(("to_q", "to_k", "to_v")):
        found = modules[f"transformer.transformer_blocks.0.attn.{name}"]
        assert found.kind == kind
        expected = whole[24 * place : 24 * place + 24]
        assert (found.delta() - expected).norm() <= 1e-6 * expected.norm()


def test_shared_factors_come_back_as_they_were(tmp_path: Path) -> None:
    import torch

    tensors = underscored(bfl_tensors(("lora_down.weight", "lora_up.weight"), alpha=True, hidden=8), "lora_unet_")
    updates = read_updates(save(tmp_path / "a.safetensors", tensors))
    parts = [updates.modules[f"transformer.transformer_blocks.0.attn.{name}"] for name in ("to_q", "to_k", "to_v")]
    assert {part.factors["A"].data_ptr() for part in parts} == {parts[0].factors["A"].data_ptr()}
    format_named("kohya-flux").write(updates, tmp_path / "b.safetensors")
    from safetensors.torch import load_file

    again = load_file(tmp_path / "b.safetensors")
    factors = {key for key in tensors if not key.endswith(".alpha")}
    assert {key for key in again if not key.endswith(".alpha")} == factors
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
