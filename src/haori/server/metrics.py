"""Figures for Prometheus, under vLLM's names where they mean the same, so that its dashboards and gateways work.

Each app has its own registry. Series per adapter are bounded: the first so many adapters have their own, the others
share one, and a name that does not resolve never makes any.
"""

import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from haori.serve.request import Finish, StreamChunk
from haori.server.contracts import Backend

__all__ = ["AnswerMeter", "Meters"]

_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN_TOKENS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_OTHERS = "other"
_REASONS: dict[Finish, str] = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}
_MODEL = "model_name"


disable_created_metrics()  # type: ignore[no-untyped-call]  # an unused second series for each


class Meters:
    """The figures of one server.

    Args:
        model: The base's name, a label of every series.
        backend: Returns what is loaded, or None.
        max_batch: Requests, and so adapters, that run at once.
        metered_adapters: Adapters with series of their own.
    """

    def __init__(
        self, model: str, backend: Callable[[], Backend | None], *, max_batch: int, metered_adapters: int
    ) -> None:
        self.registry = registry = CollectorRegistry()
        self._room = metered_adapters
        self._metered: set[str] = set()
        label = (_MODEL,)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, label, registry=registry, buckets=tuple(buckets)).labels(model)

        self.first_token = histogram("vllm:time_to_first_token_seconds", "Time to the first token.", _FIRST_TOKEN_S)
        self.between_tokens = histogram("vllm:inter_token_latency_seconds", "Time between tokens.", _BETWEEN_TOKENS_S)
        self.whole = histogram("vllm:e2e_request_latency_seconds", "Time from request to end.", _WHOLE_S)
        self.prompt_tokens = Counter("vllm:prompt_tokens", "Prompt tokens.", label, registry=registry).labels(model)
        self.generated = Counter("vllm:generation_tokens", "Generated tokens.", label, registry=registry).labels(model)
        self._success = Counter(
            "vllm:request_success", "Requests that ended, by reason.", (_MODEL, "finished_reason"), registry=registry
        )
        self._endings = {finish: self._success.labels(model, reason) for finish, reason in _REASONS.items()}
        self.adapter_requests = Counter(
            "haori:adapter_requests", "Requests by adapter; a blend counts for each part.", ("adapter",),
            registry=registry,
        )  # fmt: skip
        self.adapter_tokens = Counter(
            "haori:adapter_tokens", "Generated tokens by adapter; a blend's count for each part.", ("adapter",),
            registry=registry,
        )  # fmt: skip
        registry.register(_EngineFigures(model, backend, max_batch))

    def begin(self, names: Sequence[str], prompt_tokens: int) -> "AnswerMeter":
        """Count a request to the adapters (or the base) `names`, which exist."""
        self.prompt_tokens.inc(prompt_tokens)
        series = [self._series(name) for name in dict.fromkeys(names)]
        for name in series:
            self.adapter_requests.labels(name).inc()
        return AnswerMeter(self, series)

    def ended(self, finish: Finish) -> None:
        """Count how an answer ended."""
        self._endings[finish].inc()

    def _series(self, name: str) -> str:
        if name not in self._metered:
            if len(self._metered) >= self._room:
                return _OTHERS
            self._metered.add(name)
        return name


class AnswerMeter:
    """Times one answer, chunk by chunk."""

    def __init__(self, meters: Meters, series: Sequence[str]) -> None:
        self._meters = meters
        self._tokens = [meters.adapter_tokens.labels(name) for name in series]
        self._began = time.perf_counter()
        self._last: float | None = None

    def observe(self, chunk: StreamChunk) -> None:
        """Record a chunk."""
        meters = self._meters
        at = time.perf_counter()
        if chunk.tokens:
            if self._last is None:
                meters.first_token.observe(at - self._began)
            else:
                meters.between_tokens.observe((at - self._last) / len(chunk.tokens))
            self._last = at
            meters.generated.inc(len(chunk.tokens))
            for counter in self._tokens:
                counter.inc(len(chunk.tokens))
        if chunk.finish is not None:
            meters.whole.observe(at - self._began)
            meters.ended(chunk.finish)


class _EngineFigures(Collector):
    """Asks the engine when Prometheus asks."""

    def __init__(self, model: str, backend: Callable[[], Backend | None], max_batch: int) -> None:
        self._model = model
        self._backend = backend
        self._max_batch = max_batch

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the names are known at the first look."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Yield how busy the engine is."""
        backend = self._backend()
        if backend is None:
            return
        status = backend.engine.status()
        yield self._gauge("vllm:num_requests_running", "Requests in the engine's steps.", status.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests in the queues.", status.waiting)
        share = status.kv_used_bytes / status.kv_total_bytes if status.kv_total_bytes else 0.0
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the key-value cache in use; 1 is all.", share)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", status.prefix_queries)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", status.prefix_hits)
        loads = CounterMetricFamily("haori:adapter_loads", "Times that an adapter was brought into memory.")
        loads.add_metric((), status.adapter_loads)
        yield loads
        names = {entry.adapter: entry.id for entry in reversed(backend.directory.entries()) if entry.adapter}
        info = GaugeMetricFamily(
            "vllm:lora_requests_info", "Adapters at work; the value is the time.",
            labels=("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
        )  # fmt: skip
        waiting, running = (
            ",".join(names.get(identity, identity[:19]) for identity in sorted(set(adapters)))
            for adapters in (status.waiting_adapters, status.running_adapters)
        )
        info.add_metric((str(self._max_batch), waiting, running), time.time())
        yield info

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=(_MODEL,))
        family.add_metric((self._model,), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=(_MODEL,))
        family.add_metric((self._model,), value)
        return family
