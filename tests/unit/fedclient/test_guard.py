"""The client has the last word: what is refused, in which words, and what each update is noted to have cost."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import dp_accounting as dp
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

import fedclient.guard
from fedclient.declining import Declined
from fedclient.guard import Guard, epsilon_within, released_by
from fedclient.ledger import LEDGER_FILE, FileLedger, Ledger, MemoryLedger
from fedclient.policy import Policy, PrivacyPolicy
from fedclient.releases import Account, Accounts, composed
from fedclient.residuals import MemoryResiduals
from fedclient.trainer import Evaluation, Trained, Work
from fedclient.updates import UpdateMaker
from fedcodec import build_pipeline
from fedcore.errors import ConfigError, StateUnusable, StorageFailed
from fedcore.jobfile import Job, parse_job
from fedcore.layout import Layout, Vector
from fedcore.messages import Assignment, WorkKind
from fedcore.rng import stream
from fedprivacy.accountant import epsilon_pld, epsilon_rdp
from fedprivacy.events import Adjacency, ClipCount, Everyone, Gaussian, History, Release, Rqm, Trust, Unit
from tests.support.workers import PlainWorker

DELTA = 1e-5
FEDAVG = {"mechanism": "dp-fedavg", "noise": "local", "clip": 1.0, "noise_multiplier": 4.0, "delta": DELTA}
SGD = {"mechanism": "dp-sgd", "clip": 1.0, "noise_multiplier": 1.1, "delta": DELTA, "sampling": 0.05}
RQM = {"mechanism": "rqm", "delta": DELTA}
RQM_UPLINK = [{"codec": "clip", "norm": 0.01}, {"codec": "rqm", "levels": 8}]


def job_with(privacy: dict[str, Any] | None, **sections: Any) -> Job:
    tree = {
        "job": {"name": "j", "rounds": 9},
        "task": {"name": "toy"},
        "schedule": {"cohort": 4},
        "aggregator": {"max_examples": 1},
    }
    return parse_job({**tree, **sections, **({} if privacy is None else {"privacy": privacy})}, "test")


def assigned(job: Job, kind: WorkKind = WorkKind.TRAIN, job_id: str = "ab" * 16, **fields: Any) -> Assignment:
    given = {"version": 3, "seed": 5, "layout_digest": "", "frame_digest": "0" * 64, "frame_bytes": 1, **fields}
    return Assignment("cd" * 16, job_id, job.to_json(), kind=kind, deadline_s=60.0, **given)


def guard_with(ledger: Ledger | None = None, tasks: list[str] | None = None, **privacy: Any) -> Guard:
    policy = PrivacyPolicy.model_validate(privacy, strict=True) if privacy else None
    return Guard(ledger or MemoryLedger(), Policy(tasks=tasks or ["*"], privacy=policy))


def check(guard: Guard, job: Job, kind: WorkKind = WorkKind.TRAIN, dimension: int = 100) -> None:
    work = assigned(job, kind)
    guard.check(work, job)
    guard.check_budget(work, job, dimension)


# -- what is accepted ------------------------------------------------------------------------------------------------


def test_without_a_policy_everything_is_accepted_and_noted() -> None:
    ledger = MemoryLedger()
    guard = Guard(ledger)
    for job in (job_with(None), job_with(FEDAVG), job_with({**FEDAVG, "unsafe_seed": 1})):
        for kind in WorkKind:
            if kind is not WorkKind.GRADIENT:
                check(guard, job, kind)
        guard.charge(assigned(job), job, 100)
    with ledger.locked() as accounts:
        assert accounts.in_all().updates == 3
        assert accounts.in_all().unprotected == 2, "what is drawn from a known seed hides nothing"


@pytest.mark.parametrize(
    ("privacy", "job", "text"),
    [
        ({"delta": 0.1}, job_with(None), "only jobs with [privacy], which job 'j' has not"),
        ({"mechanisms": ["dp-sgd", "rqm"]}, job_with(FEDAVG), "mechanism 'dp-fedavg', only dp-sgd, rqm"),
        ({"units": ["client"]}, job_with(SGD), "unit 'example', only client"),
        ({"units": ["example"]}, job_with(FEDAVG), "unit 'client', only example"),
        ({"trusts": ["local"]}, job_with({**FEDAVG, "noise": "server"}), "trust 'central', only local"),
        ({"trusts": ["local"]}, job_with({**FEDAVG, "noise": "clients"}), "trust 'distributed', only local"),
        ({"delta": 1e-6}, job_with(FEDAVG), "has delta 1e-05, at most 1e-06 is accepted"),
        ({"evaluation": False}, job_with({**FEDAVG, "evaluation": True}), "no figures of held-out examples"),
        ({"unsafe_seed": False}, job_with({**FEDAVG, "unsafe_seed": 3}), "no jobs with privacy.unsafe_seed"),
    ],
)
def test_what_the_policy_does_not_allow_is_refused_from_the_beginning(
    privacy: dict[str, Any], job: Job, text: str
) -> None:
    for kind in WorkKind:
        with pytest.raises(Declined) as caught:
            check(guard_with(**privacy), job, kind)
        assert str(caught.value).startswith("this client's policy: ")
        assert text in str(caught.value)


def test_what_the_policy_allows_is_taken() -> None:
    guard = guard_with(mechanisms=["dp-fedavg"], units=["client"], trusts=["local"], epsilon_per_job=3)
    for kind in (WorkKind.INITIALISE, WorkKind.TRAIN):
        check(guard, job_with(FEDAVG), kind)
    check(guard_with(evaluation=True), job_with({**FEDAVG, "evaluation": True}), WorkKind.EVALUATE)


def test_tasks_are_refused_by_name() -> None:
    for job in (job_with(None), job_with(FEDAVG)):
        with pytest.raises(Declined, match=r"no jobs of task 'toy', only digits, hf-\*"):
            check(guard_with(tasks=["digits", "hf-*"]), job, WorkKind.INITIALISE)
        check(guard_with(tasks=["t?y"]), job, WorkKind.INITIALISE)


def test_an_evaluation_that_sends_no_figures_is_taken() -> None:
    check(guard_with(units=["client"]), job_with(FEDAVG), WorkKind.EVALUATE)


def test_a_policy_with_a_budget_needs_the_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedclient.guard, "find_spec", lambda name: None)
    guard_with(units=["client"])
    for key in ("epsilon_per_job", "epsilon_in_all"):
        with pytest.raises(ConfigError, match=r"roundtable\[privacy\]"):
            Guard(MemoryLedger(), Policy(privacy=PrivacyPolicy.model_validate({key: 1.0})))


# -- what it costs ---------------------------------------------------------------------------------------------------


def spent(job: Job, kind: WorkKind = WorkKind.TRAIN, dimension: int = 100) -> History:
    found = released_by(kind, job, dimension)
    assert found is not None
    return found


def test_what_is_charged_follows_from_the_job_alone() -> None:
    def release(*mechanisms: Any, **fields: Any) -> tuple[Release, ...]:
        return (Release(mechanisms=mechanisms, **fields),)

    (sgd,) = spent(job_with(SGD, training={"local_epochs": 2})).releases
    assert (sgd.count, sgd.mechanisms) == (40, (Gaussian(noise_multiplier=1.1),))
    assert sgd.sampling.model_dump() == {"kind": "poisson", "rate": 0.05}
    for noise in ("local", "clients", "server"):
        # Noise in shares is counted as that of a quorum, which is what the shares are for.
        job = job_with({**FEDAVG, "noise": noise}, schedule={"cohort": 8, "quorum": 3})
        assert spent(job).releases == release(Gaussian(noise_multiplier=4.0))
    secret = job_with({**FEDAVG, "noise": "server", "secret_cohort": True})
    assert spent(secret).releases[0].sampling == Everyone(), "a client cannot know how many it was drawn from"
    assert spent(secret).adjacency is Adjacency.REPLACE
    for trust, clients in (("local", 1), ("central", 3)):
        levels = job_with(
            {**RQM, "trust": trust}, compression={"uplink": RQM_UPLINK}, schedule={"cohort": 8, "quorum": 3}
        )
        assert spent(levels).releases == release(Rqm(levels=8, clients=clients, dimension=100, l2_clip=0.01))
    started = job_with({**FEDAVG, "start": {"clip": 1.0, "noise_multiplier": 7.0}})
    assert spent(started, WorkKind.GRADIENT).releases == release(Gaussian(noise_multiplier=7.0))


def test_epsilon_is_that_of_dp_accounting() -> None:
    """Of DP-SGD by Rényi divergences, and of Gaussian rounds by both, with nothing of ours but the numbers."""
    steps = RdpAccountant().compose(dp.PoissonSampledDpEvent(0.05, dp.GaussianDpEvent(1.1)), 3 * 40)
    account = Account()
    for _ in range(3):
        account = account.then(spent(job_with(SGD, training={"local_epochs": 2})))
    assert account.history is not None
    assert epsilon_within(account.history, DELTA, math.inf) == pytest.approx(steps.get_epsilon(DELTA), rel=1e-9)

    account = Account().then(spent(job_with(FEDAVG))).then(spent(job_with(FEDAVG)))
    assert account.history is not None
    by_rdp = RdpAccountant().compose(dp.GaussianDpEvent(4.0), 2).get_epsilon(DELTA)
    by_pld = PLDAccountant().compose(dp.GaussianDpEvent(4.0), 2).get_epsilon(DELTA)
    assert by_pld < by_rdp
    assert epsilon_within(account.history, DELTA, by_rdp) == pytest.approx(by_rdp, rel=1e-9)
    assert epsilon_within(account.history, DELTA, by_pld) == pytest.approx(by_pld, rel=1e-3)
    assert epsilon_within(account.history, DELTA, by_rdp / 100) == pytest.approx(by_rdp, rel=1e-9)


def rounds_within(limit: float, multiplier: float) -> int:
    """Return how many Gaussian rounds keep epsilon, by dp_accounting alone."""
    rounds = 0
    while PLDAccountant().compose(dp.GaussianDpEvent(multiplier), rounds + 1).get_epsilon(DELTA) <= limit:
        rounds += 1
    return rounds


def charge_until_refused(guard: Guard, job: Job, job_id: str = "ab" * 16) -> tuple[int, str]:
    """Return how many updates were made, and why not one more."""
    work = assigned(job, job_id=job_id)
    for number in range(100):
        try:
            guard.check(work, job)
            guard.check_budget(work, job, 100)
        except Declined as error:
            with pytest.raises(Declined):  # also if nobody asks first
                guard.charge(work, job, 100)
            return number, str(error)
        guard.charge(work, job, 100)
    raise AssertionError("never refused")


@pytest.mark.parametrize("limit", [1.2, 2.0])
def test_each_job_has_as_many_updates_as_its_limit_allows(limit: float) -> None:
    ledger = MemoryLedger()
    guard = guard_with(ledger, epsilon_per_job=limit)
    for job_id in ("1" * 32, "2" * 32):
        number, text = charge_until_refused(guard, job_with(FEDAVG), job_id)
        assert number == rounds_within(limit, 4.0) > 0
        assert text.startswith("this client's policy: job 'j' would bring epsilon to ")
        assert text.endswith(f"(delta 1e-05), its limit per job is {limit:g}")
        assert float(text.split("epsilon to ")[1].split()[0]) > limit


def test_all_jobs_together_have_as_many_as_the_limit_in_all_allows() -> None:
    guard = guard_with(epsilon_per_job=1.2, epsilon_in_all=2.0)
    made = [charge_until_refused(guard, job_with(FEDAVG), f"{number}" * 32) for number in range(5)]
    assert sum(number for number, _ in made) == rounds_within(2.0, 4.0)
    assert "would bring epsilon of all jobs to" in made[-1][1]
    assert made[-1][1].endswith("its limit in all is 2")


def test_a_restart_does_not_forget(tmp_path: Path) -> None:
    made = 0
    for _ in range(100):
        guard = guard_with(FileLedger(tmp_path), epsilon_per_job=2.0)
        try:
            guard.charge(assigned(job_with(FEDAVG)), job_with(FEDAVG), 100)
        except Declined:
            break
        made += 1
    assert made == rounds_within(2.0, 4.0)


def test_after_an_update_that_nothing_hides_there_is_no_bound_in_all() -> None:
    ledger = MemoryLedger()
    Guard(ledger).charge(assigned(job_with(None)), job_with(None), 100)  # before there was a policy
    other = assigned(job_with(FEDAVG), job_id="5" * 32)
    guard_with(ledger, epsilon_per_job=4.0).check_budget(other, job_with(FEDAVG), 100)
    with pytest.raises(Declined, match="to infinity, its limit in all is 4: nothing hides 1 of 2 updates"):
        guard_with(ledger, epsilon_in_all=4.0).check_budget(other, job_with(FEDAVG), 100)
    with pytest.raises(Declined, match="to infinity, its limit per job is 4"):
        guard_with(ledger, epsilon_per_job=4.0).check_budget(assigned(job_with(FEDAVG)), job_with(FEDAVG), 100)


def test_epsilon_that_reads_like_the_limit_is_written_out() -> None:
    exact = epsilon_rdp(spent(job_with({**FEDAVG, "noise_multiplier": 50.0})), DELTA)
    limit = epsilon_within(spent(job_with({**FEDAVG, "noise_multiplier": 50.0})), DELTA, exact / 2) * (1 - 1e-9)
    with pytest.raises(Declined) as caught:
        check(guard_with(epsilon_per_job=limit), job_with({**FEDAVG, "noise_multiplier": 50.0}))
    assert float(str(caught.value).split("epsilon to ")[1].split()[0]) > limit


# -- all jobs as one -------------------------------------------------------------------------------------------------


def test_clients_that_are_hidden_as_a_whole_add_up_as_they_are() -> None:
    one, two = spent(job_with(FEDAVG)), spent(job_with({**FEDAVG, "noise": "server", "noise_multiplier": 2.0}))
    both = composed([one, two, one])
    assert (both.unit, both.adjacency, both.trust) == (Unit.CLIENT, Adjacency.ZERO_OUT, Trust.CENTRAL)
    expected = RdpAccountant().compose(dp.GaussianDpEvent(4.0), 2).compose(dp.GaussianDpEvent(2.0))
    assert epsilon_rdp(both, DELTA) == pytest.approx(expected.get_epsilon(DELTA), rel=1e-9)


def test_beside_hidden_examples_a_hidden_client_is_one_whose_vector_an_example_replaces() -> None:
    """Zero-out of an example moves its client's clipped vector by up to two clips: half the multiplier."""
    both = composed([spent(job_with(SGD)), spent(job_with(FEDAVG))])
    assert (both.unit, both.adjacency, both.trust) == (Unit.EXAMPLE, Adjacency.ZERO_OUT, Trust.LOCAL)
    expected = RdpAccountant().compose(dp.PoissonSampledDpEvent(0.05, dp.GaussianDpEvent(1.1)), 20)
    expected.compose(dp.GaussianDpEvent(2.0))
    assert epsilon_rdp(both, DELTA) == pytest.approx(expected.get_epsilon(DELTA), rel=1e-9)


