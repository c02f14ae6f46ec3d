"""KID over subsets, FID, the Inception Score, memorisation and group bootstrap, against formulas written out here."""

import itertools

import numpy as np
import pytest
from scipy import linalg

from haori.core.errors import InputError
from haori.evaluation.bootstrap import intervals
from haori.metrics.memorisation import closeness
from haori.metrics.picture_sets import KernelDistance, PairMean, frechet_distance, inception_score, kid_over_subsets
from haori.metrics.pictures import kernel_inception_distance
from haori.metrics.statistics import mean_sums
from tests.picture_networks import tiny_clip

RNG = np.random.default_rng(7)
SET = RNG.normal(size=(400, 12))


def test_kid_of_two_halves_of_one_set_is_about_0_and_of_a_shifted_half_is_not():
    halves = kid_over_subsets(SET[:200], SET[200:], size=50)
    shifted = kid_over_subsets(SET[:200], SET[200:] + 0.3, size=50)
    assert halves.size == 50 and abs(halves.mean) < 2 * halves.spread
    assert shifted.mean > 4 * abs(halves.mean) and shifted.mean > shifted.spread
    # The population value of the shifted one, from many more numbers of the same distributions.
    x, y = RNG.normal(size=(3000, 12)), RNG.normal(size=(3000, 12)) + 0.3
    assert shifted.mean == pytest.approx(kernel_inception_distance(x, y), rel=0.25)


def test_the_spread_is_that_of_subsets_drawn_again():
    found = kid_over_subsets(SET[:40], SET[40:80], subsets=400, size=10, seed=1)
    draw = np.random.default_rng(99)
    own = [
        kernel_inception_distance(draw.permutation(SET[:40])[:10], draw.permutation(SET[40:80])[:10])
        for _ in range(400)
    ]
    assert found.spread == pytest.approx(np.std(own), rel=0.15)
    assert found.mean == pytest.approx(np.mean(own), abs=3 * np.std(own) / 20)
    assert kid_over_subsets(SET[:40], SET[40:80]).size == 20, "half of the smaller set"


@pytest.mark.parametrize(("size", "count"), [(None, 3), (1, 50), (51, 50)])
def test_kid_over_subsets_that_cannot_be_drawn(size, count):
    with pytest.raises(InputError, match="KID over subsets needs"):
        kid_over_subsets(SET[:count], SET, size=size)


def fid_by_sqrtm(x, y):
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(first @ second).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)


def test_fid_is_that_of_scipys_matrix_root():
    mixing = RNG.normal(size=(12, 12))
    other = SET[:150] @ mixing + 0.5
    assert frechet_distance(SET, other, force=True) == pytest.approx(fid_by_sqrtm(SET, other), rel=1e-9)
    many = RNG.normal(size=(2048, 3))
    assert frechet_distance(many, many + np.array([1, 0, 2])) == pytest.approx(5.0, rel=1e-9), "only the means differ"
    assert frechet_distance(SET, SET, force=True) == pytest.approx(0, abs=1e-9)


def test_fid_of_singular_covariances_is_finite():
    few = RNG.normal(size=(6, 12))
    assert 0 < frechet_distance(few, SET[:5], force=True) < 100


def test_fid_of_too_few_pictures_is_refused_with_the_reason():
    many = RNG.normal(size=(2048, 3))
    with pytest.raises(InputError, match=r"needs 2,048 pictures on each side and there are 2,047: .* too high"):
        frechet_distance(many, many[1:])


def test_the_inception_score_is_its_formula_and_counts_rows_as_often_as_they_are_drawn():
    classes = RNG.dirichlet(np.full(5, 0.3), size=20)

    def written_out(shares):
        whole = shares.mean(0)
        return np.exp(np.mean([sum(p * np.log(p / q) for p, q in zip(row, whole, strict=True)) for row in shares]))

    found = inception_score(classes)
    assert found.value == pytest.approx(written_out(classes), rel=1e-9)
    counts = np.array([[2.0, 0, 3] + [1] * 17])
    again = np.repeat(classes, counts[0].astype(int), axis=0)
    assert found.resampled(counts)[0] == pytest.approx(written_out(again), rel=1e-9)
    assert inception_score(np.eye(4)).value == pytest.approx(4), "each its own class, and sure of it"
    assert inception_score(np.full((6, 4), 0.25)).value == pytest.approx(1)


def test_kid_as_a_statistic_is_the_plain_one_and_stays_unbiased_when_rows_are_drawn_again():
    x, y = SET[:30], SET[30:60]
    found = KernelDistance(x, y)
    assert found.value == pytest.approx(kernel_inception_distance(x, y), abs=1e-12)
    draws = RNG.multinomial(30, np.full(30, 1 / 30), size=4000).astype(float)
    resampled = found.resampled(draws)
    naive = [kernel_inception_distance(np.repeat(x, row.astype(int), axis=0), y) for row in draws[:200]]
    error = resampled.std() / np.sqrt(4000)
    assert abs(resampled.mean() - found.value) < 4 * error
    assert np.mean(naive) > found.value + 10 * error, "a picture beside its own copy would raise it"


def test_pairs_are_counted_as_often_as_their_rows_and_never_with_themselves():
    values = RNG.normal(size=(4, 4))
    values = values + values.T
    counted = np.array([[0, 1, 0, 1], [1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 0, 0]], bool)
    counts = [2, 1, 0, 3]
    rows = [row for row, times in enumerate(counts) for _ in range(times)]
    pairs = [values[i, j] for i, j in itertools.permutations(rows, 2) if counted[i, j]]
    assert PairMean(values, counted).resampled(np.array([counts], float))[0] == pytest.approx(np.mean(pairs))
    assert np.isnan(PairMean(values, counted).resampled(np.array([[0.0, 0, 5, 0]]))[0])


