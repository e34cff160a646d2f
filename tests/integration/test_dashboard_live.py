"""The shipped dashboard against a real Prometheus that scrapes with the shipped configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from prometheus_client import Metric
from prometheus_client.registry import Collector

from fedcore.errors import UpdateResult
from fedserver.metrics import Metrics
from fedserver.metrics_endpoint import serve
from tests.integration.prometheus_server import (
    DASHBOARDS,
    PrometheusServer,
    needs_prometheus,
    panel_queries,
)

pytestmark = [needs_prometheus, pytest.mark.prometheus]


class RoundPerScrape(Collector):
    """Lets one more round happen whenever somebody scrapes, so that every scrape finds something new."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._version = 0

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        metrics = self._metrics
        self._version += 1
        metrics.phase("digits", "train")
        metrics.waiting("digits", clients=0, updates=5)
        for missing in range(4, -1, -1):
            metrics.transferred("digits", "downlink", "train", 40_000)
            metrics.transferred("digits", "uplink", "train", 40_000)
            metrics.journal_committed(records=1, seconds=0.0004)
            metrics.fold_seconds.labels("digits").observe(0.0007)
            metrics.update("digits", UpdateResult.ACCEPTED)
            metrics.waiting("digits", clients=0, updates=missing)
        metrics.phase("digits", "closing")
        metrics.round_closed("digits", version=self._version, seconds=1.5)
        figures = {"accuracy": 1 - 1 / (1 + self._version), "loss": 1 / self._version}
        metrics.evaluated("digits", version=self._version - 1, figures=figures)
        return iter(())


@pytest.fixture(scope="module")
def metrics_url() -> Iterator[str]:
    """Where a server that runs the job `digits` shows its metrics."""
    metrics = Metrics(version="0.1.0")
    metrics.clients_enrolled.set(6)
    metrics.clients_connected.set(5)
    metrics.start_job("digits", rounds=1000)
    metrics.registry.register(RoundPerScrape(metrics))
    with serve(metrics, "127.0.0.1", 0) as endpoint:
        yield endpoint.url


@pytest.fixture(scope="module")
def prometheus(metrics_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusServer]:
    with PrometheusServer(tmp_path_factory.mktemp("prometheus"), urlsplit(metrics_url).netloc) as server:
        # Two scrapes make a rate; the rest is for those of a job's metrics that come with its first rounds.
        server.wait_for_scrapes(4)
        server.wait_for("roundtable_evaluation_version > 1")
        yield server


@pytest.mark.parametrize("dashboard", sorted(DASHBOARDS.glob("*.json")), ids=lambda path: path.stem)
def test_every_query_of_every_panel_finds_series(prometheus: PrometheusServer, dashboard: Path) -> None:
    found = {query: prometheus.query(query.expr) for query in panel_queries(dashboard)}
    assert found
    empty = [query for query, series in found.items() if not series]
    assert empty == []
    without_a_figure = [query for query, series in found.items() if not any(math.isfinite(v) for _, v in series)]
    assert without_a_figure == []


def test_the_job_variable_lists_jobs_and_not_the_scrape(prometheus: PrometheusServer) -> None:
    # Grafana's label_values(roundtable_version, job) asks exactly this.
    jobs = prometheus.get("/api/v1/label/job/values", **{"match[]": "roundtable_version"})
    assert jobs == ["digits"]


def test_the_job_label_of_a_metric_wins_over_the_name_of_the_scrape(prometheus: PrometheusServer) -> None:
    assert prometheus.query('{exported_job!=""}') == []
    assert [labels["job"] for labels, _ in prometheus.query("roundtable_clients_connected")] == ["roundtable"]


def test_the_shipped_alert_rules_evaluate_and_a_healthy_server_fires_none(prometheus: PrometheusServer) -> None:
    rules = prometheus.wait_for_rules()
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []
