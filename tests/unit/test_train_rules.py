"""Batching, schedule, automatic choices and diagnosis: plain functions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haori.tasks.recipe import ScheduleSection, recipe_from
from haori.training.batches import plan_epoch, share_of_process
from haori.training.diagnosis import Validation, diagnose
from haori.training.schedule import rate_at
from tests.training_samples import resolve_all

lengths = st.lists(st.integers(2, 300), min_size=1, max_size=200)


@given(lengths, st.integers(50, 2000), st.integers(50, 1000), st.integers(0, 5), st.integers(0, 5))
def test_every_row_is_in_one_step_within_budget(sizes: list[int], batch: int, micro: int, seed: int, epoch: int):
    steps = plan_epoch(sizes, step_budget=batch, microbatch_budget=micro, seed=seed, epoch=epoch)
    rows = [row for step in steps for part in step for row in part]
    assert sorted(rows) == list(range(len(sizes)))
    for step in steps:
        together = [row for part in step for row in part]
        assert len(together) == 1 or len(together) * max(sizes[r] for r in together) <= batch
        for part in step:
            assert len(part) == 1 or len(part) * max(sizes[r] for r in part) <= micro
    again = plan_epoch(sizes, step_budget=batch, microbatch_budget=micro, seed=seed, epoch=epoch)
    assert steps == again


def test_epochs_differ_and_buckets_save_padding():
    sizes = [10 + (i * 37) % 290 for i in range(1000)]
    first, second = (plan_epoch(sizes, step_budget=2000, microbatch_budget=2000, seed=0, epoch=e) for e in (0, 1))
    assert first != second
    padded = sum(len(part) * max(sizes[r] for r in part) for step in first for part in step)
    assert padded < 1.15 * sum(sizes)


@given(lengths, st.integers(1, 5), st.integers(50, 500))
def test_processes_share_a_step_without_loss(sizes: list[int], processes: int, micro: int):
    for step in plan_epoch(sizes, step_budget=1000, microbatch_budget=micro, seed=0, epoch=0):
        shares = [share_of_process(step, process, processes) for process in range(processes)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(row for share in shares for part in share if part for row in part) == sorted(sum(step, []))


@pytest.mark.parametrize(
    ("kind", "last"),
    [("constant", 1.0), ("linear", 1 / 90), ("cosine", 0.5 * (1 + math.cos(math.pi * 89 / 90)))],
)
def test_schedules_warm_up_and_end_where_they_should(kind: str, last: float):
    section = ScheduleSection.model_validate({"kind": kind, "warmup_ratio": 0.1})
    rates = [rate_at(step, 100, 1.0, section) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (k + 1) for k in range(10)])
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(last)


def test_auto_values_are_resolved_with_reasons_and_given_ones_kept():
    recipe = recipe_from({"name": "a", "base": "b", "data": {"path": "c"}}, ["method.rank=4", "training.epochs=7"])
    resolved, choices = resolve_all(recipe, [70] * 640, 134_515_008, ("bf16", "fast here"))
    assert resolved.method.rank == 4
    assert resolved.method.alpha == 8
    assert resolved.training.epochs == 7
    assert resolved.optimizer.lr == 5e-4
    assert resolved.training.batch_tokens == 16 * 70
    assert "auto" not in str(resolved.model_dump(exclude={"data"}))
    assert {choice.key for choice in choices} >= {"method.alpha", "optimizer.lr", "training.dtype"}
    assert all(choice.reason for choice in choices)
    again, none = resolve_all(resolved, [70] * 640, 1, ("fp32", "?"))
    assert again == resolved
    assert none == []


@pytest.mark.parametrize(
    ("overrides", "method", "lr"),
    [
        (["method.kind=dora"], {"rank": 16, "alpha": 32.0}, 5e-4),
        (["method.kind=qlora"], {"rank": 16, "alpha": 32.0}, 5e-4),
        (["method.kind=ard_lora"], {"rank": 16, "alpha": 32.0}, 5e-4),
        (["method.kind=adalora"], {"rank": 16, "initial_rank": 24, "alpha": 48.0}, 5e-3),
        (["method.kind=adalora", "method.rank=5"], {"rank": 5, "initial_rank": 8, "alpha": 16.0}, 5e-3),
        (["method.rslora=true"], {"rank": 16, "alpha": 8.0}, 5e-4),
        (["method.init=pissa"], {"rank": 16, "alpha": 32.0}, 1e-4),
        (["method.lr_ratio=16"], {"rank": 16, "alpha": 32.0}, 1.25e-4),
        (["method.kind=full"], {}, 5e-5),
        (["method.kind=peft", "method.type=loha"], {}, 5e-4),
        (["method.kind=peft", "method.type=ia3"], {}, 5e-3),
    ],
)
def test_each_method_has_rules_of_its_own(overrides: list[str], method: dict[str, float], lr: float):
    recipe = recipe_from({"name": "a", "base": "b", "data": {"path": "c"}}, overrides)
    resolved, choices = resolve_all(recipe, [70] * 640, 134_515_008, ("bf16", "fast here"))
    assert {key: getattr(resolved.method, key) for key in method} == method
    assert resolved.optimizer.lr == pytest.approx(lr)
    assert "auto" not in str(resolved.model_dump(exclude={"data"}))
    assert all(choice.reason for choice in choices)


def falling(start: float, end: float, n: int = 40) -> list[float]:
    return [start + (end - start) * i / (n - 1) for i in range(n)]


@pytest.mark.parametrize(
    ("initial", "validations", "steps", "clipped", "said"),
    [
        (
            2.0,
            [(1, 1.0, 1.1), (2, 0.9, 0.6), (3, 1.3, 0.2)],
            falling(2, 0.2),
            0.1,
            "Over-fitting from epoch 2",
        ),
        (2.0, [(1, 1.5, 1.7), (2, 1.2, 1.3)], falling(2, 1.2), 0.1, "Under-fitting"),
        (2.0, [(1, 2.6, 3.0), (2, 2.9, 3.5)], falling(2, 4), 0.9, "learning rate is too high"),
        (2.0, [(1, 1.99, 2.0), (2, 1.985, 2.0)], falling(2, 1.99), 0.0, "Hardly anything was learnt"),
        (2.0, [(1, 1.0, 1.1), (2, 0.995, 1.0)], falling(2, 1), 0.0, "levelled off"),
    ],
)
def test_diagnosis_names_what_happened(initial, validations, steps, clipped, said):
    sentences = diagnose(initial, [Validation(*v) for v in validations], steps, clipped)
    assert any(said in sentence for sentence in sentences), sentences
