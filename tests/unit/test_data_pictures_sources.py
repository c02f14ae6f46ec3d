"""Layouts of other tools are read as they are: metadata, zips, saved datasets, kohya's TOML, OneTrainer's concepts."""

import json
import shutil
import stat
import zipfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from haori.core.errors import DataError
from haori.data.sources import Source
from tests.pictures import picture, picture_folder, read


def by_name(split) -> dict[str, Any]:
    return {Path(row.origin).stem: row for row in [*split.train, *split.validation]}


def said(split, words: str) -> bool:
    return any(words in note for note in split.notes)


def metadata(folder: Path, rows: list[dict[str, Any]], name: str = "metadata.jsonl") -> None:
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def test_metadata_gives_captions(tmp_path: Path):
    picture_folder(tmp_path / "sub", 3, caption=None)
    picture_folder(tmp_path, 2)
    metadata(tmp_path / "sub", [{"file_name": f"{n:02}.png", "text": f" cat {n}", "id": n} for n in range(2)])
    (tmp_path / "sub" / "02.txt").write_text("beside")
    split = read(tmp_path, validation_share=0.0)
    assert [row.caption for row in split.train] == ["a picture of 0", "a picture of 1", "cat 0", "cat 1", "beside"]
    assert split.reference().format == "metadata.jsonl"
    assert said(split, "Columns of the metadata not used: id (2).")


def test_metadata_in_csv_and_the_file_itself_given(tmp_path: Path):
    folder = picture_folder(tmp_path, 3, caption=None)
    (folder / "metadata.csv").write_text(
        'file_name,prompt,license\n00.png,a,CC0-1.0\n01.png,"b, c",CC0-1.0\n02.png,d,CC0-1.0\n'
    )
    split = read(folder / "metadata.csv", validation_share=0.0)
    assert [row.caption for row in split.train] == ["a", "b, c", "d"]
    assert split.reference().licence == "CC0-1.0"


def test_licences_that_differ_are_listed(tmp_path: Path):
    folder = picture_folder(tmp_path, 2, caption=None)
    metadata(folder, [{"file_name": f"{n:02}.png", "text": "x", "license": f"l{n}"} for n in range(2)])
    split = read(folder, validation_share=0.0)
    assert split.reference().licence is None
    assert said(split, "state: l0, l1; data.licence can say one")
    assert read(folder, validation_share=0.0, licence="MIT").reference().licence == "MIT"


@pytest.mark.parametrize(("rows", "problem"), [
    ([{"file_name": "10.png", "text": "x"}], r"metadata.jsonl:1:file_name: there is no picture '10.png'; did you mean"),
    ([{"file_name": "../a.png", "text": "x"}], "lies outside of the folder"),
    ([{"file_name": "/etc/passwd", "text": "x"}], "lies outside of the folder"),
    ([{"filename": "00.png", "text": "x"}], "has no 'file_name' .*did you mean 'filename'"),
    ([{"file_name": "00.png", "text": ["x"]}], "a caption must be text, not list"),
    ([{"file_name": "00.png", "text": "x", "caption": "y"}], "several columns for captions: text, caption"),
    ([{"file_name": "00.png", "text": "x"}, {"file_name": "00.png", "text": "y"}], "comes a second time"),
    ([{"file_name": "00.png", "text": "another"}], "00.png has captions that differ, in 00.txt and .*metadata.jsonl:1"),
])  # fmt: skip
def test_metadata_that_does_not_fit_is_named(tmp_path: Path, rows, problem: str):
    metadata(picture_folder(tmp_path, 3), rows)
    with pytest.raises(DataError, match=problem):
        read(tmp_path, validation_share=0.0)


def test_a_caption_column_can_be_chosen(tmp_path: Path):
    metadata(
        picture_folder(tmp_path, 2, caption=None),
        [{"file_name": f"{n:02}.png", "text": "x", "de": f"{n}"} for n in range(2)],
    )
    assert [row.caption for row in read(tmp_path, validation_share=0.0, caption_column="de").train] == ["0", "1"]
    with pytest.raises(DataError, match="has no column 'ed'; did you mean 'de'"):
        read(tmp_path, caption_column="ed")


def test_folders_named_for_splits_are_splits(tmp_path: Path):
    for name, first in (("train", 0), ("validation", 20), ("test", 40)):
        (tmp_path / name).mkdir()
        for number in range(first, first + 4):
            picture(number).save(tmp_path / name / f"{number}.png")
    split = read(tmp_path, caption="x")
    assert {row.file.parent.name for row in split.train} == {"train"}
    assert {row.file.parent.name for row in split.validation} == {"validation"}
    assert said(split, "Read the folder train as train, validation as validation; not read: test.")
    assert {row.file.parent.name for row in read(tmp_path, caption="x", split="test").train} == {"test"}
    with pytest.raises(DataError, match="has no split 'holdout'; it has test, train, validation"):
        read(tmp_path, caption="x", split="holdout")


@pytest.mark.parametrize("name", ["test", "train"])
def test_one_folder_named_so_is_no_split(tmp_path: Path, name: str):
    """A train may be a locomotive."""
    picture_folder(tmp_path / name, 3)
    picture(50).save(tmp_path / "car.png")
    assert len(read(tmp_path, validation_share=0.0, caption="x").train) == 4


def test_pictures_of_the_hub_come_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No hub is asked: its dataset is one of `datasets` that lies in memory."""
    source = Source("org/name", hub=(None, "train"))
    source.__dict__["_dataset"] = saved(tmp_path, text=["a", "b", "c", "d", "e"])
    monkeypatch.setattr("haori.data.pictures.tables.training_sources", lambda section: [source])
    split = read("org/name", validation_share=0.0)
    assert [(row.origin, row.caption) for row in split.train[:2]] == [("org/name:1", "a"), ("org/name:2", "b")]
    with Image.open(split.train[1].file) as image:
        assert (np.asarray(image) == np.asarray(picture(1))).all()


def saved(tmp_path: Path, count: int = 5, **columns: Any) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), **{name: datasets.Value("string") for name in columns}})
    images = [picture(number) for number in range(count)]
    return datasets.Dataset.from_dict({"image": images, **columns}, features=features)


def test_a_saved_dataset_is_read_with_its_splits(tmp_path: Path):
    whole = saved(tmp_path, text=[f"c{n}" for n in range(5)])
    parts = datasets.DatasetDict(
        {"train": whole.select(range(3)), "validation": whole.select([3]), "test": whole.select([4])}
    )
    parts.save_to_disk(str(tmp_path / "set"))
    split = read(tmp_path / "set")
    assert [row.caption for row in split.train] == ["c0", "c1", "c2"]
    assert [row.caption for row in split.validation] == ["c3"]
    assert (np.asarray(Image.open(split.train[1].file)) == np.asarray(picture(1))).all()
    assert said(split, "not read: test")
    assert split.train[0].origin == f"{tmp_path}/set/train/data-00000-of-00001.arrow:1"


def test_a_parquet_file_is_read_once_and_again_when_it_changes(tmp_path: Path):
    path = tmp_path / "a.parquet"
    saved(tmp_path, caption=["a", "b", "c", "d", "e"], license=["CC-BY-4.0"] * 5).to_parquet(path)
    first = read(path, validation_share=0.0)
    assert [row.caption for row in first.train] == ["a", "b", "c", "d", "e"]
    assert first.reference().licence == "CC-BY-4.0"
    assert read(path, validation_share=0.0).train[0].file == first.train[0].file
    saved(tmp_path, caption=["z", "b", "c", "d", "e"]).to_parquet(path)
    assert read(path, validation_share=0.0).train[0].caption == "z"


def test_rows_without_a_picture_are_named(tmp_path: Path):
    path = tmp_path / "a.parquet"
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    images = [picture(0), None, picture(2)]
    datasets.Dataset.from_dict({"image": images, "text": ["a", "b", "c"]}, features=features).to_parquet(path)
    with pytest.raises(DataError, match=r"a.parquet:2:image: the row has no picture"):
        read(path)
    split = read(path, tolerant=True, validation_share=0.0)
    assert split.report.dropped == {"broken": 1}
    assert split.report.read == 3
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"holds no pictures: no column of .*b.parquet:1 .* Its columns are text"):
        read(tmp_path / "b.parquet")


def packed(folder: Path, path: Path, inside: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"{inside}{file.relative_to(folder)}")
    return path


@pytest.mark.parametrize("inside", ["", "my set/"])
def test_a_zip_is_read_as_its_folder(tmp_path: Path, inside: str):
    folder = picture_folder(tmp_path / "set", 4)
    path = packed(folder, tmp_path / "set.zip", inside)
    split = read(path, validation_share=0.0)
    assert [(row.content_hash, row.caption) for row in split.train] == [
        (row.content_hash, row.caption) for row in read(folder, validation_share=0.0).train
    ]
    assert split.train[0].origin == f"{path}/{inside}00.png"


def entry(name: str, *, mode: int = 0) -> zipfile.ZipInfo:
    found = zipfile.ZipInfo(name)
    found.external_attr = mode << 16
    return found


def zip_of(path: Path, entries: list[tuple[zipfile.ZipInfo, bytes]], **keys: Any) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, raw in entries:
            archive.writestr(info, raw, **keys)
    return path


@pytest.mark.parametrize(("entries", "problem"), [
    ([(entry("../evil.png"), b"x")], "leads outside"),
    ([(entry("/evil.png"), b"x")], "leads outside"),
    ([(entry("a\\..\\evil.png"), b"x")], "leads outside"),
    ([(entry("link.png", mode=stat.S_IFLNK | 0o777), b"/etc/passwd")], "holds a link"),
    ([(entry("a.txt"), b"x")], "holds no pictures"),
])  # fmt: skip
def test_hostile_zips_are_refused(tmp_path: Path, entries, problem: str):
    path = zip_of(tmp_path / "a.zip", entries)
    with pytest.raises(DataError, match=problem):
        read(path)
    assert not (tmp_path.parent / "evil.png").exists()
    assert not (tmp_path / "evil.png").exists()


def test_a_zip_that_unpacks_to_far_more_than_it_holds_is_refused(tmp_path: Path):
    path = zip_of(tmp_path / "a.zip", [(entry("a.bmp"), bytes(300 << 20))], compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match=r"a.zip' unpacks to 300 MiB, which no zip of pictures of 0 MiB does"):
        read(path)


def test_broken_zips_are_refused(tmp_path: Path):
    path = packed(picture_folder(tmp_path / "set", 3), tmp_path / "set.zip")
    raw = bytearray(path.read_bytes())
    raw[200:260] = bytes(60)
    path.write_bytes(raw)
    with pytest.raises(DataError, match="broken zip"):
        read(path)
    path.write_bytes(b"no zip")
    with pytest.raises(DataError, match="broken zip"):
        read(path)


KOHYA = """
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1

