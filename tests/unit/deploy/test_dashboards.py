from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedserver.metrics import Metrics
from fedserver.metrics_endpoint import DEFAULT_PORT
from tests.integration.prometheus_server import (
    DASHBOARDS,
    DEPLOY,
    PROMETHEUS_CONFIG,
    needs_prometheus,
    panel_queries,
    panels,
)

PROVISIONING = DEPLOY / "grafana" / "provisioning"
ALL = pytest.mark.parametrize("dashboard", sorted(DASHBOARDS.glob("*.json")), ids=lambda path: path.stem)


def load(dashboard: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(dashboard.read_text("utf-8"))
    return loaded


def exported_series() -> set[str]:
    """Names as they stand in queries: a histogram has three."""
    names: set[str] = set()
    for family in Metrics().registry.collect():
        suffixes = {
            "counter": ("_total",),
            "info": ("_info",),
            "histogram": ("_bucket", "_sum", "_count"),
        }.get(family.type, ("",))
        names |= {family.name + suffix for suffix in suffixes}
    return names


def named_in(text: str) -> set[str]:
    return set(re.findall(r"\broundtable_\w+", text))


@ALL
def test_every_metric_of_a_dashboard_is_exported(dashboard: Path) -> None:
    used = named_in(json.dumps(load(dashboard)))
    assert used
    assert used - exported_series() == set()


def test_the_rounds_dashboard_draws_every_family() -> None:
    drawn = {re.sub(r"_(bucket|sum|count)$", "", name) for name in named_in((DASHBOARDS / "rounds.json").read_text())}
    exported = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported_series()}
    assert exported - drawn == set()


def test_every_metric_of_the_alert_rules_is_exported() -> None:
    rules = yaml.safe_load((PROMETHEUS_CONFIG.parent / "rules.yml").read_text("utf-8"))
    used = named_in(" ".join(rule["expr"] for group in rules["groups"] for rule in group["rules"]))
    assert used
    assert used - exported_series() == set()


@ALL
def test_panels_have_unique_ids_titles_and_places(dashboard: Path) -> None:
    every = load(dashboard)["panels"]
    drawn = list(panels(dashboard))
    assert len({panel["id"] for panel in every}) == len(every)
    assert len({panel["title"] for panel in drawn}) == len(drawn)
    taken: dict[tuple[int, int], str] = {}
    for panel in every:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


@ALL
def test_every_panel_explains_itself_and_asks_the_chosen_data_source(dashboard: Path) -> None:
    for panel in panels(dashboard):
        assert panel["description"], panel["title"]
        for asks in (panel, *panel["targets"]):
            assert asks["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


@ALL
def test_every_variable_of_a_query_is_one_of_the_dashboard_or_of_grafana(dashboard: Path) -> None:
    own = {variable["name"] for variable in load(dashboard)["templating"]["list"]}
    assert own == {"datasource", "job"}
    for panel in panels(dashboard):
        for target in panel["targets"]:
            assert set(re.findall(r"\$\{?(\w+)", target["expr"])) <= own | {"__rate_interval", "__interval", "__range"}


def test_the_data_source_that_a_dashboard_opens_with_is_the_provisioned_one() -> None:
    provisioned = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text("utf-8"))
    (source,) = provisioned["datasources"]
    variables = load(DASHBOARDS / "rounds.json")["templating"]["list"]
    assert {v["name"]: v["current"]["value"] for v in variables}["datasource"] == source["uid"]
    assert source["type"] == "prometheus"


def test_the_dashboard_provider_and_the_readme_agree_on_the_variables_of_the_environment() -> None:
    readme = (DEPLOY / "README.md").read_text("utf-8")
    provisioning = [path.read_text("utf-8") for path in sorted(PROVISIONING.rglob("*.yml"))]
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "roundtable.yml").read_text("utf-8"))["providers"]
    assert provider["type"] == "file"
    assert re.findall(r"\$\{(\w+)\}", provider["options"]["path"])
    for name in re.findall(r"\$\{(\w+)\}", " ".join(provisioning)):
        assert f"export {name}=" in readme


def test_prometheus_scrapes_the_default_port_and_keeps_the_label_job() -> None:
    (scrape,) = yaml.safe_load(PROMETHEUS_CONFIG.read_text("utf-8"))["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": [f"127.0.0.1:{DEFAULT_PORT}"]}]
    assert scrape["honor_labels"] is True


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
@pytest.mark.prometheus
def test_promtool_accepts_the_configuration_and_its_rules() -> None:
    promtool("check", "config", PROMETHEUS_CONFIG)


@needs_prometheus
@pytest.mark.prometheus
def test_every_alert_fires_when_it_should_and_only_then() -> None:
    tests = PROMETHEUS_CONFIG.parent / "rules_test.yml"
    promtool("test", "rules", tests)
    rules = yaml.safe_load((PROMETHEUS_CONFIG.parent / "rules.yml").read_text("utf-8"))
    tested = tests.read_text("utf-8")
    assert [r["alert"] for group in rules["groups"] for r in group["rules"] if r["alert"] not in tested] == []


@needs_prometheus
@pytest.mark.prometheus
@ALL
def test_promtool_accepts_every_query_of_a_dashboard(dashboard: Path, tmp_path: Path) -> None:
    records = [
        {"record": f"panel:query:{number}", "expr": query.expr, "labels": {"panel": query.panel}}
        for number, query in enumerate(panel_queries(dashboard))
    ]
    assert records
    rules = tmp_path / "rules.yml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": records}]}), "utf-8")
    promtool("check", "rules", rules)
