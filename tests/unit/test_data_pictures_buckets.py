"""Buckets and crops: sizes that fit the base, areas kept, shapes kept as far as they can be."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haori.core.errors import DataError
from haori.data.pictures.buckets import bucket_of, buckets_of, cover, sizes_for
from tests.pictures import section_of


def test_the_buckets_of_512_are_those_of_novelai():
    """Written down by hand: the greatest height in steps of 64 with at most 512 x 512 pixels, for each width."""
    assert set(buckets_of(512, 64, 4.0)) == {
        (512, 512), (576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256),
        (448, 576), (384, 640), (320, 704), (320, 768), (256, 832), (256, 896), (256, 960), (256, 1024),
    }  # fmt: skip


@given(side=st.integers(1, 32).map(lambda n: n * 64), step=st.sampled_from([8, 16, 32, 64]), aspect=st.floats(1, 4))
def test_buckets_keep_the_area_and_come_in_both_orientations(side: int, step: int, aspect: float):
    sizes = buckets_of(side, step, aspect)
    assert (side, side) in sizes
    for width, height in sizes:
        assert width % step == height % step == 0
        assert width * height <= side * side
        assert width * height > side * side - max(width, height) * step
        assert max(width, height) <= min(width, height) * aspect
        assert (height, width) in sizes


@given(width=st.integers(1, 8000), height=st.integers(1, 8000))
def test_a_picture_gets_the_bucket_of_the_nearest_shape(width: int, height: int):
    sizes = buckets_of(512, 64, 2.0)
    chosen = bucket_of(width, height, sizes)

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log2(size[0] * height / (size[1] * width)))

    assert distance(chosen) <= min(map(distance, sizes)) + 1e-8


@given(
    width=st.integers(1, 6000), height=st.integers(1, 6000),
    bucket=st.sampled_from(buckets_of(256, 32, 2.0)), across=st.floats(0, 1), down=st.floats(0, 1),
)  # fmt: skip
def test_a_crop_lies_inside_and_cuts_one_side_only(width, height, bucket, across, down):
    crop = cover(width, height, bucket, (across, down))
    assert crop.scaled[0] == bucket[0] or crop.scaled[1] == bucket[1]
    for place, whole, part in zip((crop.left, crop.top), crop.scaled, bucket, strict=True):
        assert 0 <= place <= whole - part
    factor = max(bucket[0] / width, bucket[1] / height)
    assert abs(crop.scaled[0] - width * factor) <= 1
    assert abs(crop.scaled[1] - height * factor) <= 1
    assert crop.mirrored(bucket).mirrored(bucket) == crop


def test_the_middle_is_cut_out_by_default_and_another_point_as_far_as_it_goes():
    assert cover(200, 100, (64, 64)).left == 32
    assert cover(200, 100, (64, 64), (0.9, 0.5)).left == 64
    assert cover(100, 200, (64, 64), (0.5, 0.3)).top == 6  # 0.3 of 128 is 38.4, less half a bucket


def test_steps_are_an_eighth_of_small_resolutions():
    assert sizes_for(section_of("x", buckets=False), 64, 8) == [(64, 64)]
    small = sizes_for(section_of("x"), 64, 8)
    assert (72, 56) in small
    assert all(side % 8 == 0 for size in small for side in size)
    assert (576, 448) in sizes_for(section_of("x"), 512, 8)


@pytest.mark.parametrize(("keys", "said"), [
    ({"resolution": 500}, "data.resolution is 500, .* divide by 8; give 496 or 504"),
    ({"bucket_step": 20}, "data.bucket_step is 20, .* divide by 8; give 16 or 24"),
    ({"resolution": 4}, "data.resolution is 4, .* give 8"),
])  # fmt: skip
def test_sizes_that_do_not_divide_are_refused(keys, said):
    with pytest.raises(DataError, match=said):
        sizes_for(section_of("x", **keys), 512, 8)
