"""Captions by a model: what stock transformers says of a picture, beside it, and never over another caption."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    BlipForConditionalGeneration,
    GitForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers import ViTForImageClassification as Classifier

from haori.core.errors import InputError
from haori.data.pictures.captioners import open_captioner
from tests.captioning_models import blip, classifier, git, llava
from tests.command_line import haori
from tests.pictures import picture, picture_folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"blip": blip(folder / "blip"), "git": git(folder / "git"), "tags": classifier(folder / "tags")}


def opened(path: Path, prompt: str | None = None, threshold: float = 0.5):
    return open_captioner(str(path), prompt=prompt, max_tokens=9, threshold=threshold, device="cpu")


@pytest.mark.parametrize(("kind", "stock"), [("blip", BlipForConditionalGeneration), ("git", GitForCausalLM)])
def test_sentences_are_what_stock_transformers_says(models: dict[str, Path], kind: str, stock):
    model, processor = stock.from_pretrained(models[kind]).eval(), AutoProcessor.from_pretrained(models[kind])
    captioner, found = opened(models[kind]), set()
    for seed in range(5):
        pixels = processor(images=picture(seed), return_tensors="pt").pixel_values
        ids = model.generate(pixel_values=pixels, max_new_tokens=9, do_sample=False)
        expected = " ".join(processor.batch_decode(ids, skip_special_tokens=True)[0].split())
        found.add(captioner.caption(picture(seed)))
        assert captioner.caption(picture(seed)) == expected
    if kind == "git":
        assert len(found) > 1  # it looks at the picture


@pytest.mark.parametrize("kind", ["blip", "git"])
def test_a_prompt_begins_the_caption(models: dict[str, Path], kind: str):
    said = opened(models[kind], "a cat").caption(picture(2))
    assert said.startswith("a cat ")
    assert len(said.split()) > 3


def test_git_goes_on_from_its_prompt_as_its_paper_does(models: dict[str, Path]):
    """As the documentation of GIT shows: [CLS] and the words, without [SEP]."""
    model = GitForCausalLM.from_pretrained(models["git"]).eval()
    processor = AutoProcessor.from_pretrained(models["git"])
    words = processor.tokenizer("a cat", add_special_tokens=False).input_ids
    ids = model.generate(
        pixel_values=processor(images=picture(2), return_tensors="pt").pixel_values,
        input_ids=torch.tensor([[processor.tokenizer.cls_token_id, *words]]), max_new_tokens=9, do_sample=False,
    )  # fmt: skip
    expected = processor.batch_decode(ids, skip_special_tokens=True)[0]
    assert opened(models["git"], "a cat").caption(picture(2)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chat_model_is_asked_and_only_its_answer_is_the_caption(tmp_path: Path, dtype: torch.dtype):
    path = llava(tmp_path / "llava", dtype)
    model = LlavaForConditionalGeneration.from_pretrained(path).eval()
    processor = LlavaProcessor.from_pretrained(path)
    found = set()
    for prompt in (None, "a small cat"):
        asked = prompt or "Describe the picture in one plain sentence."
        text = f"user <image> {asked} assistant "
        for seed in range(3):
            inputs = processor(images=picture(seed), text=text, return_tensors="pt").to(dtype=dtype)
            assert (inputs.input_ids == 3).sum() == 16  # (32 / 8)^2 places of the picture
            ids = model.generate(**inputs, max_new_tokens=9, do_sample=False)[0, inputs.input_ids.shape[1] :]
            expected = " ".join(processor.decode(ids, skip_special_tokens=True).split())
            assert opened(path, prompt).caption(picture(seed)) == expected
            assert expected
            found.add(expected)
    assert len(found) > 1  # it looks at the picture, or at the question


def test_tags_are_the_labels_above_the_threshold(models: dict[str, Path]):
    model = Classifier.from_pretrained(models["tags"]).eval()
    processor = AutoImageProcessor.from_pretrained(models["tags"])
    captioner = opened(models["tags"], threshold=0.45)
    for seed in range(5):
        with torch.no_grad():
            logits = model(**processor(images=picture(seed), return_tensors="pt")).logits[0]
        shares = {model.config.id2label[at]: 1 / (1 + float((-x).exp())) for at, x in enumerate(logits)}
        likely = sorted((name for name in shares if shares[name] >= 0.45), key=lambda name: -shares[name])
        assert captioner.caption(picture(seed)) == ", ".join(likely).replace("_", " ")
        assert likely


def test_a_classifier_for_one_label_shares_out(tmp_path: Path):
    path = classifier(tmp_path / "one", several=False)
    assert opened(path, threshold=0.0).caption(picture(1)).count(",") == 4
    assert opened(path, threshold=0.51).caption(picture(1)).count(",") == 0


def test_models_that_do_not_fit_are_refused(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="takes no prompt; leave --prompt out"):
        opened(models["tags"], "a cat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"The captioning model .* cannot be loaded"):
        opened(tmp_path / "empty")
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="is BertModel; captions need an image-text model"):
        opened(tmp_path / "bert")


def test_missing_weights_are_refused(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    path = git(tmp_path / "git") / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("git.encoder"))
    save_file({key: value for key, value in tensors.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(InputError, match=f"lacks weights, such as '{name}'"):
        opened(path.parent)


def test_the_command_writes_beside_and_never_over(
    tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
):
    folder = picture_folder(tmp_path, 4, caption=None)
    exif = Image.Exif()
    exif[0x0112] = 3
    picture(2).rotate(180).save(folder / "02.png", exif=exif)  # upright it is picture 2
    (folder / "01.txt").write_text("mine")
    (folder / "03.caption").write_text("also mine")
    done = haori(capsys, "data", "caption", folder, "--model", models["git"], "--max-tokens", 9)
    assert done.code == 0, done.err
    flat = " ".join(done.out.split())
    assert "Captions written: 2 of 4 pictures. 2 had one and keep it" in flat
    expected = {seed: opened(models["git"]).caption(picture(seed)) for seed in (0, 2)}
    assert {seed: (folder / f"{seed:02}.txt").read_text() for seed in (0, 2)} == {
        seed: f"{text}\n" for seed, text in expected.items()
    }
    assert (folder / "01.txt").read_text() == "mine"
    assert not (folder / "03.txt").exists()
    again = haori(capsys, "data", "caption", folder, "--model", models["git"], "--max-tokens", 9, "--overwrite")
    assert again.code == 0
    assert (folder / "01.txt").read_text() != "mine"


def test_the_command_names_what_it_could_not_caption(
    tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
):
    folder = picture_folder(tmp_path, 2, caption=None)
    (folder / "00.png").write_bytes(b"")
    done = haori(capsys, "data", "caption", folder, "--model", models["tags"], "--threshold", 1.0)
    assert done.code == 1
    flat = " ".join(done.out.split())
    assert "00.png is empty (0 bytes)" in flat
    assert "01.png: the model says nothing of it; no caption is written" in flat
    assert not list(folder.glob("*.txt"))
    missing = haori(capsys, "data", "caption", tmp_path / "nowhere", "--model", models["tags"])
    assert missing.code == 2
    assert "is no folder; captions are written beside the pictures" in " ".join(missing.err.split())
