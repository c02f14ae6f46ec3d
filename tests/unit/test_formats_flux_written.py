"""Adapters of image transformers that are written and read again: every module changes by the same."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haori.core.errors import InputError
from haori.library.formats.registry import format_named, read_updates
from haori.library.updates import AdapterUpdates, ModuleUpdate
from tests.adapter_files import assert_equal, noise

# Modules by family, with rows and inputs for the hidden size h; some of the parts of fused modules are not there.
BLOCKS: Mapping[str, Mapping[str, Callable[[int], tuple[int, int]]]] = {
    "flux1": {
        **{f"transformer_blocks.0.attn.to_{part}": lambda h: (h, h) for part in "qkv"},
        **{f"transformer_blocks.3.attn.add_{part}_proj": lambda h: (h, h) for part in "qv"},
        **{f"single_transformer_blocks.0.attn.to_{part}": lambda h: (h, h) for part in "qkv"},
        "single_transformer_blocks.0.proj_mlp": lambda h: (4 * h, h),
        "single_transformer_blocks.2.attn.to_k": lambda h: (h, h),
        "single_transformer_blocks.4.proj_mlp": lambda h: (4 * h, h),
        "single_transformer_blocks.0.proj_out": lambda h: (h, 5 * h),
        "transformer_blocks.0.ff.net.2": lambda h: (h, 4 * h),
        "norm_out.linear": lambda h: (2 * h, h),
    },
    "flux2": {
        **{f"transformer_blocks.0.attn.to_{part}": lambda h: (h, h) for part in "qv"},
        "transformer_blocks.1.attn.add_k_proj": lambda h: (h, h),
        "transformer_blocks.0.ff.linear_in": lambda h: (6 * h, h),
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj": lambda h: (9 * h, h),
        "norm_out.linear": lambda h: (2 * h, h),
    },
    "z_image": {
        **{f"layers.0.attention.to_{part}": lambda h: (h, h) for part in "qkv"},
        "layers.0.attention.to_out.0": lambda h: (h, h),
        "noise_refiner.0.attention.to_v": lambda h: (h, h),
        "layers.0.feed_forward.w1": lambda h: (3 * h, h),
        "all_final_layer.2-1.linear": lambda h: (8, h),
    },
    "qwen_image": {
        "transformer_blocks.0.attn.to_q": lambda h: (h, h),
        "transformer_blocks.0.img_mlp.net.0.proj": lambda h: (4 * h, h),
        "transformer_blocks.0.txt_mod.1": lambda h: (6 * h, h),
        "norm_out.linear": lambda h: (2 * h, h),
    },
}
# Is always there, so that the family is told.
TELLING = {
    "flux1": "single_transformer_blocks.0.proj_out", "flux2": "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    "z_image": "layers.0.feed_forward.w1", "qwen_image": "transformer_blocks.0.txt_mod.1",
}  # fmt: skip


@st.composite
def adapters(draw: st.DrawFn) -> AdapterUpdates:
    """Draw LoRA adapters: ranks, alphas, rsLoRA and dtypes differ by module, A is shared by some, biases are there."""
    import torch

    family = draw(st.sampled_from(sorted(BLOCKS)))
    hidden = draw(st.sampled_from([4, 6, 8, 12]))
    names = draw(st.sets(st.sampled_from(sorted(BLOCKS[family])))) | {TELLING[family]}
    shares = draw(st.booleans())
    modules = {}
    for number, name in enumerate(sorted(names)):
        out, inner = BLOCKS[family][name](hidden)
        rank = 3 if shares else draw(st.integers(1, 4))
        dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        alpha = 2.0 if shares else draw(st.sampled_from([None, 1.0, 4.0, 0.3]))
        modules[f"transformer.{name}"] = ModuleUpdate(
            "lora",
            {
                "A": noise(rank, inner, seed=0 if shares else number).to(torch.float32 if shares else dtype),
                "B": noise(out, rank, seed=number).to(torch.float32 if shares else dtype),
            },
            alpha=alpha,
            rslora=draw(st.booleans()) and not shares,
            bias=noise(out, seed=number) if draw(st.booleans()) else None,
        )
    return AdapterUpdates(modules, family=family)


@pytest.mark.parametrize("name", ["kohya-flux", "comfyui", "onetrainer", "diffusers"])
@settings(max_examples=25)
@given(updates=adapters())
def test_what_is_written_is_read_again(
    name: str, updates: AdapterUpdates, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if name == "diffusers":  # whose pipelines load no biases
        modules = {module: replace(update, bias=None) for module, update in updates.modules.items()}
        updates = replace(updates, modules=modules)
    path = tmp_path_factory.mktemp("written") / "a.safetensors"
    format_named(name).write(updates, path)
    again = read_updates(path)
    assert (again.format, again.family) == (name, updates.family)
    assert_equal(again, updates)


OTHER_KINDS: Mapping[str, Callable[[int, int, int], dict[str, Any]]] = {
    "loha": lambda out, inner, seed: {
        "w1_a": noise(out, 2, seed=seed), "w1_b": noise(2, inner, seed=seed),
        "w2_a": noise(out, 2, seed=seed + 50), "w2_b": noise(2, inner, seed=seed + 50),
    },
    "lokr": lambda out, inner, seed: {
        "w1": noise(2, 2, seed=seed), "w2_a": noise(out // 2, 1, seed=seed), "w2_b": noise(1, inner // 2, seed=seed),
    },
    "diff": lambda out, inner, seed: {"diff": noise(out, inner, seed=seed)},
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("name", ["kohya-flux", "comfyui", "onetrainer"])
def test_other_kinds_are_written_and_read_again(kind: Any, name: str, tmp_path: Path) -> None:
    modules = {}
    for number, (module, size) in enumerate(BLOCKS["flux1"].items()):
        factors = OTHER_KINDS[kind](*size(8), number)
        magnitude = (
            noise(size(8)[0], seed=number) if module.startswith(("single_transformer_blocks.0", "norm_out")) else None
        )
        modules[f"transformer.{module}"] = ModuleUpdate(kind, factors, alpha=0.5 + number, magnitude=magnitude)
    updates = AdapterUpdates(modules, family="flux1")
    format_named(name).write(updates, tmp_path / "a.safetensors")
    assert_equal(read_updates(tmp_path / "a.safetensors"), updates)


def test_separate_ranks_come_back_as_they_were(tmp_path: Path) -> None:
    names = ("to_q", "to_k", "to_v")
    modules = {
        f"transformer.transformer_blocks.0.attn.{name}": ModuleUpdate(
            "lora", {"A": noise(rank, 8, seed=rank), "B": noise(8, rank, seed=rank)}, alpha=1.0
        )
        for rank, name in enumerate(names, start=1)
    }
    updates = AdapterUpdates(modules, family="flux1")
    format_named("kohya-flux").write(updates, tmp_path / "a.safetensors")
    again = read_updates(tmp_path / "a.safetensors")
    assert [update.rank for update in again.modules.values()] == [1, 2, 3]
    assert_equal(again, updates)


def test_kohya_writes_flux_with_its_metadata(tmp_path: Path) -> None:
    from haori.core.safetensors_header import read_safetensors_header

    modules = {
        "transformer.transformer_blocks.0.attn.to_q": ModuleUpdate("lora", {"A": noise(2, 8), "B": noise(8, 2)}),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": ModuleUpdate("lora", {"A": noise(2, 4), "B": noise(9, 2)}),
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q": ModuleUpdate(
            "lora", {"A": noise(2, 6), "B": noise(7, 2)}
        ),
    }
    updates = AdapterUpdates(modules, family="flux1")
    format_named("kohya").write(updates, tmp_path / "a.safetensors")
    header = read_safetensors_header(tmp_path / "a.safetensors")
    assert header.metadata["ss_base_model_version"] == "flux1"
    assert header.metadata["modelspec.architecture"] == "flux-1-dev/lora"
    assert {key.partition(".")[0] for key in header.tensors} == {
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    }
    assert_equal(read_updates(tmp_path / "a.safetensors"), updates)


def test_comfyui_holds_stable_diffusion_xl_too(tmp_path: Path) -> None:
    from haori.core.safetensors_header import read_safetensors_header

    names = {
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k":
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
        "diffusion_model.label_emb.0.2": "unet.add_embedding.linear_2",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1":
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1":
            "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
    }  # fmt: skip
    modules = {
        name: ModuleUpdate("lora", {"A": noise(2, 2048, seed=at), "B": noise(8, 2, seed=at)}, alpha=1.0 + at)
        for at, name in enumerate(names.values())
    }
    format_named("comfyui").write(AdapterUpdates(modules), tmp_path / "a.safetensors")
    header = read_safetensors_header(tmp_path / "a.safetensors")
    assert {key.removesuffix(".alpha") for key in header.tensors if key.endswith(".alpha")} == set(names)
    again = read_updates(tmp_path / "a.safetensors")
    assert (again.format, again.family) == ("comfyui", "sdxl")
    assert_equal(again, AdapterUpdates(modules))


def test_parts_that_were_not_there_are_not_there_again(tmp_path: Path) -> None:
    import torch

    for kind, make in {**OTHER_KINDS, "lora": lambda out, inner, _: {"A": noise(2, inner), "B": noise(out, 2)}}.items():
        names = ("transformer_blocks.0.attn.to_k", "single_transformer_blocks.0.attn.to_v")
        modules: dict[str, ModuleUpdate] = {
            f"transformer.{name}": ModuleUpdate(kind, make(8, 8, 0))
            for name in names  # type: ignore[arg-type]
        }
        format_named("kohya").write(AdapterUpdates(modules, family="flux1"), tmp_path / "a.safetensors")
        assert set(read_updates(tmp_path / "a.safetensors").modules) == set(modules), kind
    fresh = {"A": noise(2, 8), "B": torch.zeros(8, 2)}  # before its first step, every module is still named
    modules = {f"transformer.transformer_blocks.0.attn.to_{part}": ModuleUpdate("lora", fresh) for part in "qkv"}
    format_named("kohya").write(AdapterUpdates(modules, family="flux1"), tmp_path / "a.safetensors")
    assert set(read_updates(tmp_path / "a.safetensors").modules) == set(modules)


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    import torch

    q, k = "transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_k"
    lora = ModuleUpdate("lora", {"A": noise(2, 8), "B": noise(8, 2)}, magnitude=torch.ones(8))
    kohya, path = format_named("kohya-flux"), tmp_path / "a.safetensors"
    with pytest.raises(InputError, match="only some of the modules"):
        kohya.write(AdapterUpdates({q: lora}, family="flux1"), path)
    loha = ModuleUpdate("loha", OTHER_KINDS["loha"](8, 8, 0))
    plain = ModuleUpdate("lora", {"A": noise(2, 8), "B": noise(8, 2)})
    with pytest.raises(InputError, match="kinds loha, lora"):
        kohya.write(AdapterUpdates({q: loha, k: plain}, family="flux1"), path)
    with pytest.raises(InputError, match=r"no name for the module 'transformer_blocks.0.attn.to_x'"):
        kohya.write(AdapterUpdates({f"{q[:-1]}x": plain}, family="flux1"), path)
    with pytest.raises(InputError, match="not told"):
        kohya.write(AdapterUpdates({"transformer.nothing": plain}), path)
    for name in ("xlabs", "fal", "omi"):
        with pytest.raises(InputError, match="not written"):
            format_named(name).write(AdapterUpdates({q: plain}, family="flux1"), path)
    assert not path.exists()