[[datasets]]
resolution = 128
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = 'hoge'
  class_tokens = 'hoge girl'

  [[datasets.subsets]]
  image_dir = 'fuga'
  class_tokens = 'fuga boy'
  keep_tokens = 3
  num_repeats = 10
  flip_aug = true
  caption_prefix = 'masterpiece,'
  caption_dropout_rate = 0.1

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'reg'
  class_tokens = 'human'
  keep_tokens = 1

[[datasets]]
resolution = [64, 64]
enable_bucket = false

  [[datasets.subsets]]
  image_dir = 'piyo'
  metadata_file = 'piyo/piyo_md.json'
"""


@pytest.fixture
def kohya(tmp_path: Path) -> Path:
    """The example of sd-scripts' documentation (config_README), with further keys."""
    for first, name in enumerate(("hoge", "fuga", "reg", "piyo")):
        (tmp_path / name).mkdir()
        for number in range(2):
            picture(10 * first + number, (160, 80)).save(tmp_path / name / f"{name}{number}.png")
    (tmp_path / "fuga" / "fuga0.txt").write_text("1boy, smile")
    told = {"piyo0": {"caption": "a chick", "tags": "yellow, small"}, "piyo1.png": {"tags": "bird"}}
    (tmp_path / "piyo" / "piyo_md.json").write_text(json.dumps(told))
    (tmp_path / "set.toml").write_text(KOHYA)
    return tmp_path / "set.toml"


def test_a_kohya_dataset_is_read_as_it_is(kohya: Path):
    split = read(kohya, validation_share=0.0, trigger="sks")
    rows = by_name(split)
    assert {name: row.caption for name, row in rows.items()} == {
        "hoge0": "hoge girl", "hoge1": "hoge girl", "fuga0": "masterpiece, 1boy, smile", "fuga1": "fuga boy",
        "reg0": "human", "reg1": "human", "piyo0": "a chick, yellow, small", "piyo1": "bird",
    }  # fmt: skip
    kept = {name: row.augmentation.keep_tokens for name, row in rows.items() if name.endswith("0")}
    assert kept == {"hoge0": 2, "fuga0": 3, "reg0": 1, "piyo0": 1}
    assert all(row.augmentation.shuffle_caption for row in rows.values())
    assert {name for name, row in rows.items() if row.prior} == {"reg0", "reg1"}
    assert {name for name, row in rows.items() if row.augmentation.flip} == {"fuga0", "fuga1"}
    assert (rows["fuga0"].repeats, rows["hoge0"].repeats) == (10, 1)
    assert rows["fuga0"].augmentation.caption_dropout == 0.1
    assert rows["hoge0"].augmentation.trigger == "sks"  # the file says nothing of it, so the recipe does
    assert rows["piyo0"].bucket == (64, 64)
    assert rows["hoge0"].bucket == (176, 80)  # of the buckets of 128 x 128 in steps of 16 the nearest to 2:1
    assert split.report.rows == {"train": 6, "validation": 0, "regularisation": 2}
    assert said(split, "Keys not used: batch_size = 4 (set the batch in the training section)")


@pytest.mark.parametrize(("old", "new", "problem"), [
    ("num_repeats", "num_repeat", "datasets 1, subset 2: 'num_repeat' is no key .*did you mean 'num_repeats'"),
    ("image_dir = 'hoge'", "image_dir = 'hogee'", "datasets 1, subset 1: there is no 'hogee'"),
    ("resolution = 128", "resolution = [128, 64]", "is no square; give the side of a square"),
    ("keep_tokens = 3", "keep_tokens = -3", "datasets 1, subset 2: keep_tokens: .*greater than or equal to 0"),
    ("[general]", "[generals]", "'generals' is not a part of a kohya dataset"),
    ("[general]", "[general", "not readable as TOML"),
    ("'piyo/piyo_md.json'", "'piyo/piyo0.png'", "not readable as JSON"),
    ("resolution = 128", "resolution = 130", "data.resolution is 130, .* give 128 or 136"),
])  # fmt: skip
def test_a_kohya_dataset_that_does_not_fit_is_refused(kohya: Path, old: str, new: str, problem: str):
    kohya.write_text(KOHYA.replace(old, new))
    with pytest.raises(DataError, match=problem):
        read(kohya)


def concept(path: str, **keys: Any) -> dict[str, Any]:
    """Return a concept as OneTrainer writes it (ConceptConfig.to_dict), most keys at their defaults."""
    image = {
        "__version": 0, "enable_crop_jitter": False, "enable_random_flip": False, "enable_fixed_flip": False,
        "enable_random_rotate": False, "enable_fixed_rotate": False, "random_rotate_max_angle": 0.0,
        "enable_resolution_override": False, "resolution_override": "512",
    }  # fmt: skip
    text = {"__version": 0, "prompt_source": "sample", "prompt_path": "", "enable_tag_shuffling": False,
            "tag_delimiter": ",", "keep_tags_count": 1, "tag_dropout_enable": False}  # fmt: skip
    return {
        "__version": 1, "image": image | keys.pop("image", {}), "text": text | keys.pop("text", {}), "name": path,
        "path": path, "seed": 1, "enabled": True, "validation_concept": False, "include_subdirectories": False,
        "image_variations": 1, "text_variations": 1, "balancing": 1.0, "balancing_strategy": "REPEATS",
        "loss_weight": 1.0, **keys,
    }  # fmt: skip


