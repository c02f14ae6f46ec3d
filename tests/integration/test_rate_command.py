"""`haori rate` as a rater uses it: pictures drawn or found, votes typed, stopped and taken up again, results."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.command_line import Done, haori


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Any:
    def answers(*lines: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))

    answers()
    return answers


def folder_of(path: Path, colour: str, names: str = "abcd") -> Path:
    path.mkdir()
    for number, name in enumerate(names):
        Image.new("RGB", (16, 16), colour).rotate(number).save(path / f"{name}.png")
    return path


def sides(session: Path, name: str) -> list[str]:
    """Return on which side a system stands in each pair, as one who votes for it would type it."""
    pairs = json.loads((session / "key" / "key.json").read_text())["pairs"]
    return ["left" if pair["left"] == name else "r" for pair in pairs]


def flat(done: Done) -> str:
    return " ".join((done.out + done.err).split())


def test_pictures_of_folders_are_rated_in_two_sittings(tmp_path: Path, typed: Any, capsys: Any) -> None:
    red, blue = folder_of(tmp_path / "red", "red"), folder_of(tmp_path / "blue", "blue")
    session = tmp_path / "session"
    done = haori(capsys, "rate", session, "--folder", red, "--folder", f"better={blue}", "--order", "1")
    assert done.code == 0 and "4 pairs are in" in flat(done) and "0 of 4 pairs are rated" in flat(done)
    choices = sides(session, "better")
    typed(choices[0], "what", "u", choices[0], "t", "q")
    done = haori(capsys, "rate", session)
    assert done.code == 0 and "2 of 4 pairs are rated. Go on: haori rate" in flat(done)
    assert "'what' is no answer" in flat(done) and str(session / "pairs" / "001.png") in done.out
    assert not re.search(r"\bred\b|\bbetter\b(?!\?)", done.out)  # nobody is named before the last vote
    votes = [json.loads(line)["choice"] for line in (session / "votes.jsonl").read_text().splitlines()]
    first = "left" if choices[0] == "left" else "right"
    assert votes == [first, "undo", first, "tie"]
    typed(choices[2], "s")
    done = haori(capsys, "rate", session)
    text = flat(done)
    assert done.code == 0 and "3 votes of 1 person on 4 pairs (ties: 1); passed over: 1." in text
    results = json.loads((session / "results.json").read_text())
    assert [(one["first"], one["wins"], one["losses"], one["ties"]) for one in results["meetings"]] == [
        ("red", 0, 2, 1)
    ]
    assert results["strengths"][0]["system"] == "better"
    again = haori(capsys, "rate", session, "--report")
    assert again.code == 0 and flat(again) == text.rpartition("[q]uit: ")[2]


def test_systems_are_drawn_on_the_same_prompts_and_seeds(tmp_path: Path, typed: Any, capsys: Any) -> None:
    from haori.bases import find_base
    from haori.images.generation import PictureGenerator
    from haori.images.request import PictureRequest
    from haori.library import Library
    from tests.mixed_files import every_kind

    generator = PictureGenerator(find_base("emoji-sd"))
    components = {"unet": generator.pipeline.unet, "text_encoder": generator.pipeline.text_encoder}
    every_kind(components, 1).save(tmp_path / "Lora" / "ink.safetensors")
    Library().mounts.add(tmp_path / "Lora")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("noto red heart\n\nfluent pizza\n")
    session = tmp_path / "session"
    done = haori(
        capsys, "rate", session, "--system", "base", "--system", "half=ink:0.5", "--base", "emoji-sd",
        "--prompts", prompts, "--seeds", "1..2", "--steps", "2", "--guidance", "3", "--rater", "ann",
    )  # fmt: skip
    assert done.code == 0, done.err
    key = json.loads((session / "key" / "key.json").read_text())
    assert key["systems"] == {"base": "", "half": "<lora:ink:0.5>"} and len(key["pairs"]) == 4
    expected = generator.draw([PictureRequest("fluent pizza", seed=2, steps=2, guidance=3.0)])[0].image
    (pair,) = (pair for pair in key["pairs"] if pair["item"] == "fluent pizza | seed 2")
    side = "left" if pair["left"] == "base" else "right"
    with Image.open(session / "pairs" / f"{pair['id']}-{side}.png") as found:
        differences = [abs(a - b) for a, b in zip(found.tobytes(), expected.tobytes(), strict=True)]
    assert max(differences) <= 1  # another batch
    kept = sorted((session / "key" / "drawn" / "2").iterdir())
    with Image.open(kept[-1]) as image:
        assert (
            image.info["parameters"].startswith("fluent pizza <lora:ink:0.5>\n")
            and "Seed: 2" in image.info["parameters"]
        )


def test_wrong_input_is_answered_in_a_sentence(tmp_path: Path, typed: Any, capsys: Any) -> None:
    red, blue = folder_of(tmp_path / "red", "red"), folder_of(tmp_path / "blue", "blue", "ef")
    session = tmp_path / "session"
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for arguments, sentence in (
        ([], "is no session of ratings"),
        (["--report"], "is no session of ratings"),
        (["--folder", red], "at least twice"),
        (["--folder", red, "--folder", red], "Two folders are called 'red'"),
        (["--folder", red, "--folder", blue], "No picture has its counterpart of the same file name"),
        (["--folder", red, "--folder", blue, "--steps", "3"], "--steps is for drawing"),
        (["--folder", red, "--folder", blue, "--system", "base"], "--system is for drawing"),
        (["--folder", red, "--folder", tmp_path / "none"], "is no folder of pictures"),
        (["--system", "base"], "two systems or more"),
        (["--system", "base", "--system", "base"], "names of their own"),
        (["--system", "base", "--system", "x:0.5"], "--base emoji-sd --prompt"),
        (["--system", "base", "--system", "x:nan", "--base", "emoji-sd", "--prompt", "a"], "'nan'"),
        (["--system", "base", "--system", "x", "--base", "emoji-sd", "--prompt", "a", "--seeds", "b"], "seed"),
        (["--system", "base", "--system", "x", "--base", "emoji-sd", "--prompts", tmp_path / "binary"], "UTF-8"),
        (["--report", "--system", "base"], "--system is for a new session"),
        (["--system", "base", "--system", "nobody", "--base", "emoji-sd", "--prompt", "a"], "'nobody'"),
    ):
        done = haori(capsys, "rate", session, *arguments)
        assert done.code == 2 and sentence in flat(done), f"{arguments}\n{done.err}"
        assert "Traceback" not in done.err and not session.exists()
    assert (
        haori(capsys, "rate", session, "--folder", red, "--folder", folder_of(tmp_path / "ab", "green", "ab")).code == 0
    )
    done = haori(capsys, "rate", session, "--pairs", "2")
    assert done.code == 2 and "--pairs is for a new session" in flat(done)
    (session / "votes.jsonl").write_text("no vote\n")
    done = haori(capsys, "rate", session)
    assert done.code == 2 and "Line 1 of" in flat(done)
