"""What a check says of pictures: captions together, augmentations, rights; the contact sheet; the command."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from haori.core.errors import DataError
from haori.data.pictures import contact_sheet, holds_pictures, sheet
from tests.command_line import haori
from tests.diffusion_pipelines import saved, stable_diffusion
from tests.pictures import picture, picture_folder, read


def said(split, words: str) -> bool:
    return any(words in note for note in split.notes)


def test_captions_that_are_shared_are_counted(tmp_path: Path):
    folder = picture_folder(tmp_path, 6)
    for number in (1, 3, 5):
        (folder / f"{number:02}.txt").write_text("a cat")
    split = read(folder, validation_share=0.0)
    assert split.report.captions["the same as another's"] == 3
    assert said(split, "Captions that several pictures share: 'a cat' (3). What differs")
    (folder / "04.txt").unlink()
    (folder / "02.txt").unlink()
    given = read(folder, validation_share=0.0, caption="for the others")
    assert given.report.captions["the same as another's"] == 3
    assert not said(given, "for the others")
    assert "the same as another's" not in read(picture_folder(tmp_path / "b", 3), validation_share=0.0).report.captions


def test_where_the_trigger_is_missing_it_is_said(tmp_path: Path):
    folder = picture_folder(tmp_path, 4)
    (folder / "01.txt").write_text("a sks thing")
    (folder / "02.txt").write_text("an SKS thing")
    split = read(folder, validation_share=0.0, trigger="sks")
    assert split.report.captions["without the trigger, which is put before them"] == 3
    assert said(split, f"in another spelling or inside another word: {folder}/02.png")


def test_augmentations_are_warned_about(tmp_path: Path):
    folder = picture_folder(tmp_path, 3)
    (folder / "02.txt").write_text("a Sign with letters")
    assert not said(read(folder), "mirror")
    split = read(folder, flip=True, colour=0.3)
    assert said(split, "writing is learnt as mirror writing")
    assert said(split, f"Captions that speak of such: {folder}/02.png.")
    assert said(split, "Colours are changed at random")


def test_copyright_notices_and_licences_of_cards_are_found(tmp_path: Path):
    folder = picture_folder(tmp_path, 3)
    exif = Image.Exif()
    exif[0x8298] = "(c) Jane Doe"
    picture(1).save(folder / "01.png", exif=exif)
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\nText.\n")
    split = read(folder, validation_share=0.0)
    assert said(split, "carry a copyright notice: (c) Jane Doe (1); see that you may train on them")
    assert split.reference().licence == "cc-by-4.0"


def test_a_sheet_shows_each_picture_with_its_crop(tmp_path: Path):
    folder = picture_folder(tmp_path / "set", 3, size=(192, 96))
    split = read(folder, buckets=False)
    assert contact_sheet(split.train, tmp_path / "sheet.png", held_out=split.validation) == 3
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    red = np.abs(sheet - [0xE0, 0x20, 0x20]).max(axis=2) == 0
    rows, columns = np.nonzero(red)
    assert np.ptp(rows) + 1 == 100  # 192 x 96 are shown as 200 x 100; the square in the middle is framed
    first = columns[columns < 8 + 200]
    assert (first.min(), first.max()) == (8 + 50, 8 + 149)
    # Inside of the frame the picture is as it is, outside it is paler.
    small = np.asarray(
        picture(int(Path(split.train[0].origin).stem), (192, 96)).resize((200, 100), Image.Resampling.LANCZOS)
    )
    top = rows.min()
    inside = sheet[top + 10 : top + 90, 8 + 60 : 8 + 140]
    assert np.abs(inside - small[10:90, 60:140]).mean() < 2
    outside = sheet[top + 10 : top + 90, 8 + 5 : 8 + 45]
    assert np.abs(outside - (0.55 * small[10:90, 5:45] + 0.45 * 255)).mean() < 2


def test_a_sheet_says_which_letters_it_cannot_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only the line at the top differs: the same picture with a caption in Latin and in Japanese letters."""
    monkeypatch.setattr("haori.data.pictures.sheet._WIDE_FONTS", ())
    monkeypatch.setattr("haori.data.pictures.sheet._wide_font", sheet._wide_font.__wrapped__)
    dark = []
    for caption in ("a cat", "猫"):
        rows = read(picture_folder(tmp_path, 6), validation_share=0.0, max_rows=6).train
        contact_sheet([replace(row, caption=caption) for row in rows], tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as image:
            dark.append(int((np.asarray(image.convert("L"))[:24] < 128).sum()))
    assert dark[1] > 2 * dark[0]


def test_a_sheet_of_very_many_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    split = read(picture_folder(tmp_path / "set", 5, size=(64, 64)), validation_share=0.0)
    monkeypatch.setattr("haori.data.pictures.sheet.MOST_PICTURES", 12)
    assert contact_sheet(list(split.train) * 5, tmp_path / "sheet.png") == 12
    with pytest.raises(DataError, match=r"does not end in \.png"):
        contact_sheet(split.train, tmp_path / "sheet.jpg")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(stable_diffusion(), tmp_path_factory.mktemp("base") / "sd")


def test_the_command_checks_pictures_by_itself(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]):
    folder = picture_folder(tmp_path / "set", 12)
    (folder / "03.txt").write_text("cat red " * 60)
    (folder / "04.png").write_bytes(b"")
    done = haori(
        capsys, "data", "check", folder, "--base", base, "--set", "resolution=64", "--show", 1,
        "--sheet", tmp_path / "sheet.png",
    )  # fmt: skip
    assert done.code == 0, done.err
    flat = " ".join(done.out.split())
    assert "12 read;" in flat
    assert "1 broken" in flat
    assert "04.png is empty (0 bytes)" in flat
    assert "1 longer than the text encoder reads" in flat
    assert "03.png: the text encoder does not read the end: " in flat
    assert "Contact sheet of 11 pictures" in flat
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 1600


def test_the_command_refuses_in_a_sentence(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    done = haori(capsys, "data", "check", tmp_path / "a.jsonl", "--task", "text_to_image", "--base", base)
    assert done.code == 2
    assert "is of an unknown kind; give a folder of pictures" in " ".join(done.err.split())
    one = tmp_path / "one"
    one.mkdir()
    picture(1).save(one / "a.png")
    done = haori(capsys, "data", "check", one, "--base", base, "--set", "caption=x", "--set", "resolution=64")
    assert done.code == 1
    assert "has one picture; to hold one out for validation" in " ".join(done.out.split())


def test_sources_of_pictures_are_told_by_their_names(tmp_path: Path):
    (tmp_path / "a").mkdir()
    assert not holds_pictures(str(tmp_path / "a"))
    (tmp_path / "a" / "x.JPG").write_bytes(b"")
    assert holds_pictures(str(tmp_path / "a"))
    assert holds_pictures("set.zip")
    assert not holds_pictures("set.jsonl")
    assert not holds_pictures("org/name")
