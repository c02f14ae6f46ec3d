"""Retrieval, nearest styles and KID on planted features; the network's features against another implementation."""

import numpy as np
import pytest
from PIL import Image

from haori.metrics.picture_features import PictureFeatures
from haori.metrics.pictures import kernel_inception_distance, nearest_labels, retrieval

RNG = np.random.default_rng(0)
REAL = RNG.normal(size=(40, 16)) + 5.0  # 20 subjects in two styles, with a large direction common to all
SUBJECTS = [f"s{place // 2}" for place in range(40)]


def test_a_picture_like_the_wanted_subject_is_retrieved_in_any_style():
    wanted = SUBJECTS[1::2]
    assert retrieval(REAL[1::2] + 0.01, wanted, REAL, SUBJECTS) == (1.0, 1.0)


def test_one_wrong_picture_in_ten_is_counted():
    queries, wanted = REAL[::2][:10].copy(), SUBJECTS[::2][:10]
    queries[3] = REAL[30]
    found = retrieval(queries, wanted, REAL, SUBJECTS)
    assert found.first == pytest.approx(0.9)
    assert found.in_five <= 1.0


def test_the_top_five_are_five_labels_not_five_pictures():
    # Six pictures of "a" are nearest; "b" is the second label, "f" the sixth.
    angles = np.radians([0, 1, 2, 3, 4, 5, 10, 20, 30, 40, 50])
    references = np.stack([np.cos(angles), np.sin(angles)], 1)
    balanced = np.concatenate([references, -references])  # their mean is 0, so that angles stay
    labels = [*"aaaaaabcdef", *("z" * 11)]
    assert nearest_labels(references[:1], balanced, labels, count=5) == [["a", "b", "c", "d", "e"]]
    assert retrieval(references[:1], ["f"], balanced, labels) == (0.0, 0.0)
    assert retrieval(references[:1], ["b"], balanced, labels) == (0.0, 1.0)


def test_kid_is_the_unbiased_estimate_of_its_paper():
    x, y = RNG.normal(size=(7, 3)), RNG.normal(size=(5, 3)) + 1

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3

    same_x = sum(kernel(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    same_y = sum(kernel(y[i], y[j]) for i in range(5) for j in range(5) if i != j) / (5 * 4)
    across = sum(kernel(a, b) for a in x for b in y) / 35
    assert kernel_inception_distance(x, y) == pytest.approx(same_x + same_y - 2 * across, rel=1e-12)


def test_kid_is_about_0_between_two_samples_of_one_distribution_and_negative_half_the_time():
    draws = [kernel_inception_distance(RNG.normal(size=(20, 8)), RNG.normal(size=(20, 8))) for _ in range(200)]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / np.sqrt(200)
    assert 0.2 < np.mean(np.array(draws) < 0) < 0.8


@pytest.mark.slow
def test_the_features_are_those_of_the_implementation_the_weights_were_converted_with():
    y, x = np.mgrid[0:224, 0:224]
    picture = Image.fromarray(np.stack([x % 256, (x * y) % 251, (y * 2) % 256], -1).astype(np.uint8))
    features = PictureFeatures.load().features([picture, picture.resize((64, 64))])
    assert features.shape == (2, 1280)
    # efficientnet-lite-pytorch 0.1.0, extract_features().mean((2, 3)) of the same pixels
    expected = [0.41247281, 0.0, 0.33610776, 0.0, 0.0, 0.0013472389, 0.0, 0.38831776]
    np.testing.assert_allclose(features[0, :8], expected, atol=1e-5)
    assert features[0].sum().item() == pytest.approx(263.85144, abs=1e-2)
