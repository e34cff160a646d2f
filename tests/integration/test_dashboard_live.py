"""The shipped dashboard against a real Prometheus that scrapes a working server, with the shipped configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.integration.prometheus_server import (
    DASHBOARDS,
    PrometheusServer,
    needs_prometheus,
    panel_queries,
)
from tests.support.processes import Deployment, deployed, digits_job

pytestmark = [needs_prometheus, pytest.mark.prometheus]

NUM_CLIENTS = 3


@dataclass(frozen=True)
class RunningJob:
    """A server whose job goes on for as long as anybody looks, beside a private one that waits for more clients."""

    deployment: Deployment
    job_ids: set[str]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningJob]:
    with deployed(tmp_path_factory.mktemp("federation")) as deployment:
        deployment.start_digits_clients(NUM_CLIENTS)
        compression = {"uplink": [{"codec": "bf16"}]}  # of a lossless one there would be no error to draw
        privacy = {"mechanism": "dp-fedavg", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3, "epsilon": 1e5}
        jobs = [
            digits_job("endless", rounds=100_000, compression=compression),
            digits_job("private", cohort=50, privacy=privacy, aggregator={"max_examples": 1}),
        ]
        yield RunningJob(deployment, {deployment.submit(job) for job in jobs})


@pytest.fixture(scope="module")
def prometheus(running: RunningJob, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusServer]:
    target = urlsplit(running.deployment.ready["metrics_url"]).netloc
    with PrometheusServer(tmp_path_factory.mktemp("prometheus"), target) as server:
        # Two scrapes make a rate; the rest is for those of a job's metrics that come with its first rounds.
        server.wait_for_scrapes(4)
        server.wait_for("roundtable_evaluation_version > 1")
        server.wait_for("rate(roundtable_rounds_total[1m]) > 0")
        yield server


@pytest.mark.parametrize("dashboard", sorted(DASHBOARDS.glob("*.json")), ids=lambda path: path.stem)
def test_every_query_of_every_panel_finds_series(prometheus: PrometheusServer, dashboard: Path) -> None:
    found = {query: prometheus.query(query.expr) for query in panel_queries(dashboard)}
    assert found
    empty = [query for query, series in found.items() if not series]
    assert empty == []
    without_a_figure = [query for query, series in found.items() if not any(math.isfinite(v) for _, v in series)]
    assert without_a_figure == []


def test_the_job_variable_lists_jobs_and_not_the_scrape(running: RunningJob, prometheus: PrometheusServer) -> None:
    # Grafana's label_values(roundtable_version, job) asks exactly this.
    jobs = prometheus.get("/api/v1/label/job/values", **{"match[]": "roundtable_version"})
    assert set(jobs) == running.job_ids


def test_the_job_label_of_a_metric_wins_over_the_name_of_the_scrape(prometheus: PrometheusServer) -> None:
    assert prometheus.query('{exported_job!=""}') == []
    assert [labels["job"] for labels, _ in prometheus.query("roundtable_clients_connected")] == ["roundtable"]


def test_the_shipped_alert_rules_evaluate_and_a_healthy_server_fires_none(prometheus: PrometheusServer) -> None:
    rules = prometheus.wait_for_rules()
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []
