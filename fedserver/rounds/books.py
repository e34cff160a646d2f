"""A private job's spending as its engine sees it: asked before a round opens, noted before a version is made.

For a job that is not private nothing of this does anything.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial

from fedcore.layout import Layout
from fedcore.messages import WorkKind
from fedserver.rounds.attempt import Attempt
from fedserver.rounds.plan import Plan
from fedserver.rounds.privacy import RELEASING, JobPrivacy, Spending
from fedserver.rounds.scheduler import Assign
from fedserver.rounds.services import Services
from fedserver.state.records import JobRecord, Record


class Books:
    """See the module's text. Used on the event loop's thread; epsilons are computed in worker threads.

    Attributes:
        spending: what has been spent up to the newest version; None: the job is not private, or not recovered.
    """

    def __init__(self, privacy: JobPrivacy | None, services: Services, plan: Plan) -> None:
        self._privacy, self._services = privacy, services
        self._rounds = plan.job.job.rounds
        self._can_add_up = True
        self.spending: Spending | None = None

    @property
    def epsilon(self) -> float | None:
        """Of what has been spent; None: the job is not private."""
        return None if self.spending is None else self.spending.now.epsilon

    async def excess(self, stage: WorkKind, layout: Layout | None, command: Assign) -> str:
        """Return why the clients of `command` must not be asked; empty: they may."""
        if self._privacy is None or layout is None or stage not in RELEASING:
            return ""
        place = stage, layout, command.clients, command.available
        return await self._services.in_worker(partial(self._privacy.excess, *place))

    async def release(
        self, attempt: Attempt, layout: Layout | None, records: list[Record], *, in_version: bool
    ) -> None:
        """Make durable what clients have let out with a sealed attempt, before anything is made of it.

        Args:
            attempt: sealed; what is durable of it are its updates.
            layout: of the job.
            records: to be written with it; taken from the list if they were.
            in_version: whether a version is made of it, or it is given up.
        """
        if self._privacy is None or layout is None or attempt.kind not in RELEASING:
            return
        record = self._privacy.record(
            attempt, layout, self._services.store, self._services.clock.wall_s(), in_version=in_version
        )
        if record is not None:
            await self._services.journal.write(*records, record)
            records.clear()
            self._privacy.add(record)

    async def add_up(self, layout: Layout | None, version: int, record: JobRecord) -> JobRecord:
        """Bring `spending` up to a version, and return the job's record with it; after a failure, the one that it had.

        Raises:
            Exception: it cannot be computed; the job has to end, which asks for it again.
        """
        privacy = self._privacy
        if privacy is None or not self._can_add_up:
            return record
        self._can_add_up = False
        found = await self._services.in_worker(partial(privacy.spending, layout, self._rounds - version))
        self._can_add_up = True
        self.spending = found
        epsilons = found.now.epsilon, found.at_end
        now, at_end = epsilons if found.unsafe_seed is None else (math.inf, math.inf)
        self._services.metrics.spent(privacy.job_id, epsilon=now, at_end=at_end, budget=found.budget)
        return replace(record, privacy=json.dumps(found.as_json()))
