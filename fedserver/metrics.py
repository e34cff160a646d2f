"""What the server tells Prometheus: every family, and the endpoint that shows them.

docs/metrics.md describes each family for operators; deploy/grafana/dashboards/rounds.json draws them.
No label ever names a client: one client's norm, loss or timing is nobody's graph.

Threads: the methods of `Metrics` may be called from the event loop and from worker threads at once; a scrape
reads on a thread of its own. Nothing here blocks.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedcore.errors import InvalidInput, UpdateResult
from fedcore.names import check_name

PHASES = ("waiting", "initialise", "gradient", "train", "closing", "evaluate", "finished", "failed")
OUTCOMES = ("closed", "abandoned")
WAITS = ("clients", "updates")
DIRECTIONS = ("uplink", "downlink")
SPENDINGS = ("now", "end", "budget")
KINDS = ("initialise", "gradient", "train", "evaluate")

# Tasks choose the names of their figures, so a job could otherwise make any number of series.
MAX_EVALUATION_FIGURES = 16
# Shown first when a task reports more than that.
_USUAL_FIGURES = ("accuracy", "loss")

# A fold of 1e5 values takes well under a millisecond, one of 1e9 some seconds.
_FOLD_BUCKETS_S = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)
# From a simulated round to phones that train over night.
_ROUND_BUCKETS_S = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
# A commit costs one fdatasync: 0.1 ms on an idle NVMe, seconds on a dying disk.
_COMMIT_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


M = TypeVar("M", Counter, Gauge, Histogram)


class _PhaseCollector(Collector):
    """Phase and age, both made at scrape from one entry, so that no scrape sees two phases or none."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._entered: dict[str, tuple[str, float]] = {}  # job: phase, when entered in seconds
        self._lock = threading.Lock()

    def enter(self, job: str, phase: str) -> None:
        with self._lock:
            self._entered[job] = (phase, self._now())

    @staticmethod
    def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily]:
        phase = GaugeMetricFamily(
            "roundtable_round_phase", "1 for the phase that the job is in, 0 for the others.", labels=("job", "phase")
        )
        age = GaugeMetricFamily(
            "roundtable_round_phase_age_seconds", "Seconds since the job entered its phase.", labels=("job",)
        )
        return phase, age

    def describe(self) -> Iterator[Metric]:
        """Yield the families without samples, which is how the registry learns their names."""
        yield from self._families()

    def collect(self) -> Iterator[Metric]:
        """Yield the families as they are now."""
        with self._lock:
            entered = dict(self._entered)
            now_s = self._now()
        phase_family, age_family = self._families()
        for job, (phase_now, since_s) in entered.items():
            for phase in PHASES:
                phase_family.add_metric((job, phase), float(phase == phase_now))
            age_family.add_metric((job,), max(0.0, now_s - since_s))
        yield phase_family
        yield age_family


