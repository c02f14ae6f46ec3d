"""The average of trained weights: the formula in float64, what is saved, and what a resumed run goes on with."""

from pathlib import Path

import pytest
import torch

from haori.training.checkpoint import checkpoints_of
from haori.training.loop import Loop
from haori.training.signals import StopRequest
from tests.training_samples import make_loop, recipe, rows

STEPS = 6


def adapter(loop: Loop) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in loop.model.named_parameters() if p.requires_grad}


def watched(loop: Loop) -> list[dict[str, torch.Tensor]]:
    """Return the weights at the start and, as the run goes on, after each step."""
    seen = [adapter(loop)]
    step = loop.step

    def stepping(*args, **options):
        step(*args, **options)
        seen.append(adapter(loop))

    loop.step = stepping
    return seen


@pytest.mark.parametrize("decay", [0.3, 0.95])
def test_what_a_run_leaves_is_the_average_of_its_steps(tiny_base_folder: Path, tmp_path: Path, decay: float):
    made = recipe(f"training.ema={decay}", f"training.max_steps={STEPS}", "optimizer.lr=1e-2")
    loop = make_loop(tiny_base_folder, tmp_path / "run", made, rows(40), None)
    seen = watched(loop)
    loop.run(StopRequest())
    assert len(seen) == STEPS + 1
    for name, left in adapter(loop).items():
        expected = seen[0][name].double()
        for number, weights in enumerate(seen[1:], 1):
            now = min(decay, (1 + number) / (10 + number))
            expected = now * expected + (1 - now) * weights[name].double()
        torch.testing.assert_close(left.double(), expected, rtol=0, atol=1e-7)
        moved = (seen[-1][name].double() - expected).abs().max()
        assert moved > 1e-4  # the last weights are no average


def test_validation_measures_the_average_and_leaves_the_weights(tiny_base_folder: Path, tmp_path: Path):
    made = recipe("training.ema=0.9", "training.max_steps=4", "optimizer.lr=3e-2")
    loop = make_loop(tiny_base_folder, tmp_path / "run", made, rows(40), rows(10, seed=1))
    seen = watched(loop)
    loop.run(StopRequest())
    last = loop.measurements.series("validation")[-1]["loss"]
    assert loop._mean_losses(loop.validation).values["loss"] == pytest.approx(
        last, rel=1e-6
    )  # the average is in the model
    for name, parameter in loop.model.named_parameters():
        if name in seen[-1]:
            parameter.data.copy_(seen[-1][name])
    assert abs(loop._mean_losses(loop.validation).values["loss"] - last) > 1e-4


def test_a_resumed_run_goes_on_with_the_average(tiny_base_folder: Path, tmp_path: Path):
    made = recipe("training.ema=0.9", "training.save_every=2", f"training.max_steps={STEPS}")
    train = rows(40)
    whole = make_loop(tiny_base_folder, tmp_path / "whole", made, train, None)
    whole.run(StopRequest())

    class StopAt(StopRequest):
        def __bool__(self) -> bool:
            return first.position.step >= 3

    first = make_loop(tiny_base_folder, tmp_path / "part", made, train, None)
    first.run(StopAt())
    newest = checkpoints_of(tmp_path / "part")[-1]
    second = make_loop(tiny_base_folder, tmp_path / "part", made, train, None, 3)
    second.run(StopRequest(), second.restore(newest))
    for name, tensor in adapter(second).items():
        assert torch.equal(tensor, adapter(whole)[name])


def test_an_observer_that_fails_is_told_and_ends_nothing(tiny_base_folder: Path, tmp_path: Path):
    from haori.core.events import Warned

    made = recipe("training.max_steps=3")
    plain = make_loop(tiny_base_folder, tmp_path / "plain", made, rows(40), rows(10, seed=1))
    plain.run(StopRequest())
    loop = make_loop(tiny_base_folder, tmp_path / "run", made, rows(40), rows(10, seed=1))
    told: list[str] = []

    def broken(model: torch.nn.Module, step: int, epoch: float) -> None:
        torch.rand(5)
        raise RuntimeError("no room for a picture")

    loop.observer = broken
    loop.on_event = lambda event: told.append(event.text) if isinstance(event, Warned) else None
    loop.run(StopRequest())
    assert told
    assert all("no room for a picture" in text for text in told)
    assert all(torch.equal(tensor, adapter(plain)[name]) for name, tensor in adapter(loop).items())
