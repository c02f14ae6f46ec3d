"""`haori compare` on pictures: LoRA, full fine-tuning and DreamBooth on a tiny pipeline, a process for each run."""

import json
from pathlib import Path

import pytest

from tests.command_line import haori
from tests.diffusion_pipelines import saved, stable_diffusion
from tests.pictures import picture_folder

RECIPE = """
name: cat
task: text_to_image
base: {base}
data: {{path: {data}, resolution: 32, validation_share: 0.3}}
method: {{kind: lora, rank: 4, alpha: 4}}
optimizer: {{lr: {lr}}}
training: {{epochs: 2, batch_size: 4, dtype: fp32, evaluations_per_epoch: 1}}
samples: {{prompts: []}}
"""


def test_methods_are_compared_by_loss_memory_time_and_drift(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = saved(stable_diffusion(), tmp_path / "tiny")
    picture_folder(tmp_path / "pictures", 10, size=(32, 32))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(base=base, data=tmp_path / "pictures", lr=0.002))
    arguments = ("compare", tmp_path / "recipe.yaml", "--methods", "lora,full,dreambooth", "--seeds", 1)
    done = haori(capsys, *arguments, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    methods = {result["method"]: result for result in found["methods"]}
    assert list(methods) == ["base", "lora", "full", "dreambooth"]
    for name, result in methods.items():
        assert 0 < result["scores"]["prediction_loss"]["low"] <= result["scores"]["prediction_loss"]["high"]
        if name == "base":
            continue
        against = result["scores"]["prediction_loss"]["against"]["base"]
        assert against["value"] < 0 and against["low"] < against["high"], "held-out pictures are predicted better"
        drift = result["forgetting"]["shipped"]
        assert drift["whole"]["before"] == 0 and 0 < drift["whole"]["low"] < drift["whole"]["after"] < 1
        assert set(drift["kinds"]) == {"things", "places", "living things", "nothing"}
        assert result["cost"]["peak_memory_bytes"] > 0 and result["cost"]["seconds"] > 0
    trained = {name: methods[name]["cost"]["trainable_parameters"] for name in methods if name != "base"}
    assert trained["lora"] < trained["full"] < trained["dreambooth"]
    assert methods["lora"]["cost"]["size_bytes"] < methods["full"]["cost"]["size_bytes"]
    page = (tmp_path / "out" / "comparison.html").read_text()
    for said in ("DreamBooth", "Drift: distance of predictions", "pixels/s", "UNet2DConditionModel"):
        assert said in page
    assert "nats" not in page and "tokens/s" not in page
    assert "drift" in done.out and "Loss of the prediction" in done.out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--test", "more"), "pictures are scored on those held out"),
        (("--general", "mine.txt"), "has no meaning for pictures"),
        (("--methods", "dreambooht"), "dreambooth"),
    ],
)
def test_what_cannot_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: tuple[str, str], said: str
) -> None:
    base = saved(stable_diffusion(), tmp_path / "tiny")
    picture_folder(tmp_path / "pictures", 6, size=(32, 32))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(base=base, data=tmp_path / "pictures", lr="auto"))
    done = haori(capsys, "compare", tmp_path / "recipe.yaml", *given, "--out", tmp_path / "out")
    assert done.code != 0 and said in done.err
    assert not (tmp_path / "out").exists()
