"""Prometheus metrics of one app, in a separate registry, so that one process can hold several apps."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from openmimo.engine.server.backends.protocol import Backend, BackendGauges

_SECONDS_TO_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_COUNTED_NAMES = 64
_SECONDS_IN_ALL = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """The server's own counters and histograms, and the backend's gauges, which are read when metrics are collected."""

    def __init__(self, backend: Backend):
        self._registry = CollectorRegistry()
        self.http_requests = Counter(
            "openmimo_http_requests", "Answered HTTP requests.", ["path", "status"], registry=self._registry
        )
        self.replies = Counter(
            "openmimo_replies", "Finished replies, by finish reason.", ["finish_reason"], registry=self._registry
        )
        self.seconds_to_first_token = Histogram(
            "openmimo_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS_TO_FIRST,
            registry=self._registry,
        )
        self.seconds_per_token = Histogram(
            "openmimo_time_per_output_token_seconds",
            "Time between tokens after the first, averaged over a reply.",
            buckets=_SECONDS_PER_TOKEN,
            registry=self._registry,
        )
        self.seconds_in_all = Histogram(
            "openmimo_request_seconds",
            "From a request's arrival to the end of its reply.",
            buckets=_SECONDS_IN_ALL,
            registry=self._registry,
        )
        self._ignored_fields = Counter(
            "openmimo_ignored_fields",
            "Unknown fields of requests that were ignored.",
            ["field"],
            registry=self._registry,
        )
        self._ignored_names: set[str] = set()
        self._registry.register(_BackendCollector(backend))

    def count_ignored_fields(self, names: Sequence[str]) -> None:
        """Count the unknown fields of a request. After many distinct names, further ones count as "other"."""
        for name in names:
            if len(self._ignored_names) < _COUNTED_NAMES:
                self._ignored_names.add(name)
            self._ignored_fields.labels(name if name in self._ignored_names else "other").inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _BackendCollector(Collector):
    def __init__(self, backend: Backend):
        self._backend = backend

    def describe(self) -> Iterator[Metric]:
        """The metric families of `collect`, without calling the backend."""
        return _families(BackendGauges())

    def collect(self) -> Iterator[Metric]:
        """The current values of the backend's gauges."""
        return _families(self._backend.gauges())


def _families(gauges: BackendGauges) -> Iterator[Metric]:
    yield GaugeMetricFamily("openmimo_requests_waiting", "Requests in the engine's queue.", gauges.num_waiting)
    yield GaugeMetricFamily("openmimo_requests_running", "Requests in the engine's batch.", gauges.num_running)
    yield GaugeMetricFamily("openmimo_cache_used_bytes", "KV cache held by requests.", gauges.cache_bytes_used)
    yield GaugeMetricFamily("openmimo_cache_bytes", "Size of the KV cache.", gauges.cache_bytes_total)
    yield GaugeMetricFamily("openmimo_healthy", "Whether the engine accepts requests.", float(gauges.is_healthy))
    yield GaugeMetricFamily("openmimo_ranks", "Devices that share the model.", gauges.num_ranks)
    yield CounterMetricFamily("openmimo_prompt_tokens", "Tokens of prompts.", gauges.num_prompt_tokens)
    yield CounterMetricFamily(
        "openmimo_prefix_hit_tokens", "Prompt tokens found in the prefix cache.", gauges.num_cached_tokens
    )
    yield CounterMetricFamily("openmimo_generated_tokens", "Tokens generated.", gauges.num_new_tokens)
    yield _by_position("openmimo_drafts_offered", "Drafts that were verified.", gauges.drafts_offered)
    yield _by_position("openmimo_drafts_accepted", "Drafts that were accepted.", gauges.drafts_accepted)
    steps = CounterMetricFamily(
        "openmimo_sequence_steps", "Decoding steps of sequences, by the number of drafts verified.", labels=["drafts"]
    )
    for drafts, count in enumerate(gauges.steps_by_drafts):
        steps.add_metric([str(drafts)], count)
    yield steps
    yield GaugeMetricFamily("openmimo_graphs", "Captured graphs of the accelerator.", gauges.num_graphs)
    yield GaugeMetricFamily("openmimo_graph_capture_seconds", "Time of their capture.", gauges.graph_seconds)
    yield GaugeMetricFamily("openmimo_graph_bytes", "Memory that their capture took.", gauges.graph_bytes)
    yield CounterMetricFamily("openmimo_graph_passes", "Passes that replayed a graph.", gauges.num_graph_passes)
    yield CounterMetricFamily(
        "openmimo_other_passes", "Passes that launched their kernels one by one.", gauges.num_other_passes
    )
    yield CounterMetricFamily("openmimo_audio_input_seconds", "Sound in prompts.", gauges.seconds_heard)
    yield CounterMetricFamily("openmimo_audio_output_seconds", "Sound generated.", gauges.seconds_spoken)


def _by_position(name: str, help_line: str, counts: tuple[int, ...]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help_line, labels=["position"])
    for position, count in enumerate(counts, start=1):
        family.add_metric([str(position)], count)
    return family
