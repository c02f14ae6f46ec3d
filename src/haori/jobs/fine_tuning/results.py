"""What a fine-tuning job tells of its run: the CSV of its result file, and the figures of each checkpoint."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["checkpoint_metrics", "result_csv"]

_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


def result_csv(lines: Sequence[Mapping[str, Any]], accuracies: Mapping[int, Mapping[str, float]]) -> bytes:
    """Return the result file, a line a step.

    Args:
        lines: Of the run's `metrics.jsonl`.
        accuracies: By step, shares of trained tokens that are the likeliest: `train` and `valid`.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_COLUMNS)
    trained = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
    validated = {line["step"]: line["loss"] for line in lines if line["kind"] == "validation"}
    for step in sorted(trained):
        measured = accuracies.get(step, {})
        found = (trained[step], measured.get("train"), validated.get(step), measured.get("valid"))
        table.writerow([step, *("" if figure is None else f"{figure:.6g}" for figure in found)])
    return text.getvalue().encode()


def checkpoint_metrics(
    step: int, lines: Sequence[Mapping[str, Any]], accuracies: Mapping[str, float]
) -> dict[str, float | None]:
    """Return the figures of a checkpoint, as OpenAI calls them; its `valid` figures are always of the whole file."""
    loss = {(line["kind"], line["step"]): line["loss"] for line in lines}
    valid, accuracy = loss.get(("validation", step)), accuracies.get("valid")
    return {
        "step": step,
        "train_loss": loss.get(("train", step)),
        "train_mean_token_accuracy": accuracies.get("train"),
        "valid_loss": valid,
        "valid_mean_token_accuracy": accuracy,
        "full_valid_loss": valid,
        "full_valid_mean_token_accuracy": accuracy,
    }
