"""What the service counts. Every replica has a registry; /metrics shows them all, each sample under its replica."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class IngressMetrics:
    """Figures of an ingress replica: requests, their times, its caches."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "rayclip_requests", "requests answered", ["route", "status", "model"], registry=registry
        )
        self.seconds = Histogram(
            "rayclip_request_seconds", "time to the answer", ["route"], buckets=_SECONDS, registry=registry
        )
        self.num_running = 0
        """The same as a number, without those of probes."""
        self.running = Gauge("rayclip_requests_running", "requests being answered", registry=registry)
        self.retries = Counter("rayclip_retries", "calls repeated since a replica went away", registry=registry)
        self.cache_hits = Gauge("rayclip_class_matrix_hits", "class matrices found in the cache", registry=registry)
        self.cache_misses = Gauge("rayclip_class_matrix_misses", "class matrices computed", registry=registry)
        self.keys_stale = Gauge(
            "rayclip_api_keys_stale", "1 where the file of keys has changed and cannot be read", registry=registry
        )
        self.cache_bytes = Gauge("rayclip_class_matrix_bytes", "bytes of the cached matrices", registry=registry)


class EncoderMetrics:
    """Figures of a tower's replica: its batches and its queue."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.batch = Histogram(
            "rayclip_batch_size", "items a batch", ["tower", "model"], buckets=_BATCH, registry=registry
        )
        self.seconds = Histogram(
            "rayclip_batch_seconds", "time a batch", ["tower", "model"], buckets=_SECONDS, registry=registry
        )
        self.waiting = Gauge("rayclip_waiting", "items that wait for a batch", ["tower"], registry=registry)
        self.refused = Counter("rayclip_refused", "requests refused by a full queue", ["tower"], registry=registry)
        self.broken = Counter("rayclip_broken_pictures", "pictures not decoded", ["code"], registry=registry)


class CoordinatorMetrics:
    """Of the coordinator: whether the registry is followed, and whether what it names can be loaded."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.up = Gauge(
            "rayclip_registry_up", "1 where the role's model was found at the last look", ["role"], registry=registry
        )
        self.age = Gauge(
            "rayclip_registry_age_seconds", "since the role's model was last found", ["role"], registry=registry
        )
        self.failed = Gauge(
            "rayclip_model_failed", "1 where a version cannot be fetched or loaded", ["model"], registry=registry
        )


def collect(registry: CollectorRegistry) -> list[Metric]:
    """A replica's present figures, as plain values that may travel."""
    return list(registry.collect())


def render(metrics_of: dict[str, list[Metric]]) -> bytes:
    """All replicas' figures in Prometheus' text form."""
    merged: dict[str, Metric] = {}
    for replica, metrics in metrics_of.items():
        for metric in metrics:
            into = merged.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            into.samples += [
                sample._replace(labels={**sample.labels, "replica": replica})
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ]
    return generate_latest(_Merged(merged.values()))


class _Merged:
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics
