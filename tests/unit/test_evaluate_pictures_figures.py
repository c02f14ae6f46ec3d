"""Figures of drawn pictures on planted features: what an adapter learnt, copied and forgot is seen, and no more."""

import numpy as np
import pytest

from haori.evaluation.pictures.asking import Asked
from haori.evaluation.pictures.figures import Standard, UnrelatedStandard
from haori.evaluation.pictures.measuring import Found, add_fid, measured
from haori.metrics.picture_features import Seen

RNG = np.random.default_rng(3)
PROMPTS = tuple(f"subject {number}" for number in range(12))
ASKED = Asked(PROMPTS, seeds=3, seed=0, captions=True)
SUBJECTS = RNG.normal(size=(12, 24))
STYLE = RNG.normal(size=24) * 1.5
BASE = np.repeat(SUBJECTS, 3, axis=0) + 0.3 * RNG.normal(size=(36, 24))
DATA = SUBJECTS + STYLE + 0.3 * RNG.normal(size=(12, 24))
OTHER = RNG.normal(size=(30, 24)) + STYLE
LEARNT = np.repeat(SUBJECTS, 3, axis=0) + STYLE + 0.3 * RNG.normal(size=(36, 24))
STANDARD = Standard(ASKED, DATA, PROMPTS, BASE, OTHER)


def found(features, standard=STANDARD):
    return {name: one.value for name, one in standard.figures(Seen(features)).items()}


def metrics(features):
    every = Found({}, {})
    measured(every, STANDARD.figures(Seen(features)), STANDARD.figures(Seen(BASE)), ASKED.groups)
    return every.metrics


def test_the_base_held_against_itself_is_no_different():
    for name, metric in metrics(BASE).items():
        assert metric.difference == 0 and metric.difference_low == metric.difference_high == 0, name
    own = found(BASE)
    assert abs(own["data_similarity"]) < 0.1 and own["nearest_data"] < 0.2
    assert own["prompt_retrieval"] == 1.0, "its other seeds show the same subjects"


def test_a_learnt_style_is_clearly_nearer_to_the_data_and_keeps_its_subjects():
    learnt = metrics(LEARNT)
    for name in ("data_similarity", "nearest_data"):
        assert learnt[name].difference_low is not None and learnt[name].difference_low > 0.3
    assert learnt["kid"].difference_high is not None and learnt["kid"].difference_high < 0
    assert learnt["subject_retrieval"].value == 1.0 and learnt["prompt_retrieval"].value > 0.9
    assert learnt["data_similarity"].value == pytest.approx(STANDARD.among_data(), abs=0.1)


def test_similarity_to_the_data_is_its_formula():
    middle = BASE.mean(0)
    cosines = [
        np.dot(one - middle, other - middle) / np.linalg.norm(one - middle) / np.linalg.norm(other - middle)
        for one in LEARNT
        for other in DATA
    ]
    assert found(LEARNT)["data_similarity"] == pytest.approx(np.mean(cosines), rel=1e-9)


def test_subjects_that_were_mixed_up_are_counted_one_by_one():
    wrong = LEARNT.copy()
    wrong[[0, 17, 30]] = LEARNT[[35, 0, 8]]
    assert found(wrong)["subject_retrieval"] == pytest.approx(33 / 36)
    assert found(LEARNT)["prompt_retrieval"] - found(wrong)["prompt_retrieval"] == pytest.approx(3 / 36)


def test_what_the_data_themselves_keep_is_known_where_prompts_are_captions():
    assert STANDARD.kept_by_data() == 1.0
    mixed = DATA.copy()
    mixed[[0, 1, 2]] = DATA[[1, 2, 0]]
    assert Standard(ASKED, mixed, PROMPTS, BASE, None).kept_by_data() == pytest.approx(9 / 12)
    given = Asked(PROMPTS, seeds=3, seed=0)
    assert Standard(given, DATA, PROMPTS, BASE, None).kept_by_data() is None


