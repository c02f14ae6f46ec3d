"""How each metric reads: its title, the direction of improvement and its scale."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["KINDS", "Kind", "Scale", "in_order", "kind_of", "label_metric"]

Scale = Literal["share", "score", "perplexity", "coefficient", "nats", "distance", "number"]


@dataclass(frozen=True)
class Kind:
    """How a metric is read.

    Attributes:
        title: What people call it.
        better: The direction of improvement.
        scale: `share` (0..1, shown as per cent), `score` (0..100), `perplexity` (1 and up), `coefficient` (-1..1),
            `nats` (any number), `distance` (about 0 to 2) or `number` (0 and up, each with a scale of its own).
    """

    title: str
    better: Literal["higher", "lower"]
    scale: Scale


KINDS: dict[str, Kind] = {
    "accuracy": Kind("Accuracy", "higher", "share"),
    "preference_accuracy": Kind("Preference accuracy", "higher", "share"),
    "entity_f1": Kind("Entity F1", "higher", "share"),
    "entity_precision": Kind("Entity precision", "higher", "share"),
    "entity_recall": Kind("Entity recall", "higher", "share"),
    "token_accuracy": Kind("Token accuracy", "higher", "share"),
    "macro_f1": Kind("Macro F1", "higher", "share"),
    "micro_f1": Kind("Micro F1", "higher", "share"),
    "auroc": Kind("AUROC", "higher", "share"),
    "aupr": Kind("AUPR", "higher", "share"),
    "mcc": Kind("MCC", "higher", "coefficient"),
    "calibration_error": Kind("Calibration error", "lower", "share"),
    "log_loss": Kind("Log loss", "lower", "nats"),
    "reward_margin": Kind("Reward margin", "higher", "nats"),
    "chosen_reward": Kind("Chosen reward", "higher", "nats"),
    "rejected_reward": Kind("Rejected reward", "lower", "nats"),
    "exact_match": Kind("Exact match", "higher", "share"),
    "bleu": Kind("BLEU", "higher", "score"),
    "chrf": Kind("chrF", "higher", "score"),
    "prediction_loss": Kind("Loss of the prediction", "lower", "nats"),
    "perplexity": Kind("Perplexity", "lower", "perplexity"),
    "data_similarity": Kind("Similarity to the data", "higher", "coefficient"),
    "nearest_data": Kind("Nearest to the data", "higher", "share"),
    "subject_retrieval": Kind("Subject retrieval", "higher", "share"),
    "prompt_retrieval": Kind("Prompts kept", "higher", "share"),
    "clip_score": Kind("CLIP score", "higher", "score"),
    "diversity": Kind("Diversity", "higher", "distance"),
    "memorised": Kind("Taken for copies", "lower", "share"),
    "drift": Kind("Drift, unrelated", "lower", "distance"),
    "unrelated_retrieval": Kind("Kept, unrelated", "higher", "share"),
    "kid": Kind("KID", "lower", "number"),
    "fid": Kind("FID", "lower", "number"),
    "classifier_score": Kind("Classifier score", "higher", "number"),
}

_OF_A_LABEL = {
    "precision": Kind("Precision", "higher", "share"),
    "recall": Kind("Recall", "higher", "share"),
    "f1": Kind("F1", "higher", "share"),
}


def label_metric(metric: str, label: str) -> str:
    """Return the name of `precision`, `recall` or `f1` of one label, such as `recall[positive]`."""
    return f"{metric}[{label}]"


def kind_of(name: str) -> Kind:
    """Return how a metric is read, that of one label included.

    Raises:
        KeyError: No metric has this name.
    """
    metric, bracket, label = name.partition("[")
    if name in KINDS or not bracket:
        return KINDS[name]
    kind = _OF_A_LABEL[metric]
    return replace(kind, title=f"{kind.title}, {label.removesuffix(']')}")


def in_order(names: Iterable[str]) -> list[str]:
    """Return the names in the order in which metrics are shown: those of `KINDS`, then those of labels."""
    given = [*names]
    of_labels = [name for name in given if "[" in name and name.partition("[")[0] in _OF_A_LABEL]
    return [name for name in KINDS if name in given] + of_labels
