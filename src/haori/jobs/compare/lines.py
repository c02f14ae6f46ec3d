"""How a comparison reads: every figure as text, once, for the terminal and the page."""

from typing import NamedTuple

from haori.evaluation.result import figure, interval_of
from haori.jobs.compare.recipes import BASE, DREAMBOOTH
from haori.jobs.compare.records import Comparison, Cost, MethodResult, Score
from haori.jobs.compare.scores import main_metric
from haori.metrics.kinds import KINDS
from haori.tasks.registry import task_of
from haori.tasks.task import Task

__all__ = ["TITLES", "CostLine", "ScoreLine", "cost_lines", "forgetting_cell", "headline", "metrics_of", "score_lines"]

TITLES = {
    "base": "base",
    "lora": "LoRA",
    "dora": "DoRA",
    "adalora": "AdaLoRA",
    "ard_lora": "ARD-LoRA",
    "qlora": "QLoRA",
    "full": "full fine-tuning",
    "dreambooth": "DreamBooth (with text encoders)",
    "head": "head alone",
    "peft": "PEFT",
}
_GENERAL = "shipped"


class ScoreLine(NamedTuple):
    """One method and one metric: figure, 95% interval, spread over seeds, differences with their intervals."""

    method: str
    metric: str
    value: str
    interval: str
    spread: str
    against_base: str
    against_base_interval: str
    against_full: str
    against_full_interval: str


class CostLine(NamedTuple):
    """What a method's training took, what is left on disk, and what it forgot."""

    method: str
    lr: str
    time: str
    speed: str
    peak: str
    trained: str
    size: str
    forgot: str
    forgot_interval: str


def metrics_of(comparison: Comparison) -> tuple[str, ...]:
    """Return the metrics measured, the main one first."""
    first = main_metric(comparison.methods[0].scores)
    return (first, *(name for name in comparison.methods[0].scores if name != first))


def score_lines(comparison: Comparison, metric: str) -> list[ScoreLine]:
    """Return one line per method that has a score, the base first."""
    return [_score(result, metric, result.scores[metric]) for result in comparison.methods if metric in result.scores]


def cost_lines(comparison: Comparison) -> list[CostLine]:
    """Return one line per method of which a run finished."""
    return [_cost(result, result.cost) for result in comparison.methods if result.cost is not None]


def forgetting_cell(result: MethodResult, name: str) -> tuple[str, str]:
    """Return how much a method forgot of one set of general text, and the interval; empty if not measured."""
    found = result.forgetting.get(name)
    if found is None:
        return "", ""
    whole = found.whole
    interval = "" if whole.low is None else f"{whole.low:+.3f} to {whole.high:+.3f}"
    return f"{whole.difference:+.3f}", interval


def headline(comparison: Comparison) -> str:
    """Return the main finding: the adapter that scored best, beside full fine-tuning or the base."""
    metric = metrics_of(comparison)[0]
    kind = KINDS[metric]
    found = {result.method: result for result in comparison.methods if metric in result.scores}
    adapters = [result for name, result in found.items() if name not in (BASE, "full", "head", DREAMBOOTH)]
    if not adapters:
        return "No adapter was trained to the end." if "full" not in found else _against(found["full"], BASE, metric)
    sign = -1 if kind.better == "lower" else 1
    best = max(adapters, key=lambda result: sign * result.scores[metric].value)
    if "full" not in found:
        return _against(best, BASE, metric)
    return _against(best, "full", metric) + _price(best, found["full"], task_of(comparison.recipe.task))


def _against(result: MethodResult, other: str, metric: str) -> str:
    kind, score = KINDS[metric], result.scores[metric]
    difference = score.against[other]
    text = (
        f"{kind.title} {figure(kind, score.value)} with {TITLES[result.method]}, "
        f"{figure(kind, score.value - difference.value)} with {'the bare base' if other == BASE else TITLES[other]}: "
        f"{figure(kind, difference.value, signed=True)}"
    )
    if difference.low is None or difference.high is None:
        return f"{text}."
    clear = difference.low > 0 or difference.high < 0
    interval = interval_of(kind, difference.low, difference.high, signed=True)
    return f"{text} (95% interval {interval}){'' if clear else ', no clear difference'}."


def _price(result: MethodResult, full: MethodResult, task: Task) -> str:
    cost, other = result.cost, full.cost
    if cost is None or other is None:
        return ""
    text = f" {TITLES[result.method]} trained {_share(cost)} of the weights, peaked at {_peak(cost)} instead of "
    text += f"{_peak(other)}, ran at {_speed(cost)} instead of {_speed(other)} {task.unit}/s"
    own, its = (forgetting_cell(one, _GENERAL)[0] for one in (result, full))
    return f"{text}, and {task.general.sentence.format(own, its)}." if own and its else f"{text}."


def _score(result: MethodResult, metric: str, score: Score) -> ScoreLine:
    kind = KINDS[metric]
    cells = []
    for other in (BASE, "full"):
        difference = score.against.get(other)
        value, low, high = (difference.value, difference.low, difference.high) if difference else (None, None, None)
        cells += [figure(kind, value, signed=True), interval_of(kind, low, high, signed=True)]
    spread = "" if score.spread is None else f"± {figure(kind, score.spread)}"
    return ScoreLine(
        TITLES[result.method],
        metric,
        figure(kind, score.value),
        interval_of(kind, score.low, score.high),
        spread.replace("%", " points"),
        *cells,
    )


def _cost(result: MethodResult, cost: Cost) -> CostLine:
    forgot, interval = forgetting_cell(result, _GENERAL)
    return CostLine(
        method=TITLES[result.method],
        lr="" if result.lr is None else f"{result.lr:.2g}",
        time=_duration(cost.seconds),
        speed=_speed(cost),
        peak=_peak(cost),
        trained=_share(cost),
        size=_size(cost.size_bytes),
        forgot=forgot,
        forgot_interval=interval,
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _speed(cost: Cost) -> str:
    return f"{cost.tokens_per_s:,.0f}"


def _peak(cost: Cost) -> str:
    return f"{cost.peak_memory_bytes / 1e9:.2f} GB"


def _share(cost: Cost) -> str:
    share = cost.trainable_parameters / max(1, cost.total_parameters)
    return f"{share:.2%}" if share < 0.1 else f"{share:.0%}"


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