def test_a_copy_of_a_training_picture_is_flagged_and_new_pictures_are_about_as_often_as_expected():
    training, new = RNG.normal(size=(200, 12)), RNG.normal(size=(400, 12))
    copies = training[[3, 50]] + 0.02 * RNG.normal(size=(2, 12))
    found = closeness(np.concatenate([new, copies]), training)
    assert found.flagged[-2:].all() and list(found.nearest[-2:]) == [3, 50]
    assert 0.02 < found.flagged[:-2].mean() < 0.09
    nearest = [min(1 - np.corrcoef(np.stack([new[0] - training.mean(0), row - training.mean(0)]))[0, 1] for row in
                   training)]  # fmt: skip
    assert found.distances[0] == pytest.approx(nearest[0], abs=0.1), "a correlation is a cosine less its own mean"


def test_copies_among_the_training_pictures_do_not_hide_one_that_was_drawn():
    training = np.repeat(RNG.normal(size=(30, 12)), 2, axis=0)
    found = closeness(training[:1] + 0.001, training)
    assert found.limit > 0.01 and found.flagged[0]
    assert closeness(training, np.repeat(training[[0, 2]], 2, axis=0)) is None, "two pictures give no limit"
    assert closeness(training, np.repeat(training[:1], 9, axis=0)) is None


def test_groups_are_drawn_again_whole():
    # Within a group all rows are alike, so 4 groups of 25 tell no more than 4 rows would.
    values, groups = np.repeat([0.0, 1, 2, 3], 25), np.repeat([5, 1, 3, 2], 25)
    grouped = intervals(mean_sums(values), groups=groups.tolist(), seed=1)
    alone = intervals(mean_sums(values), seed=1)
    four = intervals(mean_sums([0.0, 1, 2, 3]), seed=1)
    assert grouped is not None and alone is not None and four is not None
    assert grouped.value.high - grouped.value.low == pytest.approx(four.value.high - four.value.low, rel=0.1)
    assert grouped.value.high - grouped.value.low > 3 * (alone.value.high - alone.value.low)


def test_rows_are_drawn_again_within_groups_of_any_size():
    values = np.concatenate([RNG.normal(size=3), RNG.normal(size=40)])
    found = intervals(mean_sums(values), mean_sums(values - 1), groups=[0] * 3 + [1] * 40)
    assert found is not None and found.difference == pytest.approx((1, 1)), "paired: the same rows on both sides"
    one = intervals(mean_sums(values), groups=[0] * 43)
    expected = 2 * 1.96 * values.std() / np.sqrt(43)
    assert one is not None and one.value.high - one.value.low == pytest.approx(expected, rel=0.15)


def test_classes_are_those_of_the_last_layer():
    import torch

    from haori.metrics.efficientnet import EfficientNetLite0
    from haori.metrics.picture_features import PictureFeatures
    from tests.pictures import picture

    torch.manual_seed(0)
    weight, bias = torch.randn(7, 1280), torch.randn(7)
    seen = PictureFeatures(EfficientNetLite0(), (weight, bias)).see([picture(1), picture(2)])
    logits = seen.features @ weight.double().numpy().T + bias.double().numpy()
    powers = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(seen.classes, powers / powers.sum(1, keepdims=True), rtol=1e-9)


def test_clip_says_what_stock_transformers_says(tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    from haori.metrics.picture_networks import load_network
    from tests.pictures import picture

    network = load_network(str(tiny_clip(tmp_path / "clip-tiny")))
    pictures, texts = [picture(seed, (24, 32)) for seed in range(19)], ["a red cat", "cat"] * 9 + ["a" * 50]
    seen = network.see(pictures, texts)
    assert network.name == "clip-tiny" and network.reads_text and seen.classes is None
    stock = CLIPModel.from_pretrained(tmp_path / "clip-tiny").eval()
    processor = CLIPProcessor.from_pretrained(tmp_path / "clip-tiny")
    both = processor(images=pictures, text=texts, return_tensors="pt", padding=True, truncation=True)
    out = stock(**both)
    scale = stock.logit_scale.exp().item()
    expected = (out.logits_per_image / scale).diagonal().detach().numpy()
    np.testing.assert_allclose(seen.likeness, expected, atol=1e-5)
    own = seen.features / np.linalg.norm(seen.features, axis=1, keepdims=True)
    np.testing.assert_allclose(own, out.image_embeds.detach().numpy(), atol=1e-5)


def test_dinov2_gives_its_pooled_output(tmp_path):
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    from haori.metrics.picture_networks import load_network
    from tests.pictures import picture

    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dino")
    processor = BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path / "dino")
    pictures = [picture(seed) for seed in range(3)]
    seen = load_network(str(tmp_path / "dino")).see(pictures, ["", "", ""])
    expected = model(processor(images=pictures, return_tensors="pt")["pixel_values"]).pooler_output
    np.testing.assert_allclose(seen.features, expected.detach().numpy(), atol=1e-5)
    assert seen.likeness is None


def test_a_network_that_sees_nothing_is_refused(tmp_path, tiny_base_folder):
    from haori.metrics.picture_networks import load_network

    with pytest.raises(InputError, match="does not see pictures"):
        load_network(str(tiny_base_folder))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_network(str(tmp_path))


def test_offline_a_network_of_the_hub_is_refused_at_once(monkeypatch):
    import time

    from haori.core.settings import settings
    from haori.metrics.picture_networks import load_network

    monkeypatch.setenv("HAORI_OFFLINE", "1")
    settings.cache_clear()
    started = time.perf_counter()
    with pytest.raises(InputError, match="'somebody/nothing' that is to look at pictures cannot be loaded"):
        load_network("somebody/nothing")
    assert time.perf_counter() - started < 5, "the hub was asked"
