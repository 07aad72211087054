"""`/metrics`: Prometheus metrics with vLLM's names and meanings under the prefix `skymoe_`, and tokens per expert.

What the engine counts (`EngineStats`) is shown as it counts it, at the moment it is asked; what a client feels (time to
first token, between tokens, from end to end) is measured here, where the request comes in and its bytes go out. The
registry is our own: nothing else in the process adds to it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from skymoe.engine.output import EngineInfo, EngineStats
from skymoe.serve.admission import Admission

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40)
_END = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
_WINDOW_S = 10.0


class Metrics:
    """What happened to requests, for operators.

    Args:
        name: of the model; every series carries it.
        admission: its refusals are shown.
    """

    def __init__(self, name: str, admission: Admission) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._labels = {"model_name": name}
        names = ("model_name",)
        registry = self.registry

        def histogram(key: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(key, text, names, namespace="skymoe", buckets=buckets, registry=registry)
            return made.labels(**self._labels)

        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", _FIRST)
        self.between_tokens = histogram("inter_token_latency_seconds", "Between two tokens of a request.", _BETWEEN)
        self.end_to_end = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _END)
        self.prompt_tokens = histogram("request_prompt_tokens", "Tokens read per request.", _TOKENS)
        self.generation_tokens = histogram("request_generation_tokens", "Tokens written per request.", _TOKENS)
        self._success = Counter(
            "request_success", "Requests that ended, by why.", ("model_name", "finished_reason"), namespace="skymoe",
            registry=registry,
        )  # fmt: skip
        self._http = Counter(
            "http_requests", "HTTP requests, by route and status.", ("route", "status"), namespace="skymoe",
            registry=registry,
        )  # fmt: skip
        self._engine = _EngineCollector(self._labels, admission)
        registry.register(self._engine)
        self._written: deque[tuple[float, int]] = deque()

    def finished(self, reason: str) -> None:
        """A request ended."""
        self._success.labels(**self._labels, finished_reason=reason).inc()

    def answered(self, route: str, status: int) -> None:
        """An HTTP request was answered; `route` is one of ours, never what a client wrote."""
        self._http.labels(route, str(status)).inc()

    def wrote(self, num_tokens: int) -> None:
        """Tokens came from the engine; feeds `tokens_per_second`."""
        now = time.monotonic()
        if self._written and now - self._written[-1][0] < 0.05:
            self._written[-1] = (self._written[-1][0], self._written[-1][1] + num_tokens)
        else:
            self._written.append((now, num_tokens))
        self._forget(now)

    def tokens_per_second(self) -> float:
        """Written by all requests in the last ten seconds, per second."""
        self._forget(time.monotonic())
        return sum(count for _, count in self._written) / _WINDOW_S

    def _forget(self, now: float) -> None:
        while self._written and now - self._written[0][0] > _WINDOW_S:
            self._written.popleft()

    def expose(self, info: EngineInfo | None, stats: EngineStats | None) -> bytes:
        """All of it as text."""
        self._engine.info, self._engine.stats = info, stats
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """What the engine counts, at the moment it was asked."""

    def __init__(self, labels: dict[str, str], admission: Admission) -> None:
        self.info: EngineInfo | None = None
        self.stats: EngineStats | None = None
        self._names, self._values = list(labels), list(labels.values())
        self._admission = admission

    def collect(self) -> Iterable[Metric]:
        refused = CounterMetricFamily("skymoe_requests_refused", "Requests sent away, by why.", labels=["reason"])
        for reason, count in self._admission.refused.items():
            refused.add_metric([reason], count)
        yield refused
        if self.stats is not None:
            yield from self._gauges(self.stats)
            yield from self._counters(self.stats)
            yield self._experts(self.stats)

    def _gauges(self, stats: EngineStats) -> Iterable[Metric]:
        used = 1 - stats.free_pages / stats.num_pages if stats.num_pages else 0.0
        for key, text, value in (
            ("num_requests_running", "Requests in the batch.", stats.num_running),
            ("num_requests_waiting", "Requests in the queue.", stats.num_waiting),
            ("kv_cache_usage_perc", "Part of the key/value cache in use; 1 is all.", used),
            ("kv_cache_pages", "Pages of the key/value cache.", stats.num_pages),
            ("kv_cache_free_pages", "Pages free for the taking, cached ones included.", stats.free_pages),
            ("kv_cache_cached_pages", "Free pages whose content can still be shared.", stats.cached_pages),
        ):
            yield self._one(GaugeMetricFamily(f"skymoe_{key}", text, labels=self._names), value)

    def _counters(self, stats: EngineStats) -> Iterable[Metric]:
        for key, text, value in (
            ("prompt_tokens", "Prompt tokens read, cached ones included.", stats.prompt_tokens),
            ("generation_tokens", "Tokens written.", stats.generation_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up in the cache.", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the cache.", stats.prefix_hits),
            ("num_preemptions", "Times a request gave its pages back.", stats.num_preemptions),
            ("engine_steps", "Steps of the model.", stats.num_steps),
            ("engine_step_seconds", "Time in steps of the model.", stats.step_seconds),
        ):
            yield self._one(CounterMetricFamily(f"skymoe_{key}", text, labels=self._names), value)

    def _experts(self, stats: EngineStats) -> Metric:
        text = "Tokens that each expert of each layer was given."
        metric = CounterMetricFamily("skymoe_expert_tokens", text, labels=[*self._names, "layer", "expert"])
        layers = self.info.moe_layers if self.info is not None else ()
        for layer, counts in zip(layers, stats.expert_tokens, strict=False):
            for expert, count in enumerate(counts):
                metric.add_metric([*self._values, str(layer), str(expert)], count)
        return metric

    def _one(self, metric: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        metric.add_metric(self._values, value)
        return metric
