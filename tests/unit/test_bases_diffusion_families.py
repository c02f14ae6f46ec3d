"""What each family of image bases adapts, reads of captions, and says of distilled bases; adapters learn on each."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.diffusion_pipelines import FAMILIES, saved

# Linear modules of one block, as trainers of the family adapt them, and how many blocks the tiny models have.
LINEAR: dict[str, tuple[set[str], int]] = {
    "sd15": ({"to_q", "to_k", "to_v", "to_out.0", "proj", "net.2", "proj_in", "proj_out"}, 4 * 12),
    "sdxl": ({"to_q", "to_k", "to_v", "to_out.0", "proj", "net.2", "proj_in", "proj_out"}, 4 * 12),
    "flux1": (
        {
            "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj", "net.2",
            "proj_mlp", "proj_out",
        },
        2 * 12 + 2 * 5,
    ),
    "flux2": (
        {
            "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "linear_in",
            "linear_out", "to_qkv_mlp_proj", "to_out",
        },
        2 * 12 + 2 * 2,
    ),
    "z_image": ({"to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"}, 2 * 7),
    "qwen_image": (
        {
            "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj", "net.2",
        },
        # Of the last block, four that write text which nothing reads are left out.
        2 * 12 - 4,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: Any, tmp_path_factory: Any) -> Any:
    from haori.bases import find_base

    return find_base(str(saved(FAMILIES[request.param](), tmp_path_factory.mktemp("family") / request.param)))


def ending(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def test_all_linear_means_what_trainers_of_the_family_adapt(base: Any) -> None:
    from haori.bases import load_skeleton, resolve_targets
    from haori.bases.diffusion import family_of

    skeleton: Any = load_skeleton(base)
    assert skeleton.family.name == family_of(base).name == base.name
    endings, count = LINEAR[base.name]
    found = resolve_targets(skeleton, "all-linear")
    assert {ending(name) for name in found} == endings
    assert len(found) == count
    assert not any("norm" in name or "mod" in name.replace("to_mod", "") for name in found)
    attention = resolve_targets(skeleton, "attention")
    assert set(attention) < set(found)
    assert all(".attn" in name or ".attention." in name for name in attention)
    for encoder in skeleton.family.text_encoders:
        text = resolve_targets(skeleton, encoder)
        assert all(name.startswith(f"{encoder}.") and "visual" not in name for name in text)
        assert text


def conditions(base: Any, captions: list[str]) -> dict[str, Any]:
    from haori.bases.diffusion import PictureSize, PipelineProcessor

    processor = PipelineProcessor(base)
    size = PictureSize((64, 48), (0, 8), (32, 32))
    tokens = {f"tokens_{name}": ids for name, ids in processor.tokens(captions).items()}
    return {**tokens, **processor.family.sizes([size] * len(captions))}


def noisy(base: Any, size: int = 32) -> dict[str, Any]:
    import torch

    from haori.bases.diffusion import family_of

    family = family_of(base)
    side = size // family.latent_factor
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, family.latent_channels, side, side, generator=generator)
    return {"noisy": latents, "timesteps": torch.tensor([100.0, 800.0])}


def test_an_adapter_learns_in_every_module_with_checkpointing_or_without(base: Any) -> None:
    import peft
    import torch

    from haori.bases import load_model, resolve_targets

    def gradients(checkpointing: bool) -> dict[str, Any]:
        model: Any = load_model(base, dtype="fp32", device="cpu")
        # What was initialised to zero, as modulation is, would hide what lies behind it.
        generator = torch.Generator().manual_seed(1)
        for weight in model.denoiser.parameters():
            if not weight.any():
                weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=resolve_targets(model, "all-linear"), init_lora_weights=False)
        adapted: Any = peft.get_peft_model(model, config).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        given = conditions(base, ["a red cat", "blue"])
        adapted(**noisy(base), **given).sample.square().mean().backward()
        return {name: weight.grad for name, weight in adapted.named_parameters() if weight.requires_grad}

    plain = gradients(False)
    assert [name for name, gradient in plain.items() if gradient is None or not gradient.any()] == []
    for name, gradient in gradients(True).items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


def test_states_that_are_cached_give_the_prediction_of_tokens(base: Any) -> None:
    """Each caption embedded alone and stacked, as a cache does it, is the same as all embedded together."""
    import torch

    from haori.bases import load_model
    from haori.bases.diffusion import PipelineProcessor

    model: Any = load_model(base, dtype="fp32", device="cpu")
    captions = ["a red cat", "blue with white dots"]
    encoders = PipelineProcessor(base).load_text_encoders("fp32", "cpu")
    processor = PipelineProcessor(base)
    with torch.no_grad():
        rows = [processor.family.embed(encoders, processor.tokens([caption])) for caption in captions]
        cached = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        given = conditions(base, captions)
        sizes = {name: value for name, value in given.items() if not name.startswith("tokens_")}
        together = model(**noisy(base), **given).sample
        torch.testing.assert_close(model(**noisy(base), **cached, **sizes).sample, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["sdxl", "flux1"], indirect=True)
def test_one_of_two_text_encoders_may_be_trained_and_the_other_cached(base: Any) -> None:
    import torch

    from haori.bases import load_model
    from haori.bases.diffusion import PipelineProcessor

    processor = PipelineProcessor(base)
    whole: Any = load_model(base, dtype="fp32", device="cpu")
    part: Any = load_model(base, dtype="fp32", device="cpu", components=(processor.family.denoiser, "text_encoder"))
    assert "text_encoder_2" not in dict(part.named_children())
    given = conditions(base, ["a red cat", "blue"])
    tokens = processor.tokens(["a red cat", "blue"])
    second = {name: ids for name, ids in tokens.items() if name.startswith("text_encoder_2")}
    with torch.no_grad():
        cached = processor.family.embed(whole.text_encoders, second)
        first = {name: value for name, value in given.items() if not name.startswith("tokens_text_encoder_2")}
        expected = whole(**noisy(base), **given).sample
        torch.testing.assert_close(part(**noisy(base), **first, **cached).sample, expected)


def test_what_is_cut_off_a_caption_is_what_the_encoder_does_not_read(base: Any) -> None:
    """Changing the end that is told to be cut changes no token; changing what stands before it does."""
    import torch

    from haori.bases.diffusion import PipelineProcessor

    processor = PipelineProcessor(base)
    assert processor.cut("a red cat") == ""
    caption = "abcde " * 200
    cut = processor.cut(caption)
    assert 0 < len(cut) < len(caption)
    assert caption.strip().endswith(cut)
    kept = caption.strip()[: -len(cut)]
    reader = "text_encoder_2" if base.name == "flux1" else "text_encoder"
    read = processor.tokens([caption])[reader]
    assert torch.equal(processor.tokens([kept + "z" * len(cut)])[reader][:, :-2], read[:, :-2])
    changed = kept.rstrip()[:-1] + "z" + cut
    assert not torch.equal(processor.tokens([changed])[reader], read)


def named(base: Any, folder: Path, name: str, **index: Any) -> Any:
    """Return the family of the same base under another name, with other entries in its index."""
    import shutil

    from haori.bases import find_base
    from haori.bases.diffusion import family_of

    shutil.copytree(base.path, folder / name)
    file = folder / name / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **index}))
    return family_of(find_base(str(folder / name)))


def test_a_distilled_base_is_told(base: Any, tmp_path: Path) -> None:
    assert named(base, tmp_path, "plain").distilled() is None
    said = named(base, tmp_path, f"{base.name}-Turbo-4steps").distilled()
    assert said is not None
    assert "distilled to few steps (its name says 'Turbo'); training on it undoes the distillation" in said
    assert "Train on" in said
    if base.name == "flux2":
        assert "its index says so" in named(base, tmp_path, "klein", is_distilled=True).distilled()


def test_schnell_and_lcm_are_told_by_their_configurations(tmp_path: Path) -> None:
    from haori.bases import find_base
    from haori.bases.diffusion import family_of
    from tests.diffusion_pipelines import flux1

    schnell = family_of(find_base(str(saved(flux1(guided=False), tmp_path / "flux"))))
    assert "reads no guidance scale, as schnell does" in str(schnell.distilled())
    lcm = FAMILIES["sd15"]()
    saved(lcm, tmp_path / "fast")
    index = tmp_path / "fast" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": ["diffusers", "LCMScheduler"]}))
    assert "its scheduler is LCMScheduler" in str(family_of(find_base(str(tmp_path / "fast"))).distilled())


def test_a_token_is_trained_in_every_text_encoder_that_reads_it_alike(base: Any, tmp_path: Path) -> None:
    """Both of SDXL have CLIP's vocabulary; of FLUX.1's, T5 has another, and only CLIP's row is trained."""
    import peft
    import torch

    from haori.adapters.insertion import Insertion
    from haori.adapters.methods import insert_method
    from haori.bases import load_model, resolve_targets
    from haori.bases.diffusion import PipelineProcessor
    from haori.core.methods import LoraMethod

    processor, model = PipelineProcessor(base), load_model(base, dtype="fp32", device="cpu")
    token = "cat</w>" if base.name in ("sd15", "sdxl", "flux1") else "Z"
    text = token.removesuffix("</w>")
    targets = resolve_targets(model, "attention")
    method = LoraMethod(rank=2, alpha=2.0, trainable_tokens=(text,))
    adapted: Any = insert_method(model, processor, method, targets, Insertion(seed=0, steps=1))  # type: ignore[arg-type]
    deltas = {name: weight for name, weight in adapted.named_parameters() if "trainable_tokens_delta" in name}
    encoders = {name.split(".")[2] for name in deltas}
    assert encoders == ({"text_encoder", "text_encoder_2"} if base.name == "sdxl" else {"text_encoder"})
    assert len(deltas) == len(encoders)
    given = {**noisy(base), **conditions(base, [f"a {text}", "a dog"])}
    with torch.no_grad():
        before = adapted(**given).sample
        for delta in deltas.values():
            delta.add_(torch.randn(delta.shape, generator=torch.Generator().manual_seed(1)))
        after = adapted(**given).sample
    moved = (after - before).abs().amax(dim=(1, 2, 3))
    assert moved[0] > 1e-6
    assert moved[1] == 0
    assert processor.convert_ids_to_tokens(processor(text, add_special_tokens=False)["input_ids"]) == [token]
    adapted.save_pretrained(tmp_path)
    again: Any = peft.PeftModel.from_pretrained(load_model(base, dtype="fp32", device="cpu"), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(**given).sample, after)


def test_nothing_of_a_prediction_is_tied_to_the_processor(base: Any) -> None:
    """On the meta device a tensor made elsewhere is an error; where masks are looked into, nothing runs there."""
    import torch

    from haori.bases import load_skeleton
    from haori.bases.diffusion import PictureSize

    if base.name in ("z_image", "qwen_image"):
        return
    skeleton: Any = load_skeleton(base)
    size = PictureSize((64, 48), (0, 8), (32, 32))
    with torch.device("meta"):
        latents = {name: value.to("meta") for name, value in noisy(base).items()}
        states = {
            "sd15": {"text_states": torch.empty(2, 77, 24)},
            "sdxl": {
                "text_states": torch.empty(2, 77, 8), "text_states_2": torch.empty(2, 77, 12),
                "pooled": torch.empty(2, 12),
            },
            "flux1": {"text_states": torch.empty(2, 9, 24), "pooled": torch.empty(2, 20)},
            "flux2": {"text_states": torch.empty(2, 9, 48)},
        }[base.name]  # fmt: skip
    sizes = {name: value.to("meta") for name, value in skeleton.family.sizes([size] * 2).items()}
    assert skeleton(**latents, **states, **sizes).sample.shape == latents["noisy"].shape


@pytest.mark.parametrize("mixed", [False, True])
def test_a_base_in_16_bits_predicts_nearly_the_same_and_is_trained(base: Any, mixed: bool) -> None:
    """As it is loaded by default: weights in bf16, adapters in fp32, with autocast or without."""
    import peft
    import torch

    from haori.bases import load_model, resolve_targets

    whole: Any = load_model(base, dtype="fp32", device="cpu")
    model: Any = load_model(base, dtype="bf16", device="cpu")
    given = {**noisy(base), **conditions(base, ["a red cat", "blue"])}
    adapted: Any = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=resolve_targets(model, ["all-linear", "text_encoder"]))
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        sample = adapted(**given).sample
    assert sample.dtype == torch.bfloat16
    with torch.no_grad():
        expected = whole(**given).sample
    assert (sample.float() - expected).norm() / expected.norm() < 0.05
    sample.float().square().mean().backward()
    gradients = [weight.grad for name, weight in adapted.named_parameters() if "lora_B" in name]
    found = [gradient for gradient in gradients if gradient is not None and gradient.any()]
    assert len(found) > len(gradients) // 2
    assert all(gradient.dtype == torch.float32 for gradient in found)
