"""What a comparison computes again from rows with answers: pairs stay pairs whatever their answers say."""

from types import SimpleNamespace

import pytest

from haori.tasks.preference import TASK


def row(reference: str, *rewards: float) -> SimpleNamespace:
    score = rewards[0] if len(rewards) == 1 else rewards[0] - rewards[1]
    return SimpleNamespace(
        reference=reference, tokens=2, nll=-2 * rewards[0], label=None, text=None, score=score, scores=tuple(rewards)
    )


def test_pairs_whose_chosen_answer_is_good_or_bad_are_pairs():
    found = TASK.statistics([row("good", -1.0, -2.0), row("bad", -3.0, -1.0), row("good", -1.0, -1.5)], ())
    assert found["preference_accuracy"].value == pytest.approx(2 / 3)
    assert found["reward_margin"].value == pytest.approx((1.0 - 2.0 + 0.5) / 3)
    assert found["chosen_reward"].value == pytest.approx(-5 / 3)
    assert found["rejected_reward"].value == pytest.approx(-4.5 / 3)


def test_judged_answers_are_ranked():
    found = TASK.statistics([row("good", -1.0), row("bad", -2.0), row("good", -3.0), row("bad", -4.0)], ())
    assert set(found) == {"auroc", "aupr"}
    assert found["auroc"].value == pytest.approx(3 / 4)
