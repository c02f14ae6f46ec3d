"""What was done to an adapter, run by run.

It is kept in the tenant and saved in one folder with the weights: whoever does requests again from a saved state
counts them from there, so that none counts twice.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from haori.core.client_runs import ClientRun
from haori.core.hashing import hash_bytes
from haori.core.records import now
from haori.jobs.tenants.records import AdamParams, Datum

__all__ = ["Runs", "forwarded", "gone_on", "rows_hash", "saved_as", "stepped"]

Runs = tuple[ClientRun, ...]
"""The runs that made an adapter what it is, in their order; the last is under way."""


def gone_on(runs: Runs, run: ClientRun) -> Runs:
    """Return the runs once another goes on from what they made; what their clients said of them stays with them."""
    return (*(one.with_fields(metadata=None) for one in runs), run)


def forwarded(
    runs: Runs, loss: str, *, rows: int, tokens: int, data_hash: str, metrics: Mapping[str, float]
) -> Runs:  # fmt: skip
    """Return the runs once gradients were added by one more call."""
    run = runs[-1]
    chained = data_hash if run.data_hash is None else hash_bytes((run.data_hash + data_hash).encode())
    return _with_last(
        runs,
        run.with_fields(
            losses={**run.losses, loss: run.losses.get(loss, 0) + 1}, rows=run.rows + rows, tokens=run.tokens + tokens,
            data_hash=chained, last_loss=loss, last_figures={**metrics, "rows": rows, "tokens": tokens},
        ),
    )  # fmt: skip


def stepped(runs: Runs, params: AdamParams) -> Runs:
    """Return the runs once one more step was applied."""
    run = runs[-1]
    return _with_last(runs, run.with_fields(steps=run.steps + 1, optimizer=params.model_dump()))


def saved_as(runs: Runs, checkpoint: str | None, request: int | None) -> Runs:
    """Return the runs as a folder keeps them."""
    return _with_last(runs, runs[-1].with_fields(checkpoint=checkpoint, request=request, saved=now()))


def rows_hash(data: Sequence[Datum], loss: str, config: Mapping[str, float | str]) -> str:
    """Return the hash of the rows of a call, with its loss and configuration."""
    digest = hashlib.sha256(json.dumps([loss, dict(config), len(data)], sort_keys=True).encode())
    for datum in data:
        for name, values in (("tokens", datum.tokens), *sorted(datum.inputs.items())):
            array = np.asarray(values)
            digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
            digest.update(array.tobytes())
    return f"sha256:{digest.hexdigest()}"


def _with_last(runs: Runs, run: ClientRun) -> Runs:
    return (*runs[:-1], run)
