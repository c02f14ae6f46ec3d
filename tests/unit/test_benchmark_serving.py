"""What benchmarks/serving makes of its measurements; the measurements themselves are run by `make bench`."""

import importlib
from collections import Counter
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "serving"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in (FOLDER.parent, FOLDER):
        monkeypatch.syspath_prepend(str(folder))

    def one(name: str) -> ModuleType:
        return importlib.import_module(name)

    return one


def rate(value: float) -> dict[str, float]:
    return {"tokens_per_s": value}


def test_figures_are_ratios_of_what_was_measured_together(load: Any) -> None:
    parts = {
        "base": {"base": {"haori": rate(450.0), "vllm": rate(300.0)}},
        "adapters": {"base": {"haori": rate(400.0)}, "adapters32": {"haori": rate(300.0), "peft": rate(30.0)}},
        "zipf": {"base": rate(500.0), "zipf": rate(250.0)},
    }
    found = load("figures").figures(parts)
    assert found["base_vs_vllm"] == 1.5
    assert found["adapters32_vs_base"] == 0.75
    assert found["adapters32_vs_peft"] == 10.0
    assert found["zipf1000_vs_base"] == 0.5


def test_what_was_not_measured_is_null(load: Any) -> None:
    figures = load("figures")
    found = figures.figures({"adapters": {"adapters8": {"haori": rate(300.0)}}})
    assert set(figures.BARS) <= set(found)
    assert set(found.values()) == {None}


def test_a_missed_bar_is_said(load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    load("figures").show({"base_vs_vllm": 1.0, "cold_load_ms": 61.0, "adapters8_vs_base": 0.9, "soak_growth": None})
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("MISSED") for line in lines] == [True, True, False, False]


def test_the_adapter_of_rank_k_is_drawn_in_proportion_to_1_over_k(load: Any) -> None:
    counts = Counter(islice(load("workload").zipf(1000, seed=3), 40_000))
    assert counts[0] / counts[1] == pytest.approx(2.0, rel=0.1)
    assert counts[0] / counts[9] == pytest.approx(10.0, rel=0.2)
    assert max(counts) > 950


def test_requests_of_one_batch_have_different_prompts_and_as_many_adapters_as_asked(load: Any) -> None:
    workload = load("workload")
    pool = [[number] for number in range(100)]
    made = workload.requests(pool, 2, workload.spread(8, 32))
    assert len({tuple(prompt) for prompt, _ in made}) == 32
    assert Counter(adapter for _, adapter in made) == dict.fromkeys(range(8), 4)
    assert {adapter for _, adapter in workload.requests(pool, 0, workload.spread(0, 4))} == {None}


def test_adapters_are_held_against_the_base_by_their_median_time_to_the_first_token(load: Any) -> None:
    waits = {"base": [0.1, 0.2, 9.0], "one": [4.3] * 3, "two": [4.0] * 3, "one:0.5": [5.0] * 3, "two:-0.5": [4.4] * 3}
    found = load("turns").summary(waits)
    assert found["names"]["two"] == {"ttft_p50_s": 4.0, "ttft_p95_s": 4.0, "requests": 3}
    assert found["ttft_adapter_vs_base"] == pytest.approx(4.35 / 0.2)
    figures = load("figures").figures({"turns": found})
    assert figures["ttft_adapter_vs_base"] == 21.75


@pytest.mark.parametrize(("ratio", "missed"), [(1.5, False), (1.51, True)])
def test_the_bar_of_the_time_to_the_first_token(
    load: Any, capsys: pytest.CaptureFixture[str], ratio: float, missed: bool
) -> None:
    load("figures").show({"ttft_adapter_vs_base": ratio})
    assert capsys.readouterr().out.rstrip().endswith("MISSED") is missed
