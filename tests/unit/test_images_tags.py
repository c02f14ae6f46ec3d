"""Tags of adapters in prompts: the web UI's grammar, read strictly."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haori.core.errors import InputError
from haori.images.tags import AdapterTag, Schedule, parse_prompt


def a1111(prompt):
    """Read a prompt as the web UI 1.10.1 does (modules/extra_networks.py and extensions-builtin/Lora)."""
    found = []

    def take(match):
        positional, named = [], {}
        for item in match[2].split(":"):
            parts = item.split("=", 2)
            if len(parts) == 2:
                named[parts[0]] = parts[1]
            else:
                positional.append(item)
        te = float(positional[1]) if len(positional) > 1 else 1.0
        te = float(named.get("te", te))
        unet = float(positional[2]) if len(positional) > 2 else te
        unet = float(named.get("unet", unet))
        found.append((positional[0], te, unet))
        return ""

    text = re.sub(r"<(\w+):([^>]+)>", take, prompt)
    return text, found


READ = [
    "a cat",
    "a cat <lora:lineart:0.7>, smiling",
    "<lora:a>cat",
    "a <lora:style one:0.4> b <lyco:two.v2:0.6:0.2> c",
    "<lora:x:te=0.5:unet=0.8>",
    "<lora:x:0.5:unet=0.8>",
    "<lora:te=0.25:x>",
    "<lora:x:0.5:te=0.25>",
    "<lora:x:0.5:0.8:te=0.25>",
    "<lora:x:-1.5>",
    "<lora:x: .5 >",
    "<lora:x:1e-1:2.>",
    "<lora:猫/線画@2:0.7> 猫",
    "I <3 you, 1 < 2 > 0",
    "<lora:x:0.5><lora:x:0.25>",
    "",
]


@pytest.mark.parametrize("prompt", READ)
def test_what_the_web_ui_reads_is_read_as_there(prompt):
    text, found = a1111(prompt)
    read = parse_prompt(prompt)
    assert read.text == text
    assert [(tag.name, tag.text_encoder, tag.unet) for tag in read.tags] == found
    assert all(tag.schedule is None for tag in read.tags)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("<lora:x:nan>", "'nan' where a number"),
        ("<lora:x:inf>", "'inf' where a number"),
        ("<lora:x:-inf>", "'-inf' where a number"),
        ("<lora:x:1e9>", "strength 1e+09"),
        ("<lora:x:1e999>", "where a number"),
        ("<lora:x:0x1>", "'0x1' where a number"),
        ("<lora:x:1_0>", "where a number"),
        ("<lora:x:٣>", "where a number"),
        ("<lora:x:>", "'' where a number"),
        ("<lora:x:strong>", "'strong' where a number"),
        ("<lora:x:0,7>", "without its place"),
        ("<lora:x:te=:unet=1>", "'' where a number"),
        ("<lora:x:te=0.5@0,1@1>", "only be the denoiser's"),
        ("<lora:<lora:x:1>:1>", "'<' inside"),
        ("<lora:x:1", "not closed"),
        ("<lora::1>", "names no adapter"),
        ("<lora:>", "names no adapter"),
        ("<lora:te=1>", "names no adapter"),
        ("<hypernet:x:1>", "hypernetwork"),
        ("<LoRA:x:1>", "did you mean 'lora'"),
        ("<foo:x:1>", "unknown kind of network 'foo'"),
        ("<lora:x:unett=1>", "did you mean 'unet'"),
        ("<lora:x:te=1:te=2>", "sets 'te' twice"),
        ("<lora:x:1:1:4>", "haori resize"),
        ("<lora:x:dyn=4>", "haori resize"),
        ("<lora x:1>", "looks like a tag"),
        ("< lora:x:1>", "looks like a tag"),
        ("<lora>", "looks like a tag"),
        ("<lora:x:1@0.5,0@0.2>", "do not rise"),
        ("<lora:x:1@0,0@2>", "do not rise"),
        ("<lora:x:1@-1,0@1>", "do not rise"),
        ("<lora:x:1@0,0>", "without its place"),
        ("<lora:x:1@nan>", "where a number"),
        ("<lora:x:" + ",".join(["1@0.5"] * 65) + ">", "65 points"),
        ("<lora:x:1>" * 65, "more than 64"),
        ("a" * 10_000, "10,000 characters"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(prompt, said):
    with pytest.raises(InputError) as error:
        parse_prompt(prompt)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_lenient_reading_leaves_bad_tags_out_and_says_so():
    read = parse_prompt("a <lora:x:nan> b <lora:y:0.5> c <foo:z> <lora:open", lenient=True)
    assert read.text == "a  b  c  "
    assert read.tags == (AdapterTag("y", 0.5, 0.5),)
    assert len(read.notes) == 3
    assert all("left out" in note for note in read.notes)
    with pytest.raises(InputError):
        parse_prompt("a" * 10_000, lenient=True)


def test_schedules_go_straight_between_points_and_jump_at_doubled_ones():
    ramp = parse_prompt("<lora:x:0@0,0.8@0.5>").tags[0]
    assert (ramp.text_encoder, ramp.unet) == (0.0, 0.0)
    assert ramp.schedule is not None
    assert [ramp.schedule.at(share) for share in (0, 0.25, 0.5, 1)] == pytest.approx([0, 0.4, 0.8, 0.8])
    jump = Schedule(((0.2, 1.0), (0.5, 1.0), (0.5, 0.0)))
    assert [jump.at(share) for share in (0, 0.49, 0.5, 1)] == [1, 1, 0, 0]
    apart = parse_prompt("<lora:x:te=0.3:unet=1@0,0@1>").tags[0]
    assert (apart.text_encoder, apart.unet) == (0.3, 1.0)
    assert parse_prompt("<lora:x:0.5@0.3>").tags == (AdapterTag("x", 0.5, 0.5),)


@given(st.text(max_size=200) | st.text(alphabet="<>:=@,.lora1e-n ", max_size=80))
def test_any_text_is_read_or_refused_and_lenient_reading_never_fails(text):
    read = parse_prompt(text, lenient=True)
    assert len(read.text) <= len(text)
    try:
        strict = parse_prompt(text)
    except InputError:
        assert read.notes
    else:
        assert strict == read
        assert strict.text == re.sub(r"<(\w+):([^>]+)>", "", text)
