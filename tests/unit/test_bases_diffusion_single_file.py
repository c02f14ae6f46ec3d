"""Single-file checkpoints: told by their headers, converted without a hub, every weight where it belongs."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from haori.core.errors import BaseError, FileFormatError
from tests.diffusion_pipelines import clip_encoder, clip_tokenizer, kl_autoencoder, saved, unet
from tests.original_names import checkpoint, write_checkpoint

DEEP: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "attention_head_dim": 2, "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
WIDE: dict[str, Any] = {
    "block_out_channels": (8, 16, 16), "norm_num_groups": 4, "attention_head_dim": 2, "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "use_linear_projection": True,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2), "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
}  # fmt: skip
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM: dict[str, Any] = {**BETAS, "steps_offset": 1, "clip_sample": False}


def pipeline(kind: str) -> Any:
    """Return a tiny pipeline of the widths by which a kind is told, and of the depths of its UNet."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    tokenizer = clip_tokenizer()
    vae = kl_autoencoder(
        block_out_channels=(4, 4, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    if kind != "sdxl":
        width, options = (768, {}) if kind == "sd15" else (1024, {"use_linear_projection": True})
        return StableDiffusionPipeline(
            unet=unet(width, **DEEP, **options), text_encoder=clip_encoder(tokenizer, width, num_hidden_layers=1),
            tokenizer=tokenizer, vae=vae, scheduler=DDIMScheduler(**DDIM), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    return StableDiffusionXLPipeline(
        unet=unet(2048, projection_class_embeddings_input_dim=6 * 4 + 1280, **WIDE), vae=vae, tokenizer=tokenizer,
        text_encoder=clip_encoder(tokenizer, 768, num_hidden_layers=1), tokenizer_2=clip_tokenizer(pad="!</w>"),
        text_encoder_2=clip_encoder(tokenizer, 1280, projection=True, seed=3, num_hidden_layers=1),
        scheduler=EulerDiscreteScheduler(**BETAS), add_watermarker=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pipelines() -> Callable[[str], Any]:
    made: dict[str, Any] = {}
    return lambda kind: made.setdefault(kind, pipeline(kind))


@pytest.fixture
def tiny(pipelines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return what writes a checkpoint, and sets configurations and vocabulary of its size in the place of real ones."""
    from haori.bases.diffusion import single_file

    monkeypatch.setattr(single_file, "clip_tokenizer", lambda pad: clip_tokenizer(pad if pad != "!" else "!</w>"))
    monkeypatch.setattr(single_file, "CONFIGS", tmp_path / "configs")

    def write(kind: str, name: str = "model", change: Any = None, **metadata: str) -> Path:
        folder = saved(pipelines(kind), tmp_path / "configs" / kind)
        for weights in folder.rglob("*.safetensors"):
            weights.unlink()
        for tokenizer in folder.glob("tokenizer*"):
            shutil.rmtree(tokenizer)
        weights = checkpoint(pipelines(kind), kind)
        return write_checkpoint(tmp_path / f"{name}.safetensors", change(weights) if change else weights, **metadata)

    return write


@pytest.mark.parametrize(("kind", "name"), [("sd15", "model"), ("sd2", "v2-1_768-ema-pruned"), ("sdxl", "illustrious")])
def test_every_weight_arrives_where_the_pipeline_had_it(
    tiny: Any, pipelines: Any, kind: str, name: str, haori_home: Path
) -> None:
    import torch

    from haori.bases import find_base, load_model
    from haori.bases.diffusion import PipelineProcessor, pipeline_of

    file = tiny(kind, name)
    base = find_base(str(file))
    stock = pipelines(kind)
    assert base.name == name
    assert base.source == f"checkpoint:{file}"
    assert base.pipeline == type(stock).__name__
    model: Any = load_model(base, dtype="fp32", device="cpu")
    assert model.family.name == kind
    made: Any = pipeline_of(base, dtype="fp32", device="cpu")
    for part in ("unet", "vae", *model.family.text_encoders):
        expected, found = stock.components[part].state_dict(), made.components[part].state_dict()
        assert set(found) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, msg=f"{part} {key}")
    expected = "v_prediction" if kind == "sd2" else "epsilon"
    assert PipelineProcessor(base).noising.kind == expected
    assert set(base.components) == {"unet", "vae", *model.family.text_encoders}
    again = find_base(str(file))
    assert again.reference() == base.reference()
    raw = file.read_bytes()
    hashes = base.reference().checkpoint
    assert hashes.sha256 == hashlib.sha256(raw).hexdigest()
    assert hashes.autov1 == hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]
    assert not list(base.path.glob("configs"))


def test_what_the_header_states_of_the_prediction_counts(tiny: Any, haori_home: Path) -> None:
    import torch

    from haori.bases import find_base
    from haori.bases.diffusion import PipelineProcessor

    stated = find_base(str(tiny("sd2", "stated", **{"modelspec.prediction_type": "epsilon"})))
    assert PipelineProcessor(stated).noising.kind == "epsilon"
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    noob = find_base(str(tiny("sd15", "noob", change=lambda weights: {**weights, **marks})))
    noising = PipelineProcessor(noob).noising
    assert noising.kind == "v_prediction"
    noise = torch.ones(1, 4, 2, 2)
    torch.testing.assert_close(noising.add(0 * noise, noise, torch.tensor([999.0])), noise)
    with pytest.raises(BaseError, match=r"neither its header nor its name says .* put 512 or 768 into its file name"):
        find_base(str(tiny("sd2", "unstated")))


def test_a_checkpoint_is_registered_under_a_name_and_outlives_its_file(tiny: Any, haori_home: Path) -> None:
    from haori.bases import add_base, find_base, remove_base

    file = tiny("sd15")
    base = add_base(str(file), name="mine")
    file.unlink()
    assert base.path.is_relative_to(haori_home / "bases")
    assert find_base("mine").reference() == base.reference()
    assert base.reference().checkpoint is not None
    remove_base("mine")
    assert not base.path.exists()


def without(prefix: str) -> Any:
    return lambda weights: {name: value for name, value in weights.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(("change", "said"), [
    (without("first_stage_model."), "lacks its autoencoder"),
    (without("cond_stage_model."), "lacks its text encoder"),
    (without("model.diffusion_model.input_blocks.1.1"), r"weights of its unet, and the family's bases have"),
    (without("cond_stage_model.transformer.text_model.encoder.layers.0.mlp"), "weights of its text_encoder, and the"),
    (without("model.diffusion_model."), "is no checkpoint of Stable Diffusion 1, 2 or XL"),
])  # fmt: skip
def test_a_checkpoint_without_a_part_is_refused(tiny: Any, change: Any, said: str, haori_home: Path) -> None:
    from haori.bases import find_base

    with pytest.raises((BaseError, FileFormatError), match=said):
        find_base(str(tiny("sd15", change=change)))
    assert not list((haori_home / "cache").rglob("model_index.json")), "nothing half converted is left"


def test_damaged_weights_are_refused_by_name(tiny: Any, haori_home: Path) -> None:
    from haori.bases import find_base

    def damaged(weights: dict[str, Any]) -> dict[str, Any]:
        weights["model.diffusion_model.out.2.weight"][0, 0, 0, 0] = float("nan")
        return weights

    def with_copy(weights: dict[str, Any]) -> dict[str, Any]:
        return damaged({name: value.clone() for name, value in weights.items()})

    with pytest.raises(FileFormatError, match=r"NaN or infinity in 'conv_out.weight' of its unet"):
        find_base(str(tiny("sd15", change=with_copy)))


def test_what_no_part_reads_is_named(tiny: Any, haori_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from haori.bases import find_base

    leftovers = ("model_ema.diffusion_modelout2weight", "betas", "sqrt_alphas_cumprod", "first_stage_model.loss.logvar")
    for names, said in ((leftovers, False), (("control_model.input_hint_block.0.weight", *leftovers), True)):
        extra = {name: torch.zeros(2) for name in names}
        find_base(str(tiny("sd15", f"extra{len(names)}", change=lambda weights, extra=extra: {**weights, **extra})))
        line = "1 weights belong to none of its parts and are left out, such as control_model.input_hint_block.0.weight"
        assert (line in " ".join(capsys.readouterr().err.split())) == said


def file_of(path: Path, *names: str, shape: tuple[int, ...] = (2, 2), dtype: Any = None) -> str:
    import torch

    return str(write_checkpoint(path, {name: torch.zeros(shape, dtype=dtype) for name in names}))


def test_files_that_are_no_checkpoint_are_told_what_they_are(tmp_path: Path, haori_home: Path) -> None:
    import torch

    from haori.bases import find_base

    file = tmp_path / "x.safetensors"
    context = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    cases: list[tuple[Callable[[], str], str]] = [
        (lambda: file_of(file, "lora_unet_down_blocks_0.lora_up.weight"), "holds an adapter .* `haori library add`"),
        (lambda: file_of(file, "unet.to_q.lora.up.weight"), "holds an adapter"),
        (lambda: file_of(file, "double_blocks.0.img_attn.qkv.weight"), "holds the transformer of FLUX; its text enc"),
        (lambda: file_of(file, "conv_in.weight"), "is no checkpoint of Stable Diffusion 1, 2 or XL"),
    ]
    for write, said in cases:
        with pytest.raises(BaseError, match=said):
            find_base(write())
    first = "model.diffusion_model.input_blocks.0.0.weight"
    for channels, dtype, said in (
        (9, None, "reads 9 channels, such as those for inpainting"),
        (4, torch.float8_e4m3fn, "stored in F8_E4M3; give the checkpoint in 16 or 32 bits"),
    ):
        write_checkpoint(file, {context: torch.zeros(8, 768), first: torch.zeros(8, channels, 3, 3, dtype=dtype)})
        with pytest.raises(BaseError, match=said):
            find_base(str(file))
    pickle = tmp_path / "old.ckpt"
    torch.save({"state_dict": {}}, pickle)
    with pytest.raises(FileFormatError, match=r"pickles can run code.*convert-pickle"):
        find_base(str(pickle))
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-10])
    with pytest.raises(FileFormatError):
        find_base(str(tmp_path / "cut.safetensors"))
    with pytest.raises(BaseError, match=r"no folder or file 'gone.safetensors'; check the path"):
        find_base("gone.safetensors")


# Weights that the model cards and papers of the bases state or that everybody counts in them.
PARAMETERS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", PARAMETERS)
def test_the_shipped_configurations_build_models_of_the_published_sizes(kind: str) -> None:
    import diffusers
    import torch
    import transformers

    from haori.bases.diffusion.single_file import CONFIGS

    found = {}
    for file in sorted((CONFIGS / kind).glob("*/config.json")):
        config = json.loads(file.read_text())
        with torch.device("meta"):
            if "architectures" in config:
                reader: Any = getattr(transformers, config["architectures"][0])
                model = reader(reader.config_class.from_pretrained(file.parent))
            else:
                model = getattr(diffusers, config["_class_name"]).from_config(config)
        found[file.parent.name] = sum(weight.numel() for weight in model.parameters())
    assert found == PARAMETERS[kind]


def test_the_vocabulary_is_built_as_clip_publishes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its places are known: `!` is 0, `a` ending a word 320, the first merge 512, start and end 49406 and 49407."""
    import gzip
    import itertools
    import zipfile

    from haori.bases.diffusion import clip_vocabulary

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [chr(code) for code in range(0xC0, 0x100)]
    ends = [f"{letter}</w>" for letter in letters]
    pairs = [("i", "n"), ("t", "h"), ("a", "n</w>")]
    taken = {"".join(pair) for pair in pairs}
    others = ((*pair, "".join(pair)) for pair in itertools.product(letters, letters + ends))
    pairs += [(first, second) for first, second, word in others if word not in taken]
    triples = ((first + second, third) for first, second in pairs[:1500] for third in ends if "</w>" not in second)
    pairs += [pair for pair in triples if "".join(pair) not in taken][: 48894 - len(pairs)]
    assert len(pairs) == 48894
    text = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in pairs) + "\nnot used\n"
    wheel = tmp_path / "open_clip.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("open_clip/bpe_simple_vocab_16e6.txt.gz", gzip.compress(text.encode()))
    monkeypatch.setattr(clip_vocabulary, "download", lambda *given, **named: wheel)
    tokenizer = clip_vocabulary.clip_tokenizer("!")
    assert len(tokenizer) == 49408
    assert tokenizer("a")["input_ids"] == [49406, 320, 49407]
    assert tokenizer.convert_tokens_to_ids(["!", "in", "th"]) == [0, 512, 513]
    padded = tokenizer("A", padding="max_length")["input_ids"]
    assert padded == [49406, 320, 49407] + [0] * 74
    assert clip_vocabulary.clip_tokenizer("<|endoftext|>").pad_token_id == 49407
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("open_clip/other.txt", b"")
    with pytest.raises(FileFormatError, match="does not hold CLIP's merges"):
        clip_vocabulary.clip_tokenizer("!")


# Modules that kohya's sd-scripts report for a LoRA of each base, known from every log of theirs.
ADAPTED = {"sd15": (192, 72), "sd2": (192, 138), "sdxl": (722, 72 + 192)}


@pytest.mark.parametrize("kind", ADAPTED)
def test_targets_are_as_many_as_kohya_adapts(kind: str) -> None:
    """Text encoders of OpenCLIP lack there the last layer, which is not read: 23 of six modules each."""
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from haori.bases import resolve_targets
    from haori.bases.diffusion import DiffusionModel, noising_of
    from haori.bases.diffusion.configs import Part, PipelineConfigs
    from haori.bases.diffusion.families.stable_diffusion import StableDiffusion
    from haori.bases.diffusion.families.stable_diffusion_xl import StableDiffusionXL
    from haori.bases.diffusion.single_file import CONFIGS

    parts, components = {}, {}
    for file in sorted((CONFIGS / kind).glob("*/config.json")):
        config, name = json.loads(file.read_text()), file.parent.name
        parts[name] = Part("", "", file.parent, config)
        with torch.device("meta"):
            if name == "unet":
                from diffusers import UNet2DConditionModel

                components[name] = UNet2DConditionModel.from_config(config)
            elif name != "vae":
                reader: Any = CLIPTextModelWithProjection if name.endswith("2") else CLIPTextModel
                components[name] = reader(reader.config_class.from_pretrained(file.parent))
    parts |= {name: Part("", "", CONFIGS, {}) for name in ("tokenizer", "tokenizer_2")}
    family: Any = (StableDiffusionXL if kind == "sdxl" else StableDiffusion)(PipelineConfigs(kind, "", {}, parts))
    model = DiffusionModel(family, noising_of({}), components)
    text = sum(len(resolve_targets(model, name)) for name in family.text_encoders)
    assert (len(resolve_targets(model, "all-linear")), text) == ADAPTED[kind]
    assert family.name == kind
