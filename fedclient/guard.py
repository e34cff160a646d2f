"""The client has the last word: what it works for, and how much of its privacy that may cost.

What an update costs follows from the job as the client reads it, and from the fewest clients that a version may have:
a server has no say in it. Every making of an update draws noise anew, so each one counts, whether it arrives or not.

Shape legend: D values in an update.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Final, NoReturn

from fedclient.declining import Declined
from fedclient.ledger import Ledger
from fedclient.policy import Policy, PrivacyPolicy
from fedclient.releases import Account, Accounts, Entry
from fedcore.errors import ConfigError, InvalidInput
from fedcore.jobfile import Job
from fedcore.messages import Assignment, WorkKind
from fedprivacy.accountant import ACCOUNTING_MISSING, epsilon_pld, epsilon_rdp
from fedprivacy.events import History
from fedprivacy.jobs import Accounting, Round

_MAX_LOSSES: Final = 16
"""Kinds of releases whose privacy loss distributions are put together: each takes up to some seconds."""
_WORTH: Final = 4.0
"""How far above a limit Rényi divergences may be for loss distributions to be tried."""
_RELEASING: Final = (WorkKind.TRAIN, WorkKind.GRADIENT)
_log: Final = logging.getLogger(__name__)


class Guard:
    """Refuses work that the policy does not allow, and notes in the ledger whatever is released.

    Used on the worker's thread.

    Args:
        ledger: of this client, over all jobs.
        policy: of its owner.
        wall_s: tells the time, seconds since 1970 (UTC).

    Raises:
        ConfigError: the policy limits epsilon, and dp-accounting is not installed.
    """

    def __init__(self, ledger: Ledger, policy: Policy | None = None, wall_s: Callable[[], float] = time.time) -> None:
        self._ledger, self._wall_s = ledger, wall_s
        self._policy = policy or Policy()
        self._limits = self._policy.privacy or PrivacyPolicy()
        if self._limits.has_budget and find_spec("dp_accounting") is None:
            raise ConfigError(f"the policy limits epsilon: {ACCOUNTING_MISSING}")

    def check(self, assignment: Assignment, job: Job) -> None:
        """Look at what is asked for, before anything is built for it.

        Raises:
            Declined: the policy does not allow it.
        """
        if not self._policy.allows_task(job.task.name):
            _refuse(f"it takes no jobs of task {job.task.name!r}, only {_listed(self._policy.tasks)}")
        policy, accounting = self._policy.privacy, Accounting.of(job)
        if policy is None:
            return
        if accounting is None:
            _refuse(f"it takes only jobs with [privacy], which job {job.job.name!r} has not")
        section = accounting.section
        for what, found, accepted in (
            ("mechanism", section.mechanism, policy.mechanisms),
            ("unit", accounting.unit.value, policy.units),
            ("trust", accounting.trust.value, policy.trusts),
        ):
            if found not in accepted:
                _refuse(f"it takes no jobs with {what} {found!r}, only {_listed(accepted)}")
        if section.delta > policy.delta:
            _refuse(f"job {job.job.name!r} has delta {section.delta:g}, at most {policy.delta:g} is accepted")
        if section.unsafe_seed is not None and not policy.unsafe_seed:
            _refuse("it takes no jobs with privacy.unsafe_seed, which hides nothing")
        if section.evaluation and not policy.evaluation:
            _refuse("it sends no figures of held-out examples, which nothing hides")

    def check_budget(self, assignment: Assignment, job: Job, dimension: int) -> None:
        """Look at what an update of D = `dimension` values would cost, before anything is spent on it.

        Raises:
            Declined: it would exceed the policy's limits, or it cannot be said what it would cost.
            StateUnusable: the ledger is damaged.
            StorageFailed: the ledger cannot be opened.
        """
        if assignment.kind in _RELEASING:
            released = released_by(assignment.kind, job, dimension)
            if self._limits.has_budget:
                with self._ledger.locked() as accounts:
                    self._check_limits(accounts, assignment.job_id, job, released)

    def charge(self, assignment: Assignment, job: Job, dimension: int) -> None:
        """Note an update that was made, durably: it may leave once this has returned.

        Raises:
            Declined, StateUnusable, StorageFailed: as for `check_budget`; nothing may leave.
        """
        released = released_by(assignment.kind, job, dimension)
        entry = Entry(
            job_id=assignment.job_id,
            job_name=job.job.name,
            version=assignment.version,
            kind="train" if assignment.kind is WorkKind.TRAIN else "gradient",
            assignment_id=assignment.assignment_id,
            released=released,
            wall_s=self._wall_s(),
        )
        with self._ledger.locked() as accounts:
            self._check_limits(accounts, assignment.job_id, job, released)
            self._ledger.append(entry)
        _log.debug("release noted", extra={"job": assignment.job_id, "version": assignment.version})

    def _check_limits(self, accounts: Accounts, job_id: str, job: Job, released: History | None) -> None:
        name, limits = f"job {job.job.name!r}", self._limits
        if limits.epsilon_per_job is not None:
            account = accounts.of(job_id).then(released)
            self._check_limit(account, f"{name} would bring epsilon", "per job", limits.epsilon_per_job)
        if limits.epsilon_in_all is not None:
            account = accounts.in_all().then(released)
            self._check_limit(account, f"{name} would bring epsilon of all jobs", "in all", limits.epsilon_in_all)

    def _check_limit(self, account: Account, what: str, scope: str, limit: float) -> None:
        delta = self._limits.delta
        if account.unprotected:
            _refuse(
                f"{what} to infinity, its limit {scope} is {limit:g}: nothing hides {account.unprotected} of"
                f" {account.updates} updates with this one, so there is no bound"
            )
        assert account.history is not None
        epsilon = epsilon_within(account.history, delta, limit)
        if not epsilon <= limit:
            _refuse(f"{what} to {_shown(epsilon, limit)} (delta {delta:g}), its limit {scope} is {limit:g}")


def released_by(kind: WorkKind, job: Job, dimension: int) -> History | None:
    """Return what an update of a job releases; None: nothing hides it.

    Raises:
        Declined: it is beyond what can be accounted for; the job may be anything.
    """
    accounting = Accounting.of(job)
    if accounting is None or accounting.section.unsafe_seed is not None:
        return None
    quorum = job.schedule.updates_at_deadline
    who = Round(clients=quorum, assigned=quorum, available=0)
    try:
        if kind is WorkKind.TRAIN:
            return accounting.history(accounting.trained(who, dimension))
        if accounting.section.start is None:
            raise InvalidInput("privacy.start is missing")
        return accounting.history(accounting.started(who))
    except (ArithmeticError, LookupError, ValueError) as error:
        text = str(error).splitlines()[0] if isinstance(error, InvalidInput) else repr(error)
        raise Declined(f"the privacy of job {job.job.name!r} cannot be accounted for: {text[:500]}") from error


@lru_cache(maxsize=256)
def epsilon_within(history: History, delta: float, limit: float) -> float:
    """Return an upper bound of epsilon: by Rényi divergences if that is within `limit`, else the best there is.

    Loss distributions take a second or more, so that they are tried only where they may make the difference.
    """
    by_rdp = epsilon_rdp(history, delta)
    if by_rdp <= limit or by_rdp > _WORTH * limit or len(history.releases) > _MAX_LOSSES:
        return by_rdp
    by_pld = epsilon_pld(history, delta)
    return by_rdp if by_pld is None else min(by_pld, by_rdp)


def _refuse(text: str) -> NoReturn:
    raise Declined(f"this client's policy: {text}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _shown(epsilon: float, limit: float) -> str:
    """Return epsilon, which is above the limit, such that it reads so."""
    if math.isinf(epsilon):
        return "infinity"
    short = f"{epsilon:.4g}"
    return short if float(short) > limit else repr(epsilon)
