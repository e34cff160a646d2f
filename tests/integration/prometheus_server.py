"""A real Prometheus for tests, and the queries of the shipped dashboards."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import pytest
import yaml

T = TypeVar("T")

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARDS = DEPLOY / "grafana" / "dashboards"
PROMETHEUS_CONFIG = DEPLOY / "prometheus" / "prometheus.yml"

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="the Debian package prometheus is not installed",
)

# What Grafana puts in the place of its variables. PromQL refuses them raw.
VARIABLES = {
    "job": ".+",
    "__rate_interval": "1m",
    "__interval": "15s",
    "__range": "5m",
}


@dataclass(frozen=True)
class PanelQuery:
    """One query of one panel, as Prometheus gets it."""

    panel: str
    ref: str
    expr: str


def panel_queries(dashboard: Path) -> Iterator[PanelQuery]:
    """Yield every query of every panel, also of those inside collapsed rows, with variables replaced.

    Raises:
        KeyError: a query uses a variable that `VARIABLES` has no value for.
    """
    for panel in panels(dashboard):
        for target in panel.get("targets", []):
            expr = re.sub(r"\$\{?(\w+)\}?", lambda found: VARIABLES[found.group(1)], target["expr"])
            yield PanelQuery(panel["title"], target["refId"], expr)


def panels(dashboard: Path) -> Iterator[dict[str, Any]]:
    """Yield every panel that is not a row."""
    for panel in json.loads(dashboard.read_text("utf-8"))["panels"]:
        if panel["type"] == "row":
            yield from panel["panels"]
        else:
            yield panel


class PrometheusServer:
    """Prometheus with the shipped configuration, aimed at one other target and scraping more often.

    Use it as a context manager. It listens on a port of loopback that the system chooses and keeps its data below
    `folder`.
    """

    def __init__(self, folder: Path, target: str, *, scrape_interval: str = "200ms") -> None:
        self._folder = folder
        self._target = target
        self._scrape_interval = scrape_interval
        self._ready = threading.Event()
        self._log: list[str] = []
        self._url = ""

    def __enter__(self) -> Self:
        config = yaml.safe_load(PROMETHEUS_CONFIG.read_text("utf-8"))
        config["global"] |= {"scrape_interval": self._scrape_interval, "evaluation_interval": self._scrape_interval}
        config["rule_files"] = [str(PROMETHEUS_CONFIG.parent / name) for name in config["rule_files"]]
        (scrape,) = config["scrape_configs"]
        scrape["static_configs"] = [{"targets": [self._target]}]
        self._folder.mkdir(parents=True, exist_ok=True)
        config_file = self._folder / "prometheus.yml"
        config_file.write_text(yaml.safe_dump(config), "utf-8")
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config_file}",
                f"--storage.tsdb.path={self._folder / 'data'}",
                "--web.listen-address=127.0.0.1:0",
                "--log.level=info",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        if not self._ready.wait(30) or not self._url:
            self._stop()
            raise AssertionError("prometheus did not start:\n" + "".join(self._log))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._log.append(line)
            listening = re.search(r'msg="Listening on" address=(\S+)', line)
            if listening:
                self._url = f"http://{listening.group(1)}"
            if "Server is ready to receive web requests" in line:
                self._ready.set()
        self._ready.set()  # it ended: whoever waits for it finds no use in waiting on

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        if self._process.stderr is not None:
            self._process.stderr.close()

    def get(self, path: str, **parameters: str) -> Any:
        """Return `data` of an answer of the HTTP API, such as `get("/api/v1/rules")`."""
        url = f"{self._url}{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Return the labels and the value of every series that `expr` gives now."""
        series = self.get("/api/v1/query", query=expr)["result"]
        return [(one["metric"], float(one["value"][1])) for one in series]

    def wait_for(self, expr: str, *, deadline_s: float = 30.0) -> list[tuple[dict[str, str], float]]:
        """Return what `expr` gives as soon as it gives any series.

        Raises:
            AssertionError: none within the deadline.
        """
        return self._eventually(lambda: self.query(expr), f"no series: {expr}", deadline_s)

    def wait_for_scrapes(self, num_scrapes: int) -> None:
        """Return when the target has been scraped so often."""
        self.wait_for(f"sum_over_time(up[5m]) >= {num_scrapes}")

    def wait_for_rules(self) -> list[dict[str, Any]]:
        """Return every rule of the shipped groups once each has been evaluated."""

        def evaluated() -> list[dict[str, Any]]:
            rules = [rule for group in self.get("/api/v1/rules")["groups"] for rule in group["rules"]]
            return [] if any(rule["health"] == "unknown" for rule in rules) else rules

        return self._eventually(evaluated, "no rules, or some not evaluated", 30.0)

    def _eventually(self, ask: Callable[[], list[T]], problem: str, deadline_s: float) -> list[T]:
        end_s = time.monotonic() + deadline_s
        pause = threading.Event()
        while time.monotonic() < end_s:
            found = ask()
            if found:
                return found
            pause.wait(0.1)  # Prometheus tells nobody when it has scraped or evaluated
        raise AssertionError(f"{problem} within {deadline_s} s\n" + "".join(self._log[-20:]))