def concepts(tmp_path: Path, found: Any) -> Path:
    (tmp_path / "concepts.json").write_text(json.dumps(found))
    return tmp_path / "concepts.json"


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for first, name in enumerate(("one", "two", "three", "off")):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for number in range(3):
            path = tmp_path / name / ("deeper" if number == 2 else "") / f"{name} {number}.png"
            picture(10 * first + number).save(path)
            path.with_suffix(".txt").write_text(f"caption {name} {number}")
    (tmp_path / "prompt.txt").write_text("one for all\n")
    return tmp_path


def test_concepts_of_onetrainer_are_read_as_they_are(folders: Path):
    path = concepts(folders, [
        concept("one", image={"enable_random_flip": True, "enable_random_rotate": True}, balancing=3.0,
                loss_weight=0.5),
        concept("two", text={"prompt_source": "filename", "enable_tag_shuffling": True}, include_subdirectories=True),
        concept("three", text={"prompt_source": "concept", "prompt_path": "prompt.txt"}, validation_concept=True),
        concept("off", enabled=False),
    ])  # fmt: skip
    split = read(path)
    rows = by_name(split)
    assert {name: row.caption for name, row in rows.items()} == {
        "one 0": "caption one 0", "one 1": "caption one 1", "two 0": "two 0", "two 1": "two 1", "two 2": "two 2",
        "three 0": "one for all", "three 1": "one for all",
    }  # fmt: skip
    assert {row.caption for row in split.validation} == {"one for all"}
    assert (rows["one 0"].repeats, rows["one 0"].weight, rows["one 0"].augmentation.flip) == (3, 0.5, True)
    assert rows["two 0"].augmentation.shuffle_caption
    assert rows["two 0"].augmentation.keep_tokens == 1
    assert said(split, "enable_random_rotate = true (pictures are not turned)")
    assert said(split, "Concepts that are switched off, not read: off.")


def test_concepts_inside_a_configuration_and_numbers_of_samples(folders: Path):
    whole = {"concepts": [concept("one", balancing_strategy="SAMPLES", balancing=9), concept("two", balancing=0.4)]}
    split = read(concepts(folders, whole), validation_share=0.0)
    rows = by_name(split)
    assert rows["one 0"].repeats == 4  # 9 samples of 2 pictures are 4.5 each
    assert said(split, "concept one: each picture comes 4 times in an epoch; the file asks for 4.5 times")
    assert rows["two 0"].repeats == 1


@pytest.mark.parametrize(("keys", "problem"), [
    ({"pathh": "x"}, "concept one: 'pathh' is no key of a concept; did you mean 'path'"),
    ({"path": "nowhere"}, "there is no 'nowhere'"),
    ({"balancing": -1}, "balancing must be a number above 0, not -1"),
    ({"image": {"enable_resolution_override": True, "resolution_override": "512,768"}}, "must be one number"),
    ({"text": {"prompt_source": "other"}}, "prompt_source 'other' must be sample"),
    ({"enabled": False}, "has no concept that is switched on"),
])  # fmt: skip
def test_concepts_that_do_not_fit_are_refused(folders: Path, keys: dict[str, Any], problem: str):
    with pytest.raises(DataError, match=problem):
        read(
            concepts(
                folders,
                [concept("one") | keys if "image" not in keys and "text" not in keys else concept("one", **keys)],
            )
        )


def test_a_mask_folder_is_matched_by_name(tmp_path: Path):
    folder, masks = picture_folder(tmp_path / "set", 3), tmp_path / "masks"
    masks.mkdir()
    Image.new("L", (96, 96), 255).save(masks / "01.png")
    split = read(folder, validation_share=0.0, masks="files", mask_folder=str(masks))
    assert [row.mask for row in split.train] == [None, masks / "01.png", None]
    shutil.copy(masks / "01.png", masks / "01.webp")
    with pytest.raises(DataError, match=r"01.png and 01.webp are masks for one picture"):
        read(folder, masks="files", mask_folder=str(masks))
    with pytest.raises(DataError, match="there is no folder 'nowhere'"):
        read(folder, masks="files", mask_folder="nowhere")


def test_other_files_are_refused_by_kind(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="is of an unknown kind; give a folder of pictures"):
        read(tmp_path / "a.json")
