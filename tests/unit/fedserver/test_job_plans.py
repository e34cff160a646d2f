"""What a job file may combine."""

from __future__ import annotations

import pytest

from fedcore.errors import JobFileError
from fedcore.jobfile import parse_job
from fedserver.rounds.plan import make_plan
from tests.support.server import small_job


@pytest.mark.parametrize("side", ["uplink", "downlink"])
def test_what_hides_by_its_draws_is_refused_while_everybody_knows_them(side: str) -> None:
    job = parse_job(small_job().model_dump(mode="json") | {"compression": {side: [{"codec": "rqm"}]}}, "job")
    with pytest.raises(JobFileError, match=rf"compression\.{side}: rqm hides values by what it draws"):
        make_plan(job, "job")
