"""The family of an adapter's base: shapes first, then modules, then what the header says."""

import pytest
import torch

from haori.library.families import FAMILY_TITLES, family_of, stated_family, tell_family
from haori.library.updates import AdapterUpdates, ModuleUpdate

K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def update(out: int, inner: int, *kernel: int) -> ModuleUpdate:
    a, b = torch.zeros(1, inner, *kernel), torch.zeros(out, 1, *[1] * len(kernel))
    return ModuleUpdate("lora", {"A": a, "B": b})


def adapter(modules: dict[str, ModuleUpdate], **metadata: str) -> AdapterUpdates:
    return AdapterUpdates(modules, metadata)


@pytest.mark.parametrize(("width", "family"), [(768, "sd15"), (1024, "sd2"), (2048, "sdxl")])
def test_cross_attention_tells_unets_apart_and_counts_before_the_header(width: int, family: str) -> None:
    found = tell_family(adapter({K: update(320, width)}))
    assert found == (family, "shapes", None)
    loha = {f"w{n}_a": torch.zeros(320, 2) for n in (1, 2)} | {f"w{n}_b": torch.zeros(2, width) for n in (1, 2)}
    assert family_of(adapter({K: ModuleUpdate("loha", loha)})) == family
    other = "sdxl_base_v1-0" if family != "sdxl" else "sd_v1"
    contradicted = tell_family(adapter({K: update(320, width)}, ss_base_model_version=other))
    assert contradicted.name == family
    assert contradicted.contradiction is not None
    assert other in contradicted.contradiction and FAMILY_TITLES[family] in contradicted.contradiction


@pytest.mark.parametrize(
    ("modules", "family"),
    [
        ({"unet.down_blocks.0.attentions.0.proj_in": update(320, 320, 1, 1)}, "sd15"),
        ({"unet.down_blocks.0.attentions.0.proj_in": update(320, 320)}, "sd2"),
        ({"unet.up_blocks.0.attentions.0.proj_in": update(1280, 1280)}, "sdxl"),
        ({"unet.mid_block.attentions.0.transformer_blocks.9.attn1.to_q": update(1280, 1280)}, "sdxl"),
        ({"text_encoder_2.text_model.encoder.layers.0.mlp.fc1": update(5120, 1280)}, "sdxl"),
        ({"text_encoder.text_model.encoder.layers.0.mlp.fc1": update(4096, 1024)}, "sd2"),
        ({"text_encoder.text_model.encoder.layers.0.mlp.fc1": update(3072, 768)}, None),
        ({"unet.down_blocks.2.resnets.0.conv1": update(8, 8, 3, 3)}, None),
        ({"transformer.single_transformer_blocks.0.attn.to_q": update(3072, 3072)}, "flux1"),
        ({"transformer.single_transformer_blocks.0.proj_mlp": update(12288, 3072)}, "flux1"),
        ({"transformer.transformer_blocks.0.ff.net.0.proj": update(12288, 3072)}, "flux1"),
        ({"transformer.transformer_blocks.0.attn.to_q": update(3072, 3072)}, "flux1"),
        ({"transformer.transformer_blocks.0.attn.to_q": update(6144, 6144)}, "flux2"),
        ({"transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj": update(27648, 3072)}, "flux2"),
        ({"transformer.transformer_blocks.7.ff.linear_in": update(36864, 6144)}, "flux2"),
        ({"transformer.transformer_blocks.59.attn.to_q": update(3072, 3072)}, "qwen_image"),
        ({"transformer.transformer_blocks.0.img_mlp.net.0.proj": update(12288, 3072)}, "qwen_image"),
        ({"transformer.layers.0.attention.to_q": update(3840, 3840)}, "z_image"),
        ({"transformer.transformer_blocks.0.attn.to_q": update(1536, 1536)}, "sd3"),
        ({"model.model.layers.0.self_attn.q_proj": update(768, 768)}, None),
    ],
)  # fmt: skip
def test_modules_tell_where_no_text_width_does(modules: dict[str, ModuleUpdate], family: str | None) -> None:
    assert family_of(adapter(modules)) == family


@pytest.mark.parametrize(
    ("key", "value", "family"),
    [
        ("ss_base_model_version", "sd_v1", "sd15"),
        ("ss_base_model_version", "sd_v2_v", "sd2"),
        ("ss_base_model_version", "sdxl_base_v1-0", "sdxl"),
        ("ss_base_model_version", "sd_1.5", "sd15"),
        ("ss_base_model_version", "flux1", "flux1"),
        ("ss_base_model_version", "flux2_klein_4b", "flux2"),
        ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora", "sdxl"),
        ("modelspec.architecture", "stable-diffusion-v1/lora", "sd15"),
        ("modelspec.architecture", "flux-1-schnell/lora", "flux1"),
        ("modelspec.architecture", "Flux.1-dev/lora", "flux1"),
        ("modelspec.architecture", "qwen-image/lora", "qwen_image"),
        ("ss_base_model_version", "pixart", None),
    ],
)
def test_what_headers_say(key: str, value: str, family: str | None) -> None:
    assert stated_family({key: value}) == family
    untold = adapter({"unet.down_blocks.2.resnets.0.conv1": update(8, 8, 3, 3)}, **{key: value})
    assert tell_family(untold) == (family, "header" if family else "", None)


def test_the_naming_of_the_file_counts_before_its_header() -> None:
    untold = adapter({"unet.down_blocks.2.resnets.0.conv1": update(8, 8, 3, 3)}, ss_base_model_version="sd_v1")
    found = tell_family(untold, likely="sdxl")
    assert found.name == "sdxl" and "sd_v1" in str(found.contradiction)
