"""The model card: Markdown with the front matter that model hubs read.

Whatever a job file or a client wrote goes through `fedserver.export.markdown`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from fedcore.adapters import FULL_GROUP, adapted_modules
from fedcore.jobfile import CodecStage, Job
from fedcore.methods import method_of
from fedprivacy.guarantee import Guarantee
from fedserver.export.base import MODEL_FILE, PLOT_FILE, Exportable, Format
from fedserver.export.figures import Row, evaluated, held_out_examples, metric_names, spread
from fedserver.export.markdown import code, escaped, line, paragraphs, table, yaml_text

MAX_ROWS: Final = 20
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")

_NO_PRIVACY: Final = """\
- **No privacy guarantee.** The job ran without differential privacy. Clients kept their examples, but the server saw
  each client's update (encrypted only on its way), and trained weights can give away what they were trained on."""

_UNSAFE: Final = """\
- **No privacy guarantee.** All draws followed from the seed {seed}, which everybody knows who has the job file: what is
  said above under Privacy holds for jobs that draw in secret, and not for this one."""

_LIMITS: Final = """\
- **Figures are the clients' own.** Each client measured on data that it held out and that nobody else has seen; the
  figures are means over clients, weighted by their numbers of held-out examples.
- **The description of the data is the job author's.** The server never sees data and cannot check it.
- Nothing is claimed about fairness, safety, or data unlike the clients'."""

_LOAD_LORA: Final = """\
from peft import PeftModel

model = PeftModel.from_pretrained(base, ".")"""

_LOAD_AUTO: Final = """\
from transformers import {auto}

model = {auto}.from_pretrained(".")"""

_AUTO_CLASSES: Final = {
    "hf-causal-lm": "AutoModelForCausalLM",
    "hf-sequence-classification": "AutoModelForSequenceClassification",
}

_LOAD_FULL: Final = f"""\
from safetensors.torch import load_file

# Buffers, such as running averages, are not part of the file: each client has its own.
unknown = model.load_state_dict(load_file("{MODEL_FILE}"), strict=False).unexpected_keys
assert not unknown, unknown"""

_LOAD_OTHER: Final = f"""\
from safetensors.torch import load_file

tensors = load_file("{MODEL_FILE}")"""


def base_model_of(job: Job) -> str | None:
    """Return what the task's parameter `base_model`, or else `model`, says, if it has one."""
    base = job.task.params.get("base_model", job.task.params.get("model"))
    return line(base) or None if isinstance(base, str) else None


def model_card(what: Exportable, *, form: Format, with_plot: bool) -> str:
    """Return the card of a version; the same arguments give the same text."""
    job = what.job
    parts = [
        *_front_matter(what, form),
        "",
        f"# {escaped(job.job.name)}",
        "",
        _summary(what, form),
        *(f"\n{text}" for text in paragraphs(job.job.description)),
        *_section("The job", table(("", ""), _job_rows(what))),
        *_section("Data", _data(job)),
        *_section("Method", table(("", ""), _method_rows(what))),
        *_section("Figures", _figures(what)),
        *_section("Rounds", _rounds(what, with_plot=with_plot)),
        *_section("How to load it", _loading(what, form)),
        *(_section("Privacy", table(("", ""), _privacy_rows(what.privacy))) if what.privacy else []),
        *_section("What is not claimed", [*_no_guarantee(what.privacy), _LIMITS]),
        *_section("How to cite it", [_citation(what)]),
    ]
    return "\n".join(parts) + "\n"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *lines]


def _front_matter(what: Exportable, form: Format) -> Iterator[str]:
    yield "---"
    base = base_model_of(what.job)
    if form is Format.PEFT:
        yield "library_name: peft"
    elif form is Format.MERGED and what.job.task.name in _AUTO_CLASSES:
        yield "library_name: transformers"
    if base is not None and _HUB_ID.fullmatch(base):  # hubs refuse a card whose base model is a path
        yield f"base_model: {yaml_text(base)}"
    yield "tags:"
    for tag in dict.fromkeys(("federated-learning", "roundtable", what.job.adapter.name, what.job.task.name)):
        yield f"- {yaml_text(tag)}"
    yield "---"


