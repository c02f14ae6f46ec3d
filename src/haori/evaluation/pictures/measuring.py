"""From what a network sees to metrics with intervals: prompts are drawn again, and seeds within them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from haori.core.records import Metric
from haori.evaluation.bootstrap import RESAMPLES, as_metric, intervals
from haori.metrics.kinds import KINDS
from haori.metrics.picture_sets import FEWEST_FOR_FID, frechet_distance, kid_over_subsets

if TYPE_CHECKING:
    from haori.evaluation.pictures.figures import Standard, UnrelatedStandard
    from haori.metrics.statistics import Array, Statistic

__all__ = ["Found", "add_fid", "alike_note", "kept_note", "measured", "notes_of"]

_FEWEST_FOR_SUBSETS = 4
# Pictures drawn again are fewer different ones, which lowers it.
_WITHOUT_INTERVAL = {"classifier_score"}


class Found(NamedTuple):
    """Metrics with their intervals, and the intervals of the base's own figures."""

    metrics: dict[str, Metric]
    of_base: dict[str, tuple[float, float]]


def measured(
    found: Found, adapter: "Mapping[str, Statistic]", base: "Mapping[str, Statistic]", groups: Sequence[int]
) -> None:
    """Add the metrics of one set of prompts.

    Args:
        found: Where they go.
        adapter: Statistics over the pictures of the adapter.
        base: The same of the base; those that it has not are given without it.
        groups: [pictures] number of each picture's prompt.
    """
    for name, own in adapter.items():
        other = base.get(name)
        ends = None
        if name not in _WITHOUT_INTERVAL:
            ends = intervals(own, other, resamples=RESAMPLES, groups=groups)
        found.metrics[name] = as_metric(own.value, other.value if other else None, ends)
        if ends and ends.base:
            found.of_base[name] = (ends.base.low, ends.base.high)


def add_fid(found: Found, standard: "Standard", adapter: "Array", *, force: bool) -> str:
    """Add FID where there are pictures enough or it is forced, and return what is to be said of it."""
    fewest = min(len(adapter), len(standard.data))
    if fewest < FEWEST_FOR_FID and not force:
        return (
            f"FID is left out: it needs {FEWEST_FOR_FID:,} pictures on each side and there are {fewest:,}. With fewer "
            "it is too high by more than what adapters change; KID is not. --force-fid gives it all the same."
        )
    value, base = (frechet_distance(one, standard.data, force=True) for one in (adapter, standard.base))
    found.metrics["fid"] = Metric(value=value, base=base, difference=value - base)
    if fewest < FEWEST_FOR_FID:
        return (
            f"FID was forced: of {fewest:,} pictures it is far too high, and compares with no other number of pictures."
        )
    return "FID has no interval: drawing pictures again would raise it."


def alike_note(found: Found, prompts: int) -> list[str]:
    """Say of shares on which all pictures came out alike how far off they may be."""
    alike = [
        KINDS[name].title for name, metric in found.metrics.items()
        if KINDS[name].scale == "share" and metric.low is not None and metric.low == metric.high
    ]  # fmt: skip
    if not alike:
        return []
    return [
        f"All pictures came out alike in {', '.join(alike)}, so the intervals have no width; by the rule of three for "
        f"{prompts} prompts the true figure may still be {100 * min(1.0, 3 / prompts):.0f} points away."
    ]


def kept_note(standard: "Standard") -> list[str]:
    """Say how many prompts the data's own pictures keep, where that is known."""
    if standard.asked.seeds < 2:
        return []
    kept = standard.kept_by_data()
    if kept is None:
        return [
            "Prompts kept falls by a change of style alone; where prompts are captions, the data's own pictures tell "
            "how far."
        ]
    return [
        f"Held against what the base draws of their captions, the data's own pictures keep {100 * kept:.0f}% of the "
        "prompts; a share as high as that is no loss."
    ]


def notes_of(
    standard: "Standard", unrelated: "UnrelatedStandard", adapter: "Array", network: str, *, classes: bool
) -> list[str]:
    """Return how the figures are to be read, in plain sentences."""
    asked, others = standard.asked, unrelated.asked
    notes = [
        f"Pictures are compared by features of {network}; figures of another network do not compare with these.",
        f"Intervals are 95% percentile bootstrap, {RESAMPLES} resamples: prompts are drawn again, and seeds within "
        "them. A difference is adapter minus base on the same prompts and seeds; an interval without 0 is clear.",
        "Similarity to the data is the mean cosine with every picture of the data, seen from the mean of what the base "
        f"draws: about 0 for the base, and {standard.among_data():.3f} among the data themselves.",
    ]
    if min(len(adapter), len(standard.data)) >= _FEWEST_FOR_SUBSETS:
        own, base = (kid_over_subsets(one, standard.data) for one in (adapter, standard.base))
        notes.append(
            f"KID over 100 random subsets of {own.size}: {own.mean:.4f} ± {own.spread:.4f}, the base's {base.mean:.4f} "
            f"± {base.spread:.4f} (mean and standard deviation over subsets)."
        )
    notes += kept_note(standard)
    notes.append(
        f"Drift is the distance (1 - cosine) of adapter and base on {len(others.prompts)} unrelated prompts, same seeds"
        + (f"; two seeds of the base are {unrelated.between_seeds():.3f} apart." if others.seeds > 1 else ".")
    )
    if classes:
        notes.append(
            f"The classifier score is exp(E KL(p(y|x) || p(y))) by the classes of {network}; an Inception Score is the "
            "same by those of Inception, and other figures. It has no interval: pictures drawn again are fewer "
            "different ones, which lowers it."
        )
    if asked.seeds < 2:
        notes.append("Diversity, and which prompts were kept, need two seeds or more of each prompt.")
    few = [one for one in (asked, others) if len(one.prompts) < 10]
    if few:
        fewest = min(len(one.prompts) for one in few)
        notes.append(f"Only {fewest} prompts: intervals from so few are too narrow; use 30 or more.")
    return notes
