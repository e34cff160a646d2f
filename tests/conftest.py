"""What every test shares: the Hypothesis profiles.

`ci` (the default) draws the same examples on every run, so a failure on one machine is a failure on all.
`HYPOTHESIS_PROFILE=explore` draws new ones, ten times as many: for releases and after deep changes.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci",
    deadline=None,  # time limits are pytest-timeout's, a busy machine must not fail a property
    derandomize=True,
    database=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", settings.get_profile("ci"), derandomize=False, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
