"""What a node and its HTTP server count, for Prometheus: the only prometheus_client import.

Everything is read when it is asked for, into a registry of its own: nothing is counted twice, several providers of one
process do not mix, and what is never scraped costs nothing. No label has a value that comes from the network. What each
metric means, and what to do about it, is in docs/operations.md.
"""

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from plasm_dht.dht.server import PlasmServer
from plasm_dht.dht.stats import Durations
from plasm_dht.provider.site import Traffic

OPEN_METRICS = "application/openmetrics-text"


class Exposition(Collector):
    """The metrics of one node that listens, and of the HTTP server that answers for it."""

    def __init__(self, server: PlasmServer, traffic: Traffic) -> None:
        self._server = server
        self._traffic = traffic
        self._build = version("plasm-dht")
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self, accept: str) -> tuple[str, bytes]:
        """(content type, body) in the format that the scraper's `Accept` header asks for."""
        # Of the client's header no more than that: one that the library cannot read makes it raise.
        encode, content_type = choose_encoder(OPEN_METRICS if OPEN_METRICS in accept else "")
        return content_type, encode(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Everything but the process's."""
        yield _labelled(
            GaugeMetricFamily("plasm_dht_build_info", "Always 1", labels=("version", "python")),
            [((self._build, platform.python_version()), 1)],
        )
        yield from self._advertised()
        yield from self._held()
        yield from self._network()
        yield from self._http()

    def _advertised(self) -> Iterator[Metric]:
        server, stats = self._server, self._server.protocol.stats
        now, advertised = server.now(), stats.advertised()
        yield _gauge("plasm_dht_record_ttl_seconds", "Life of a record that is published", server.record_ttl)
        yield _gauge("plasm_dht_refresh_interval_seconds", "Time between two refreshes", server.refresh_interval)
        yield _labelled(
            CounterMetricFamily(
                "plasm_dht_refreshes",
                "Times a record was published or refreshed, by whether enough holders acknowledged it",
                labels=("result",),
            ),
            [(["done"], stats.rounds_done), (["failed"], stats.rounds_failed)],
        )
        yield _gauge("plasm_dht_advertised_records", "Records that are kept alive", advertised.records)
        yield _gauge(
            "plasm_dht_failing_records", "Records whose last refresh too few holders acknowledged", advertised.failing
        )
        if advertised.ends is not None:
            yield _gauge(
                "plasm_dht_next_expiry_seconds",
                "Time until the first record that is kept alive expires at its holders, unless it is refreshed",
                max(advertised.ends - now, 0) / 1000,
            )
        yield _gauge("plasm_dht_owed_stores", "Stores of a change that holders are still owed", advertised.owed)
        yield _gauge(
            "plasm_dht_clock_correction_seconds",
            "What the network's time is ahead of this machine's clock, where that was found to be wrong; else 0",
            round((now - server.clock.wall()) / 1000),  # the two were read one after the other
        )

    def _held(self) -> Iterator[Metric]:
        storage, stats = self._server.storage, self._server.protocol.stats
        yield _gauge("plasm_dht_records_held", "Records in the storage, tombstones included", storage.records)
        yield _gauge("plasm_dht_records_limit", "Records that the storage holds at most", storage.max_records)
        yield _gauge("plasm_dht_held_bytes", "Size of the records in the storage", storage.bytes)
        yield _gauge("plasm_dht_held_bytes_limit", "Size of what the storage holds at most", storage.max_bytes)
        yield _by(
            "plasm_dht_stores_received",
            "Stores that other nodes asked for: accepted, or why this node refused",
            "result",
            stats.stores_received,
        )
        yield _by(
            "plasm_dht_stores_sent",
            "Stores at other nodes: accepted, not answered, or why they refused",
            "result",
            stats.stores_sent,
        )

    def _network(self) -> Iterator[Metric]:
        protocol = self._server.protocol
        stats, live = protocol.stats, protocol.router.live_count
        yield _labelled(
            GaugeMetricFamily("plasm_dht_contacts", "Nodes in the routing table", labels=("state",)),
            [(["live"], live), (["stale"], len(protocol.router) - live)],
        )
        yield CounterMetricFamily("plasm_dht_datagrams_received", "Datagrams that arrived", value=stats.received)
        yield CounterMetricFamily("plasm_dht_datagrams_sent", "Datagrams that were sent", value=stats.sent)
        yield _by("plasm_dht_datagrams_dropped", "Datagrams that led to nothing, by why", "reason", stats.dropped)
        yield _histogram(
            HistogramMetricFamily("plasm_dht_round_trip_seconds", "From a request to its answer"),
            [((), stats.round_trips)],
        )
        looked = [(("name", result), took) for result, took in stats.readings.items()]
        looked += [(("key", result), took) for result, took in stats.lookups.items()]
        yield _histogram(
            HistogramMetricFamily(
                "plasm_dht_lookup_duration_seconds",
                "Readings of a name, and lookups of a key",
                labels=("kind", "result"),
            ),
            looked,
        )

    def _http(self) -> Iterator[Metric]:
        yield _labelled(
            CounterMetricFamily(
                "plasm_dht_http_requests", "HTTP requests, by what was asked for", labels=("path", "status")
            ),
            self._traffic.answers.items(),
        )
        yield CounterMetricFamily("plasm_dht_http_sent_bytes", "Bytes of HTTP bodies", value=self._traffic.sent)


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(name, meaning, value=value)


def _by(name: str, meaning: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, meaning, labels=(label,))
    return _labelled(family, (([each], count) for each, count in counts.items()))


def _labelled(family: GaugeMetricFamily | CounterMetricFamily, values: Iterable[tuple[Sequence[str], float]]) -> Metric:
    for labels, value in values:
        family.add_metric(labels, value)
    return family


def _histogram(family: HistogramMetricFamily, durations: Iterable[tuple[Sequence[str], Durations]]) -> Metric:
    for labels, each in durations:
        family.add_metric(labels, list(_buckets(each)), each.total)
    return family


def _buckets(durations: Durations) -> Iterable[tuple[str, float]]:
    """(upper bound, how many were at most that long), as Prometheus has them: each includes those before."""
    below = 0
    for bound, count in zip((*map(str, durations.bounds), "+Inf"), durations.counts, strict=True):
        below += count
        yield bound, below