class Metrics:
    """Every family of the server, in a registry of its own.

    Families are attributes: use them directly (`metrics.clients_connected.set(3)`), or the methods where one
    event moves several of them.

    Args:
        registry: where the families are registered; a new one by default, never the process-wide one.
        now: seconds on a monotonic clock (`fedcore.clock.Clock.now_s`), read when a phase is entered and at
            every scrape, there on the thread of the scrape.
        version: of the server, for `roundtable_build_info`.

    Raises:
        ValueError: the registry already has a family of one of these names.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        *,
        now: Callable[[], float] = time.monotonic,
        version: str = "unknown",
    ) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        reg = self.registry
        self._phases = _PhaseCollector(now)
        reg.register(self._phases)
        self._series: dict[tuple[object, tuple[str, ...]], object] = {}

        self.rounds = Counter(
            "roundtable_rounds_total", "Rounds that ended, by outcome.", ("job", "outcome"), registry=reg
        )
        self.version = Gauge("roundtable_version", "Newest version of the job.", ("job",), registry=reg)
        self.rounds_planned = Gauge(
            "roundtable_rounds_planned", "Rounds that the job file asks for.", ("job",), registry=reg
        )
        self.round_seconds = Histogram(
            "roundtable_round_seconds",
            "Seconds from the opening of a round to the version it made.",
            ("job",),
            buckets=_ROUND_BUCKETS_S,
            registry=reg,
        )
        self.waiting_for = Gauge(
            "roundtable_round_waiting_for",
            "How many the open round still lacks before it can go on.",
            ("job", "for"),
            registry=reg,
        )
        self.updates = Counter(
            "roundtable_updates_total", "Updates that were looked at, by result.", ("job", "result"), registry=reg
        )
        self.fold_seconds = Histogram(
            "roundtable_fold_seconds",
            "Seconds to decode, check and fold one update.",
            ("job",),
            buckets=_FOLD_BUCKETS_S,
            registry=reg,
        )
        self.transferred_bytes = Counter(
            "roundtable_transferred_bytes_total",
            "Bytes of updates with their headers, and of downloads, by direction and kind of work.",
            ("job", "direction", "kind"),
            registry=reg,
        )
        self.raw_uplink_bytes = Counter(
            "roundtable_raw_uplink_bytes_total",
            "Bytes that the values of training updates would have had as float32.",
            ("job",),
            registry=reg,
        )
        self.encoding_error = Gauge(
            "roundtable_encoding_error",
            "What encoding left out of the newest version's updates, by L2 norm, on average.",
            ("job",),
            registry=reg,
        )
        self.evaluation = Gauge(
            "roundtable_evaluation",
            "Figures of the newest evaluated version, over all clients that measured it.",
            ("job", "metric"),
            registry=reg,
        )
        self.evaluation_version = Gauge(
            "roundtable_evaluation_version", "The newest evaluated version.", ("job",), registry=reg
        )
        self.privacy_epsilon = Gauge(
            "roundtable_privacy_epsilon",
            "Epsilon of a private job: spent by the client that has released most, at the job's end, and the budget.",
            ("job", "of"),
            registry=reg,
        )
        self.clients_connected = Gauge("roundtable_clients_connected", "Clients with an open session.", registry=reg)
        self.clients_enrolled = Gauge(
            "roundtable_clients_enrolled", "Clients with a certificate that is not revoked.", registry=reg
        )
        self.journal_commit_seconds = Histogram(
            "roundtable_journal_commit_seconds",
            "Seconds that one durable commit of the journal takes.",
            buckets=_COMMIT_BUCKETS_S,
            registry=reg,
        )
        self.journal_batch_records = Histogram(
            "roundtable_journal_batch_records",
            "Records that one commit of the journal makes durable together.",
            buckets=_BATCH_BUCKETS,
            registry=reg,
        )
        self.rpc_errors = Counter(
            "roundtable_rpc_errors_total", "Calls answered with an error, by its code.", ("code",), registry=reg
        )
        self.build = Info("roundtable_build", "Constant 1; the labels tell what is running.", registry=reg)
        self.build.info({"version": version, "python": platform.python_version()})

    def start_job(self, job: str, *, rounds: int, version: int = 0, phase: str = "waiting") -> None:
        """Show a job that is new or was found in the journal at start-up.

        Its counters start at 0 rather than at their first event: `rate()` and `increase()` cannot see the jump
        from no series to 1.
        """
        self.rounds_planned.labels(job).set(rounds)
        self.version.labels(job).set(version)
        for outcome in OUTCOMES:
            self.rounds.labels(job, outcome)
        for result in UpdateResult:
            if result is not UpdateResult.UNKNOWN_JOB:
                self.updates.labels(job, result.value)
        for direction in DIRECTIONS:
            for kind in KINDS:
                self.transferred_bytes.labels(job, direction, kind)
        self.raw_uplink_bytes.labels(job)
        self.round_seconds.labels(job)
        self.fold_seconds.labels(job)
        self.waiting(job, clients=0, updates=0)
        self.phase(job, phase)

    def phase(self, job: str, phase: str) -> None:
        """Say that a job enters `phase`, one of `PHASES`; its age starts at 0, also when the name is the same.

        Raises:
            ValueError: no such phase.
        """
        if phase not in PHASES:
            raise ValueError(f"phase {phase!r} is not one of {', '.join(PHASES)}")
        self._phases.enter(job, phase)

    def waiting(self, job: str, *, clients: int, updates: int) -> None:
        """Set how many clients and how many updates the open round lacks; 0 and 0 when it waits for nothing."""
        self._of(self.waiting_for, job, "clients").set(clients)
        self._of(self.waiting_for, job, "updates").set(updates)

    def round_closed(self, job: str, *, version: int, seconds: float, encoding_error: float | None = None) -> None:
        """Count a round that made `version` in `seconds` since it was opened; its updates may name their mean error."""
        if encoding_error is not None:
            self.encoding_error.labels(job).set(encoding_error)
        self.rounds.labels(job, "closed").inc()
        self.version.labels(job).set(version)
        self.round_seconds.labels(job).observe(seconds)

    def round_abandoned(self, job: str) -> None:
        """Count a round that made no version."""
        self.rounds.labels(job, "abandoned").inc()

    def update(self, job: str, result: UpdateResult) -> None:
        """Count an update by what became of it.

        A job that does not exist is a name that a client chose, so that result is counted with an empty label:
        nobody makes series by inventing names.
        """
        self._of(self.updates, "" if result is UpdateResult.UNKNOWN_JOB else job, result.value).inc()

    def transferred(self, job: str, direction: str, kind: str, num_bytes: int) -> None:
        """Count bytes of updates or downloads that went over the wire.

        Args:
            job: the job that the bytes belong to.
            direction: one of `DIRECTIONS`, as the client sees it: uplink is towards the server.
            kind: the work they belong to, one of `KINDS`.
            num_bytes: as sent, an update's header included; what is sent twice counts twice.

        Raises:
            ValueError: an unknown direction or kind.
        """
        if direction not in DIRECTIONS or kind not in KINDS:
            raise ValueError(f"{direction!r}, {kind!r}: not one of {DIRECTIONS} and one of {KINDS}")
        self._of(self.transferred_bytes, job, direction, kind).inc(num_bytes)

    def raw_received(self, job: str, num_bytes: int) -> None:
        """Count what the values of a training update would have had as float32; an update counts once."""
        self._of(self.raw_uplink_bytes, job).inc(num_bytes)

    def folded(self, job: str, seconds: float) -> None:
        """Count an update that took so long to fold."""
        self._of(self.fold_seconds, job).observe(seconds)

    def evaluated(self, job: str, *, version: int, figures: Mapping[str, float]) -> None:
        """Show the figures of the newest evaluated version and drop those of the one before.

        Args:
            job: the job.
            version: the version that was measured.
            figures: name to value over all clients, never of one client. Names that `fedcore.names` refuses
                are left out; of the rest at most `MAX_EVALUATION_FIGURES` are shown: accuracy and loss first,
                then by name.
        """
        shown = sorted(filter(_is_name, figures), key=lambda name: (name not in _USUAL_FIGURES, name))
        shown = shown[:MAX_EVALUATION_FIGURES]
        self.evaluation.remove_by_labels({"job": job})
        for name in shown:
            self.evaluation.labels(job, name).set(figures[name])
        self.evaluation_version.labels(job).set(version)

    def spent(self, job: str, *, epsilon: float, at_end: float, budget: float | None) -> None:
        """Set what a private job has spent, what it will have if it goes on to its end, and what it may."""
        for of, value in zip(SPENDINGS, (epsilon, at_end, budget), strict=True):
            if value is not None:
                self._of(self.privacy_epsilon, job, of).set(value)

    def journal_committed(self, *, records: int, seconds: float) -> None:
        """Count one durable commit of the journal."""
        self.journal_commit_seconds.observe(seconds)
        self.journal_batch_records.observe(records)

    def _of(self, metric: M, *labels: str) -> M:
        """Return the series with these labels; looked up once, for these are asked for with every update."""
        found = self._series.get((metric, labels))
        if found is None:
            found = self._series[metric, labels] = metric.labels(*labels)
        return cast("M", found)


def _is_name(text: str) -> bool:
    try:
        check_name(text)
    except InvalidInput:
        return False
    return True
