"""`haori evaluate` on an adapter for pictures of a tiny pipeline, looked at by a network made for the test."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from haori.library import Library
from tests.command_line import haori
from tests.diffusion_pipelines import saved, stable_diffusion
from tests.picture_adapters import UNET, adapted, saved_adapter
from tests.picture_networks import Quarters, tiny_clip
from tests.pictures import picture_folder, section_of

DRAWN = ("--seeds", 2, "--steps", 2, "--guidance", 2)


@pytest.fixture
def adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter in the library, and the folder of pictures it is measured on."""
    from haori.bases import find_base

    monkeypatch.setattr("haori.metrics.picture_networks.load_network", lambda spec: Quarters())
    base = saved(stable_diffusion(), tmp_path / "tiny")
    folder = saved_adapter(adapted(find_base(str(base)), UNET, size=0.3), tmp_path / "adapter")
    done = haori(capsys, "library", "add", folder, "--base", base, "--name", "cat")
    assert done.code == 0, done.err
    Library().update("cat", task="text_to_image")
    (tmp_path / "prompts.txt").write_text("a red cat\n\na cat \na  dog\na red cat\n")
    (tmp_path / "others.txt").write_text("a tree\na car\n")
    return picture_folder(tmp_path / "pictures", 6, size=(32, 32))


def evaluated(capsys: Any, tmp_path: Path, data: Path, *options: Any) -> tuple[Any, Any]:
    done = haori(capsys, "evaluate", "cat", "--data", data, *DRAWN, "--out", tmp_path / "out", *options)
    assert done.code == 0, done.err
    return done, json.loads((tmp_path / "out" / "evaluation.json").read_text())


