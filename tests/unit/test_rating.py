"""Blind ratings: pairs by chance, votes that last, results of known votes, and what a folder gives away."""

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from haori.core.errors import FileFormatError, InputError
from haori.evaluation.rating.pairs import PairKey, make_pairs
from haori.evaluation.rating.results import rating_results
from haori.evaluation.rating.session import RatedWork, Session, create_session
from haori.evaluation.rating.votes import Vote, read_votes, record_vote, standing
from haori.images.infotext import png_bytes
from haori.images.rated import found_systems, system_tags

PROMPTS = {f"item {number}": f"prompt {number}" for number in range(20)}


def plain(colour: Any, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_every_two_systems_meet_on_every_item_and_stand_on_both_sides_alike() -> None:
    pairs, keys = make_pairs(("a", "b", "c"), PROMPTS, seed=3)
    assert [pair.id for pair in pairs] == [key.id for key in keys] == [f"{number:03d}" for number in range(1, 61)]
    assert all(pair.prompt == PROMPTS[key.item] for pair, key in zip(pairs, keys, strict=True))
    meetings = Counter((frozenset((key.left, key.right)), key.item) for key in keys)
    assert len(meetings) == 60 and set(meetings.values()) == {1}
    sides = Counter((key.left, key.right) for key in keys)
    assert set(sides.values()) == {10} and len(sides) == 6
    assert make_pairs(("a", "b", "c"), PROMPTS, seed=3) == (pairs, keys)
    other = make_pairs(("a", "b", "c"), PROMPTS, seed=4)[1]
    assert [key.item for key in other] != [key.item for key in keys]
    # Which stands on the left does not follow from the order: neither system is there in a run of its own.
    lefts = [key.left for key in keys if {key.left, key.right} == {"a", "b"}]
    assert lefts != sorted(lefts) and lefts != sorted(lefts, reverse=True)


def test_fewer_pairs_are_spread_over_every_two_systems() -> None:
    keys = make_pairs(("a", "b", "c"), PROMPTS, seed=0, most=10)[1]
    met = Counter(frozenset((key.left, key.right)) for key in keys)
    assert sorted(met.values()) == [3, 3, 4]
    with pytest.raises(InputError, match="takes 3 at least"):
        make_pairs(("a", "b", "c"), PROMPTS, seed=0, most=2)
    with pytest.raises(InputError, match="at least two"):
        make_pairs(("a",), PROMPTS, seed=0)


def test_votes_last_and_the_last_one_stands(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    for choice in ("left", "right", "undo", "tie"):
        record_vote(path, Vote(pair="001", choice=choice))
    record_vote(path, Vote(pair="002", choice="left"))
    record_vote(path, Vote(pair="002", rater="ann", choice="skip"))
    record_vote(path, Vote(pair="001", choice="undo"))
    votes = read_votes(path, ["001", "002"])
    assert len(votes) == 7
    assert [(vote.pair, vote.rater, vote.choice) for vote in standing(votes)] == [
        ("002", "", "left"), ("002", "ann", "skip"),
    ]  # fmt: skip
    # The machine stopped within a line: that vote was not confirmed, and the next one is not swallowed.
    with path.open("a") as file:
        file.write('{"pair": "001", "cho')
    assert read_votes(path, ["001", "002"]) == votes
    record_vote(path, Vote(pair="001", choice="right"))
    assert [vote.choice for vote in read_votes(path, ["001", "002"])[7:]] == ["right"]


def test_foreign_lines_among_votes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    record_vote(path, Vote(pair="001", choice="left"))
    with pytest.raises(FileFormatError, match=r"Line 1 .* pair '001', which the session does not have"):
        read_votes(path, ["002"])
    path.write_text(path.read_text() + '{"pair": "001", "choice": "both"}\n')
    with pytest.raises(FileFormatError, match=r"Line 2 .* is no vote"):
        read_votes(path, ["001"])


def keyed(*meetings: tuple[str, str]) -> list[PairKey]:
    """Return a key with an item of its own for each pair."""
    return [
        PairKey(id=f"{number:03d}", item=f"item {number}", left=left, right=right)
        for number, (left, right) in enumerate(meetings)
    ]


def voted(keys: list[PairKey], choices: list[Any], rater: str = "") -> list[Vote]:
    return [Vote(pair=key.id, rater=rater, choice=choice) for key, choice in zip(keys, choices, strict=True)]


def test_wins_ties_and_sides_are_counted() -> None:
    keys = keyed(("a", "b"), ("b", "a"), ("a", "b"), ("b", "a"), ("a", "b"), ("b", "a"))
    found = rating_results(("a", "b"), keys, voted(keys, ["left", "right", "left", "left", "tie", "skip"]))
    (meeting,) = found.meetings
    assert (meeting.first, meeting.wins, meeting.losses, meeting.ties) == ("a", 3, 1, 1)
    assert meeting.share is not None and meeting.share.value == 0.75
    assert meeting.p_value == pytest.approx(10 / 16)  # 2 (1 + 4) / 2^4
    assert (found.votes, found.ties, found.skips, found.raters) == (6, 1, 1, 1)
    assert found.left is not None and found.left.value == 0.75
    # Half a win for both of a tie: log(3.5 / 1.5) apart.
    assert [one.system for one in found.strengths] == ["a", "b"]
    assert found.strengths[0].value - found.strengths[1].value == pytest.approx(math.log(3.5 / 1.5), abs=1e-8)


def test_intervals_of_strengths_hold_the_truth_as_often_as_they_say() -> None:
    """Votes are drawn with known strengths; of 95% intervals about 95% hold them."""
    chance = random.Random(5)
    truth = {"a": 0.5, "b": 0.0, "c": -0.5}
    keys = keyed(*[pair for _ in range(60) for pair in (("a", "b"), ("b", "c"), ("c", "a"))])
    held = total = 0
    for _ in range(60):
        choices = [
            "left" if chance.random() < 1 / (1 + math.exp(truth[key.right] - truth[key.left])) else "right"
            for key in keys
        ]
        for one in rating_results(("a", "b", "c"), keys, voted(keys, choices), resamples=300).strengths:
            assert one.low is not None and one.high is not None and one.low < one.value < one.high
            held += one.low <= truth[one.system] <= one.high
            total += 1
    assert total == 180 and 0.88 <= held / total <= 0.99


def test_what_has_no_finite_strength_is_said_in_a_sentence() -> None:
    keys = keyed(*[("a", "b")] * 5, ("b", "c"), ("c", "b"))
    found = rating_results(("a", "b", "c"), keys, voted(keys, ["left"] * 7))
    assert found.strengths == ()
    assert "a neither lost nor tied against b and c" in found.notes[0]
    apart = keyed(("a", "b"), ("b", "a"))
    found = rating_results(("a", "b", "c"), apart, voted(apart, ["left", "left"]))
    assert "c and a have not been compared" in found.notes[0]
    few = keyed(("a", "b"), ("a", "b"), ("a", "b"))
    found = rating_results(("a", "b"), few, voted(few, ["left", "left", "right"]))
    assert found.strengths[0].low is None and "no intervals" in found.notes[0]
    dozen = keyed(*[("a", "b")] * 12)
    found = rating_results(("a", "b"), dozen, voted(dozen, ["left", "right"] * 6))
    assert found.strengths[0].low is not None and "over 12 prompts with seeds; of fewer than 20" in found.notes[0]
    assert rating_results(("a", "b"), few, []).notes == ("There are no votes yet.",)


def test_a_liking_for_one_side_is_told() -> None:
    keys = keyed(*[("a", "b"), ("b", "a")] * 15)
    biased = rating_results(("a", "b"), keys, voted(keys, ["left"] * 30))
    assert any(note.startswith("The left side was chosen more often") for note in biased.notes)
    fair = rating_results(("a", "b"), keys, voted(keys, ["left", "right"] * 15))
    assert not any("side" in note for note in fair.notes)


def test_a_session_gives_nothing_away_but_its_key(tmp_path: Path) -> None:
    work = RatedWork(systems={"secretly": "<lora:ink:1>", "hidden": "base"}, prompts=PROMPTS)
    pictures = {
        name: {item: plain((at * 10, colour, 0)) for at, item in enumerate(PROMPTS)}
        for name, colour in (("secretly", 0), ("hidden", 255))
    }
    for found in pictures.values():
        for image in found.values():
            image.info["parameters"] = "<lora:ink:1>"
    made = create_session(tmp_path / "session", work, pictures, seed=1)
    key = made.key()
    for entry in key.pairs:
        for side, name in (("left", entry.left), ("right", entry.right)):
            with Image.open(tmp_path / "session" / "pairs" / f"{entry.id}-{side}.png") as image:
                assert image.getpixel((0, 0)) == pictures[name][entry.item].getpixel((0, 0))
                assert image.info == {}
    with Image.open(made.picture(made.document.pairs[0])) as sheet:
        first = key.pairs[0]
        left, right = (pictures[name][first.item].getpixel((0, 0)) for name in (first.left, first.right))
        middle = sheet.height // 2 + 20
        assert (sheet.getpixel((sheet.width // 4, middle)), sheet.getpixel((3 * sheet.width // 4, middle))) == (
            left,
            right,
        )
    seen = [path for path in (tmp_path / "session").rglob("*") if path.is_file() and "key" not in path.parts]
    assert len(seen) == 61
    for path in seen:
        assert not any(word in path.read_bytes() for word in (b"secretly", b"hidden", b"ink", b"seed"))
    with pytest.raises(InputError, match="exists; choose a new folder"):
        create_session(tmp_path / "session", work, pictures, seed=1)


def test_pictures_that_are_the_same_are_told_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    work = RatedWork(systems={"a": "", "b": ""}, prompts={"x": "x"})
    made = create_session(tmp_path / "one", work, {"a": {"x": plain("red")}, "b": {"x": plain("red")}}, seed=0)
    assert "In 1 of 1 pairs both pictures are the same" in made.key().notes[0]
    with pytest.raises(KeyError):
        create_session(tmp_path / "two", work, {"a": {"x": plain("red")}, "b": {}}, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    with pytest.raises(InputError, match="is no session"):
        Session(tmp_path / "two")
    (tmp_path / "one" / "session.json").write_text("{")
    with pytest.raises(FileFormatError, match="is damaged"):
        Session(tmp_path / "one")


def test_systems_are_read() -> None:
    assert system_tags("base") == ("base", "")
    assert system_tags("lineart:0.7") == ("lineart:0.7", "<lora:lineart:0.7>")
    assert system_tags("both = a:0.4+b:0.6") == ("both", "<lora:a:0.4><lora:b:0.6>")
    assert system_tags("<lora:a:te=0.5:unet=1>") == ("<lora:a:te=0.5:unet=1>",) * 2
    assert system_tags("mine=<lora:a:te=0.5>") == ("mine", "<lora:a:te=0.5>")
    for wrong in ("a:nan", "x=", "", "a:0.5:1:2:3", "<hypernet:a:1>"):
        with pytest.raises(InputError):
            system_tags(wrong)


def written(folder: Path, *pictures: tuple[str, str, int], suffix: str = "") -> Path:
    folder.mkdir()
    for name, prompt, seed in pictures:
        text = f"{prompt}\nSteps: 2, Seed: {seed}"
        (folder / name).write_bytes(png_bytes(plain((seed, 0, 0)), text) if prompt else png_bytes(plain("red"), ""))
    return folder


def test_folders_are_paired_by_prompt_and_seed_or_by_name(tmp_path: Path) -> None:
    one = written(tmp_path / "one", ("1.png", "a cat", 1), ("2.png", "a cat", 2), ("3.png", "a dog", 1))
    two = written(tmp_path / "two", ("7.png", "a  cat <lora:x:1>", 2), ("8.png", "a cat <lora:x:1>", 1))
    found = found_systems({"one": one, "two": two})
    assert found.prompts == {"a cat | seed 1": "a cat", "a cat | seed 2": "a cat"}
    assert found.pictures["two"]["a cat | seed 2"].getpixel((0, 0)) == (2, 0, 0)
    assert "1 pictures have no counterpart" in found.notes[0] and "3.png" in found.notes[0]
    three = written(tmp_path / "three", ("1.png", "", 0), ("9.png", "", 0))
    by_name = found_systems({"one": one, "three": three})
    assert list(by_name.prompts) == ["1"] and by_name.prompts["1"] == ""
    with pytest.raises(InputError, match="of the same file name"):
        found_systems({"two": two, "three": three})
    twice = written(tmp_path / "twice", ("1.png", "a cat", 1), ("2.png", "a cat <lora:y:1>", 1))
    with pytest.raises(InputError, match="the same prompt and seed"):
        found_systems({"one": one, "twice": twice})
    with pytest.raises(InputError, match="is no folder"):
        found_systems({"one": one, "none": tmp_path / "none"})


def test_results_are_json_that_is_read_again(tmp_path: Path) -> None:
    from haori.evaluation.rating.results import RatingResults

    keys = keyed(*[("a", "b"), ("b", "a")] * 20)
    choices = np.random.default_rng(0).choice(["left", "right", "tie"], 40).tolist()
    found = rating_results(("a", "b"), keys, voted(keys, choices))
    assert RatingResults.model_validate_json(found.model_dump_json()) == found
    assert json.loads(found.model_dump_json())["meetings"][0]["share"][0] == found.meetings[0].share.value
