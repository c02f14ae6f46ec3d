"""A run on a tiny pipeline with its text encoder: proved, stored, exported with a header that says how it was made."""

import json
from pathlib import Path
from typing import Any

import pytest

from haori.core.safetensors_header import read_safetensors_header
from haori.library import Library
from tests.command_line import haori
from tests.diffusion_pipelines import saved, stable_diffusion
from tests.picture_adapters import drawn
from tests.pictures import picture_folder

RECIPE = """
name: cat
task: text_to_image
base: {base}
data: {{path: {data}, trigger: zkz, resolution: 32, caption_dropout: 0.1}}
method: {{kind: lora, rank: 4, alpha: 2}}
optimizer: {{lr: 0.002}}
training: {{epochs: 2, batch_size: 4, text_encoder: true, dtype: fp32, seed: 3}}
noise: {{min_snr_gamma: 5, offset: 0.05}}
samples: {{prompts: []}}
"""


@pytest.fixture
def trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    base = saved(stable_diffusion(), tmp_path / "tiny")
    picture_folder(tmp_path / "pictures", 8, size=(32, 32))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(base=base, data=tmp_path / "pictures"))
    done = haori(capsys, "train", tmp_path / "recipe.yaml")
    assert done.code == 0, done.err
    return Library().get("cat")


def test_a_run_ends_in_files_for_others_that_say_what_they_are(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import DiffusionPipeline

    card = trained.card
    assert card.components == ("text_encoder", "unet") and card.base.family == "sd15"
    assert {"effect of text_encoder", "delta of unet", "merge"} <= {check.name for check in card.verification.checks}
    assert haori(capsys, "library", "verify", "cat").code == 0
    Library().update("cat", licence="CC-BY-4.0", recommended_strength=0.8)
    unet = card.base.components["unet"].weights
    pictures = []
    for wanted in ("kohya", "diffusers"):
        done = haori(
            capsys, "library", "export", "cat", "--out", tmp_path / f"{wanted}.safetensors", "--format", wanted
        )
        assert done.code == 0, done.err
        header = read_safetensors_header(tmp_path / f"{wanted}.safetensors").metadata
        expected = {
            "ss_base_model_version": "sd_v1", "ss_sd_model_name": "tiny", "ss_resolution": "(32, 32)",
            "ss_num_train_images": "7", "ss_num_epochs": "2", "ss_epoch": "2", "ss_steps": "4", "ss_seed": "3",
            "ss_unet_lr": "0.002", "ss_learning_rate": "0.002", "ss_text_encoder_lr": "0.001",
            "ss_min_snr_gamma": "5.0", "ss_noise_offset": "0.05", "ss_caption_dropout_rate": "0.1",
            "ss_lr_scheduler": "cosine", "ss_output_name": wanted, "haori_recommended_strength": "0.8",
            "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.license": "CC-BY-4.0",
            "modelspec.trigger_phrase": "zkz", "modelspec.resolution": "32x32",
            "modelspec.prediction_type": "epsilon", "ss_v2": "False", "ss_zero_terminal_snr": "False",
            "modelspec.usage_hint": "Use it at strength 0.8 with zkz in the prompt.",
        }  # fmt: skip
        assert {key: header.get(key) for key in expected} == expected
        assert json.loads(header["haori_base"])["weights"]["unet"] == unet
        assert "adapter_config" not in header and str(tmp_path) not in json.dumps(header)
        assert ("ss_network_dim" in header) == (wanted == "kohya")
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "tiny", safety_checker=None, local_files_only=True)
        bare = drawn(pipe)
        pipe.load_lora_weights(str(tmp_path), weight_name=f"{wanted}.safetensors")
        pictures.append(drawn(pipe))
    effect = (pictures[0] - bare).norm()
    assert effect > 0.01 * bare.norm() and (pictures[0] - pictures[1]).norm() < 1e-3 * effect
    header = read_safetensors_header(tmp_path / "kohya.safetensors").metadata
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "2.0")
    assert "recommended strength" in haori(capsys, "library", "show", "cat").out


@pytest.mark.parametrize("text_encoder", [False, True])
def test_a_full_fine_tuning_is_a_pipeline_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text_encoder: bool
) -> None:
    from diffusers import DiffusionPipeline

    from haori.bases import find_base

    base = saved(stable_diffusion(), tmp_path / "tiny")
    picture_folder(tmp_path / "pictures", 6, size=(32, 32))
    text = RECIPE.format(base=base, data=tmp_path / "pictures").replace("kind: lora, rank: 4, alpha: 2", "kind: full")
    (tmp_path / "recipe.yaml").write_text(text.replace("text_encoder: true", f"text_encoder: {text_encoder}".lower()))
    done = haori(capsys, "train", tmp_path / "recipe.yaml", "--out", tmp_path / "model")
    assert done.code == 0, done.err
    changed = {
        name for name, part in find_base(str(tmp_path / "model")).components.items()
        if part.fingerprint.weights != find_base(str(base)).components[name].fingerprint.weights
    }  # fmt: skip
    assert changed == ({"unet", "text_encoder"} if text_encoder else {"unet"})
    loaded = [
        DiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
        for folder in (base, tmp_path / "model")
    ]
    bare, trained = map(drawn, loaded)
    assert (trained - bare).norm() > 0.01 * bare.norm()