@pytest.mark.parametrize(
    "mechanisms",
    [
        (Gaussian(noise_multiplier=3.0),),
        (Gaussian(noise_multiplier=3.0), ClipCount(std=2.0)),
        (Rqm(levels=8, dimension=50, l2_clip=0.1),),
        (Rqm(levels=8, dimension=1),),
    ],
)
def test_replacing_costs_what_it_costs(mechanisms: tuple[Any, ...]) -> None:
    release = Release(mechanisms=mechanisms)
    hidden = History(unit=Unit.CLIENT, adjacency=Adjacency.REPLACE, trust=Trust.LOCAL, releases=(release,))
    nothing = History(unit=Unit.EXAMPLE, adjacency=Adjacency.ZERO_OUT, trust=Trust.LOCAL)
    assert epsilon_rdp(composed([hidden, nothing]), DELTA) == pytest.approx(epsilon_rdp(hidden, DELTA), rel=1e-9)


def test_a_job_that_comes_back_as_another_is_counted_as_both() -> None:
    """A server may send anything under a job's id."""
    guard = guard_with(ledger := MemoryLedger(), epsilon_per_job=1000.0)
    for job in (job_with(SGD), job_with(FEDAVG)):
        guard.charge(assigned(job), job, 100)
    with ledger.locked() as accounts:
        assert accounts.of("ab" * 16).history == composed([spent(job_with(SGD)), spent(job_with(FEDAVG))])
        assert accounts == Accounts({"ab" * 16: accounts.of("ab" * 16)})


