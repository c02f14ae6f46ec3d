"""Preference losses against the papers' formulas, written again in NumPy from logits, and their gradients."""

import numpy as np
import pytest
import torch
from torch import Tensor

from haori.tasks.preference.losses import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    mismatch_divergence,
    orpo_loss,
    simpo_loss,
)

PAIRS, LENGTH, VOCABULARY = 7, 9, 11


class Answers:
    """Random logits of answers of several lengths, and log p(answer) from them."""

    def __init__(self, seed: int, sharpness: float = 2.0) -> None:
        random = np.random.default_rng(seed)
        self.logits = sharpness * random.standard_normal((PAIRS, LENGTH, VOCABULARY))
        self.tokens = random.integers(0, VOCABULARY, (PAIRS, LENGTH))
        self.lengths = random.integers(1, LENGTH + 1, PAIRS)

    def summed(self) -> np.ndarray:
        found = np.zeros(PAIRS)
        for row in range(PAIRS):
            for place in range(self.lengths[row]):
                p = np.exp(self.logits[row, place]) / np.exp(self.logits[row, place]).sum()
                found[row] += np.log(p[self.tokens[row, place]])
        return found


@pytest.fixture
def four() -> tuple[np.ndarray, ...]:
    """Chosen and rejected under the policy, then under the reference."""
    chosen, rejected, reference = Answers(0), Answers(1), [Answers(2), Answers(3)]
    reference[0].tokens, reference[0].lengths = chosen.tokens, chosen.lengths
    reference[1].tokens, reference[1].lengths = rejected.tokens, rejected.lengths
    return (chosen.summed(), rejected.summed(), reference[0].summed(), reference[1].summed(),
            chosen.lengths.astype(float), rejected.lengths.astype(float))  # fmt: skip


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def tensors(values: tuple[np.ndarray, ...]) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def agree(found: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo(four, beta, smoothing):
    hi, lo, rw, rl, *_ = four
    found = dpo_loss(*tensors(four[:4]), beta=beta, label_smoothing=smoothing)
    # Equation 7, the ratio of probabilities written out; Mitchell: a share of the labels is swapped.
    p = sigmoid(beta * np.log((np.exp(hi) / np.exp(rw)) / (np.exp(lo) / np.exp(rl))))
    agree(found.loss, -(1 - smoothing) * np.log(p) - smoothing * np.log(1 - p))
    agree(found.chosen, beta * (hi - rw))
    agree(found.rejected, beta * (lo - rl))


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_ipo_compares_means_over_tokens(four, beta):
    hi, lo, rw, rl, nw, nl = four
    _, _, _, _, *counts = tensors(four)
    found = ipo_loss(*tensors(four[:4]), chosen_tokens=counts[0], rejected_tokens=counts[1], beta=beta)
    agree(found.loss, ((hi - rw) / nw - (lo - rl) / nl - 1 / (2 * beta)) ** 2)
    agree(found.chosen, beta * (hi - rw) / nw)


def test_ipo_of_one_token_is_the_papers_formula_as_written(four):
    ones = torch.ones(PAIRS, dtype=torch.float64)
    hi, lo, rw, rl, *_ = four
    found = ipo_loss(*tensors(four[:4]), chosen_tokens=ones, rejected_tokens=ones, beta=0.3)
    agree(found.loss, (np.log(np.exp(hi) * np.exp(rl) / (np.exp(lo) * np.exp(rw))) - 1 / 0.6) ** 2)


def test_hinge(four):
    hi, lo, rw, rl, *_ = four
    found = hinge_loss(*tensors(four[:4]), beta=0.4)
    expected = np.maximum(0, 1 - 0.4 * ((hi - rw) - (lo - rl)))
    assert 0 < (expected == 0).sum() < PAIRS  # both sides of the hinge
    agree(found.loss, expected)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo(four, beta):
    hi, lo, _, _, nw, nl = four
    values = tensors(four)
    found = orpo_loss(values[0], values[1], chosen_tokens=values[4], rejected_tokens=values[5], beta=beta)
    p, q = np.exp(hi / nw), np.exp(lo / nl)
    agree(found.loss, -hi / nw - beta * np.log(sigmoid(np.log((p / (1 - p)) / (q / (1 - q))))))


def test_simpo(four):
    hi, lo, _, _, nw, nl = four
    values = tensors(four)
    found = simpo_loss(values[0], values[1], chosen_tokens=values[4], rejected_tokens=values[5], beta=2.0, gamma=1.1)
    agree(found.loss, -np.log(sigmoid(2.0 / nw * hi - 2.0 / nl * lo - 1.1)))
    agree(found.rejected, 2.0 / nl * lo)


def test_kto(four):
    policy, mismatched, reference, reference_mismatched, *_ = four
    desirable = np.array([True, False, True, True, False, False, True])
    values = tensors(four)
    for sign in (1, -1):  # a divergence above zero, and one that is clamped
        z = mismatch_divergence(sign * values[1], sign * values[3])
        expected_z = max(0.0, sign * float((mismatched - reference_mismatched).mean()))
        assert float(z) == pytest.approx(expected_z)
        found = kto_loss(values[0], values[2], torch.tensor(desirable), z, beta=0.3, desirable_weight=1.5,
                         undesirable_weight=0.5)  # fmt: skip
        r = policy - reference
        v = np.where(desirable, 1.5 * sigmoid(0.3 * (r - expected_z)), 0.5 * sigmoid(0.3 * (expected_z - r)))
        agree(found.loss, np.where(desirable, 1.5, 0.5) - v)
        agree(found.reward, 0.3 * r)


def test_divergence_has_no_gradient(four):
    values = [value.requires_grad_() for value in tensors(four)]
    assert not mismatch_divergence(values[1], values[3]).requires_grad


def losses():
    counts = torch.tensor([3.0, 1.0, 5.0, 2.0], dtype=torch.float64)
    other = torch.tensor([1.0, 4.0, 2.0, 2.0], dtype=torch.float64)
    lengths = {"chosen_tokens": counts, "rejected_tokens": other}
    reference = torch.tensor([[-3.0, -4.0, -2.5, -6.0], [-2.0, -5.0, -3.5, -4.0]], dtype=torch.float64)
    desirable = torch.tensor([True, False, True, False])
    return {
        "dpo": lambda hi, lo: dpo_loss(hi, lo, *reference, beta=0.3, label_smoothing=0.1).loss,
        "ipo": lambda hi, lo: ipo_loss(hi, lo, *reference, beta=0.3, **lengths).loss,
        "hinge": lambda hi, lo: hinge_loss(hi, lo, *reference, beta=0.3).loss,
        "orpo": lambda hi, lo: orpo_loss(hi, lo, beta=0.5, **lengths).loss,
        "simpo": lambda hi, lo: simpo_loss(hi, lo, beta=2.0, gamma=0.5, **lengths).loss,
        "kto": lambda hi, lo: (
            kto_loss(hi, reference[0], desirable, torch.tensor(0.4), beta=0.3, desirable_weight=2.0).loss + 0 * lo
        ),
    }


@pytest.mark.parametrize("kind", ["dpo", "ipo", "hinge", "orpo", "simpo", "kto"])
def test_gradients(kind):
    hi = torch.tensor([-3.3, -1.2, -7.0, -2.2], dtype=torch.float64, requires_grad=True)
    lo = torch.tensor([-2.1, -6.0, -3.0, -4.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses()[kind], (hi, lo))


@pytest.mark.parametrize("kind", ["dpo", "hinge", "orpo", "simpo"])  # ipo pulls back what is too far
def test_a_step_down_raises_the_chosen_answer(kind):
    hi = torch.tensor([-3.3, -1.2, -7.0, -2.2], dtype=torch.float64, requires_grad=True)
    lo = torch.tensor([-2.1, -6.0, -3.0, -4.4], dtype=torch.float64, requires_grad=True)
    losses()[kind](hi, lo).sum().backward()
    assert (hi.grad <= 0).all() and (lo.grad >= 0).all()
    assert (hi.grad < 0).any() and (lo.grad > 0).any()


def test_extremes_stay_finite():
    certain = torch.tensor([0.0, -1e-9, -800.0], requires_grad=True)
    ones = torch.ones(3)
    found = orpo_loss(certain, certain.flip(0), chosen_tokens=ones, rejected_tokens=ones, beta=0.1).loss
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(certain.grad).all()
    far = torch.tensor([500.0, -500.0])
    assert torch.isfinite(dpo_loss(far, -far, 0 * far, 0 * far, beta=1.0).loss).all()
