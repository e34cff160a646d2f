"""Private jobs that would not hide what they say are refused, with a sentence that says why and what would do."""

from __future__ import annotations

from typing import Any

import pytest

from fedcore.errors import JobFileError
from fedcore.jobfile import parse_job
from fedserver.rounds import private_fitness
from fedserver.rounds.plan import Plan, make_plan

SERVER = {"mechanism": "dp-fedavg", "clip": 1.0, "noise_multiplier": 1.0}
SHARED = {**SERVER, "noise": "clients"}
LOCAL = {**SERVER, "noise": "local"}
SGD = {"mechanism": "dp-sgd", "clip": 1.0, "noise_multiplier": 1.0, "sampling": 0.1}
PAPER = {"mechanism": "dp-lora-paper", "clip": 1.0, "noise_multiplier": 1.0}
RQM = {"mechanism": "rqm"}
START = {"start": {"clip": 1.0, "noise_multiplier": 1.0}}
LEVELS = {"compression": {"preset": "rqm"}}
FEDBACK = {"compression": {"uplink": [{"codec": "top-k"}], "error_feedback": {}}}


def plan(privacy: dict[str, Any], **sections: Any) -> Plan:
    tree = {
        "job": {"name": "x", "rounds": 10},
        "task": {"name": "digits"},
        "schedule": {"cohort": 4},
        "aggregator": {"max_examples": 1},
        "privacy": {"delta": 1e-3, **privacy},
        **sections,
    }
    return make_plan(parse_job(tree, "x"), "x")


def uplink(*stages: str | dict[str, Any]) -> dict[str, Any]:
    return {"compression": {"uplink": [{"codec": each} if isinstance(each, str) else each for each in stages]}}


@pytest.mark.parametrize(
    ("privacy", "sections"),
    [
        (SGD, {"aggregator": {"max_examples": 1000}}),
        (SGD, uplink("top-k", "kmeans", "rice", "huffman")),
        (SGD, {"adapter": {"name": "lora"}, "aggregator": {"rule": "flora"}}),
        ({**SGD, **START}, {"adapter": {"name": "lora-sb", "votes": True}}),
        (SERVER, uplink("per-tensor")),
        (SERVER, {"adapter": {"name": "lora", "ranks": {"a*": 2}}}),
        ({**SERVER, "noise_multiplier": 0.3, "adaptive": {}}, {}),
        ({**SERVER, "secret_cohort": True}, {}),
        (SHARED, {}),
        (SHARED, {"adapter": {"name": "rolora"}}),
        (LOCAL, {"adapter": {"name": "lora", "ranks": {"a*": 2}}}),
        (LOCAL, uplink("top-k", "int8")),
        ({**LOCAL, **START}, {"adapter": {"name": "lora-sb"}}),
        (LOCAL, {"adapter": {"name": "lora"}, "aggregator": {"rule": "fedex-lora", "max_examples": 1}}),
        (RQM, LEVELS),
        ({**RQM, "trust": "central"}, uplink("clip", "per-tensor", "rqm")),
        (RQM, uplink("rqm", "zstd")),
        (PAPER, {"adapter": {"name": "lora"}}),
    ],
)
def test_what_hides_is_accepted(privacy: dict[str, Any], sections: dict[str, Any]) -> None:
    assert plan(privacy, **sections).accounting is not None


