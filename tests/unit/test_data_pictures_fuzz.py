"""Whatever stands in the files of other tools, the answer is a listing or a sentence, never a traceback."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from haori.core.errors import DataError
from haori.data.pictures import kohya, onetrainer
from haori.data.pictures.sources import list_pictures
from tests.pictures import picture, section_of

ODD = (
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5)
    | st.lists(st.integers(-2, 9), max_size=3) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)  # fmt: skip
FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture(1, (8, 8)).save(tmp_path / "a.png")
    return tmp_path


def toml(value: Any) -> str | None:
    """Return a value as TOML has it; None for what it cannot say."""
    if value is None or (isinstance(value, int) and not -(2**63) <= value < 2**63):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {item}" for key, item in value.items()) + " }"
    return json.dumps(value)


def answered(path: Path) -> None:
    try:
        listing = list_pictures(section_of(path), str(path))
    except DataError as error:
        assert str(error)
        assert "Traceback" not in str(error)
    else:
        for file in listing.files:
            assert file.caption() is None or isinstance(file.caption(), str)
            assert file.repeats >= 1


@FEW
@given(
    key=st.sampled_from(sorted({*kohya._SAME, *kohya._NUMBERS, *kohya._OWN, *kohya._UNUSED})),
    value=ODD,
    place=st.integers(0, 2),
)
def test_any_value_in_a_kohya_dataset(folder: Path, key: str, value: Any, place: int):
    said = toml(value)
    if said is None:
        return
    line = f"{json.dumps(key)} = {said}\n"
    own = "" if key == "image_dir" and place == 2 else "image_dir = '.'\n"
    parts = ["[general]\n", "[[datasets]]\n", f"[[datasets.subsets]]\n{own}"]
    parts[place] += line
    (folder / "a.toml").write_text("".join(parts), encoding="utf-8")
    answered(folder / "a.toml")


@FEW
@given(
    part=st.sampled_from(["", "image", "text"]), value=ODD,
    number=st.integers(0, 60),
)  # fmt: skip
def test_any_value_in_a_concept(folder: Path, part: str, value: Any, number: int):
    known = {
        "": {*onetrainer._OWN, *onetrainer._UNUSED},
        "image": {*onetrainer._IMAGE_OWN, *onetrainer._IMAGE_UNUSED},
        "text": {*onetrainer._TEXT_OWN, *onetrainer._TEXT_UNUSED},
    }[part]
    key = sorted(known)[number % len(known)]
    concept: dict[str, Any] = {"path": ".", "image": {"enable_resolution_override": number % 2 == 0}, "text": {}}
    (concept[part] if part else concept)[key] = value
    (folder / "a.json").write_text(json.dumps([concept]), encoding="utf-8")
    answered(folder / "a.json")


@FEW
@given(
    row=st.dictionaries(
        st.sampled_from(["file_name", "text", "caption", "license", "x"]), ODD | st.just("a.png"), max_size=4
    )
)
def test_any_row_of_metadata(folder: Path, row: dict[str, Any]):
    (folder / "metadata.jsonl").write_text(f"{json.dumps(row)}\n", encoding="utf-8")
    answered(folder)


@FEW
@given(raw=st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
def test_any_bytes_as_a_caption(folder: Path, raw: bytes):
    (folder / "a.txt").write_bytes(raw)
    [file] = list_pictures(section_of(folder), str(folder)).files
    try:
        caption = file.caption()
    except DataError as error:
        assert "a.txt" in str(error)
    else:
        assert caption is None or caption.strip() == caption
