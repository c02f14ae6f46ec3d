"""Image bases: one model of components, what a recipe's targets mean in it, adapters of PEFT over it, its errors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from haori.core.errors import BaseError, InputError
from tests.diffusion_pipelines import saved, stable_diffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return saved(stable_diffusion(), tmp_path_factory.mktemp("sd") / "tiny")


@pytest.fixture(scope="module")
def base(folder: Path) -> Any:
    from haori.bases import find_base

    return find_base(str(folder))


def loaded(base: Any, **options: Any) -> Any:
    from haori.bases import load_model

    return load_model(base, dtype="fp32", device="cpu", **options)


def inputs(base: Any, *, trained: bool = False) -> dict[str, Any]:
    """Return random arguments of the forward, with token ids for a trained text encoder or random states."""
    import torch

    from haori.bases.diffusion import PipelineProcessor

    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    if trained:
        text = {f"tokens_{name}": ids for name, ids in PipelineProcessor(base).tokens(["a cat", "red"]).items()}
    else:
        text = {"text_states": torch.randn(2, 77, 24, generator=generator)}
    return {"noisy": noisy, "timesteps": torch.tensor([10.0, 900.0]), **text}


def test_the_model_and_its_skeleton_have_the_names_of_the_components(base: Any) -> None:
    from haori.bases import load_skeleton

    model, skeleton = loaded(base), load_skeleton(base)
    assert [name for name, _ in model.named_children()] == ["unet", "text_encoder"]
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    assert {name: weight.shape for name, weight in skeleton.named_parameters()} == shapes
    assert all(weight.is_meta for weight in skeleton.parameters())
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert [name for name, _ in loaded(base, components=("unet",)).named_children()] == ["unet"]


def test_weights_and_dtype_are_those_of_the_files(base: Any, folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from haori.bases import load_model

    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    model: Any = load_model(base, dtype="bf16", device="cpu")
    held = model.unet.state_dict()
    assert set(stored) == set(held)
    assert all(torch.equal(value.bfloat16(), held[name]) for name, value in stored.items())
    assert model(**inputs(base)).sample.dtype == torch.bfloat16


def test_targets_mean_what_people_who_train_with_diffusers_expect(base: Any) -> None:
    from haori.bases import load_skeleton, resolve_targets

    skeleton: Any = load_skeleton(base)
    linear = resolve_targets(skeleton, "all-linear")
    # Per block of attention: q, k, v, out twice, two of the feed-forward, the way in and the way out.
    blocks = [name for name, module in skeleton.named_modules() if type(module).__name__ == "Transformer2DModel"]
    assert len(blocks) == 4 - 1 + 1
    assert len(linear) == len(blocks) * (2 * 4 + 2 + 2)
    assert all(name.startswith(tuple(f"{block}." for block in blocks)) for name in linear)
    assert resolve_targets(skeleton, "unet") == linear
    attention = resolve_targets(skeleton, "attention")
    assert {name.rpartition("attn")[2][2:] for name in attention} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert len(attention) == len(blocks) * 8
    text = resolve_targets(skeleton, "text_encoder")
    assert {name.rpartition(".")[2] for name in text} == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert len(text) == 2 * 6
    convolutions = resolve_targets(skeleton, "convolutions")
    assert {"conv1", "conv2", "conv_shortcut", "conv"} == {name.rpartition(".")[2] for name in convolutions}
    assert not set(convolutions) & set(linear)
    assert set(resolve_targets(skeleton, ["attention", "text_encoder"])) == {*attention, *text}
    assert resolve_targets(skeleton, "to_q") == [name for name in attention if name.endswith("to_q")]


def test_a_target_of_nothing_names_what_there_is(base: Any) -> None:
    from haori.bases import load_skeleton, resolve_targets

    with pytest.raises(InputError, match=r"no module 'text_encoder'; .*linear modules are: .*to_q"):
        resolve_targets(load_skeleton(base, components=("unet",)), "text_encoder")


METHODS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "lora": ("LoraConfig", {"r": 2}, ["attention"]),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True}, ["attention"]),
    "locon": ("LoraConfig", {"r": 2}, ["all-linear", "convolutions"]),
    "lokr": ("LoKrConfig", {"r": 2}, ["all-linear", "convolutions"]),
    "loha": ("LoHaConfig", {"r": 2}, ["all-linear", "convolutions"]),
    "both": ("LoraConfig", {"r": 2}, ["attention", "text_encoder"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_peft_learns_is_saved_and_gives_the_same_again(base: Any, method: str, tmp_path: Path) -> None:
    import peft
    import torch

    from haori.bases import resolve_targets

    kind, options, targets = METHODS[method]
    model = loaded(base)
    trained = "text_encoder" in targets
    given = inputs(base, trained=trained)
    before = model(**given).sample
    config = getattr(peft, kind)(target_modules=resolve_targets(model, targets), **options)
    torch.manual_seed(0)
    adapted: Any = peft.get_peft_model(model, config)
    adapted(**given).sample.square().mean().backward()
    learning = [name for name, weight in adapted.named_parameters() if weight.grad is not None and weight.grad.any()]
    assert any(".text_encoder." in name for name in learning) == trained
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape))
        after = adapted(**given).sample
    assert (after - before).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    keys = set(peft.load_peft_weights(str(tmp_path)))
    assert any(key.startswith("base_model.model.unet.down_blocks.0.attentions.0.") for key in keys)
    again: Any = peft.PeftModel.from_pretrained(loaded(base), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(**given).sample, after)


def test_tokens_of_the_text_encoder_can_be_trained(base: Any) -> None:
    import peft
    import torch

    from haori.bases.diffusion import PipelineProcessor

    token = PipelineProcessor(base)("cat", add_special_tokens=False)["input_ids"]
    assert len(token) == 1
    adapted: Any = peft.get_peft_model(
        loaded(base), peft.LoraConfig(r=2, target_modules=["to_q"], trainable_token_indices=token)
    )
    given = inputs(base, trained=True)
    adapted(**given).sample.square().mean().backward()
    [delta] = [weight for name, weight in adapted.named_parameters() if "trainable_tokens_delta" in name]
    assert delta.shape == (1, 24)
    assert delta.grad is not None
    assert delta.grad.any()
    with torch.no_grad():
        before = adapted(**given).sample
        delta.copy_(torch.randn(delta.shape, generator=torch.Generator().manual_seed(1)))
        moved = (adapted(**given).sample - before).abs().amax(dim=(1, 2, 3))
    assert moved[0] > 1e-4, "the caption with the token"
    assert moved[1] == 0, "the caption without"


def test_activation_checkpointing_gives_the_same_gradients(base: Any) -> None:
    import peft
    import torch

    def gradients(checkpointing: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        model = loaded(base)
        adapted: Any = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["to_q", "q_proj"], init_lora_weights=False)
        ).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            assert model.unet.is_gradient_checkpointing
            assert model.text_encoder.is_gradient_checkpointing
        adapted(**inputs(base, trained=True)).sample.square().mean().backward()
        return {name: weight.grad for name, weight in adapted.named_parameters() if weight.requires_grad}

    plain, sparing = gradients(False), gradients(True)
    assert set(plain) == set(sparing)
    for name, gradient in plain.items():
        torch.testing.assert_close(sparing[name], gradient, msg=name)


def test_tokens_for_an_encoder_that_is_not_loaded_are_refused(base: Any) -> None:
    with pytest.raises(InputError, match="'text_encoder', which is not loaded; loaded are unet"):
        loaded(base, components=("unet",))(**inputs(base, trained=True))


def test_what_is_cut_off_a_caption_is_told(base: Any) -> None:
    from haori.bases.diffusion import PipelineProcessor

    processor = PipelineProcessor(base)
    assert processor.cut("a red cat") == ""
    # 75 tokens fit between the start and the end: each letter of these words is one.
    assert processor.cut(" ".join(["abcde"] * 15)) == ""
    assert processor.cut(" ".join(["abcde"] * 15 + ["Red"])) == "Red"
    ids = processor.tokens(["cat", " ".join(["abcde"] * 20)])["text_encoder"]
    assert ids.shape == (2, 77)
    assert processor.native_size == 32
    assert processor.size_multiple == 4


def broken(folder: Path, into: Path, **index: Any) -> Any:
    from haori.bases import find_base

    shutil.copytree(folder, into)
    file = into / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **index}))
    return find_base(str(into))


def test_a_pipeline_of_no_family_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    from haori.bases import load_skeleton

    base = broken(folder, tmp_path / "other", _class_name="PixArtAlphaPipeline")
    with pytest.raises(BaseError, match=r"PixArtAlphaPipeline, which belongs to no family .*StableDiffusionPipeline"):
        load_skeleton(base)


def test_a_missing_component_is_named(folder: Path, tmp_path: Path) -> None:
    base = broken(folder, tmp_path / "part", text_encoder=[None, None])
    with pytest.raises(BaseError, match=r"StableDiffusionPipeline\) lacks its part 'text_encoder'; it has scheduler"):
        loaded(base)


def test_weights_that_are_missing_are_named(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from haori.bases import find_base

    shutil.copytree(folder, tmp_path / "less")
    file = tmp_path / "less" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(BaseError, match=r"'unet' in 'less' lack 1 of its weights, such as 'conv_in.weight'"):
        loaded(find_base(str(tmp_path / "less")))


def test_a_class_of_another_library_is_not_run(folder: Path, tmp_path: Path) -> None:
    base = broken(folder, tmp_path / "own", text_encoder=["shutil", "rmtree"])
    with pytest.raises(BaseError, match=r"read by shutil\.rmtree; only classes of diffusers and transformers"):
        loaded(base)


def test_weights_held_only_as_a_variant_are_loaded(folder: Path, tmp_path: Path) -> None:
    from haori.bases import find_base

    shutil.copytree(folder, tmp_path / "half")
    for file in (tmp_path / "half").rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    assert loaded(find_base(str(tmp_path / "half"))).unet.config.in_channels == 4


def test_a_text_base_is_refused(tiny_base_folder: Path) -> None:
    from haori.bases import find_base
    from haori.bases.diffusion import PipelineProcessor

    tiny_base = find_base(str(tiny_base_folder))
    with pytest.raises(BaseError, match=r"is one model \(.*\), no pipeline for pictures"):
        PipelineProcessor(tiny_base)


def test_a_tokenizer_that_states_no_length_reads_what_the_encoder_has_positions_for(folder: Path, tmp_path: Path):
    from haori.bases import find_base
    from haori.bases.diffusion import PipelineProcessor

    into = shutil.copytree(folder, tmp_path / "endless")
    path = into / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("model_max_length") == 77
    path.write_text(json.dumps(settings))
    processor = PipelineProcessor(find_base(str(into)))
    assert processor.tokens(["a red cat"])["text_encoder"].shape == (1, 77)
    assert processor.cut("cat " * 100).count("cat") == 25
