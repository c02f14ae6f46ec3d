"""What a training job will take: time with an interval, memory, tokens and price, learnt from finished jobs.

Time is tokens over the rate of the last finished jobs on the same base and machine. Rates differ by a factor, so they
are averaged as logarithms, and the interval is the 95% prediction interval of Student's t for one more job. Before
there is any, a measurement of the plan is taken (`haori train --dry-run`), or else one of SmolLM2-135M on two cores,
scaled by parameters; the estimate says which.
"""

import math
import socket
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from pydantic import Field
from sqlalchemy import select

from haori.core.records import Record
from haori.core.settings import settings
from haori.jobs.database.tables import jobs
from haori.jobs.queue.store import JobStore

__all__ = ["Estimate", "Measured", "estimate"]

_LAST = 50  # jobs that are learnt from
_MEASURED_PARAMETERS_PER_S = 430 * 135e6  # tokens/s times parameters: benchmarks/train_speed
_OF_ONE, _OF_A_PLAN, _OF_A_GUESS = 2.0, 1.5, 5.0  # factors of the interval where there is nothing to compute it from
_T_975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t by degrees of freedom, from 1
_T_975_MORE = 2.23


class Estimate(Record):
    """What a job is likely to take if no epoch is left out."""

    seconds: float
    seconds_low: float = Field(description="Of a 95% interval.")
    seconds_high: float
    memory_bytes: int | None = Field(description="Peak of the process; None where nothing is known.")
    tokens: int = Field(description="To be trained on, all epochs together.")
    price: float | None = Field(description="By the table of prices (HAORI_PRICES); None without one for the base.")
    currency: str | None
    from_jobs: int = Field(description="Finished jobs that it was learnt from.")
    reason: str = Field(description="Where the figures are from, as a sentence.")


class Measured(NamedTuple):
    """Time and memory of a plan, measured on its largest batch."""

    seconds: float
    memory_bytes: int


def estimate(
    store: JobStore, *, base: str, tokens: int, parameters: int | None = None, measured: Measured | None = None
) -> Estimate:
    """Estimate a training job.

    Args:
        store: The queue, whose finished jobs are learnt from.
        base: The base as the recipe names it.
        tokens: To be trained on, all epochs together.
        parameters: Of the base, for the case that there is nothing better to go by.
        measured: The plan's measurement, likewise.
    """
    rates, memory = _finished(store, base)
    if rates:
        mean, factor = _prediction(rates)
        seconds = tokens / mean
        plural = "s" if len(rates) > 1 else ""
        reason = f"Learnt from {len(rates)} finished job{plural} on this base and machine."
    elif measured is not None:
        seconds, memory, factor = measured.seconds, measured.memory_bytes, _OF_A_PLAN
        reason = "No job on this base has finished here yet; measured on the largest batch."
    else:
        seconds = tokens * (parameters or 135e6) / _MEASURED_PARAMETERS_PER_S
        factor = _OF_A_GUESS
        reason = (
            "No job on this base has finished here yet; taken from SmolLM2-135M on two CPU cores, by parameters, so "
            "only its order of magnitude counts."
        )
    price = next(
        (each for pattern, each in settings().prices.items() if fnmatchcase(base.lower(), pattern.lower())), None
    )
    return Estimate(
        seconds=round(seconds, 1), seconds_low=round(seconds / factor, 1), seconds_high=round(seconds * factor, 1),
        memory_bytes=memory, tokens=tokens, price=None if price is None else round(price * tokens / 1e6, 6),
        currency=None if price is None else settings().currency, from_jobs=len(rates), reason=reason,
    )  # fmt: skip


def _prediction(rates: list[float]) -> tuple[float, float]:
    """Return the mean rate, and the factor by which one more job may differ from it."""
    logs = [math.log(rate) for rate in rates]
    count = len(logs)
    mean = sum(logs) / count
    if count == 1:
        return math.exp(mean), _OF_ONE
    spread = math.sqrt(sum((log - mean) ** 2 for log in logs) / (count - 1))
    t = _T_975[count - 2] if count - 2 < len(_T_975) else _T_975_MORE
    return math.exp(mean), math.exp(t * spread * math.sqrt(1 + 1 / count))


def _finished(store: JobStore, base: str) -> tuple[list[float], int | None]:
    """Return the rates in tokens/s of finished jobs on a base and this machine, and the highest memory of any."""
    done = jobs.c.state == "succeeded"
    asked = select(jobs.c.spec, jobs.c.result).where(done).order_by(jobs.c.ended.desc()).limit(_LAST)
    rates, memory = [], 0
    with store.database.reading() as connection:
        for spec, result in connection.execute(asked):
            record = _record(result)
            if record is None or _base_of(spec) != base:
                continue
            rates.append(record["tokens"] / record["seconds"])
            memory = max(memory, record.get("peak_memory_bytes", 0))
    return rates, memory or None


def _record(result: Any) -> dict[str, Any] | None:
    """Return the record of a training run in a job's result, if it was done on this machine."""
    found = result.get("record") if isinstance(result, dict) else None
    if not isinstance(found, dict) or result.get("machine", socket.gethostname()) != socket.gethostname():
        return None
    return found if found.get("tokens") and found.get("seconds") else None


def _base_of(spec: dict[str, Any]) -> str | None:
    recipe = spec.get("recipe")
    return recipe.get("base") if isinstance(recipe, dict) else spec.get("base")
