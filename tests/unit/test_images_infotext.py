"""Infotext: what a PNG says about how it was made, also where the text was written by others."""

import struct
import time
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from haori.core.errors import FileFormatError, InputError
from haori.images.infotext import (
    Infotext,
    adapter_hashes,
    hashes_text,
    picture_infotext,
    png_bytes,
    read_infotext,
)

# As the web UI 1.10.1 wrote it.
FOREIGN = """(masterpiece:1.2), a cat <lora:lineart:0.7>,
on a "mat"
Negative prompt: blurred,
bad: hands
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 3735928559, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Denoising strength: 0.7, Hires upscale: 2, \
Hires upscaler: Latent, Lora hashes: "lineart: 0123456789ab, a, b: cdef01234567", Version: v1.10.1"""


def test_a_text_of_the_web_ui_is_read():
    read = read_infotext(FOREIGN)
    assert read.prompt == '(masterpiece:1.2), a cat <lora:lineart:0.7>,\non a "mat"'
    assert read.negative == "blurred,\nbad: hands"
    assert read.settings["Sampler"] == "DPM++ 2M"
    assert read.settings["Seed"] == "3735928559"
    assert read.settings["Model"] == "v1-5-pruned-emaonly"
    assert len(read.settings) == 13
    assert adapter_hashes(read.settings["Lora hashes"]) == {"lineart": "0123456789ab", "a, b": "cdef01234567"}
    assert read.text() == FOREIGN


TEXTS = st.text(alphabet=st.characters(codec="utf-8"), max_size=60)


@given(TEXTS, TEXTS, TEXTS)
def test_what_is_written_is_read_back_or_refused(prompt, negative, value):
    info = Infotext(prompt, negative, {"Steps": "3", "Model": value, "Version": "haori"})
    assert read_infotext(info.text()) == info


@pytest.mark.parametrize("which", ["prompt", "negative"])
def test_prompts_that_the_text_could_not_tell_apart_are_refused_or_kept(which):
    hostile = "a\nNegative prompt: b\nSteps: 1, Seed: 2"
    info = Infotext(**{"prompt": "a", which: hostile}, settings={"Steps": "3"})
    if which == "prompt":
        with pytest.raises(InputError, match="begins with 'Negative prompt:'"):
            info.text()
    else:
        assert read_infotext(info.text()) == info


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "begins with ''"),
        ("a cat", "begins with 'a cat'"),
        ("Steps: 1, Steps: 2", "twice"),
        ("Steps: 1, nonsense", "'name: value'"),
        ("Steps: 1, : 3", "'name: value'"),
        ("Steps: 1, " + ", ".join(f"k{number}: 1" for number in range(300)), "more than 200"),
        ("a" * 70_000, "70,000 characters"),
        ("Steps: 1, " + "a" * 60_000, "'name: value'"),
    ],
)
def test_hostile_texts_are_one_sentence(text, said):
    began = time.perf_counter()
    with pytest.raises(FileFormatError) as error:
        read_infotext(text)
    assert said in str(error.value)
    assert len(str(error.value)) < 400
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("text", ["a cat\nSteps: 1", "猫 <lora:線画:0.7>\nSteps: 1", "a\0b\r\n\tc\nSteps: 1"])
def test_a_png_keeps_its_text_and_is_the_same_each_time(text, tmp_path):
    image = Image.new("RGB", (8, 8), "red")
    data = png_bytes(image, text)
    assert data == png_bytes(image.copy(), text)
    assert picture_infotext(data, "it") == text
    (tmp_path / "a.png").write_bytes(data)
    assert picture_infotext(tmp_path / "a.png", "it") == text
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.info["parameters"] == text


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_pictures_that_hold_no_readable_text_are_one_sentence(tmp_path):
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    good = plain.read_bytes()
    bomb = good[:33] + chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * (8 << 20), 9)) + good[33:]
    wide = good[:16] + struct.pack(">II", 60_000, 60_000) + good[24:]
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (8, 8)).save(photo)
    for data in (good, bomb, wide, good[:40], b"", b"\x89PNG\r\n\x1a\n" + bytes(100), photo.read_bytes()):
        with pytest.raises(FileFormatError) as error:
            picture_infotext(data, "it")
        assert str(error.value).startswith("it ")
        assert len(str(error.value)) < 400
        assert "\n" not in str(error.value)


def test_hashes_are_written_as_the_web_ui_does():
    assert hashes_text({"a": "0" * 12, "b": "1" * 12}) == f"a: {'0' * 12}, b: {'1' * 12}"
