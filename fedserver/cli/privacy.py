"""`fedserver privacy`: what a mechanism guarantees, before anything runs. It needs no server."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedcore.cli import JsonOption, print_json
from fedcore.errors import InvalidInput
from fedserver.cli.options import DEFAULT_FOLDER, FolderOption

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedprivacy.events import History, Pbm, Rqm


class Mechanism(StrEnum):
    """What `--mechanism` names."""

    DP_SGD = "dp-sgd"
    DP_FEDAVG = "dp-fedavg"
    RQM = "rqm"
    PBM = "pbm"
    DP_LORA_PAPER = "dp-lora-paper"


_GAUSSIAN: Final = {"noise_multiplier", "epsilon", "steps", "sampling", "delta"}
_DISCRETE: Final = {"clients", "dimension", "orders", "epsilon", "steps", "delta"}
_ALLOWED: Final = {
    Mechanism.DP_SGD: _GAUSSIAN,
    Mechanism.DP_FEDAVG: _GAUSSIAN,
    Mechanism.RQM: {*_DISCRETE, "levels", "keep", "clip", "extension", "l2_clip"},
    Mechanism.PBM: {*_DISCRETE, "trials", "theta"},
    Mechanism.DP_LORA_PAPER: {"noise_multiplier", "steps", "delta"},
}
_ORDERS: Final = "2,8,32"
_IN_GUARANTEE: Final = {"guarantee", "text", "readings", "epsilon", "epsilon_pld", "epsilon_rdp", "delta"}


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(privacy)


def privacy(
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="A job file, or a job on the server.", show_default=False)
    ] = None,
    mechanism: Annotated[
        Mechanism | None, typer.Option("--mechanism", help="Without JOB: what is to be accounted for.")
    ] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option("--noise-multiplier", help="Standard deviation of the noise over the clip.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option("--epsilon", help="A budget: solves for what is left out.")] = None,
    delta: Annotated[float | None, typer.Option("--delta", help="Chance with which epsilon need not hold.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps, or rounds; of a job, its rounds.")] = None,
    sampling: Annotated[
        float | None, typer.Option("--sampling", help="Probability of taking part in a step; 1 if left out.")
    ] = None,
    levels: Annotated[int | None, typer.Option("--levels", help="Of rqm; 16 if left out.")] = None,
    keep: Annotated[float | None, typer.Option("--keep", help="Of rqm; 0.42 if left out.")] = None,
    clip: Annotated[float | None, typer.Option("--clip", help="Of rqm; 1 if left out.")] = None,
    extension: Annotated[float | None, typer.Option("--extension", help="Of rqm; 1 if left out.")] = None,
    l2_clip: Annotated[float | None, typer.Option("--l2-clip", help="Of rqm: bound on a vector's ℓ2 norm.")] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="Of pbm; 15 if left out.")] = None,
    theta: Annotated[float | None, typer.Option("--theta", help="Of pbm; 0.25 if left out.")] = None,
    clients: Annotated[int | None, typer.Option("--clients", help="In a sum of rqm or pbm; 1 if left out.")] = None,
    dimension: Annotated[int | None, typer.Option("--dimension", help="Values in a vector; 1 if left out.")] = None,
    population: Annotated[
        int | None, typer.Option("--population", help="Of a job: clients that secret cohorts are drawn from.")
    ] = None,
    folder: FolderOption = DEFAULT_FOLDER,
    orders: Annotated[str | None, typer.Option("--orders", help=f"Rényi orders; {_ORDERS} if left out.")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Write epsilon over steps as PNG.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a job or a mechanism guarantees, or plan the noise or the steps that a budget allows.

    Nothing runs. Leave out --noise-multiplier or --steps and give --epsilon to have it solved for. Of a job on the
    server: what it has spent.
    """
    given = {
        "noise_multiplier": noise_multiplier,
        "epsilon": epsilon,
        "delta": delta,
        "steps": steps,
        "sampling": sampling,
        "levels": levels,
        "keep": keep,
        "clip": clip,
        "extension": extension,
        "l2_clip": l2_clip,
        "trials": trials,
        "theta": theta,
        "clients": clients,
        "dimension": dimension,
        "population": population,
        "orders": orders,
    }
    given = {name: value for name, value in given.items() if value is not None}
    answer, history_after = _answer(job, mechanism, given, folder)
    if plot is not None:
        if history_after is None:
            raise InvalidInput("--plot: of a job on the server, its model card has epsilon by version")
        answer["plot"] = _plot(plot, answer, history_after)
    if as_json:
        print_json({name: value for name, value in answer.items() if name != "text"})
    else:
        _show(answer)


