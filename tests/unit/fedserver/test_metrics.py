from __future__ import annotations

import shutil
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from fedcore.errors import AddressInUse, ConfigError, UpdateResult
from fedserver.metrics import DIRECTIONS, KINDS, MAX_EVALUATION_FIGURES, PHASES, Metrics
from fedserver.metrics_endpoint import serve

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"


class Hands:
    """A clock that somebody turns."""

    def __init__(self) -> None:
        self.s = 100.0

    def now_s(self) -> float:
        return self.s


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def series(metrics: Metrics, family: str) -> dict[tuple[str, ...], float]:
    return {
        tuple(sample.labels.values()): sample.value
        for metric in metrics.registry.collect()
        for sample in metric.samples
        if sample.name == family
    }


def used() -> Metrics:
    """Metrics where every family has a series."""
    metrics = Metrics(version="0.1.0")
    metrics.start_job("digits", rounds=20)
    metrics.round_closed("digits", version=1, seconds=2.0)
    metrics.evaluated("digits", version=1, figures={"accuracy": 0.5, "loss": 1.0})
    metrics.journal_committed(records=3, seconds=0.001)
    metrics.rpc_errors.labels("not-found").inc()
    return metrics


def test_nothing_goes_to_the_process_wide_registry() -> None:
    before = generate_latest(REGISTRY).count(b"# TYPE roundtable_")
    Metrics()
    assert generate_latest(REGISTRY).count(b"# TYPE roundtable_") == before == 0


def test_an_injected_registry_is_used_and_takes_the_families_once() -> None:
    registry = CollectorRegistry()
    assert Metrics(registry).registry is registry
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        Metrics(registry)


def test_exactly_one_phase_is_on() -> None:
    metrics = Metrics()
    metrics.phase("digits", "train")
    metrics.phase("digits", "closing")
    phases = series(metrics, "roundtable_round_phase")
    assert phases == {("digits", phase): float(phase == "closing") for phase in PHASES}


def test_an_unknown_phase_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'trian' is not one of waiting, initialise, gradient, train"):
        Metrics().phase("digits", "trian")


def test_the_age_of_a_phase_grows_on_the_given_clock_and_starts_again_with_each_phase() -> None:
    hands = Hands()
    metrics = Metrics(now=hands.now_s)
    metrics.phase("digits", "train")
    hands.s += 7.5
    assert value(metrics, "roundtable_round_phase_age_seconds", job="digits") == 7.5
    metrics.phase("digits", "train")
    hands.s += 1
    assert value(metrics, "roundtable_round_phase_age_seconds", job="digits") == 1


def test_the_counters_of_a_new_job_start_at_zero() -> None:
    metrics = Metrics()
    metrics.start_job("digits", rounds=20, version=4)
    assert value(metrics, "roundtable_rounds_planned", job="digits") == 20
    assert value(metrics, "roundtable_version", job="digits") == 4
    assert value(metrics, "roundtable_rounds_total", job="digits", outcome="closed") == 0
    assert value(metrics, "roundtable_rounds_total", job="digits", outcome="abandoned") == 0
    results = {result for _, result in series(metrics, "roundtable_updates_total")}
    assert results == {str(result) for result in UpdateResult} - {"unknown-job"}
    assert len(series(metrics, "roundtable_transferred_bytes_total")) == len(DIRECTIONS) * len(KINDS)
    assert value(metrics, "roundtable_round_phase", job="digits", phase="waiting") == 1
    assert value(metrics, "roundtable_round_seconds_count", job="digits") == 0


def test_rounds_are_counted_by_outcome_and_only_closed_ones_are_timed() -> None:
    metrics = Metrics()
    metrics.round_closed("digits", version=3, seconds=2.0)
    metrics.round_abandoned("digits")
    assert value(metrics, "roundtable_rounds_total", job="digits", outcome="closed") == 1
    assert value(metrics, "roundtable_rounds_total", job="digits", outcome="abandoned") == 1
    assert value(metrics, "roundtable_version", job="digits") == 3
    assert value(metrics, "roundtable_round_seconds_count", job="digits") == 1
    assert value(metrics, "roundtable_round_seconds_sum", job="digits") == 2


def test_the_encoding_error_is_that_of_the_newest_version_which_has_one() -> None:
    metrics = Metrics()
    metrics.round_closed("digits", version=1, seconds=2.0)
    assert series(metrics, "roundtable_encoding_error") == {}
    metrics.round_closed("digits", version=2, seconds=2.0, encoding_error=0.25)
    assert series(metrics, "roundtable_encoding_error") == {("digits",): 0.25}


def test_waiting_tells_what_for() -> None:
    metrics = Metrics()
    metrics.waiting("digits", clients=2, updates=5)
    assert series(metrics, "roundtable_round_waiting_for") == {("digits", "clients"): 2, ("digits", "updates"): 5}


