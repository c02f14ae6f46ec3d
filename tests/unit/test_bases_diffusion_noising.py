"""Noise and targets against the papers' formulas in float64, computed here, and against stock schedulers."""

from typing import Any

import pytest

from haori.core.errors import BaseError, InputError

STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False,
}  # fmt: skip
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}


def noising(scheduler: dict[str, Any] = STABLE_DIFFUSION, **changes: Any) -> Any:
    from haori.bases.diffusion import noising_of

    return noising_of({**scheduler, **changes})


def signal() -> Any:
    """Return the product of 1 - beta in float64, with beta's square root linear (Rombach et al. 2022)."""
    import numpy as np

    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    return np.cumprod(1 - betas)


def pictures() -> tuple[Any, Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return latents, noise, torch.tensor([0.0, 500.0, 999.0])


def test_steps_follow_the_formulas() -> None:
    import torch

    latents, noise, times = pictures()
    a = torch.from_numpy(signal()[[0, 500, 999]]).reshape(3, 1, 1, 1)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    close = {"rtol": 2e-6, "atol": 2e-6}  # diffusers computes its tables in fp32
    torch.testing.assert_close(noising().add(latents, noise, times), noisy, **close)
    assert torch.equal(noising().target(latents, noise, times), noise)
    velocity = a.sqrt() * noise - (1 - a).sqrt() * latents
    torch.testing.assert_close(noising(prediction_type="v_prediction").target(latents, noise, times), velocity, **close)
    assert torch.equal(noising(prediction_type="sample").target(latents, noise, times), latents)
    assert noising().kind == "epsilon"


def test_min_snr_weighs_as_the_paper_says() -> None:
    import numpy as np
    import torch

    _, _, times = pictures()
    snr = signal()[[0, 500, 999]] / (1 - signal()[[0, 500, 999]])
    capped = np.minimum(snr, 5.0)
    expected = {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}
    for kind, weights in expected.items():
        found = noising(prediction_type=kind).weights(times, 5.0)
        torch.testing.assert_close(found.double(), torch.from_numpy(weights), rtol=1e-4, atol=1e-7)
        assert torch.equal(noising(prediction_type=kind).weights(times, None), torch.ones(3))


def test_a_schedule_that_ends_in_nothing_but_noise_is_kept() -> None:
    import torch

    latents, noise, times = pictures()
    ours = noising(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    torch.testing.assert_close(ours.add(latents, noise, times)[2], noise[2], rtol=0, atol=1e-3)
    torch.testing.assert_close(ours.target(latents, noise, times)[2], -latents[2], rtol=0, atol=1e-3)
    assert torch.isfinite(noising(rescale_betas_zero_snr=True).weights(times, 5.0)).all()
    assert (noising().add(latents, noise, times)[2] - noise[2]).abs().max() > 0.01


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_noise_is_that_of_the_stock_scheduler(schedule: str) -> None:
    import torch
    from diffusers import EulerDiscreteScheduler

    latents, noise, times = pictures()
    stock: Any = EulerDiscreteScheduler(beta_schedule=schedule, beta_start=0.0008, beta_end=0.012)
    ours = noising(dict(stock.config))
    # The stock one gives x / a_t, which its model's input is scaled back from.
    spread = stock.add_noise(latents, noise, times)
    sigma = ((1 - stock.alphas_cumprod) / stock.alphas_cumprod)[times.long()].sqrt().reshape(3, 1, 1, 1)
    torch.testing.assert_close(ours.add(latents, noise, times), spread / (sigma**2 + 1).sqrt(), rtol=1e-4, atol=1e-4)


def test_flow_is_a_straight_path() -> None:
    import torch

    latents, noise, _ = pictures()
    times = torch.tensor([0.0, 250.0, 1000.0])
    ours = noising(FLOW)
    share = (times.double() / 1000).reshape(3, 1, 1, 1)
    torch.testing.assert_close(ours.add(latents, noise, times), latents + share * (noise - latents))
    assert torch.equal(ours.target(latents, noise, times), noise - latents)
    assert torch.equal(ours.weights(times, None), torch.ones(3))
    with pytest.raises(InputError, match=r"min-SNR \(gamma 5\) .* flow matching, so leave it out"):
        ours.weights(times, 5.0)


def test_the_straight_path_is_that_of_the_stock_scheduler() -> None:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    latents, noise, _ = pictures()
    stock: Any = FlowMatchEulerDiscreteScheduler()
    times = stock.timesteps[[1, 400, 999]]
    expected = stock.scale_noise(latents.float(), times, noise.float())
    torch.testing.assert_close(noising(FLOW).add(latents.float(), noise.float(), times), expected)


@pytest.mark.parametrize("scheduler", [STABLE_DIFFUSION, FLOW])
def test_timesteps_are_drawn_as_asked(scheduler: dict[str, Any]) -> None:
    import torch

    from haori.bases.diffusion import TimestepSampling

    def drawn(sampling: Any) -> Any:
        return noising(scheduler).draw(40_000, torch.Generator().manual_seed(0), sampling) / 1000

    uniform = drawn(TimestepSampling())
    assert uniform.min() >= 0
    assert uniform.max() <= 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.std().item() == pytest.approx(12**-0.5, abs=0.01)
    inner = torch.logit(drawn(TimestepSampling("logit_normal", mean=0.5, std=0.8)).clamp(1e-4, 1 - 1e-4))
    assert inner.mean().item() == pytest.approx(0.5, abs=0.03)
    assert inner.std().item() == pytest.approx(0.8, abs=0.03)
    moved = drawn(TimestepSampling("shift", shift=3.0))
    # A shift of 3 takes the median 1/2 to 3/4.
    assert moved.median().item() == pytest.approx(0.75, abs=0.01)
    again = noising(scheduler).draw(5, torch.Generator().manual_seed(7), TimestepSampling())
    assert torch.equal(again, noising(scheduler).draw(5, torch.Generator().manual_seed(7), TimestepSampling()))
    if scheduler is STABLE_DIFFUSION:
        assert torch.equal(again, again.round()), "steps are whole"


def test_even_timesteps_are_the_middles_of_equal_parts() -> None:
    assert noising().even(4).tolist() == [125, 375, 625, 875]
    assert noising(FLOW).even(8).tolist() == [62.5 + 125 * at for at in range(8)]


def test_noising_that_is_not_served_is_refused_by_name() -> None:
    with pytest.raises(BaseError, match="'EDMEulerScheduler' noises in a way"):
        noising({"_class_name": "EDMEulerScheduler"})
    with pytest.raises(BaseError, match="prediction_type 'score'; known are epsilon, v_prediction, sample"):
        noising(prediction_type="score")