# -- hostile jobs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "kind", "dimension"),
    [
        (job_with({**RQM, "trust": "local"}, compression={"uplink": [{"codec": "rqm", "levels": 65536}]}), "train", 9),
        (job_with({**RQM, "trust": "local"}, compression={"uplink": [{"codec": "rqm", "levels": "9"}]}), "train", 9),
        (job_with({**RQM, "trust": "local"}, compression={"uplink": RQM_UPLINK}), "train", 2**40),
        (job_with({**RQM, "trust": "local"}, compression={"uplink": RQM_UPLINK}), "gradient", 9),
        (job_with({**SGD, "sampling": 1e-300}), "train", 9),
        (job_with({**SGD, "sampling": 1e-9}, training={"local_epochs": 10_000}), "train", 9),
        (job_with({k: v for k, v in FEDAVG.items() if k != "noise_multiplier"} | {"epsilon": 1.0}), "train", 9),
        (
            job_with({**FEDAVG, "noise": "server", "adaptive": {"count_std": 0.001}}),
            "train",
            9,
        ),
    ],
)
def test_what_cannot_be_accounted_for_is_declined_with_and_without_a_policy(
    job: Job, kind: str, dimension: int
) -> None:
    for guard in (guard_with(), guard_with(epsilon_per_job=1e6)):
        with pytest.raises(Declined, match="the privacy of job 'j' cannot be accounted for: "):
            check(guard, job, WorkKind(kind), dimension)
        with pytest.raises(Declined):
            guard.charge(assigned(job, WorkKind(kind)), job, dimension)


