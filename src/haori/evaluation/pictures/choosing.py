"""Which epoch and which strength: a rule on figures with intervals, said in plain words.

    1. Out are settings that lose prompts (more than 10 points fewer kept than by the base, or than by the data's own
       pictures where these keep fewer, and clearly so) or copy (clearly more than 5% of their pictures taken for copies
       of training pictures).
    2. Of the rest the one whose pictures are most like the data is the nearest.
    3. Settings that are not clearly less like the data than that one count as equal to it. Of these the one is
       recommended that moves unrelated prompts least, where it does so as measured.

Clear means that a 95% interval, paired on the same prompts and seeds, does not hold the value.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from haori.core.records import Metric
from haori.evaluation.bootstrap import Interval
from haori.metrics.memorisation import EXPECTED_SHARE

__all__ = ["RULE", "Choice", "Setting", "choose"]

_LOST = 0.1
RULE = (
    "Settings that keep more than 10 points fewer prompts than the base (than the data's own pictures, where these "
    "keep fewer), or of whose pictures more than 5% are taken for copies, are left out where the interval says so "
    "clearly. Of the others, those that are not clearly less like the data than the most similar one count as equal, "
    "and of these the one with the least drift on unrelated prompts is recommended."
)


@dataclass(frozen=True)
class Setting:
    """An adapter of some epoch at some strength, measured.

    Attributes:
        epoch: Epochs it was trained for; None where that is not known.
        strength: At which it was drawn.
        adapter: Where it is: folder of a checkpoint, or name in the library.
        metrics: What was measured, with differences to the base.
        loss: On the pictures held out, at that epoch; None where it was not measured.
        kept_by_data: Share of prompts that the data's own pictures keep; None where that is not known.
    """

    epoch: float | None
    strength: float
    adapter: str
    metrics: dict[str, Metric]
    loss: float | None = None
    kept_by_data: float | None = None

    @property
    def label(self) -> str:
        """Return what people call it."""
        return f"strength {self.strength:g}" if self.epoch is None else f"epoch {self.epoch:.3g} at {self.strength:g}"


@dataclass(frozen=True)
class Choice:
    """What is recommended, and why.

    Attributes:
        recommended: Place of the setting; None where none can be.
        equal: Places of those that are not clearly less like the data than the most similar one.
        left_out: Why a setting is left out, by its place.
        reasons: Sentences for people.
    """

    recommended: int | None
    equal: tuple[int, ...]
    left_out: dict[int, str]
    reasons: tuple[str, ...]


def choose(settings: Sequence[Setting], less_like: Callable[[int, int], Interval | None]) -> Choice:
    """Recommend a setting by the rule of this module.

    Args:
        settings: One or more.
        less_like: Gives the 95% interval of how much less one setting's pictures are like the data than another's,
            both by place; None where there is no interval.
    """
    left_out = {place: why for place, setting in enumerate(settings) if (why := _fault(setting))}
    rest = [place for place in range(len(settings)) if place not in left_out]
    if not rest:
        return Choice(
            None, (), left_out, ("Every setting loses prompts or copies; try an earlier epoch or less strength.",)
        )
    nearest = max(rest, key=lambda place: settings[place].metrics["data_similarity"].value)
    equal = [place for place in rest if place == nearest or not _clearly_above(less_like(nearest, place))]
    best = min(equal, key=lambda place: (_drift(settings[place]), settings[place].strength))
    reasons = [_reason(settings, best, nearest, len(rest))]
    if len(equal) > 1:
        others = ", ".join(settings[place].label for place in equal if place != best)
        reasons.append(
            f"The intervals do not tell its similarity from that of {others}; among these drift decided, and more "
            "prompts or seeds would tell more."
        )
    lost, _ = _lost(settings[best])
    if lost > _LOST:
        reasons.append(
            f"It may lose prompts: {100 * lost:.0f} points fewer were kept than should be, "
            "which so few pictures do not tell from none; draw more prompts."
        )
    low = settings[best].metrics["data_similarity"].difference_low
    if low is None or low <= 0:
        reasons.append("It is not clearly more like the data than the base itself: train longer, or draw more prompts.")
    return Choice(best, tuple(equal), left_out, tuple(reasons))


def _fault(setting: Setting) -> str:
    copied = setting.metrics.get("memorised")
    lost, clearly = _lost(setting)
    if lost > _LOST and clearly:
        return f"loses prompts ({-100 * lost:+.0f} points)"
    if copied is not None and copied.low is not None and copied.low > EXPECTED_SHARE:
        return f"copies ({100 * copied.value:.0f}% taken for copies)"
    return ""


def _lost(setting: Setting) -> tuple[float, bool]:
    """Return the share of prompts lost, and whether the interval says that some are."""
    kept, data = setting.metrics.get("prompt_retrieval"), setting.kept_by_data
    if kept is None or kept.base is None:
        return 0.0, False
    if data is not None and data < kept.base:
        return data - kept.value, kept.high is not None and kept.high < data
    return kept.base - kept.value, kept.difference_high is not None and kept.difference_high < 0


def _clearly_above(interval: Interval | None) -> bool:
    return interval is not None and interval.low > 0


def _drift(setting: Setting) -> float:
    return setting.metrics["drift"].value


def _reason(settings: Sequence[Setting], best: int, nearest: int, count: int) -> str:
    chosen = settings[best]
    similarity = chosen.metrics["data_similarity"]
    text = f"Recommended: {chosen.label}. Similarity to the data {similarity.value:.3f}"
    if best == nearest:
        text += f", the highest of {count}" if count > 1 else ""
    else:
        most = settings[nearest]
        text += (
            f", not clearly less than the {most.metrics['data_similarity'].value:.3f} of {most.label}, and it moves "
            f"unrelated prompts least: drift {_drift(chosen):.3f}, not {_drift(most):.3f}"
        )
    if (kept := chosen.metrics.get("prompt_retrieval")) is not None:
        text += f"; prompts kept {100 * kept.value:.0f}%"
        text += f", by the base {100 * kept.base:.0f}%" if kept.base is not None else ""
        data = chosen.kept_by_data
        text += f" and by the data's own pictures {100 * data:.0f}%" if data is not None else ""
    if (copied := chosen.metrics.get("memorised")) is not None:
        text += f"; {100 * copied.value:.0f}% taken for copies"
    return f"{text}."
