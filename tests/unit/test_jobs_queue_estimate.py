"""Estimates of jobs: learnt from finished ones of the same base and machine, else measured or guessed, and priced."""

import math
import socket
from pathlib import Path

import pytest

from haori.core.settings import settings
from haori.jobs.database.connection import open_database
from haori.jobs.queue.estimate import Measured, estimate
from haori.jobs.queue.store import JobStore


@pytest.fixture
def store(tmp_path: Path):
    database = open_database(f"sqlite:///{tmp_path / 'haori.db'}")
    yield JobStore(database, tmp_path / "jobs")
    database.close()


def finished(store: JobStore, *, tokens: int, seconds: float, base: str = "b", machine: str | None = None) -> None:
    store.submit("train", {"recipe": {"base": base}})
    job = store.claim("w")
    record = {"tokens": tokens, "seconds": seconds, "peak_memory_bytes": 5 * 10**8}
    store.finish(job, {"record": record, "machine": machine or socket.gethostname()})


def test_three_jobs_give_the_mean_rate_and_the_t_interval_of_one_more(store: JobStore):
    for seconds in (50.0, 100.0, 200.0):
        finished(store, tokens=10_000, seconds=seconds)
    finished(store, tokens=10_000, seconds=1.0, base="other")
    finished(store, tokens=10_000, seconds=1.0, machine="elsewhere")
    found = estimate(store, base="b", tokens=20_000)
    # The rates 200, 100, 50 have the geometric mean 100; their logarithms differ by log 2, so s = log 2.
    assert found.seconds == pytest.approx(200.0, abs=0.1)
    factor = math.exp(4.303 * math.log(2) * math.sqrt(1 + 1 / 3))  # t of 2 degrees of freedom, 97.5%: any table
    assert found.seconds_high == pytest.approx(200 * factor, rel=1e-3)
    assert found.seconds_low == pytest.approx(200 / factor, rel=1e-2)
    assert (found.from_jobs, found.memory_bytes, found.price) == (3, 5 * 10**8, None)
    assert found.reason == "Learnt from 3 finished jobs on this base and machine."


def test_without_finished_jobs_it_is_measured_or_guessed_and_says_so(store: JobStore):
    measured = estimate(store, base="b", tokens=1000, measured=Measured(60.0, 10**9))
    assert (measured.seconds, measured.memory_bytes, measured.from_jobs) == (60.0, 10**9, 0)
    assert "measured on the largest batch" in measured.reason
    guessed = estimate(store, base="b", tokens=43_000, parameters=135_000_000)
    assert guessed.seconds == pytest.approx(100.0)  # 430 tokens/s
    assert estimate(store, base="b", tokens=43_000, parameters=270_000_000).seconds == pytest.approx(200.0)
    assert "only its order of magnitude counts" in guessed.reason
    assert guessed.seconds_high / guessed.seconds > measured.seconds_high / measured.seconds > 1


def test_the_first_pattern_of_the_table_gives_the_price(store: JobStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HAORI_PRICES", '{"smollm2*": 0.5, "*": 2}')
    monkeypatch.setenv("HAORI_CURRENCY", "EUR")
    settings.cache_clear()
    found = estimate(store, base="SmolLM2-135M", tokens=3_000_000)
    assert (found.price, found.currency) == (1.5, "EUR")
    assert estimate(store, base="other", tokens=3_000_000).price == 6.0
