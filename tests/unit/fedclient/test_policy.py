"""The policy file: every mistake is named, with what would be right, and nothing of it is read as permission."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedclient.policy import Policy, PrivacyPolicy, load_policy, policy_in
from fedcore.errors import ConfigError

WHOLE = """
tasks = ["digits", "hf-*"]

[privacy]
mechanisms = ["dp-sgd", "dp-fedavg"]
units = ["example"]
trusts = ["local"]
epsilon_per_job = 4
epsilon_in_all = 8.5
delta = 1e-6
evaluation = true
unsafe_seed = true
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_key_is_read(tmp_path: Path) -> None:
    assert load_policy(written(tmp_path, WHOLE)) == Policy(
        tasks=["digits", "hf-*"],
        privacy=PrivacyPolicy(
            mechanisms=["dp-sgd", "dp-fedavg"],
            units=["example"],
            trusts=["local"],
            epsilon_per_job=4.0,
            epsilon_in_all=8.5,
            delta=1e-6,
            evaluation=True,
            unsafe_seed=True,
        ),
    )


def test_what_is_left_out_is_not_restricted_but_figures_and_known_seeds_are_not_sent(tmp_path: Path) -> None:
    assert load_policy(written(tmp_path, "")) == Policy() == policy_in(tmp_path / "elsewhere")
    private = load_policy(written(tmp_path, "[privacy]\n")).privacy
    assert private is not None
    assert set(private.mechanisms) == {"dp-sgd", "dp-fedavg", "rqm", "dp-lora-paper"}
    assert (private.has_budget, private.evaluation, private.unsafe_seed) == (False, False, False)


def test_tasks_are_shell_patterns() -> None:
    policy = Policy(tasks=["digits", "hf-*"])
    assert [policy.allows_task(name) for name in ("digits", "hf-causal-lm", "digits2", "Digits")] == [
        True,
        True,
        False,
        False,
    ]


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    text = """
task = ["digits"]
[privacy]
mechanisms = ["dp-sgdd"]
units = []
trusts = "local"
epsilon_per_job = 0
epsilon_in_al = 3
delta = 1.0
evaluation = "yes"
"""
    with pytest.raises(ConfigError) as caught:
        load_policy(written(tmp_path, text))
    lines = [line.partition("policy.toml: ")[2] for line in str(caught.value).splitlines()]
    assert "task: unknown key; did you mean 'tasks'? known: tasks, privacy" in lines
    assert any(line.startswith("privacy.epsilon_in_al: unknown key; did you mean 'epsilon_in_all'?") for line in lines)
    for key in ("mechanisms.0", "units", "trusts", "epsilon_per_job", "delta", "evaluation"):
        assert any(line.startswith(f"privacy.{key}: ") for line in lines), key


@pytest.mark.parametrize("text", ["tasks = [", "tasks = [1]", "tasks = 'digits'", "privacy = 3", "x" * 70_000])
def test_what_is_no_policy_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"policy\.toml"):
        policy_in(written(tmp_path, text).parent)


def test_a_policy_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is missing"):
        load_policy(tmp_path / "policy.toml")
    (tmp_path / "policy.toml").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is missing"):
        policy_in(tmp_path)
    (tmp_path / "policy.toml").unlink()
    (tmp_path / "policy.toml").mkdir()
    with pytest.raises(ConfigError, match="cannot read"):
        policy_in(tmp_path)