@pytest.mark.parametrize(
    "privacy",
    [
        {**FEDAVG, "noise_multiplier": 1e-3},
        {**SGD, "noise_multiplier": 1e-3, "sampling": 1e-8},
        {**SGD, "noise_multiplier": 1.0, "sampling": 1e-8},
        {**SGD, "noise_multiplier": 0.3, "sampling": 1e-9},
        {**SGD, "noise_multiplier": 1e6, "sampling": 1e-9},
    ],
)
def test_jobs_at_the_bounds_are_taken_or_declined(privacy: dict[str, Any]) -> None:
    for limit in (0.001, 1.0, 100.0):
        guard = guard_with(epsilon_per_job=limit, epsilon_in_all=limit)
        try:
            check(guard, job_with(privacy))
        except Declined as error:
            assert "would bring epsilon to " in str(error)  # noqa: PT017


def test_loss_distributions_of_a_billion_sampled_steps_are_not_tried() -> None:
    """They take minutes."""
    assert epsilon_pld(spent(job_with({**SGD, "noise_multiplier": 3.0, "sampling": 1e-9})), DELTA) is None


# -- in the work -----------------------------------------------------------------------------------------------------

LAYOUT = Layout.of([("adapter", "a", (20,), "float32")])
BASE = build_pipeline([{"codec": "raw"}]).encode(np.zeros(20, np.float32), stream(0))


