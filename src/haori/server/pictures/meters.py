"""Figures of what is drawn, for Prometheus, beside those of text."""

import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["PictureMeters"]

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 240, 480, 960)
_MODEL = "model_name"
_OTHERS = "other"


class PictureMeters:
    """The figures of one base for pictures.

    Args:
        model: Its name, a label of every series.
        registry: Of the server.
        busy: Returns how many requests are drawn and how many wait.
        metered_adapters: Adapters with series of their own.
    """

    def __init__(
        self, model: str, registry: CollectorRegistry, busy: Callable[[], tuple[int, int]], *, metered_adapters: int
    ) -> None:
        self._room, self._metered = metered_adapters, set[str]()
        label = (_MODEL,)
        self.pictures = Counter("haori:pictures", "Pictures drawn.", label, registry=registry).labels(model)
        self.steps = Counter("haori:picture_steps", "Steps of pictures drawn.", label, registry=registry).labels(model)
        self._ended = Counter(
            "haori:picture_requests", "Requests for pictures that ended, by reason.", (_MODEL, "finished_reason"),
            registry=registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "haori:picture_request_seconds", "Time from request to end.", label, registry=registry, buckets=_SECONDS
        ).labels(model)
        self._adapters = Counter(
            "haori:picture_adapters", "Requests for pictures by adapter.", ("adapter",), registry=registry
        )
        self._model = model
        registry.register(_Busy(model, busy))

    def ended(self, reason: str, began_s: float, adapters: Sequence[str]) -> None:
        """Count a request that ended.

        Args:
            reason: `stop`, `abort` or `error`.
            began_s: When it came, by the performance counter.
            adapters: Names that exist; others make no series.
        """
        self._ended.labels(self._model, reason).inc()
        self._seconds.observe(time.perf_counter() - began_s)
        for name in dict.fromkeys(adapters):
            if name not in self._metered and len(self._metered) < self._room:
                self._metered.add(name)
            self._adapters.labels(name if name in self._metered else _OTHERS).inc()


class _Busy(Collector):
    """Asks the queue when Prometheus asks."""

    def __init__(self, model: str, busy: Callable[[], tuple[int, int]]) -> None:
        self._model = model
        self._busy = busy

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the names are known at the first look."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Yield how busy the queue is."""
        running, waiting = self._busy()
        for name, text, value in (
            ("haori:picture_requests_running", "Requests that are drawn.", running),
            ("haori:picture_requests_waiting", "Requests that wait to be drawn.", waiting),
        ):
            family = GaugeMetricFamily(name, text, labels=(_MODEL,))
            family.add_metric((self._model,), value)
            yield family
