"""A folder, zip or set with far too many files is refused, and so is the home folder of somebody unknown."""

import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import pytest

from haori.bases.find import find_base
from haori.core.errors import DataError, InputError
from haori.core.user_path import user_path
from haori.data import folder_files
from haori.data.pictures.sources import holds_pictures
from haori.data.sources import find_source
from tests.pictures import picture, picture_folder, read

NOBODY = "~nobody-of-this-name/pictures"


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a million real files would take minutes: the bound is 8 here, wherever it is applied."""
    for module in ("folder_files", "pictures.archives", "pictures.tables"):
        monkeypatch.setattr(f"haori.data.{module}.MAX_FILES", 8)


def test_the_bound_is_far_above_any_set_of_adapters():
    assert folder_files.MAX_FILES == 500_000


@pytest.mark.usefixtures("bounded")
def test_a_folder_holds_at_most_so_many_files(tmp_path: Path):
    folder = picture_folder(tmp_path / "a" / "b", 4)  # with captions 8 files
    assert len(read(folder, validation_share=0.0).train) == 4
    (folder / ".hidden").touch()
    for refuse in (lambda: read(folder), lambda: read(tmp_path), lambda: find_source(str(folder))):
        with pytest.raises(
            DataError, match=r"The folder '.*' holds more than the 8 files that are read from one; give"
        ):
            refuse()


@pytest.mark.usefixtures("bounded")
def test_looking_for_pictures_ends_too(tmp_path: Path):
    for number in range(9):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(DataError, match="holds more than the 8 files"):
        holds_pictures(str(tmp_path))


@pytest.mark.usefixtures("bounded")
def test_a_zip_and_a_set_hold_at_most_so_many(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(9):
            archive.writestr(f"{number}.txt", "x")
    with pytest.raises(DataError, match=r"a.zip' holds 9 files; a zip may hold 8; part it"):
        read(tmp_path / "a.zip")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [picture(number, (8, 8)) for number in range(9)], "text": ["x"] * 9}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet' holds more than the 8 pictures that are read from one set"):
        read(tmp_path / "a.parquet")


def test_a_folder_of_masks_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pictures, masks = picture_folder(tmp_path / "pictures", 3), picture_folder(tmp_path / "masks", 5)
    monkeypatch.setattr("haori.data.folder_files.MAX_FILES", 8)
    with pytest.raises(DataError, match="masks' holds more than the 8 files"):
        read(pictures, masks="files", mask_folder=str(masks))


def test_a_home_folder_is_found():
    assert user_path("~/x") == Path.home() / "x"
    assert user_path("a/~b") == Path("a/~b")


@pytest.mark.parametrize("find", [find_source, holds_pictures, read, find_base])
def test_the_home_folder_of_nobody_is_one_sentence(find):
    with pytest.raises(InputError, match=r"'~nobody-of-this-name/pictures' begins with ~nobody-of-this-name, and"):
        find(NOBODY)


def test_a_mask_folder_of_nobody(tmp_path: Path):
    with pytest.raises(InputError, match="begins with ~nobody-of-this-name"):
        read(picture_folder(tmp_path, 3), masks="files", mask_folder=NOBODY)


def test_the_command_line_says_it_without_a_traceback():
    command = [sys.executable, "-m", "haori.cli.app", "data", "check", NOBODY]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("Error: '~nobody-of-this-name/pictures' begins with ~nobody-of-this-name, and")
