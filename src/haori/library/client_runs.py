"""What a person is shown of the runs of training clients that made an adapter."""

import json
from collections.abc import Iterator

from haori.core.client_runs import FRESH, ClientRun
from haori.core.records import AdapterCard

__all__ = ["client_run_line", "client_run_rows"]


def client_run_rows(card: AdapterCard) -> Iterator[tuple[str, str]]:
    """Yield a title and a text for each run, and for what its client said of it."""
    for run in card.client_runs:
        yield "trained by", client_run_line(run)
        if run.metadata:
            yield "said of it", json.dumps(run.metadata)  # escaped: no control character reaches a terminal


def client_run_line(run: ClientRun) -> str:
    """Return what one run did, without what its client said of it."""
    began = "with fresh weights" if run.started_from == FRESH else f"from {run.started_from}"
    parts = [f"{run.run or 'a training session'}, begun {began}", f"{run.steps:,} steps"]
    if run.losses:
        calls = ", ".join(f"{count:,} of {name}" for name, count in run.losses.items())
        parts.append(f"calls: {calls} ({run.rows:,} rows, {run.tokens:,} tokens)")
    if run.last_loss is not None:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in run.last_figures.items())
        parts.append(f"last loss: {run.last_loss}, {figures}")
    if run.optimizer:
        settings = ", ".join(f"{name} {value:g}" for name, value in run.optimizer.items())
        parts.append(f"last step by AdamW: {settings}")
    if run.checkpoint is not None:
        parts.append(f"saved as {run.checkpoint}")
    if run.saved is not None:
        parts.append(run.saved)
    return "; ".join(parts)