def test_invented_job_names_make_one_series_together() -> None:
    metrics = Metrics()
    for number in range(100):
        metrics.update(f"invented-{number}", UpdateResult.UNKNOWN_JOB)
    assert series(metrics, "roundtable_updates_total") == {("", "unknown-job"): 100}


def test_bytes_are_counted_by_direction_and_kind_and_nothing_else() -> None:
    metrics = Metrics()
    metrics.transferred("digits", "uplink", "train", 100)
    metrics.transferred("digits", "uplink", "train", 20)
    metrics.transferred("digits", "downlink", "evaluate", 3)
    assert series(metrics, "roundtable_transferred_bytes_total") == {
        ("digits", "uplink", "train"): 120,
        ("digits", "downlink", "evaluate"): 3,
    }
    with pytest.raises(ValueError, match="'sideways'"):
        metrics.transferred("digits", "sideways", "train", 1)
    with pytest.raises(ValueError, match="'gossip'"):
        metrics.transferred("digits", "uplink", "gossip", 1)


def test_figures_are_those_of_the_newest_evaluated_version_alone() -> None:
    metrics = Metrics()
    metrics.evaluated("digits", version=1, figures={"accuracy": 0.5, "f1": 0.4})
    metrics.evaluated("other", version=9, figures={"accuracy": 0.9})
    metrics.evaluated("digits", version=2, figures={"accuracy": 0.6})
    assert series(metrics, "roundtable_evaluation") == {("digits", "accuracy"): 0.6, ("other", "accuracy"): 0.9}
    assert value(metrics, "roundtable_evaluation_version", job="digits") == 2


def test_a_task_with_many_figures_shows_a_bounded_number_and_the_usual_ones_first() -> None:
    metrics = Metrics()
    figures = {f"a{number:03}": 0.0 for number in range(100)} | {"loss": 1.0, "accuracy": 0.5}
    metrics.evaluated("digits", version=1, figures=figures | {"not a name\n": 1.0, "x" * 65: 1.0})
    shown = [name for _, name in series(metrics, "roundtable_evaluation")]
    assert len(shown) == MAX_EVALUATION_FIGURES
    assert shown[:3] == ["accuracy", "loss", "a000"]


def test_no_label_can_name_a_client() -> None:
    labels = {name for family in used().registry.collect() for sample in family.samples for name in sample.labels}
    assert labels == {
        "code", "direction", "for", "job", "kind", "le", "metric", "outcome", "phase", "python", "result", "version",
    }  # fmt: skip


def test_every_family_is_prefixed_and_documented_with_type_and_labels() -> None:
    rows = {
        cells[1].strip().strip("`"): cells
        for line in DOCS.read_text("utf-8").splitlines()
        if line.startswith("| `roundtable_")
        for cells in [line.split("|")]
    }
    exported = {}
    for family in used().registry.collect():
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        exported[family.name + suffix] = ("gauge" if family.type == "info" else family.type, labels)
    assert all(name.startswith("roundtable_") for name in exported)
    assert rows.keys() == exported.keys()
    for name, (kind, labels) in exported.items():
        assert rows[name][2].strip() == kind, name
        assert all(f"`{label}`" in rows[name][3] for label in labels), name


def test_every_result_of_an_update_is_documented() -> None:
    text = DOCS.read_text("utf-8")
    assert [result for result in UpdateResult if f"| `{result}` |" not in text] == []


@pytest.mark.skipif(shutil.which("promtool") is None, reason="the Debian package prometheus is not installed")
@pytest.mark.prometheus
def test_promtool_finds_nothing_to_say_about_the_exposition() -> None:
    text = generate_latest(used().registry)
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False, timeout=60)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_the_endpoint_shows_the_metrics_until_it_is_closed() -> None:
    with serve(used(), "127.0.0.1", 0) as endpoint:
        with urllib.request.urlopen(endpoint.url, timeout=10) as answer:
            assert b'roundtable_version{job="digits"} 1.0' in answer.read()
        port = endpoint.port
    endpoint.close()
    with socket.socket() as free:
        assert free.connect_ex(("127.0.0.1", port)) != 0


def test_a_taken_port_is_an_error_that_names_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressInUse, match=rf"127\.0\.0\.1:{port}"):
            serve(Metrics(), "127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port"),
    [("192.0.2.1", 0), ("127.0.0.1", 65536), ("127.0.0.1", -1)],
    ids=["not-ours", "port-too-high", "port-negative"],
)
def test_an_address_nobody_could_listen_on_is_a_configuration_error(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match=rf"metrics address {host}:{port}"):
        serve(Metrics(), host, port)
