"""diffusers' files: spellings of three generations, the alpha of the header, round trips, what cannot be written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from haori.core.errors import FileFormatError, InputError
from haori.library.formats.format import open_source
from haori.library.formats.registry import format_named, read_updates
from haori.library.updates import AdapterUpdates, ModuleUpdate
from tests.update_samples import module_updates

DIFFUSERS = format_named("diffusers")
UNET = "unet.mid_block.attentions.0.transformer_blocks.0"
TEXT = "text_encoder.text_model.encoder.layers.0"


def pair(a: str, b: str, rank: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return {a: torch.randn(rank, 6, generator=numbers), b: torch.randn(8, rank, generator=numbers)}


def write(path: Path, tensors: dict[str, torch.Tensor], described: Any = None) -> Path:
    text = described if isinstance(described, str) else json.dumps(described)
    save_file(tensors, path, {"format": "pt"} if described is None else {"lora_adapter_metadata": text})
    return path


@pytest.mark.parametrize(
    ("key", "module"),
    [
        (f"{UNET}.attn1.to_q.lora_A.weight", f"{UNET}.attn1.to_q"),
        (f"{UNET}.attn1.to_q.lora_A.default_0.weight", f"{UNET}.attn1.to_q"),
        (f"{UNET}.attn1.to_out.0.lora.down.weight", f"{UNET}.attn1.to_out.0"),
        (f"{UNET}.attn1.processor.to_q_lora.down.weight", f"{UNET}.attn1.to_q"),
        (f"{UNET}.attn2.processor.to_out_lora.down.weight", f"{UNET}.attn2.to_out.0"),
        (f"{UNET.removeprefix('unet.')}.attn2.processor.to_v_lora.down.weight", f"{UNET}.attn2.to_v"),
        ("down_blocks.0.resnets.0.conv1.lora_A.weight", "unet.down_blocks.0.resnets.0.conv1"),
        (f"{TEXT}.self_attn.q_proj.lora_linear_layer.down.weight", f"{TEXT}.self_attn.q_proj"),
        (f"{TEXT}.self_attn.to_out_lora.down.weight", f"{TEXT}.self_attn.out_proj"),
        (f"{TEXT}.mlp.fc1.lora_linear_layer.down.weight", f"{TEXT}.mlp.fc1"),
        ("text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight", f"{TEXT}.mlp.fc1"),
        ("text_encoder_2.text_projection.lora_A.weight", "text_encoder_2.text_projection"),
        ("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
         "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "transformer.transformer_blocks.0.attn.to_q"),
        ("single_transformer_blocks.0.attn.to_q.lora_A.weight", "transformer.single_transformer_blocks.0.attn.to_q"),
    ],
)  # fmt: skip
def test_spellings_of_all_generations(tmp_path: Path, key: str, module: str) -> None:
    tensors = pair(key, key.replace("lora_A", "lora_B").replace("down.weight", "up.weight"))
    found = read_updates(write(tmp_path / "a.safetensors", tensors))
    assert found.format == "diffusers" and list(found.modules) == [module]
    a, b = tensors.values()
    assert torch.equal(found.modules[module].delta(), b.double() @ a.double())


def test_spellings_are_those_that_diffusers_itself_maps() -> None:
    """Old keys go through stock conversion and through ours, to the same names."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    from haori.library.formats.diffusers import _respelled

    for layer in ("to_q", "to_k", "to_v", "to_out"):
        for way, new in (("down", "lora_A"), ("up", "lora_B")):
            old = f"mid_block.attentions.0.transformer_blocks.0.attn1.processor.{layer}_lora.{way}.weight"
            (theirs,) = convert_unet_state_dict_to_peft({old: 0})
            assert _respelled(old).replace(f"lora.{way}", new) == theirs


def test_the_alpha_of_the_header_scales_each_module(tmp_path: Path) -> None:
    q, k, fc = f"{UNET}.attn1.to_q", f"{UNET}.attn1.to_k", f"{TEXT}.mlp.fc1"
    tensors: dict[str, torch.Tensor] = {}
    for name, rank in ((q, 4), (k, 2), (fc, 4)):
        tensors |= pair(f"{name}.lora_A.weight", f"{name}.lora_B.weight", rank)
    described = {
        "unet.r": 4, "unet.lora_alpha": 8, "unet.rank_pattern": {"attn1.to_k": 2},
        "unet.alpha_pattern": {"attn1.to_k": 3}, "unet.use_rslora": False,
        "text_encoder.r": 4, "text_encoder.lora_alpha": 6, "text_encoder.use_rslora": True,
    }  # fmt: skip
    found = read_updates(write(tmp_path / "a.safetensors", tensors, described)).modules
    assert [found[name].scale for name in (q, k, fc)] == [2.0, 1.5, 3.0]
    bare = {key.removeprefix("unet."): value for key, value in described.items() if key.startswith("unet.")}
    model = {key.removeprefix("unet."): value for key, value in tensors.items() if key.startswith("unet.")}
    found = read_updates(write(tmp_path / "b.safetensors", model, bare)).modules
    assert [found[name].scale for name in (q, k)] == [2.0, 1.5]
    assert read_updates(write(tmp_path / "c.safetensors", tensors)).modules[q].scale == 1.0


@pytest.mark.parametrize(
    ("described", "reason"),
    [
        ("[1", "no JSON object"), ({"unet.lora_alpha": "much"}, "the alpha 'much'"),
        ({"unet.lora_alpha": 1, "unet.alpha_pattern": ["to_q"]}, "alpha_pattern is no table"),
        ({"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}, "is no pattern"),
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_meant_is_refused(tmp_path: Path, described: Any, reason: str) -> None:
    key = f"{UNET}.attn1.to_q"
    path = write(tmp_path / "a.safetensors", pair(f"{key}.lora_A.weight", f"{key}.lora_B.weight"), described)
    with pytest.raises(FileFormatError, match=reason):
        read_updates(path)


def test_dora_of_peft_is_of_output_rows_for_convolutions_too(tmp_path: Path) -> None:
    name = "unet.down_blocks.0.resnets.0.conv1"
    numbers = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 3, 3, generator=numbers), torch.randn(5, 2, 1, 1, generator=numbers)
    magnitude = torch.rand(1, 5, 1, 1, generator=numbers) + 0.5  # as PEFT keeps it, of as many inputs as outputs
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.lora_magnitude_vector": magnitude}
    update = read_updates(write(tmp_path / "a.safetensors", tensors)).modules[name]
    weight = torch.randn(5, 5, 3, 3, generator=numbers, dtype=torch.float64)
    changed = weight + torch.einsum("or,rikl->oikl", b[:, :, 0, 0].double(), a.double())
    norms = changed.square().sum((1, 2, 3)).sqrt()
    expected = changed * (magnitude.flatten().double() / norms)[:, None, None, None] - weight
    assert torch.allclose(update.change(weight), expected, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    update=module_updates(("lora", "tucker")), other=module_updates(("lora",)), family=st.sampled_from(["sd15", "sdxl"])
)
def test_a_round_trip_changes_nothing(
    tmp_path_factory: Any, update: ModuleUpdate, other: ModuleUpdate, family: str
) -> None:
    modules = {
        "unet.down_blocks.1.resnets.0.conv1": plain(update), "unet.mid_block.attentions.0.proj_in": plain(other),
        "text_encoder.text_model.encoder.layers.1.mlp.fc1": plain(other),
    }  # fmt: skip
    path = tmp_path_factory.mktemp("round") / "a.safetensors"
    DIFFUSERS.write(AdapterUpdates(modules, family=family), path)
    found = read_updates(path).modules
    assert sorted(found) == sorted(modules)
    for name, mine in modules.items():
        delta = mine.delta()
        assert torch.allclose(
            found[name].delta().flatten(), delta.flatten(), rtol=1e-6, atol=1e-6 * float(delta.abs().max())
        )


def plain(update: ModuleUpdate) -> ModuleUpdate:
    return ModuleUpdate("lora", update.factors, update.alpha, update.rslora)


def test_a_file_says_its_strength_to_those_who_do_not_read_its_header_too(tmp_path: Path) -> None:
    q, k = f"{UNET}.attn1.to_q", f"{UNET}.attn1.to_k"
    half = {"A": torch.randn(4, 8).half(), "B": torch.randn(8, 4).half()}
    quarter = {"A": half["A"][:2], "B": half["B"][:, :2]}
    updates = AdapterUpdates({q: ModuleUpdate("lora", half, alpha=8.0), k: ModuleUpdate("lora", quarter, alpha=3.0)})
    DIFFUSERS.write(updates, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    for name in (q, k):
        product = tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double()
        assert torch.allclose(product, updates.modules[name].delta(), rtol=1e-6)
    assert tensors[f"{q}.lora_B.weight"].dtype == torch.float16  # twice a float16 is one
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        described = json.loads(file.metadata()["lora_adapter_metadata"])
    assert described["unet.r"] == described["unet.lora_alpha"]
    assert (
        described["unet.rank_pattern"] == described["unet.alpha_pattern"] and len(described["unet.rank_pattern"]) == 1
    )


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float64]
)
@pytest.mark.parametrize("alpha", [1.0, 3.0, 16.0, -8.0])
def test_every_dtype_keeps_its_strength(tmp_path: Path, dtype: torch.dtype, alpha: float) -> None:
    name = f"{UNET}.attn1.to_q"
    factors = {"A": torch.randn(4, 8).to(dtype), "B": torch.randn(8, 4).to(dtype)}
    update = ModuleUpdate("lora", factors, alpha)
    for format_name in ("diffusers", "kohya"):
        path = tmp_path / f"{format_name}.safetensors"
        format_named(format_name).write(AdapterUpdates({name: update}, family="sd15"), path)
        assert torch.allclose(read_updates(path).modules[name].delta(), update.delta(), rtol=1e-6)


def test_a_convolution_whose_second_factor_is_a_matrix_is_written_as_two_convolutions(tmp_path: Path) -> None:
    name = "unet.mid_block.resnets.0.conv1"
    dylora = ModuleUpdate("lora", {"A": torch.randn(2, 4, 3, 3), "B": torch.randn(6, 2)}, alpha=1.0)
    DIFFUSERS.write(AdapterUpdates({name: dylora}), tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")[f"{name}.lora_B.weight"].shape == (6, 2, 1, 1)
    assert torch.allclose(read_updates(tmp_path / "a.safetensors").modules[name].delta(), dylora.delta(), rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"kind": "diff", "factors": {"diff": torch.ones(4, 4)}}, "a whole difference"),
        ({"kind": "loha", "factors": {name: torch.ones(2, 2) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}}, "LoHa"),
        ({"kind": "lokr", "factors": {"w1": torch.ones(2, 2), "w2": torch.ones(2, 2)}}, "LoKr"),
        ({"magnitude": torch.ones(4)}, "DoRA"),
        ({"bias": torch.ones(4)}, "changes a bias"),
    ],
)
def test_what_pipelines_do_not_load_is_refused_with_the_way_round(
    tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    lora = {"kind": "lora", "factors": {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}}
    with pytest.raises(InputError, match=rf"attn1\.to_q cannot.*{reason}.*haori resize.*kohya"):
        DIFFUSERS.write(AdapterUpdates({f"{UNET}.attn1.to_q": ModuleUpdate(**{**lora, **fields})}), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_modules_of_no_pipeline_are_refused(tmp_path: Path) -> None:
    lora = ModuleUpdate("lora", {"A": torch.ones(2, 4), "B": torch.ones(4, 2)})
    with pytest.raises(InputError, match=r"model\.model\.layers\.0\.mlp\.up_proj.*peft"):
        DIFFUSERS.write(AdapterUpdates({"model.model.layers.0.mlp.up_proj": lora}), tmp_path / "a")
    vectors = AdapterUpdates({f"{UNET}.attn1.to_q": lora}, extra={"bundle_emb.x": torch.ones(2)})
    with pytest.raises(InputError, match=r"bundle_emb\.x"):
        DIFFUSERS.write(vectors, tmp_path / "a")


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_mid_block_attentions_0_proj_in", "base_model.model.model.layers.0.mlp.up_proj",
        "diffusion_model.double_blocks.0.img_attn.qkv", "transformer.double_blocks.0.img_attn.qkv", "double_blocks.0.x",
    ],
)  # fmt: skip
def test_files_of_other_formats_are_left_to_them(tmp_path: Path, key: str) -> None:
    source = open_source(write(tmp_path / "a.safetensors", pair(f"{key}.lora_A.weight", f"{key}.lora_B.weight")))
    assert not DIFFUSERS.detect(source)


def test_a_module_of_no_component_beside_known_ones_is_named(tmp_path: Path) -> None:
    tensors = pair(f"{UNET}.attn1.to_q.lora_A.weight", f"{UNET}.attn1.to_q.lora_B.weight")
    tensors |= pair("vae.conv.lora_A.weight", "vae.conv.lora_B.weight")
    with pytest.raises(FileFormatError, match=r"'vae\.conv'"):
        read_updates(write(tmp_path / "a.safetensors", tensors))