def _answer(
    job: str | None, mechanism: Mechanism | None, given: dict[str, Any], folder: Path
) -> tuple[dict[str, Any], Callable[[int], History] | None]:
    from fedserver.cli import privacy_of_job

    if (job is None) is (mechanism is None):
        raise InvalidInput("give either a job or --mechanism")
    allowed = privacy_of_job.OPTIONS if mechanism is None else _ALLOWED[mechanism]
    if unfit := sorted(given.keys() - allowed):
        names = ", ".join(map(_option, sorted(allowed)))
        raise InvalidInput(f"{_option(unfit[0])} does not go with {mechanism or 'a job'}; these do: {names}")
    if job is not None and Path(job).is_file():
        return privacy_of_job.of_file(Path(job), given)
    if job is not None:
        if given:
            raise InvalidInput(f"{_option(min(given))} goes with a job file, and there is no file {job[:80]!r}")
        return privacy_of_job.of_server(folder, job), None
    assert mechanism is not None
    match mechanism:
        case Mechanism.RQM | Mechanism.PBM:
            return _discrete(mechanism, given)
        case Mechanism.DP_LORA_PAPER:
            return _dp_lora(given)
        case Mechanism.DP_SGD | Mechanism.DP_FEDAVG:
            return _gaussian(mechanism, given)


def _gaussian(mechanism: Mechanism, given: dict[str, Any]) -> tuple[dict[str, Any], Callable[[int], History]]:
    from fedprivacy.events import Unit
    from fedprivacy.planning import gaussian_steps, noise_multiplier_for, sampling_of, steps_within

    delta, sampling = _needed(given, "delta"), sampling_of(given.get("sampling", 1.0))
    unit = Unit.EXAMPLE if mechanism is Mechanism.DP_SGD else Unit.CLIENT

    def history(multiplier: float, steps: int) -> History:
        return gaussian_steps(multiplier, steps, sampling, unit=unit)

    multiplier: Any = given.get("noise_multiplier")
    steps: Any = given.get("steps")
    budget: Any = given.get("epsilon")
    if sum(each is None for each in (multiplier, steps, budget)) != 1:
        raise InvalidInput("give two of --noise-multiplier, --steps and --epsilon: the third is solved for")
    _check(multiplier, steps)
    if multiplier is None:
        multiplier = noise_multiplier_for(budget, delta, lambda each: history(each, steps))
    if steps is None:
        steps = steps_within(budget, delta, lambda each: history(multiplier, each))
    about = {"noise_multiplier": multiplier, "steps": steps, "sampling": given.get("sampling", 1.0), "budget": budget}
    return (
        {"mechanism": mechanism.value, **about, **_guaranteed(history(multiplier, steps) if steps else None, delta)},
        lambda each: history(multiplier, each),
    )


def _dp_lora(given: dict[str, Any]) -> tuple[dict[str, Any], Callable[[int], History]]:
    from fedprivacy.accountant import guarantee
    from fedprivacy.dplora import readings

    multiplier, steps, delta = (_needed(given, name) for name in ("noise_multiplier", "steps", "delta"))
    _check(multiplier, steps)
    found = [(each, guarantee(each.history, delta)) for each in readings(multiplier, steps)]
    rows = [
        {"name": reading.name, "text": reading.text, "epsilon": one.epsilon, "epsilon_rdp": one.epsilon_rdp}
        for reading, one in found
    ]
    about = {"mechanism": Mechanism.DP_LORA_PAPER.value, "noise_multiplier": multiplier, "steps": steps}
    answer = {**about, **_guaranteed(found[0][0].history, delta), "readings": rows}
    return answer, lambda each: readings(multiplier, each)[0].history


def _discrete(mechanism: Mechanism, given: dict[str, Any]) -> tuple[dict[str, Any], Callable[[int], History]]:
    from fedprivacy.events import Adjacency, History, Pbm, Release, Rqm, Trust, Unit, make
    from fedprivacy.planning import steps_within

    known = {name: value for name, value in given.items() if name not in {"orders", "epsilon", "steps", "delta"}}
    event = make(Rqm, known, "rqm") if mechanism is Mechanism.RQM else make(Pbm, known, "pbm")
    answer = {"mechanism": mechanism.value, **event.model_dump(exclude={"kind"}, mode="json")}
    answer |= _per_value(event, _orders(given.get("orders", _ORDERS)))

    def history(steps: int) -> History:
        trust = Trust.LOCAL if event.clients == 1 else Trust.SECURE_SUM
        releases = (Release(mechanisms=(event,), count=steps),)
        return History(unit=Unit.CLIENT, adjacency=Adjacency.REPLACE, trust=trust, releases=releases)

    delta, budget, steps = given.get("delta"), given.get("epsilon"), given.get("steps")
    if budget is not None and steps is not None:
        raise InvalidInput("give --steps or --epsilon: the other one is solved for")
    _check(None, steps)
    if delta is None and (budget is not None or steps is not None):
        raise InvalidInput("--delta is needed for an epsilon")
    if delta is not None:
        steps = steps_within(budget, delta, history) if budget is not None else steps or 1
        answer |= {"steps": steps, "budget": budget, **_guaranteed(history(steps) if steps else None, delta)}
    return answer, history