def test_seeds_that_draw_one_picture_have_no_diversity():
    middle = BASE.mean(0)
    alike = np.repeat(LEARNT[::3], 3, axis=0)
    assert found(alike)["diversity"] == pytest.approx(0, abs=1e-9)
    pairs = [(at, at + step) for at in range(0, 36, 3) for step in (1, 2)] + [(at + 1, at + 2) for at in
                                                                            range(0, 36, 3)]  # fmt: skip
    written_out = [
        1 - np.dot(LEARNT[one] - middle, LEARNT[other] - middle)
        / np.linalg.norm(LEARNT[one] - middle) / np.linalg.norm(LEARNT[other] - middle) for one, other in pairs
    ]  # fmt: skip
    assert found(LEARNT)["diversity"] == pytest.approx(np.mean(written_out), rel=1e-9)


def test_copies_of_training_pictures_are_flagged_with_the_picture_they_copy():
    copied = LEARNT.copy()
    copied[[5, 20, 21]] = OTHER[[7, 9, 9]] + 0.03 * RNG.normal(size=(3, 24))
    close = STANDARD.closeness(copied)
    assert close is not None and set(np.flatnonzero(close.flagged)) >= {5, 20, 21}
    assert list(close.nearest[[5, 20, 21]]) == [7, 9, 9]
    honest = STANDARD.closeness(LEARNT)
    assert honest is not None and set(np.flatnonzero(close.flagged)) == {5, 20, 21, *np.flatnonzero(honest.flagged)}
    assert found(copied)["memorised"] == pytest.approx(close.flagged.mean())


def test_a_generator_that_forgot_unrelated_prompts_is_seen():
    asked = Asked(PROMPTS, seeds=3, seed=0)
    standard = UnrelatedStandard(asked, BASE)
    same, base = standard.figures(BASE), standard.figures(BASE, is_base=True)
    assert same["drift"].value == pytest.approx(0, abs=1e-9) and "drift" not in base
    forgot = BASE.copy()
    forgot[9:18] = BASE[0] + 0.1 * RNG.normal(size=(9, 24))  # three prompts of twelve end in the first one's picture
    after = standard.figures(forgot)
    assert after["unrelated_retrieval"].value == pytest.approx(1 - 9 / 36)
    assert after["drift"].value > 0.1
    written_out = [
        1 - np.dot(one - BASE.mean(0), other - BASE.mean(0))
        / np.linalg.norm(one - BASE.mean(0)) / np.linalg.norm(other - BASE.mean(0))
        for one, other in zip(forgot, BASE, strict=True)
    ]  # fmt: skip
    assert after["drift"].value == pytest.approx(np.mean(written_out), rel=1e-9)
    every = Found({}, {})
    measured(every, after, base, asked.groups)
    assert every.metrics["drift"].base is None and every.metrics["drift"].low is not None
    assert 0 < standard.between_seeds() < 1


def test_what_needs_more_seeds_prompts_or_captions_is_left_out():
    one = Asked(PROMPTS, seeds=1, seed=0)
    figures = found(LEARNT[::3], Standard(one, DATA, PROMPTS, BASE[::3], None))
    assert set(figures) == {"data_similarity", "nearest_data", "kid"}
    single = Asked(PROMPTS[:1], seeds=2, seed=0)
    assert "nearest_data" not in found(LEARNT[:2], Standard(single, DATA, PROMPTS, BASE[:2], None))


def test_clip_and_classes_become_figures():
    seen = Seen(LEARNT, np.eye(36), np.linspace(-0.1, 0.6, 36))
    figures = STANDARD.figures(seen)
    assert figures["clip_score"].value == pytest.approx(100 * np.linspace(-0.1, 0.6, 36).clip(0).mean())
    assert figures["classifier_score"].value == pytest.approx(36)


def test_fid_is_left_out_with_its_reason_or_forced_with_a_warning():
    every = Found({}, {})
    assert "needs 2,048 pictures on each side and there are 12" in add_fid(every, STANDARD, LEARNT, force=False)
    assert "fid" not in every.metrics
    assert "far too high" in add_fid(every, STANDARD, LEARNT, force=True)
    fid = every.metrics["fid"]
    assert fid.base is not None and fid.base > fid.value and fid.low is None
