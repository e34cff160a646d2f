"""What a status says, in words."""

from __future__ import annotations

from typing import Any, Final

from fedserver.cli.text import duration_text, figures_text, printable, size_text

_MAX_NAMES: Final = 5
_STAGES: Final = {
    "initialise": "making version 0",
    "gradient": "starting from gradients",
    "train": "training",
    "evaluate": "evaluating the last version",
}


class Pace:
    """How long a round takes, from the times at which versions were made."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[int, float]] = {}

    def see(self, state: dict[str, Any]) -> None:
        """Note where each job is."""
        for job in state["jobs"]:
            if job["latest"] is not None:
                self._first.setdefault(job["job_id"], (job["latest"]["version"], job["latest"]["created_at"]))

    def left_s(self, job: dict[str, Any]) -> float | None:
        """Return about how many seconds a job needs from its newest version on; None if nothing tells.

        Rounds that were seen count; before there are any, all rounds since the job was submitted.
        """
        latest = job["latest"]
        if latest is None or latest["version"] >= job["rounds"]:
            return None
        submitted = (0, job["submitted_at"])
        version, at_s = self._first.get(job["job_id"], submitted)
        if latest["version"] <= version:
            version, at_s = submitted
        if latest["version"] <= version:
            return None
        round_s = (latest["created_at"] - at_s) / (latest["version"] - version)
        return float(max(0.0, round_s * (job["rounds"] - latest["version"])))


def clients_text(state: dict[str, Any]) -> str:
    """Return who is there."""
    clients = state["clients"]
    return f"clients: {clients['connected']} connected of {clients['enrolled']} enrolled"


def bytes_text(job: dict[str, Any]) -> str:
    """Return what has crossed the wire."""
    return f"up {size_text(job['uplink_bytes'])}, down {size_text(job['downlink_bytes'])}"


def privacy_text(job: dict[str, Any]) -> str:
    """Return what a private job has spent; nothing of one that is not private."""
    if (privacy := job["privacy"]) is None:
        return ""
    if privacy["unsafe_seed"] is not None:
        return "private with an unsafe seed: nothing is hidden"
    text = f"epsilon {number_text(privacy['epsilon'])} at delta {privacy['delta']:g}"
    if job["status"] == "running":
        text += f", {number_text(privacy['epsilon_at_end'])} at the end"
    return text if privacy["epsilon_budget"] is None else f"{text}, of {privacy['epsilon_budget']:g}"


def phase_text(job: dict[str, Any], age_s: float = 0.0, connected: int = 0) -> str:
    """Return what a job is doing, for how long, what it waits for and from whom.

    Args:
        job: from a status.
        age_s: seconds since the status came.
        connected: how many clients are; those that lack what the job needs are told apart.
    """
    if job["status"] != "running":
        took = job["finished_at"] and f" after {duration_text(job['finished_at'] - job['submitted_at'])}"
        return f"{job['status']}{took or ''}" + (f": {printable(job['failure'])}" if job["failure"] else "")
    if "stage" not in job:
        return "rests while the server starts or stops"
    waiting = job["waiting_for"]
    doing = _STAGES.get(job["stage"], job["stage"])
    if job["attempt"]:
        doing += f" (attempt {job['attempt'] + 1})"
    match job["phase"]:
        case "waiting":
            what = f"waits for {_count(waiting['missing'], 'client')}{misfits_text(job, connected)}"
        case "open":
            what = f"{_count(job['accepted'], 'update')} in"
            if waiting["missing"]:
                what += f", {waiting['missing']} missing{_from(waiting['clients'])}"
        case "closing":
            what = "computes the next version"
        case other:
            what = other
    since = f"{duration_text(job['phase_age_s'] + age_s)}"
    if job["phase"] == "closing":
        return f"{doing}: {what}, for {since}"
    left = f"at most {duration_text(job['deadline_in_s'] - age_s)} more"
    return f"{doing}: {what}, for {since}, {left}{_declined(job)}"


def _declined(job: dict[str, Any]) -> str:
    """Return who has declined last, where that may be what a job waits for."""
    last = job.get("last_decline")
    if last is None or not job["waiting_for"]["missing"]:
        return ""
    return f"; {printable(last['client'])} declined: {printable(last['reason'])}"


def misfits_text(job: dict[str, Any], connected: int) -> str:
    """Return what a waiting job needs, if clients are there that do not have it; else nothing."""
    if job["status"] != "running" or job["phase"] != "waiting" or "needs" not in job:
        return ""
    if not job["waiting_for"]["missing"] or (fitting := job["fitting_clients"]) >= connected:
        return ""
    needs = job["needs"]
    codecs = ", ".join(f"'{printable(codec)}'" for codec in needs["codecs"])
    has = f"{fitting} of them has" if fitting == 1 else f"{fitting or 'none'} of them have"
    return (
        f" ({connected} connected, {has} task '{printable(needs['task'])}', adapter '{printable(needs['adapter'])}'"
        f" and {'codec' if len(needs['codecs']) == 1 else 'codecs'} {codecs})"
    )


def job_line(job: dict[str, Any], pace: Pace, connected: int = 0) -> str:
    """Return a job's state as one line; see `phase_text`."""
    parts = [f"{printable(job['name'])} {job['job_id'][:8]}: round {job['version'] or 0}/{job['rounds']}"]
    parts += [phase_text(job, connected=connected), figures_text(job["evaluated"]), privacy_text(job), bytes_text(job)]
    if job["status"] == "running" and (left_s := pace.left_s(job)) is not None:
        parts.append(f"about {duration_text(left_s)} left")
    return "; ".join(part for part in parts if part)


def number_text(value: float | None) -> str:
    """Return a number; JSON has no infinity, which is null."""
    return "infinity" if value is None else f"{value:.4g}"


def _from(clients: list[str]) -> str:
    if not clients:
        return ""
    more = f" and {len(clients) - _MAX_NAMES} more" if len(clients) > _MAX_NAMES else ""
    return f" from {', '.join(map(printable, clients[:_MAX_NAMES]))}{more}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
