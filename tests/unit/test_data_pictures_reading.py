"""Folders of pictures become rows: captions, repeats, duplicates, what is held out, and every picture accounted for."""

import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from haori.core.errors import DataError, MissingExtraError
from haori.data.pictures.dataset import PictureSplit
from tests.pictures import picture, picture_folder, read


def names(rows) -> list[str]:
    return [Path(row.origin).name for row in rows]


def accounted(split: PictureSplit) -> bool:
    report = split.report
    return report.read == sum(report.rows.values()) + sum(report.dropped.values())


def table(split: PictureSplit) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(split.table())
    return console.export_text()


def test_a_folder_becomes_rows_with_captions(tmp_path: Path):
    split = read(picture_folder(tmp_path / "set", 12))
    rows = [*split.train, *split.validation]
    assert sorted(names(rows)) == [f"{number:02}.png" for number in range(12)]
    assert {Path(row.origin).stem: row.caption for row in rows}["07"] == "a picture of 7"
    assert split.train[0].origin == f"{tmp_path}/set/{split.train[0].file.name}"
    assert all((row.width, row.height, row.bucket) == (96, 96, (64, 64)) for row in rows)
    assert split.reference().rows == {"train": len(split.train), "validation": len(split.validation)}
    assert accounted(split)
    assert "No problems found." in table(split)


def test_shapes_go_to_their_buckets(tmp_path: Path):
    folder = picture_folder(tmp_path, 6)
    picture(20, (200, 100)).save(folder / "wide.png")
    picture(21, (100, 200)).save(folder / "tall.png")
    (folder / "wide.txt").write_text("w")
    (folder / "tall.txt").write_text("t")
    bucket = {Path(row.origin).stem: row.bucket for row in read(folder, validation_share=0.0).train}
    assert bucket["wide"] == (88, 40)  # of the buckets in steps of 8 up to 2.5:1, the one nearest to 2
    assert bucket["tall"] == (40, 88)
    assert bucket["00"] == (64, 64)
    squares = read(folder, validation_share=0.0, buckets=False)
    assert {row.bucket for row in squares.train} == {(64, 64)}


def test_files_in_folders_with_numbers_are_repeated(tmp_path: Path):
    picture_folder(tmp_path / "10_sks dog", 3, caption=None)
    picture_folder(tmp_path / "2024_summer", 3)
    for number in range(3):
        picture(50 + number).save(tmp_path / "2024_summer" / f"{number:02}.png")
    split = read(tmp_path, validation_share=0.0)
    assert [row.repeats for row in split.train] == [10] * 3 + [1] * 3
    assert [row.caption for row in split.train[:3]] == ["sks dog"] * 3
    assert split.report.steps == 33
    assert any("10_sks dog (10)" in note for note in split.notes)
    assert [row.repeats for row in read(tmp_path, validation_share=0.0, repeats=2).train][::3] == [20, 2]


@pytest.mark.parametrize("ending", [".txt", ".caption"])
def test_either_ending_of_caption_files_is_read(tmp_path: Path, ending: str):
    folder = picture_folder(tmp_path, 4, caption=None)
    for number in range(4):
        (folder / f"{number:02}{ending}").write_text(f"\ufeffcaption\n{number}\n", encoding="utf-8")
    split = read(folder, validation_share=0.0)
    assert split.train[2].caption == "caption 2"
    assert split.report.captions["of several lines, which are joined"] == 4
    other = ".caption" if ending == ".txt" else ".txt"
    with pytest.raises(DataError, match=r"4 pictures have no caption \(.*00.png, "):
        read(folder, caption_extension=other)


