"""Methods by name: what they stand for, and jobs whose parts do not go with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedcore.errors import JobFileError
from fedcore.jobfile import load_job, parse_job
from fedcore.methods import METHODS, method_of
from fedserver.rounds.plan import Plan, make_plan


def plan_of(**sections: dict[str, Any]) -> Plan:
    tree: dict[str, Any] = {
        "job": {"name": "methods", "rounds": 1},
        "task": {"name": "digits"},
        "schedule": {"cohort": 1},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return make_plan(parse_job(tree, "job"), "job")


def refused(**sections: dict[str, Any]) -> str:
    with pytest.raises(JobFileError) as caught:
        plan_of(**sections)
    return str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_stands_for_its_adapter_and_rule(name: str) -> None:
    params = {} if name == "full" else {"rank": 4}
    job = plan_of(job={"method": name}, adapter=params).job
    assert (job.adapter.name, job.aggregator.rule) == (METHODS[name].adapter, METHODS[name].rule)
    assert job.adapter.params == params
    assert job.job.method is None
    assert method_of(job) is METHODS[name]
    assert make_plan(job, "job").job == job
    same = plan_of(adapter={"name": METHODS[name].adapter, **params}, aggregator={"rule": METHODS[name].rule}).job
    assert same == job


def test_no_two_methods_are_the_same_job() -> None:
    assert len({(method.adapter, method.rule) for method in METHODS.values()}) == len(METHODS)


def test_a_name_beside_the_method_is_refused(tmp_path: Path) -> None:
    assert "'flora' stands for adapter.name 'lora', and the job says 'lora-sb'" in refused(
        job={"method": "flora"}, adapter={"name": "lora-sb"}
    )
    assert "'flora' stands for aggregator.rule 'flora', and the job says 'hetlora'" in refused(
        job={"method": "flora"}, aggregator={"rule": "hetlora"}
    )
    assert "job.method: method 'fedsb': did you mean 'fed-sb'?" in refused(job={"method": "fedsb"})
    file = tmp_path / "job.toml"
    text = '[job]\nname = "x"\nrounds = 1\nmethod = "fed-sb"\n[task]\nname = "digits"\n[schedule]\ncohort = 1\n'
    file.write_text(text)
    assert load_job(file).adapter.name == "lora-sb"
    for section, key, value in (("adapter", "name", "full"), ("aggregator", "rule", "weighted-mean")):
        file.write_text(f'{text}[{section}]\n{key} = "{value}"\n')
        with pytest.raises(JobFileError, match=f"stands for {section}.{key} too"):
            load_job(file)


FACTOR_RULES = ["flora", "fedex-lora", "flexlora", "hetlora", "lora-fair"]


@pytest.mark.parametrize("rule", FACTOR_RULES)
@pytest.mark.parametrize("adapter", ["full", "ffa-lora", "rolora", "lora-sb", "own"])
def test_a_rule_over_factors_needs_pairs_that_are_trained(rule: str, adapter: str) -> None:
    assert f"aggregator.rule: {rule} makes one pair of factors of many" in refused(
        adapter={"name": adapter}, aggregator={"rule": rule}
    )


@pytest.mark.parametrize("method", [*FACTOR_RULES, "rolora"])
def test_what_scales_steps_or_feeds_back_does_not_go_with_factors_that_are_replaced(method: str) -> None:
    assert "server_optimizer: " in refused(job={"method": method}, server_optimizer={"name": "adam"})
    assert "server_optimizer: " in refused(
        job={"method": method}, server_optimizer={"name": "none", "learning_rate": 0.5}
    )
    assert "compression.error_feedback: " in refused(
        job={"method": method}, compression={"uplink": [{"codec": "top-k"}], "error_feedback": {}}
    )
    plan_of(job={"method": method}, compression={"uplink": [{"codec": "top-k"}]})


@pytest.mark.parametrize("method", METHODS)
def test_ranks_may_differ_where_that_means_something(method: str) -> None:
    ranks = {"rank": 8, "ranks": {"small-*": 2}}
    if method in ("fedex-lora", "lora-fair"):
        assert "adapter.ranks: " in refused(job={"method": method}, adapter=ranks)
    elif method != "full":
        assert plan_of(job={"method": method}, adapter=ranks).sending.rank_of("small-1") == 2


def test_a_key_that_full_training_does_not_have_is_refused_before_clients_hear_of_it() -> None:
    assert "adapter.rank: unknown key" in refused(adapter={"name": "full", "rank": 4})