class Worker(PlainWorker):
    """Counts what it was asked for."""

    def __init__(self) -> None:
        self.built = 0
        self.trained = 0

    def initialise(self, work: Work) -> tuple[Layout, Vector]:
        self.built += 1
        return LAYOUT, np.zeros(20, np.float32)

    def layout(self, work: Work) -> Layout:
        self.built += 1
        return LAYOUT

    def train(self, work: Work, base_D: Vector, **options: Any) -> Trained:
        self.trained += 1
        return Trained(np.zeros(20, np.float32), 10, {}, None)

    def evaluate(self, work: Work, base_D: Vector) -> Evaluation:
        return Evaluation(0, {})

    def forget(self, job_id: str) -> None:
        pass


class House:
    """A maker of updates, with its guard and worker."""

    def __init__(self, guard: Guard) -> None:
        self.worker = Worker()
        key = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
        self.maker = UpdateMaker(self.worker, key, "fed", "c1", MemoryResiduals(), guard)

    def update(self, job: Job, kind: WorkKind = WorkKind.TRAIN) -> None:
        work = assigned(job, kind, layout_digest=LAYOUT.digest, version=0)
        if kind is WorkKind.INITIALISE:
            self.maker.initialise(work)
        else:
            self.maker.update(work, memoryview(BASE), lambda part: None, threading.Event())