def test_two_captions_that_differ_are_asked_about(tmp_path: Path):
    folder = picture_folder(tmp_path, 4)
    (folder / "01.caption").write_text("a picture of 1")
    assert read(folder, validation_share=0.0).train[1].caption == "a picture of 1"
    (folder / "01.caption").write_text("something else")
    with pytest.raises(DataError, match=r"01.png has captions that differ, in 01.txt and 01.caption; .*=.txt"):
        read(folder)
    assert (
        read(folder, validation_share=0.0, caption_extension=".caption", caption="x").train[1].caption
        == "something else"
    )


def test_pictures_without_captions_take_what_is_said_of_all(tmp_path: Path):
    folder = picture_folder(tmp_path, 4)
    (folder / "01.txt").unlink()
    (folder / "02.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"2 pictures have no caption \(.*01.png, .*02.png\)"):
        read(folder)
    split = read(folder, tolerant=True, validation_share=0.0)
    assert split.report.dropped == {"without a caption": 2}
    assert accounted(split)
    assert "Problem: 2 pictures have no caption" in table(split)
    shared = read(folder, validation_share=0.0, caption="a thing")
    assert [row.caption for row in shared.train] == ["a picture of 0", "a thing", "a thing", "a picture of 3"]
    assert shared.report.captions["from data.caption"] == 2
    alone = read(folder, validation_share=0.0, trigger="sks")
    assert alone.report.captions["the trigger alone"] == 2


def test_captions_in_another_encoding_are_refused(tmp_path: Path):
    folder = picture_folder(tmp_path, 3)
    (folder / "01.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"01.txt: byte 4 \(0xe9\) is not UTF-8 text; save the file as UTF-8"):
        read(folder)
    (folder / "01.txt").write_bytes("café".encode("utf-16"))
    with pytest.raises(DataError, match=r"01.txt: byte 1 .* looks like UTF-16"):
        read(folder)


def test_broken_pictures_stop_training_and_are_listed_by_a_check(tmp_path: Path):
    folder = picture_folder(tmp_path, 8)
    (folder / "03.png").write_bytes(b"")
    (folder / "04.png").write_bytes((folder / "05.png").read_bytes()[:100])
    with pytest.raises(DataError, match=r"03.png is empty \(0 bytes\).*\(1 more like this"):
        read(folder)
    split = read(folder, tolerant=True)
    assert split.report.dropped == {"broken": 2}
    assert accounted(split)
    assert len(split.report.problems) == 2
    assert not split.refused


def test_the_same_picture_with_the_same_caption_is_left_out_once(tmp_path: Path):
    folder = picture_folder(tmp_path, 6)
    shutil.copy(folder / "00.png", folder / "again.png")
    shutil.copy(folder / "00.txt", folder / "again.txt")
    shutil.copy(folder / "01.png", folder / "told otherwise.png")
    (folder / "told otherwise.txt").write_text("other words")
    split = read(folder, validation_share=0.0)
    assert split.report.dropped == {"exact duplicates": 1}
    assert "told otherwise.png" in names(split.train)
    assert accounted(split)
    assert any(note.startswith("Pictures left out: 1 exact duplicates") for note in split.notes)


def test_what_was_done_to_pictures_is_counted(tmp_path: Path):
    folder = picture_folder(tmp_path, 6)
    picture(30, (40, 40)).save(folder / "00.png")
    picture(31).convert("CMYK").save(folder / "x.jpg")
    (folder / "x.txt").write_text("x")
    changed = read(folder, validation_share=0.0)
    assert changed.report.changed == {"enlarged": 1, "CMYK": 1}
    assert "1 enlarged, 1 CMYK" in table(changed)
    assert "Pictures changed: 1 enlarged, 1 CMYK." in changed.notes
    dropped = read(folder, validation_share=0.0, too_small="drop")
    assert dropped.report.dropped == {"too small": 1}
    assert accounted(dropped)
    with pytest.raises(DataError, match=r"1 picture is smaller than needed \(.*00.png: 40 x 40 for 64 x 64\)"):
        read(folder, too_small="error")


def test_captions_that_are_too_long_are_shown_where_they_are_cut(tmp_path: Path):
    folder = picture_folder(tmp_path, 4)
    (folder / "02.txt").write_text("one two three four five six")
    split = read(folder, validation_share=0.0, trigger="sks", cut=lambda text: " ".join(text.split()[5:]))
    assert split.report.captions["longer than the text encoder reads"] == 1
    assert split.report.cut == (
        f"{folder}/02.png: the text encoder does not read the end: five six",
    )  # the trigger takes a place
    assert "Cut: " in table(split)
    assert any(note.startswith("Captions: 1 longer than the text encoder reads") for note in split.notes)
    assert any(note.endswith("does not read the end: five six") for note in split.notes)


def test_the_split_depends_on_content_alone(tmp_path: Path):
    folder = picture_folder(tmp_path / "a", 40)
    first = read(folder)
    held = {row.content_hash for row in first.validation}
    assert 1 <= len(held) <= 12
    assert not held & {row.content_hash for row in first.train}
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        path.rename(folder / f"z{99 - number}.png")
        path.with_suffix(".txt").rename(folder / f"z{99 - number}.txt")
    assert {row.content_hash for row in read(folder).validation} == held
    picture(77).save(folder / "new.png")
    (folder / "new.txt").write_text("new")
    grown = read(folder)
    assert held <= {row.content_hash for row in grown.validation}


def test_pictures_that_look_alike_stay_on_one_side(tmp_path: Path):
    folder = picture_folder(tmp_path, 30, size=(192, 192))
    for number in range(30):
        image = picture(number, (192, 192)).resize((150, 150))
        image.save(folder / f"{number:02}b.jpg", quality=80)
        (folder / f"{number:02}b.txt").write_text("again")
    split = read(folder, validation_share=0.3)
    sides = [{Path(row.origin).stem[:2] for row in part} for part in (split.train, split.validation)]
    assert sides[0] | sides[1] == {f"{number:02}" for number in range(30)}
    assert not sides[0] & sides[1]
    assert any("look nearly alike: 60 in 30 groups" in note for note in split.notes)


def test_a_copy_never_takes_a_picture_out_of_training(tmp_path: Path):
    """Whatever the copies' own hashes are, and though they come first by name."""
    folder = picture_folder(tmp_path, 30)
    before = {row.content_hash for row in read(folder, validation_share=0.3).train}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            image.resize((90, 90)).save(folder / f"! {path.name}")
        (folder / f"! {path.stem}.txt").write_text("again")
    assert before <= {row.content_hash for row in read(folder, validation_share=0.3).train}


def test_pictures_of_another_colour_do_not_look_alike(tmp_path: Path):
    for number, colour in enumerate([(230, 0, 0), (0, 0, 230), (240, 200, 0)]):
        image = Image.new("RGB", (96, 96), "white")
        image.paste(colour, (20, 20, 70, 76))
        image.save(tmp_path / f"{number}.png")
    assert not any("alike" in note for note in read(tmp_path, caption="heart", validation_share=0.0).notes)


def test_of_few_pictures_it_is_said_what_is_held_out(tmp_path: Path):
    split = read(picture_folder(tmp_path, 5))
    assert len(split.validation) == 1
    assert any(
        f"Of 5 pictures 1 is held out for validation: {split.validation[0].origin}." in note for note in split.notes
    )


def test_one_picture_is_refused_unless_nothing_is_held_out(tmp_path: Path):
    folder = picture_folder(tmp_path, 1)
    with pytest.raises(DataError, match=r"has one picture; .*--set data.validation_share=0"):
        read(folder)
    assert read(folder, tolerant=True).refused
    alone = read(folder, validation_share=0.0)
    assert (len(alone.train), len(alone.validation)) == (1, 0)


def test_a_validation_folder_of_its_own_is_compared(tmp_path: Path):
    train = picture_folder(tmp_path / "a", 6)
    held = picture_folder(tmp_path / "b", 2)
    picture(90).save(held / "01.png")
    split = read(train, validation=str(held))
    assert (len(split.train), len(split.validation)) == (6, 2)
    assert any("also among the training pictures, or nearly: 1" in note for note in split.notes)
    assert accounted(split)


def test_regularisation_pictures_have_a_weight_and_no_trigger(tmp_path: Path):
    own = picture_folder(tmp_path / "own", 5)
    for number in range(4):
        (tmp_path / "reg" / "1_dog").mkdir(parents=True, exist_ok=True)
        picture(60 + number).save(tmp_path / "reg" / "1_dog" / f"{number}.png")
    split = read(own, trigger="sks", regularisation=str(tmp_path / "reg"), prior_weight=0.5, caption="never")
    prior = [row for row in split.train if row.prior]
    assert [(row.caption, row.weight, row.augmentation.trigger) for row in prior] == [("dog", 0.5, None)] * 4
    assert not any(row.prior for row in split.validation)
    assert split.report.rows["regularisation"] == 4
    assert accounted(split)


def test_what_is_no_picture_is_named(tmp_path: Path):
    folder = picture_folder(tmp_path, 3)
    (folder / "notes.md").write_text("x")
    (folder / "photo.HEIC").write_bytes(b"x")
    (folder / ".hidden.png").write_bytes(b"x")
    split = read(folder, validation_share=0.0)
    assert any(f"not read: {folder}/notes.md, {folder}/photo.HEIC." in note for note in split.notes)
    assert any("a kind that is not read: photo.HEIC; convert" in note for note in split.notes)


def test_too_many_are_cut_off_and_said(tmp_path: Path):
    split = read(picture_folder(tmp_path, 6), max_rows=4, validation_share=0.0)
    assert len(split.train) == 4
    assert any("Of the 6 pictures" in note for note in split.notes)


@pytest.mark.parametrize(("make", "said"), [
    (lambda folder: folder / "nowhere", "There is no .*; give a folder of pictures, a zip"),
    (lambda folder: folder, "holds no pictures; their names end in .*png"),
    (lambda folder: picture(1).save(folder / "a.png") or folder / "a.png", "is one picture; give the folder"),
])  # fmt: skip
def test_what_is_no_source_is_refused(tmp_path: Path, make, said: str):
    with pytest.raises(DataError, match=said):
        read(make(tmp_path))


def test_mask_files_are_no_pictures(tmp_path: Path):
    folder = picture_folder(tmp_path, 4)
    Image.fromarray(np.full((96, 96), 255, dtype=np.uint8)).save(folder / "01-masklabel.png")
    split = read(folder, validation_share=0.0)
    assert len(split.train) == 4
    assert any("Mask files beside pictures, not used: 1" in note for note in split.notes)
    masked = read(folder, validation_share=0.0, masks="files")
    mask = folder / "01-masklabel.png"
    for size, value, problem in (
        ((96, 48), 255, "the mask is 96 x 48, another shape than the 96 x 96 of .*01.png"),
        ((96, 96), 0, "the mask is black all over"),
    ):
        Image.new("L", size, value).save(mask)
        with pytest.raises(DataError, match=problem):
            read(folder, masks="files")
    mask.write_bytes(b"x")
    with pytest.raises(DataError, match=r"01-masklabel\.png is no picture"):
        read(folder, masks="files")
    before = masked.reference().hash
    Image.fromarray(np.full((96, 96), 200, dtype=np.uint8)).save(folder / "01-masklabel.png")
    assert read(folder, validation_share=0.0, masks="files").reference().hash != before
    assert [row.mask and row.mask.name for row in masked.train] == [None, "01-masklabel.png", None, None]
    assert any("Pictures without a mask, which count all over" in note for note in masked.notes)


def test_without_pillow_the_install_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = picture_folder(tmp_path, 3)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"need pillow; install it with `pip install 'haori\[images\]'`"):
        read(folder)
