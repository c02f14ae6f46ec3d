from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn

from haori.adapters.fused import fuse
from haori.tasks.causal_lm.objective import Batch, CausalLmObjective
from haori.tasks.task import LossSum
from haori.training.lanes import Lanes, lanes_for
from tests.parity import test_fused as samples
from tests.parity import test_fused_diffusion as unets

OBJECTIVE = CausalLmObjective(Dataset.from_dict({"length": []}), 0)


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    cores = torch.get_num_threads()
    yield Lanes(2)
    torch.set_num_threads(cores)


def batch_of(ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> Batch:
    return Batch(ids, mask, labels, tuple(range(10, 10 + len(ids))))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_two_lanes_give_the_gradient_and_losses_of_one(lanes: Lanes, rows: int):
    model = samples.adapted()
    fuse(model)
    batch = batch_of(*samples.shared_batch(rows, 20, 9))
    whole = OBJECTIVE.loss(model, batch)
    (whole.total * 0.1).backward()
    expected = gradients(model)
    model.zero_grad()
    halves = lanes.backward(model, OBJECTIVE, batch, 0.1)
    assert samples.worst(gradients(model), expected) < 1e-4
    assert float(halves.total) == pytest.approx(float(whole.total.detach()), rel=1e-5)
    assert halves.count == whole.count
    by_row = [torch.sort(loss.each[loss.row_of == row]).values for loss in (halves, whole) for row in range(rows)]
    for mine, theirs in zip(by_row[:rows], by_row[rows:], strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_lanes_are_exactly_repeatable_and_add_to_what_is_there(lanes: Lanes):
    model = samples.adapted()
    fuse(model)
    batch = batch_of(*samples.shared_batch(4, 20, 9))
    found = []
    for _ in range(2):
        model.zero_grad()
        lanes.backward(model, OBJECTIVE, batch, 1.0)
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    lanes.backward(model, OBJECTIVE, batch, 1.0)
    assert all(torch.allclose(p.grad, 2 * found[0][n]) for n, p in model.named_parameters() if p.grad is not None)


def test_a_lane_without_labels_adds_nothing(lanes: Lanes):
    model = samples.adapted()
    fuse(model)
    ids, mask, labels = samples.shared_batch(2, 20, 9)
    labels[1] = -100
    loss = lanes.backward(model, OBJECTIVE, batch_of(ids, mask, labels), 1.0)
    assert loss.count == int((labels[:, 1:] != -100).sum())
    assert set(loss.row_of.tolist()) == {0}


def test_the_number_of_threads_is_as_before():
    cores = torch.get_num_threads()
    Lanes(cores)
    assert torch.get_num_threads() == cores


@dataclass(frozen=True)
class Pictures:
    rows: tuple[int, ...]
    given: dict[str, torch.Tensor]


class PictureLoss:
    separable = True

    def loss(self, model: nn.Module, batch: Pictures) -> LossSum:
        each = model(**batch.given, return_dict=False)[0].square().flatten(1).mean(1)
        return LossSum(each.sum(), len(each), each.detach(), torch.arange(len(each)))

    def part(self, batch: Pictures, places: list[int]) -> Pictures:
        rows = tuple(batch.rows[place] for place in places)
        return Pictures(rows, {name: value[places] for name, value in batch.given.items()})


def test_a_unet_that_runs_fused_has_lanes_with_the_gradient_of_one():
    model = unets.adapted("sd15", targets=unets.EVERYTHING)
    fused = fuse(model)
    found = lanes_for(Accelerator(cpu=True), model, PictureLoss(), recomputes=False)  # type: ignore[arg-type]
    assert (found is not None) == (torch.get_num_threads() > 1)
    batch = Pictures((7, 8), unets.inputs("sd15"))
    PictureLoss().loss(model, batch).total.backward()
    expected = gradients(model)
    model.zero_grad()
    cores = torch.get_num_threads()
    Lanes(2).backward(model, PictureLoss(), batch, 1.0)  # type: ignore[arg-type]
    torch.set_num_threads(cores)
    assert unets.worst(gradients(model), expected) < 1e-4
    fused.remove()
    assert lanes_for(Accelerator(cpu=True), model, PictureLoss(), recomputes=False) is None  # type: ignore[arg-type]
