"""The rule by which an epoch and a strength are recommended, on planted figures and intervals."""

from dataclasses import replace

from haori.core.records import Metric
from haori.evaluation.bootstrap import Interval
from haori.evaluation.pictures.choosing import Setting, choose


def setting(epoch, strength, similarity, drift, *, kept=0.0, kept_high=None, copies=0.0, copies_low=0.0, low=0.1):
    return Setting(
        epoch,
        strength,
        f"step-{epoch}",
        {
            "data_similarity": Metric(value=similarity, difference_low=low),
            "prompt_retrieval": Metric(
                value=1 + kept, high=1 + kept + 0.1, base=1.0, difference=kept, difference_high=kept_high
            ),
            "memorised": Metric(value=copies, low=copies_low),
            "drift": Metric(value=drift),
        },
    )


def told_apart(settings, width):
    def less_like(one, other):
        apart = settings[one].metrics["data_similarity"].value - settings[other].metrics["data_similarity"].value
        return Interval(apart - width, apart + width)

    return less_like


def chosen(settings, width=0.05):
    return choose(settings, told_apart(settings, width))


def test_the_most_similar_is_recommended_where_the_intervals_tell_it_from_the_others():
    found = chosen([setting(1, 0.5, 0.1, 0.1), setting(2, 1.0, 0.4, 0.5), setting(3, 1.0, 0.3, 0.4)])
    assert (found.recommended, found.equal, found.left_out) == (1, (1,), {})
    assert found.reasons == (
        "Recommended: epoch 2 at 1. Similarity to the data 0.400, the highest of 3; prompts kept 100%, by the base "
        "100%; 0% taken for copies.",
    )


def test_of_settings_that_are_not_told_apart_the_one_that_drifts_least_is_recommended_and_that_is_said():
    settings = [setting(1, 0.5, 0.1, 0.1), setting(2, 1.0, 0.40, 0.5), setting(3, 0.7, 0.37, 0.2)]
    found = chosen(settings)
    assert (found.recommended, found.equal) == (2, (1, 2))
    assert "not clearly less than the 0.400 of epoch 2 at 1" in found.reasons[0]
    assert "drift 0.200, not 0.500" in found.reasons[0]
    assert found.reasons[1].startswith("The intervals do not tell its similarity from that of epoch 2 at 1;")
    assert chosen(settings, width=0.029).recommended == 1, "a tenth narrower than the difference: told apart"
    assert chosen(settings, width=0.031).recommended == 2


def test_what_loses_prompts_or_copies_is_left_out_with_the_reason():
    settings = [
        setting(1, 0.5, 0.2, 0.1),
        setting(2, 1.0, 0.9, 0.5, kept=-0.3, kept_high=-0.05),
        setting(3, 1.0, 0.8, 0.5, copies=0.4, copies_low=0.06),
        setting(4, 1.0, 0.3, 0.5, copies=0.2, copies_low=0.04),
    ]
    found = chosen(settings)
    assert found.recommended == 3, "its copies may be chance"
    assert found.left_out == {1: "loses prompts (-30 points)", 2: "copies (40% taken for copies)"}
    none = chosen(settings[1:3])
    assert none.recommended is None and none.reasons[0].startswith("Every setting loses prompts or copies")


def test_no_more_is_asked_than_the_data_themselves_keep():
    far = [setting(1, 0.5, 0.2, 0.1), setting(2, 1.0, 0.9, 0.5, kept=-0.3, kept_high=-0.05)]
    styled = [replace(one, kept_by_data=0.75) for one in far]
    assert chosen(styled).recommended == 1, "5 points fewer than the data's own pictures"
    assert "by the base 100% and by the data's own pictures 75%" in chosen(styled).reasons[0]
    lost = [replace(one, kept_by_data=0.82) for one in far]
    assert chosen(lost).left_out == {1: "loses prompts (-12 points)"}, "its interval ends at 80%"


def test_a_loss_of_prompts_that_may_be_chance_is_said():
    found = chosen([setting(2, 1.0, 0.9, 0.5, kept=-0.25, kept_high=0.0)])
    assert found.recommended == 0 and "25 points fewer were kept than should be" in found.reasons[1]


def test_what_learnt_nothing_is_not_praised():
    found = chosen([setting(1, 1.0, 0.02, 0.01, low=-0.01)])
    assert found.recommended == 0 and "not clearly more like the data than the base itself" in found.reasons[-1]


def test_without_seeds_the_rule_does_without_prompts_kept():
    plain = Setting(
        None, 0.7, "cat", {"data_similarity": Metric(value=0.3, difference_low=0.2), "drift": Metric(value=1)}
    )
    found = choose([plain], lambda one, other: None)
    assert found.reasons == ("Recommended: strength 0.7. Similarity to the data 0.300.",)
