"""The table of methods: what each sends in a round for one adapted m × n matrix, with rank r and K clients.

A tensor's shape is given in the words of `Method`: m, n, r, Kr = K · r, (K-1)r = (K − 1) · r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from fedcore.errors import InvalidInput
from fedcore.jobfile import AdapterSection, Job
from fedcore.names import nearest


class Sent(NamedTuple):
    """A tensor that crosses the wire: what it is called, rows × columns.

    Attributes:
        is_change: whether it is part of a change of the frozen matrix, which travels beside the version's frame as
            plain float32.
    """

    name: str
    rows: str
    columns: str
    is_change: bool = False

    def num_values(self, m: int, n: int, rank: int, clients: int) -> int:
        """Return how many values it has."""
        words = {"m": m, "n": n, "r": rank, "Kr": clients * rank, "(K-1)r": (clients - 1) * rank}
        return words[self.rows] * words[self.columns]


Sends = tuple[Sent, ...]

A: Final = Sent("A", "r", "n")
B: Final = Sent("B", "m", "r")
R: Final = Sent("R", "r", "r")


@dataclass(frozen=True)
class Method:
    """One method of federated training.

    Attributes:
        name: what commands call it.
        source: who found it.
        up: what a client sends for each matrix, in each of the rounds that follow in turn; nearly always in one.
        down: what a client gets, in the same rounds.
        exact: whether the weights that all go on with are the weighted mean of the clients' weights, up to rounding.
        changes_base: whether the frozen weights change, so that who joins late needs every change so far.
        adapter: the adapter that a job names for it.
        rule: the aggregation rule that it names.
        whole: whether every parameter of the model travels, instead of something for each matrix.
        setup_up: what a client sends for each matrix once, before the first round.
        setup_down: what a client gets once.
    """

    name: str
    source: str
    up: tuple[Sends, ...]
    down: tuple[Sends, ...]
    exact: bool
    adapter: str
    rule: str = "weighted-mean"
    changes_base: bool = False
    whole: bool = False
    setup_up: Sends = ()
    setup_down: Sends = ()

    @property
    def frames_down(self) -> tuple[Sends, ...]:
        """What versions' frames hold, which is not all of `down`: new factors of FLoRA too, changes not."""
        return _FACTORS if self.changes_base else self.down

    @property
    def up_text(self) -> str:
        """`up` as people read it."""
        return "every parameter" if self.whole else ", then ".join(map(words, self.up))

    @property
    def down_text(self) -> str:
        """`down` as people read it."""
        return "every parameter" if self.whole else ", then ".join(map(words, self.down))


_FACTORS: Final[tuple[Sends, ...]] = ((A, B),)
_RESIDUAL: Final[Sends] = (
    Sent("residual's right", "(K-1)r", "n", is_change=True),
    Sent("residual's left", "m", "(K-1)r", is_change=True),
)

METHODS: Final = {
    method.name: method
    for method in (
        Method(
            "full",
            "McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017",
            up=((),),
            down=((),),
            exact=True,
            adapter="full",
            whole=True,
        ),
        Method(
            "fedit",
            "Zhang et al., Towards Building the Federated GPT: Federated Instruction Tuning, 2023",
            up=_FACTORS,
            down=_FACTORS,
            exact=False,
            adapter="lora",
        ),
        Method(
            "ffa-lora",
            "Sun et al., Improving LoRA in Privacy-preserving Federated Learning, 2024",
            up=((B,),),
            down=((B,),),
            exact=True,
            adapter="ffa-lora",
        ),
        Method(
            "rolora",
            "Chen et al., Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA, 2025",
            up=((B,), (A,)),
            down=_FACTORS,
            exact=True,
            adapter="rolora",
        ),
        Method(
            "flora",
            "Wang et al., FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations,"
            " 2024",
            up=_FACTORS,
            down=((Sent("stack of A", "Kr", "n", is_change=True), Sent("stack of B", "m", "Kr", is_change=True)),),
            exact=True,
            adapter="lora",
            rule="flora",
            changes_base=True,
        ),
        Method(
            "fedex-lora",
            "Singhal et al., FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation"
            " Models, 2024",
            up=_FACTORS,
            down=((A, B, *_RESIDUAL),),
            exact=True,
            adapter="lora",
            rule="fedex-lora",
            changes_base=True,
        ),
        Method(
            "flexlora",
            "Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client"
            " Resources, 2024",
            up=_FACTORS,
            down=_FACTORS,
            exact=False,
            adapter="lora",
            rule="flexlora",
        ),
        Method(
            "hetlora",
            "Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, 2024",
            up=_FACTORS,
            down=_FACTORS,
            exact=False,
            adapter="lora",
            rule="hetlora",
        ),
        Method(
            "lora-fair",
            "Bian et al., LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement, 2024",
            up=_FACTORS,
            down=_FACTORS,
            exact=False,
            adapter="lora",
            rule="lora-fair",
        ),
        Method(
            "fed-sb",
            "Singhal et al., Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)"
            " Federated LoRA Fine-Tuning, 2025",
            up=((R,),),
            down=((R,),),
            exact=True,
            adapter="lora-sb",
            setup_up=(Sent("summed gradient", "m", "n"),),
            setup_down=(A, B, R),
        ),
    )
}


def find_method(name: str) -> Method:
    """Return the method of that name.

    Raises:
        InvalidInput: there is none; the text names the known ones.
    """
    if name not in METHODS:
        guess = nearest(name, METHODS)
        hint = f"did you mean {guess!r}? " if guess else ""
        raise InvalidInput(f"method {name[:80]!r}: {hint}known: {', '.join(METHODS)}")
    return METHODS[name]


def method_of(job: Job) -> Method | None:
    """Return the method that a job's adapter and rule make up; None: one without a name."""
    pair = job.adapter.name, job.aggregator.rule
    return next((method for method in METHODS.values() if (method.adapter, method.rule) == pair), None)


def expand_method(job: Job) -> Job:
    """Return the job with the adapter and the rule of its method written out.

    Raises:
        InvalidInput: there is no such method, or the job names another adapter or rule beside it.
    """
    if job.job.method is None:
        return job
    method = find_method(job.job.method)
    for where, section, key, wanted in (
        ("adapter", job.adapter, "name", method.adapter),
        ("aggregator", job.aggregator, "rule", method.rule),
    ):
        given = getattr(section, key)
        # By value: a job that went through JSON has every key.
        if given not in (wanted, type(section).model_fields[key].default):
            raise InvalidInput(f"{method.name!r} stands for {where}.{key} {wanted!r}, and the job says {given!r}")
    return job.model_copy(
        update={
            "job": job.job.model_copy(update={"method": None}),
            "adapter": AdapterSection.model_validate({**job.adapter.params, "name": method.adapter}),
            "aggregator": job.aggregator.model_copy(update={"rule": method.rule}),
        }
    )


def words(sends: Sends) -> str:
    """Return what is sent as people read it: ``"A (r × n), B (m × r)"``."""
    return ", ".join(f"{sent.name} ({sent.rows} × {sent.columns})" for sent in sends)