@pytest.mark.parametrize(
    ("privacy", "sections", "text"),
    [
        (SERVER, {"aggregator": {"max_examples": 2}}, "aggregator.max_examples: 2, and dp-fedavg bounds"),
        (PAPER, {"aggregator": {}}, "set it to 1"),
        (LOCAL, FEDBACK, "would come past what dp-fedavg hides"),
        (SGD, FEDBACK, "would come past what dp-sgd hides"),
        (SERVER, uplink("int8"), "int8 can make a clipped update longer, and noise is added after it"),
        (SERVER, uplink("rand-k"), "rand-k can make a clipped update longer"),
        (SERVER, uplink("clip"), "dp-fedavg clips and adds noise by itself, before all codecs: leave clip out"),
        (SGD, uplink("clip", "gaussian-noise"), "leave gaussian-noise out"),
        (SHARED, uplink("bf16"), "shares of noise add up as long as nothing changes them, and bf16 does"),
        (SHARED, uplink("top-k"), "top-k"),
        (SERVER, uplink("zstd"), "the length of what zstd makes tells of an update"),
        (SERVER, uplink("top-k", "rice"), "the length of what rice makes tells of an update"),
        ({**RQM, "trust": "central"}, uplink("rqm", "huffman"), "the length of what huffman makes"),
        (SHARED, {"adapter": {"name": "lora", "ranks": {"a*": 2}}}, "of its higher ranks there are fewer"),
        (
            {**RQM, "trust": "central"},
            {**LEVELS, "adapter": {"name": "lora", "ranks": {"a*": 2}}},
            "of its higher ranks there are fewer",
        ),
        (SERVER, {"adapter": {"name": "rolora"}}, "rolora keeps one factor as it is, and noise by the server would"),
        ({**SERVER, "clip": 65.0}, {}, "aggregator.max_abs: 64, and values of updates up to 65"),
        (
            SERVER,
            {"adapter": {"name": "lora"}, "aggregator": {"rule": "flora", "max_examples": 1}},
            "flora with {} is none",
        ),
        (SERVER, {"aggregator": {"max_examples": 1, "over": "contributors"}}, "is none over all clients"),
        (
            {**RQM, "trust": "central"},
            {**LEVELS, "adapter": {"name": "lora"}, "aggregator": {"rule": "flexlora", "max_examples": 1}},
            "flexlora",
        ),
        (RQM, {}, "mechanism rqm is the codec 'rqm', and there is raw"),
        (RQM, uplink("rand-k", "rqm"), "rand-k before rqm changes how far two updates are apart"),
        (RQM, uplink("clip", "gaussian-noise", "rqm"), "gaussian-noise before rqm"),
        (RQM, uplink({"codec": "rqm", "levels": 100}), "less than or equal to 64"),
        (SGD, {"adapter": {"name": "lora-sb"}}, "privacy.start: lora-sb starts from gradients of the data"),
        ({**SGD, **START}, {}, "adapter full does not start from gradients: leave it out"),
        ({**SERVER, **START}, {"adapter": {"name": "lora-sb", "votes": True}}, "adapter.votes"),
        (SGD, {"training": {"max_grad_norm": 1.0}}, "training.max_grad_norm: dp-sgd clips by privacy.clip"),
        ({**SERVER, "delta": 0.25}, {}, "privacy.delta: 0.25, and below 1 / clients = 0.25 is needed"),
        ({**SERVER, "adaptive": {}}, {}, "a count noised by 0.2 alone costs what noise multiplier 0.4 does"),
        ({**LOCAL, "clip": 20.0}, {}, "values of updates up to 140 are usual"),
        ({**SERVER, "epsilon": 2.0}, {}, "above the budget of 2"),
        ({**SGD, **START, "epsilon": 1.0}, {"adapter": {"name": "lora-sb"}}, "2 rounds bring it to"),
    ],
)
def test_what_does_not_hide_is_refused(privacy: dict[str, Any], sections: dict[str, Any], text: str) -> None:
    with pytest.raises(JobFileError) as refusal:
        plan(privacy, **sections)
    assert any(text in problem for problem in refusal.value.problems), refusal.value.problems


def test_noise_is_written_into_the_job_that_is_journaled() -> None:
    job = plan({**SGD, "noise_multiplier": None, "epsilon": 4.0}).job
    assert job.privacy is not None
    assert make_plan(job, "x").job == job  # nothing is solved for a second time


def test_without_accounting_no_private_job_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_fitness, "is_installed", lambda: False)
    with pytest.raises(JobFileError, match=r"pip install 'roundtable\[privacy\]'"):
        plan(SGD)
    tree = {"job": {"name": "x", "rounds": 1}, "task": {"name": "t"}, "schedule": {"cohort": 1}}
    assert make_plan(parse_job(tree, "x"), "x").accounting is None
