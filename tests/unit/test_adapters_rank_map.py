import re
from xml.etree import ElementTree

import pytest

from haori.adapters.rank_map import draw_ranks, ranks_svg
from haori.core.errors import StorageError

RANKS = {
    "model.layers.0.self_attn.q_proj": (1, 8, 4, 4),
    "model.layers.1.self_attn.q_proj": [4, 4, 4, 8],
    "model.layers.0.mlp.up_proj": 3,
    "model.layers.1.mlp.up_proj": (5,),
    "lm_head": 2,
}


def cells(svg):
    """Return {title: (x, y, fill)} of the cells."""
    found = {}
    for group in ElementTree.fromstring(svg).iter("g"):
        rect = group.find("rect")
        found[group.find("title").text] = (float(rect.get("x")), float(rect.get("y")), rect.get("fill"))
    return found


def test_every_head_is_a_cell_with_its_rank():
    drawn = cells(ranks_svg(RANKS, 4, "ranks"))
    assert set(drawn) == {
        *(f"model.layers.0.self_attn.q_proj, head {i}: rank {r}" for i, r in enumerate((1, 8, 4, 4))),
        *(f"model.layers.1.self_attn.q_proj, head {i}: rank {r}" for i, r in enumerate((4, 4, 4, 8))),
        "model.layers.0.mlp.up_proj: rank 3", "model.layers.1.mlp.up_proj: rank 5", "lm_head: rank 2",
    }  # fmt: skip


def test_later_layers_are_above_and_modules_beside_each_other():
    drawn = cells(ranks_svg(RANKS, 4, "ranks"))
    lower, upper = drawn["model.layers.0.mlp.up_proj: rank 3"], drawn["model.layers.1.mlp.up_proj: rank 5"]
    assert lower[0] == upper[0] and lower[1] > upper[1]
    first, second = (drawn[f"model.layers.0.self_attn.q_proj, head {i}: rank {r}"] for i, r in enumerate((1, 8)))
    assert first[1] == second[1] == lower[1] and first[0] < second[0] < lower[0]
    assert drawn["lm_head: rank 2"][1] > lower[1]  # in no layer: below them


def test_colours_tell_fewer_from_more():
    drawn = cells(ranks_svg(RANKS, 4, "ranks"))
    fewer = drawn["model.layers.0.self_attn.q_proj, head 0: rank 1"][2]
    same = drawn["model.layers.0.self_attn.q_proj, head 2: rank 4"][2]
    more = drawn["model.layers.0.self_attn.q_proj, head 1: rank 8"][2]
    assert (same, more) == ("#f1eee8", "#c4502e")
    red, _, blue = (int(fewer[i : i + 2], 16) for i in (1, 3, 5))
    assert blue > red


def test_names_are_escaped_and_modules_of_one_name_told_apart():
    svg = ranks_svg({"a.0.<q>": 1, "encoder.0.q": 2, "decoder.0.q": 2}, 2, '"label"')
    assert "<q>" not in svg and "&lt;q&gt;" in svg
    assert re.findall(r">(encoder\.q|decoder\.q)<", svg) == ["encoder.q", "decoder.q"]


def test_the_png_grows_with_the_layers(tmp_path):
    sizes = []
    for layers in (2, 12):
        ranks = {f"model.layers.{i}.self_attn.q_proj": [i + 1] * 4 for i in range(layers)}
        path = tmp_path / f"{layers}.png"
        draw_ranks(ranks, 4, path, "ranks")
        header = path.read_bytes()[:24]
        assert header.startswith(b"\x89PNG")
        sizes.append(int.from_bytes(header[20:24]))
    assert sizes[1] > sizes[0] + 100


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"ranks\.png"):
        draw_ranks(RANKS, 4, tmp_path / "file" / "ranks.png", "ranks")