def test_what_is_refused_is_neither_built_nor_trained() -> None:
    house = House(guard_with(tasks=["digits"]))
    for kind in WorkKind:
        with pytest.raises(Declined, match="no jobs of task 'toy'"):
            house.update(job_with(None), kind)
    assert (house.worker.built, house.worker.trained) == (0, 0)
    house = House(guard_with(epsilon_per_job=0.1))
    with pytest.raises(Declined, match=r"its limit per job is 0\.1"):
        house.update(job_with(FEDAVG))
    assert (house.worker.built, house.worker.trained) == (0, 0)


def test_a_job_that_undoes_what_its_mechanism_hides_is_refused_whatever_the_server_says() -> None:
    """The server refuses such a job at its submission; another server might not."""
    for sections, text in (
        ({"aggregator": {"max_examples": 5}}, "aggregator.max_examples: 5"),
        ({"compression": {"uplink": [{"codec": "clip"}]}}, "leave clip out"),
    ):
        house = House(Guard(MemoryLedger()))
        with pytest.raises(Declined, match=text):
            house.update(job_with(FEDAVG, **sections))
        assert house.worker.trained == 0


def test_an_update_that_is_drawn_anew_is_another_upload() -> None:
    """What was sent of the first one, before the client died, is not gone on with."""
    house = House(Guard(MemoryLedger()))

    def made(job: Job) -> str:
        work = assigned(job, layout_digest=LAYOUT.digest, version=0)
        return house.maker.update(work, memoryview(BASE), lambda part: None, threading.Event()).update_id

    assert len({made(job_with(None)) for _ in range(2)}) == 1
    assert len({made(job_with(FEDAVG)) for _ in range(2)}) == 2


def test_every_update_is_noted_before_it_can_leave_also_one_that_is_made_again(tmp_path: Path) -> None:
    house = House(Guard(FileLedger(tmp_path)))
    for number in range(1, 4):
        house.update(job_with(None))
        assert FileLedger(tmp_path).read().of("ab" * 16).updates == number
    house.update(job_with(None), WorkKind.EVALUATE)
    house.update(job_with(None), WorkKind.INITIALISE)
    assert FileLedger(tmp_path).read().in_all().updates == 3


def test_an_update_that_cannot_be_noted_does_not_leave(tmp_path: Path) -> None:
    house = House(Guard(FileLedger(tmp_path)))
    (tmp_path / LEDGER_FILE).mkdir()
    with pytest.raises(StorageFailed, match=r"cannot open .*privacy-ledger"):
        house.update(job_with(None))
    (tmp_path / LEDGER_FILE).rmdir()
    house.update(job_with(None))
    (tmp_path / LEDGER_FILE).write_bytes(b"damaged\n")
    with pytest.raises(Declined, match=r"the privacy ledger .* nothing is released without it"):
        house.update(job_with(None))
    with pytest.raises(StateUnusable):
        FileLedger(tmp_path).read()
