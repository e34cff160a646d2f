"""`fedclient privacy`: what this client has released, what that guarantees, and what its policy still allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedclient.policy import Policy, PrivacyPolicy
from fedclient.releases import Account, Accounts
from fedprivacy.accountant import guarantee
from fedprivacy.guarantee import Guarantee


@dataclass(frozen=True)
class Spending:
    """One account, and what is left of a limit.

    Attributes:
        job_id: empty for all jobs together.
        guarantee: None if there is none: nothing was released, or some of it with nothing to hide it.
        limit: of epsilon, by the policy.
    """

    job_id: str
    account: Account
    guarantee: Guarantee | None
    limit: float | None

    @property
    def epsilon(self) -> float | None:
        """Of the guarantee, 0 if nothing was released, None if there is no bound."""
        if self.guarantee is not None:
            return self.guarantee.epsilon
        return None if self.account.unprotected else 0.0

    @property
    def left(self) -> float | None:
        """How far epsilon is below the limit; None: there is no limit."""
        if self.limit is None:
            return None
        return 0.0 if self.epsilon is None else max(0.0, self.limit - self.epsilon)

    def as_json(self, delta: float) -> dict[str, Any]:
        """Return plain JSON values; an epsilon that is infinite is null."""
        stated = None if self.guarantee is None else self.guarantee.as_json()
        return {
            **({"job_id": self.job_id, "name": self.account.name} if self.job_id else {}),
            "updates": self.account.updates,
            "unprotected": self.account.unprotected,
            "epsilon": self.epsilon if stated is None else stated["epsilon"],
            "delta": delta,
            "limit": self.limit,
            "left": self.left,
            "guarantee": stated,
        }

    def lines(self, delta: float) -> list[str]:
        """Return what people read."""
        account = self.account
        title = f"job {account.name} ({self.job_id[:6]})" if self.job_id else "all jobs together"
        bare = f", {account.unprotected} of them without privacy" if account.unprotected else ""
        epsilon = "no bound" if self.epsilon is None else f"epsilon {self.epsilon:.4g}, delta {delta:g}"
        left = "" if self.limit is None else f"; {self.left:.4g} left of {self.limit:g}"
        rows = [] if self.guarantee is None else self.guarantee.rows()
        stated = [f"  {name}: {text}" for name, text in rows if name not in ("epsilon", "delta")]
        return [f"{title}: {account.updates} update{'s' * (account.updates != 1)}{bare}; {epsilon}{left}", *stated]


@dataclass(frozen=True)
class Report:
    """Everything that `fedclient privacy` shows; epsilons are for `delta`."""

    delta: float
    jobs: list[Spending]
    in_all: Spending

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"jobs": [each.as_json(self.delta) for each in self.jobs], "in_all": self.in_all.as_json(self.delta)}

    def text(self) -> str:
        """Return what people read."""
        return "\n".join(line for each in [*self.jobs, self.in_all] for line in each.lines(self.delta))


def report(accounts: Accounts, policy: Policy) -> Report:
    """Return what was released, measured at the policy's delta.

    Raises:
        ConfigError: dp-accounting is not installed, and something is to be accounted for.
    """
    limits = policy.privacy or PrivacyPolicy()

    def spending(job_id: str, account: Account, limit: float | None) -> Spending:
        history = account.history
        return Spending(job_id, account, None if history is None else guarantee(history, limits.delta), limit)

    return Report(
        limits.delta,
        [spending(job_id, account, limits.epsilon_per_job) for job_id, account in accounts.jobs.items()],
        spending("", accounts.in_all(), limits.epsilon_in_all),
    )