def test_an_adapter_is_measured_beside_its_base(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done, found = evaluated(capsys, tmp_path, adapter, "--unrelated", tmp_path / "others.txt")
    assert {"data_similarity", "nearest_data", "subject_retrieval", "prompt_retrieval", "diversity", "memorised", "kid",
            "drift", "unrelated_retrieval"} == set(found["metrics"])  # fmt: skip
    for metric in found["metrics"].values():
        assert metric["low"] <= metric["value"] <= metric["high"]
    assert found["metrics"]["drift"]["value"] > 0
    pairs = found["pictures"]["pairs"]
    assert [pair["seed"] for pair in pairs] == list(range(6 * 2 + 2 * 2)) and sum(
        pair["unrelated"] for pair in pairs
    ) == 4
    assert [pair["prompt"] for pair in pairs[:4]] == ["a picture of 0"] * 2 + ["a picture of 1"] * 2
    for pair in pairs:
        base, own = (np.asarray(Image.open(tmp_path / "out" / pair[key])) for key in ("base", "adapter"))
        assert base.shape == own.shape == (32, 32, 3) and (base != own).any()
    assert found["pictures"]["network"] == "quarters" and found["pictures"]["settings"]["Steps"] == "2"
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 2 * 16 + 2 * len(found["pictures"]["copies"])
    assert "quarters" in page and "Taken for copies" in page and "<script" not in page
    assert not re.search(r'(src|href)="(?!data:image/png)', page), "nothing is loaded"
    with Image.open(tmp_path / "out" / "evaluation.png") as sheet:
        assert sheet.width > 500
    for said in (
        "Similarity to the data",
        "Drift, unrelated",
        "12 pictures, and 4 of unrelated prompts",
        "features of quarters",
    ):
        assert said in " ".join(done.out.split())
    record = Library().get("cat").card.evaluations[-1]
    assert record.against == "tiny" and record.metrics["drift"].value == found["metrics"]["drift"]["value"]


def test_at_strength_0_nothing_is_different_and_nothing_drifts(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--strength", 0, "--prompts", tmp_path / "prompts.txt", "--unrelated", tmp_path / "others.txt")
    _, found = evaluated(capsys, tmp_path, adapter, *options)
    assert {pair["prompt"] for pair in found["pictures"]["pairs"][:6]} == {"a red cat", "a cat", "a dog"}
    assert "subject_retrieval" not in found["metrics"], "there are no real pictures of these prompts"
    assert found["metrics"].pop("drift")["value"] == pytest.approx(0, abs=1e-9)
    for name, metric in found["metrics"].items():
        assert metric["difference"] == pytest.approx(0, abs=1e-9), name


def test_a_copy_of_a_training_picture_is_shown_beside_it(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from haori.images.generation import PictureGenerator

    honest = PictureGenerator.draw

    def copying(self: Any, requests: Any, on_step: Any = None) -> Any:
        drawn = honest(self, requests, on_step)
        place = next(at for at, one in enumerate(drawn) if "<lora:" in one.infotext)
        object.__setattr__(drawn[place], "image", Image.open(adapter / "04.png").convert("RGB"))
        return drawn

    monkeypatch.setattr(PictureGenerator, "draw", copying)
    done, found = evaluated(capsys, tmp_path, adapter, "--prompts", tmp_path / "prompts.txt", "--force-fid")
    assert found["metrics"]["fid"]["low"] is None and "of 6 pictures it is far too high" in " ".join(done.out.split())
    copy = found["pictures"]["copies"][0]
    assert copy["seed"] == 0 and copy["origin"].endswith("04.png") and copy["distance"] < 1e-6
    assert copy["base_distance"] > 0.01
    shown = np.asarray(Image.open(tmp_path / "out" / copy["training"]))
    assert (shown == np.asarray(Image.open(adapter / "04.png"))).all()
    assert "04.png" in done.out and "04.png" in (tmp_path / "out" / "evaluation.html").read_text()


def test_clip_scores_are_those_of_stock_transformers(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPModel, CLIPProcessor

    from haori.metrics.picture_networks import _opened

    monkeypatch.setattr("haori.metrics.picture_networks.load_network", _opened)
    clip = tiny_clip(tmp_path / "clip-tiny")
    _, found = evaluated(capsys, tmp_path, adapter, "--features", clip, "--unrelated", tmp_path / "others.txt")
    assert found["pictures"]["network"] == "clip-tiny" and "classifier_score" not in found["metrics"]
    pairs = [pair for pair in found["pictures"]["pairs"] if not pair["unrelated"]]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    for system, key in (("adapter", "value"), ("base", "base")):
        pictures = [Image.open(tmp_path / "out" / pair[system]).convert("RGB") for pair in pairs]
        texts = [pair["prompt"] for pair in pairs]
        out = model(**processor(images=pictures, text=texts, return_tensors="pt", padding=True, truncation=True))
        cosines = (out.logits_per_image.diagonal() / model.logit_scale.exp()).detach().numpy()
        assert found["metrics"]["clip_score"][key] == pytest.approx(100 * cosines.clip(0).mean(), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--labels", "none"), "--labels is for text"),
        (("--max-tokens", 9), "--max-tokens is for text"),
        (("--against", "nothing"), "--against is for text"),
        (("--prompts", "missing.txt"), "cannot be read: No such file"),
        (("--strength", "nan"), "nan"),
        (("--guidance", "1e9"), "guidance"),
        (("--seeds", 100_000), "number of pictures"),
    ],
)
def test_what_cannot_be_measured(
    adapter: Path, capsys: pytest.CaptureFixture[str], options: tuple[Any, ...], said: str
) -> None:
    done = haori(capsys, "evaluate", "cat", "--data", adapter, *options)
    assert done.code == 2 and said in done.err and "Traceback" not in done.err
    assert done.err.count("\n") <= 2


def test_copies_are_looked_for_among_the_pictures_that_were_trained_on(adapter: Path, tmp_path: Path) -> None:
    import haori as library
    from haori.bases import find_base
    from haori.bases.diffusion import PipelineProcessor
    from haori.data.pictures import read_pictures
    from haori.evaluation.pictures.asking import PictureOptions
    from haori.tasks.recipe import recipe_from

    trained_on = picture_folder(tmp_path / "trained", 9, size=(32, 32))
    given = {"trigger": "zkz", "validation_share": 0.3}
    made = {"name": "cat", "base": "tiny", "task": "text_to_image"}
    recipe = recipe_from({**made, "data": {**given, "path": str(trained_on), "resolution": 32}})
    processor = PipelineProcessor(find_base(str(tmp_path / "tiny")))
    sizes = {"native_size": processor.native_size, "size_multiple": processor.size_multiple}
    reference = read_pictures(section_of(trained_on, **given), **sizes, cut=processor.cut).reference()
    Library().update("cat", recipe=recipe.model_dump(mode="json"), data=(reference,))
    options = PictureOptions(seeds=1, steps=1, unrelated=("a", "b"))
    result, _ = library.evaluate("cat", str(adapter), pictures=options)
    assert result.pictures is not None and result.pictures.pairs[0].prompt == "zkz, a picture of 0", "as in training"
    (told,) = (note for note in result.notes if "trained on" in note)
    assert told.startswith("The adapter was trained on 4 of the 6 pictures given"), "three of nine were held out"
    (trained_on / "08.png").write_bytes((trained_on / "07.png").read_bytes())
    result, _ = library.evaluate("cat", str(adapter), pictures=options)
    assert any("not at hand as they were" in note for note in result.notes)
    with pytest.raises(library.core.errors.InputError, match="have no labels"):
        library.evaluate("cat", str(adapter), labels="none")


def test_a_file_of_a_mounted_tree_is_measured_and_compared(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tmp_path / "Lora"
    tree.mkdir()
    done = haori(capsys, "library", "export", "cat", "--format", "kohya", "--out", tree / "cat-file.safetensors")
    assert done.code == 0, done.err
    Library().mounts.add(tree)
    base, others = ("--base", tmp_path / "tiny"), ("--unrelated", tmp_path / "others.txt")
    out = ("--out", tmp_path / "out")
    done = haori(capsys, "evaluate", "cat-file", "--data", adapter, *DRAWN, *base, *others, *out)
    assert done.code == 0, done.err
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())["metrics"]
    _, stored = evaluated(capsys, tmp_path, adapter, *others)
    assert figures["drift"]["value"] == pytest.approx(stored["metrics"]["drift"]["value"], abs=1e-3)
    options = ("--strengths", "1", *DRAWN, *base, *others, "--out", tmp_path / "compared")
    done = haori(capsys, "compare", "cat-file", "--data", adapter, *options)
    assert done.code == 0 and "strength 1" in done.out, done.err


def test_prompts_of_no_use_are_refused(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00a")
    (tmp_path / "tag.txt").write_text("a cat <lora:nobody:1>\n")
    for name, said in (("empty.txt", "holds 0 prompts"), ("binary.txt", "not text in UTF-8"), ("tag.txt", "nobody")):
        done = haori(capsys, "evaluate", "cat", "--data", adapter, *DRAWN, "--prompts", tmp_path / name)
        assert done.code == 2 and said in done.err, done.err
