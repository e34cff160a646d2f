"""`fedserver privacy JOB`: what a job file plans, and what a job on a server has spent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedcore.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedcore.jobfile import Job
    from fedprivacy.events import History
    from fedprivacy.guarantee import Guarantee

OPTIONS: Final = {"noise_multiplier", "epsilon", "delta", "steps", "sampling", "dimension", "population"}


def of_file(path: Path, given: dict[str, Any]) -> tuple[dict[str, Any], Callable[[int], History]]:
    """Return what a job file promises, its keys replaced by what was given, and its history by rounds.

    Raises:
        InvalidInput: it is not private, or cannot be run.
    """
    from fedcore.jobfile import load_job
    from fedcore.privacy import RqmPrivacy
    from fedprivacy.accountant import guarantee
    from fedprivacy.planning import steps_within
    from fedserver.rounds.plan import make_plan
    from fedserver.rounds.privacy import uncovered_by

    accounting = make_plan(_replaced(load_job(path), given), str(path)).accounting
    assert accounting is not None
    job, section = accounting.job, accounting.section
    if isinstance(section, RqmPrivacy) and "dimension" not in given:
        raise InvalidInput("--dimension is needed: what rqm costs grows with the values in an update")
    dimension, population = given.get("dimension", 1), given.get("population", 0)

    def history(rounds: int) -> History:
        return accounting.planned(dimension, rounds, population)

    once = accounting.planned(dimension, 1, population, with_start=False)
    found = guarantee(history(job.job.rounds), section.delta)
    found = replace(found, not_covered=(*uncovered_by(section), *found.not_covered))
    answer = {
        "job": job.job.name,
        **section.model_dump(mode="json", exclude_none=True, exclude={"delta", "epsilon"}),
        "rounds": job.job.rounds,
        "budget": section.epsilon,
        "rounds_within_budget": None
        if section.epsilon is None
        else steps_within(section.epsilon, section.delta, history),
        "epsilon_of_one_round": guarantee(once, section.delta).epsilon,
    }
    return {**answer, **stated(found)}, history


def stated(found: Guarantee) -> dict[str, Any]:
    """Return what the command answers of a guarantee, whatever it is of."""
    tree = found.as_json()
    numbers = {key: tree[key] for key in ("epsilon", "epsilon_pld", "epsilon_rdp", "delta")}
    return {**numbers, "guarantee": tree, "text": found.text()}


def of_server(folder: Path, name: str) -> dict[str, Any]:
    """Return what a job on the server of a state folder has spent.

    Raises:
        NotFound: no such job.
        InvalidInput: it is not private.
    """
    from fedprivacy.guarantee import Guarantee
    from fedserver.cli.connect import operator

    with operator(folder) as server:
        (job,) = server.status(name)["jobs"]
    privacy = job["privacy"]
    if privacy is None:
        raise InvalidInput(f"job {job['name']!r} is not private: it has no section [privacy], or no version yet")
    about = {"job": job["name"], "job_id": job["job_id"], "status": job["status"], "version": job["version"]}
    return {**about, "rounds": job["rounds"], **privacy, "text": Guarantee.from_json(privacy["guarantee"]).text()}


def _replaced(job: Job, given: dict[str, Any]) -> Job:
    from fedcore.jobfile import parse_job

    if job.privacy is None:
        raise InvalidInput(f"job {job.job.name!r} is not private: it has no section [privacy]")
    tree = job.model_dump(mode="json")
    keys = {"noise_multiplier", "epsilon", "delta", "sampling"} & given.keys()
    if "epsilon" in keys and "noise_multiplier" not in keys and "noise_multiplier" in tree["privacy"]:
        tree["privacy"]["noise_multiplier"] = None  # it is solved for
    tree["privacy"].update({key: given[key] for key in keys})
    if "steps" in given:
        tree["job"]["rounds"] = given["steps"]
    return parse_job(tree, "job")