def _per_value(event: Rqm | Pbm, orders: list[float]) -> dict[str, Any]:
    """Return Rényi divergences of one value, by order."""
    from fedprivacy import levels, pbm, rqm
    from fedprivacy.events import Rqm

    def by_order(values: Any) -> dict[str, float]:
        return {f"{order:g}": float(value) for order, value in zip(orders, values, strict=True)}

    if not isinstance(event, Rqm):
        coins = event.model_copy(update={"clients": 1})
        return {
            "renyi": by_order(pbm.worst_divergence(event, orders)),
            "renyi_of_one_client": by_order(pbm.worst_divergence(coins, orders)),
            "variance": pbm.variance(event),
        }
    alone = event.model_copy(update={"clients": 1})
    worst = rqm.worst_case(event, orders)
    return {
        "renyi": by_order(worst.bounds),
        "renyi_found": None if worst.found is None else by_order(worst.found),
        "exact": worst.exact,
        "renyi_of_one_client": by_order(rqm.worst_case(alone, orders).bounds),
        "variance": levels.variance(0.0, event),
    }


def _guaranteed(history: History | None, delta: float) -> dict[str, Any]:
    """Return epsilon, and the guarantee that it belongs to; of nothing released epsilon is 0."""
    from fedprivacy.accountant import guarantee
    from fedserver.cli.privacy_of_job import stated

    if history is None:
        return {"epsilon": 0.0, "epsilon_pld": 0.0, "epsilon_rdp": 0.0, "delta": delta, "guarantee": None}
    return stated(guarantee(history, delta))


def _check(multiplier: float | None, steps: int | None) -> None:
    from fedprivacy.events import MAX_BOUND, MAX_COUNT

    if multiplier is not None and not 1e-3 <= multiplier <= MAX_BOUND:
        raise InvalidInput(f"--noise-multiplier {multiplier:g}: 0.001 to {MAX_BOUND:g} is needed")
    if steps is not None and not 1 <= steps <= MAX_COUNT:
        raise InvalidInput(f"--steps {steps}: 1 to {MAX_COUNT} is needed")


def _orders(text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or len(found) > 100 or not all(order > 1 for order in found):
        raise InvalidInput(f"--orders {text[:80]!r}: numbers above 1 are needed, with commas between, or inf")
    return found


def _needed(given: dict[str, Any], name: str) -> Any:
    if name not in given:
        raise InvalidInput(f"{_option(name)} is needed")
    return given[name]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _plot(path: Path, answer: dict[str, Any], history_after: Callable[[int], History]) -> str:
    from fedprivacy.planning import epsilon_over_steps
    from fedserver.export.privacy_plot import plot_epsilon

    if "epsilon" not in answer:
        raise InvalidInput("--plot shows epsilon over steps, for which --delta and --steps are needed")
    unit = "rounds" if "rounds" in answer else "steps"
    if not answer[unit]:
        raise InvalidInput(f"--plot: not even one step keeps epsilon {answer['budget']:g}")
    points = epsilon_over_steps(answer[unit], answer["delta"], history_after)
    plot_epsilon(points, answer["delta"], answer.get("budget"), path, unit)
    return str(path)


def _show(answer: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in answer.items():
        if name in _IN_GUARANTEE or value is None:
            continue
        table.add_row(name.replace("_", " "), _shown(value))
    for line in answer.get("text", "epsilon: 0 (nothing is released)" if "epsilon" in answer else "").splitlines():
        name, _, text = line.partition(": ")
        table.add_row(name, text)
    for reading in answer.get("readings", ()):
        table.add_row("epsilon if", f"{reading['text']}: {reading['epsilon']:.4g} (RDP {reading['epsilon_rdp']:.4g})")
    Console(highlight=False, markup=False).print(table)


def _shown(value: Any) -> str:
    if isinstance(value, dict) and not all(key.replace(".", "").isdigit() or key == "inf" for key in value):
        return ", ".join(f"{key.replace('_', ' ')} {_shown(each)}" for key, each in value.items())
    if isinstance(value, dict):
        return ", ".join(f"order {order}: {number:.6f}" for order, number in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)