def _summary(what: Exportable, form: Format) -> str:
    kind = {Format.PEFT: "A LoRA adapter", Format.MERGED: "A model", Format.WEIGHTS: "Weights"}[form]
    return (
        f"{kind} trained by federated learning: clients kept their data and sent updates, which a"
        f" Roundtable server put together. This is version {what.version} of"
        f" {what.job.job.rounds} planned."
    )


def _privacy_rows(privacy: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the guarantee whole, of everything that the job has let out so far, whichever version this is."""
    yield from ((name, escaped(text)) for name, text in Guarantee.from_json(privacy["guarantee"]).rows())
    if privacy["epsilon_budget"] is not None:
        yield "budget", f"epsilon {privacy['epsilon_budget']:g}"
    if privacy["unsafe_seed"] is not None:
        yield "unsafe seed", f"{privacy['unsafe_seed']}: **nothing is hidden from who knows it**"


def _no_guarantee(privacy: Mapping[str, Any] | None) -> list[str]:
    if privacy is None:
        return [_NO_PRIVACY]
    return [] if privacy["unsafe_seed"] is None else [_UNSAFE.format(seed=privacy["unsafe_seed"])]


def _job_rows(what: Exportable) -> Iterator[tuple[str, str]]:
    yield "job", f"{code(what.job.job.name)}, id {code(what.job_id)}, federation {code(what.federation)}"
    yield "rounds done", f"{what.version} of {what.job.job.rounds}"
    made = [row["created_at"] for row in what.rows if row["version"] == what.version]
    yield "version made", datetime.fromtimestamp(made[0], UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    yield "seed", str(what.job.job.seed)
    yield "SHA-256 of the state", f"`{what.state_sha256}` (all values as raw little-endian float32)"


def _data(job: Job) -> list[str]:
    text = "\n\n".join(paragraphs(job.task.data)) or "The job file does not say what the data is."
    params = {key: value for key, value in job.task.params.items() if key != "base_model"}
    return [text, "", f"Task {_plugin(job.task.name, params)}. The data stayed with the clients."]


def _method_rows(what: Exportable) -> Iterator[tuple[str, str]]:
    job, training, schedule = what.job, what.job.training, what.job.schedule
    base = base_model_of(job)
    if base is not None:
        yield "base model", code(base)
    if what.base_digest is not None:
        yield "digest of the base's frozen weights", f"`{what.base_digest}` (`fedclient base` compares)"
    if (method := method_of(job)) is not None:
        yield "method", f"{code(method.name)}: {method.source}"
    yield "adapter", _plugin(job.adapter.name, job.adapter.params)
    if what.adapter_sha256 is not None:
        yield "started from", f"a PEFT adapter whose weights have SHA-256 `{what.adapter_sha256}`"
    if what.is_lora:
        modules = adapted_modules(what.layout)
        shown = ", ".join(code(module) for module in list(modules)[:MAX_ROWS])
        more = f" and {len(modules) - MAX_ROWS} more" if len(modules) > MAX_ROWS else ""
        yield "rank", str(max(modules.values()))
        yield "adapted layers", shown + more
        if whole := [tensor.name for tensor in what.layout.tensors if tensor.group == FULL_GROUP]:
            more = f" and {len(whole) - MAX_ROWS} more" if len(whole) > MAX_ROWS else ""
            yield "trained whole", ", ".join(map(code, whole[:MAX_ROWS])) + more
    yield "values trained", f"{what.layout.moving.num_values:,} in {len(what.layout.moving.tensors):,} tensors"
    norm = "" if training.max_grad_norm is None else f", gradient norm at most {training.max_grad_norm:g}"
    yield (
        "local training",
        (
            f"{_counted(training.local_epochs, 'epoch')} of {training.optimizer}, learning rate"
            f" {training.learning_rate:g}, weight decay {training.weight_decay:g},"
            f" batches of {training.batch_size}{norm}"
        ),
    )
    yield "uplink codecs", _pipeline(job.compression.uplink)
    yield "downlink codecs", _pipeline(job.compression.downlink)
    limits = f"a client weighs at most {job.aggregator.max_examples:,} examples"
    yield "aggregation rule", f"{_plugin(job.aggregator.rule, job.aggregator.params)}; {limits}"
    yield "server optimiser", _plugin(job.server_optimizer.name, job.server_optimizer.params)
    yield (
        "schedule",
        (
            f"{schedule.clients_to_assign} clients are asked for a version; it closes with {schedule.updates_to_close}"
            f" updates, or after {schedule.deadline_s:g} s with {schedule.updates_at_deadline}"
        ),
    )


def _plugin(name: str, params: Mapping[str, object]) -> str:
    values = ", ".join(f"{escaped(key)} = {code(json.dumps(params[key], ensure_ascii=False))}" for key in params)
    return f"{code(name)} ({values})" if values else code(name)


def _pipeline(stages: Sequence[CodecStage]) -> str:
    return ", then ".join(_plugin(stage.codec, stage.params) for stage in stages)


def _figures(what: Exportable) -> list[str]:
    measured = evaluated(what.rows)
    if not measured:
        return ["No client has measured this job's versions."]
    first, last = measured[0], measured[-1]
    shown = (first,) if first is last else (first, last)
    header = ("", *(f"version {row['version']}" for row in shown))
    rows = [
        (escaped(name), *(_figure(row, name) for row in shown)) for name in metric_names(measured, at_most=MAX_ROWS)
    ]
    rows.append(("held-out examples", *(f"{held_out_examples(row):,}" for row in shown)))
    lines = table(header, rows)
    if last["version"] != what.version:
        lines += ["", f"Version {what.version} itself has not been measured."]
    return lines


def _rounds(what: Exportable, *, with_plot: bool) -> list[str]:
    rows = what.rows
    trained = [row for row in rows if row["version"] > 0]
    metrics = metric_names(rows, at_most=2)
    counted = (
        f"Counted in all: {_counted(sum(row['num_updates'] for row in trained), 'update')} in"
        f" {_counted(len(trained), 'round')}; {_size(sum(row['uplink_bytes'] for row in rows))} from clients to server,"
        f" {_size(sum(row['downlink_bytes'] for row in rows))} from server to clients (frames, without the"
        " headers around them)."
    )
    chosen = spread(rows, MAX_ROWS)
    header = ("version", "clients counted", "examples", "bytes up", "bytes down", *map(escaped, metrics))
    lines = [counted, ""]
    if with_plot:
        lines += [f"![Figures and bytes of each version]({PLOT_FILE})", ""]
    if len(chosen) < len(rows):
        lines += [f"{len(chosen)} of {len(rows)} versions, evenly chosen:", ""]
    return lines + table(header, [_row(row, metrics) for row in chosen])


def _row(row: Row, metrics: Sequence[str]) -> list[str]:
    counts = [f"{row[key]:,}" for key in ("num_updates", "num_examples", "uplink_bytes", "downlink_bytes")]
    return [str(row["version"]), *counts, *(_figure(row, name) for name in metrics)]


def _figure(row: Row, metric: str) -> str:
    value: Any = row["evaluation"].get(metric)
    return "" if value is None else f"{value:.4g}"


def _loading(what: Exportable, form: Format) -> list[str]:
    auto = _AUTO_CLASSES.get(what.job.task.name)
    if form is Format.PEFT:
        names, snippet = "`base` is the model that the job adapted, built as the task builds it", _LOAD_LORA
    elif form is Format.MERGED and auto is not None:
        names, snippet = "The base's own configuration and tokenizer are in it", _LOAD_AUTO.format(auto=auto)
    elif what.job.adapter.name == "full" or form is Format.MERGED:
        names, snippet = "`model` is the job's model, built as the task builds it", _LOAD_FULL
    else:
        names, snippet = f"What the tensors mean, the adapter {code(what.job.adapter.name)} knows", _LOAD_OTHER
    return [f"{names}. In this folder:", "", "```python", *snippet.splitlines(), "```"]


def _citation(what: Exportable) -> str:
    return (
        f"Name the job, the version and the state: Roundtable job {code(what.job.job.name)} ({code(what.job_id)}) of"
        f" federation {code(what.federation)}, version {what.version}, SHA-256 `{what.state_sha256}`."
    )


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _size(num_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit} ({num_bytes:,} bytes)"
    return _counted(num_bytes, "byte")
