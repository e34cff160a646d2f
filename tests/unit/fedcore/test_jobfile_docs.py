"""docs/job-file.md and docs/job.schema.json say what the code does."""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedcore.errors import JobFileError
from fedcore.jobfile import MAX_JOB_BYTES, job_schema, load_job, parse_job
from fedcore.names import NAME_PATTERN

DOCS = Path(__file__).resolve().parents[3] / "docs"
TEXT = (DOCS / "job-file.md").read_text(encoding="utf-8")
SCHEMA = job_schema()


def behind(reference: str) -> dict[str, Any]:
    found: dict[str, Any] = SCHEMA["$defs"][reference.rpartition("/")[2]]
    return found


MECHANISMS = {
    mechanism: behind(reference)
    for mechanism, reference in SCHEMA["properties"]["privacy"]["anyOf"][0]["discriminator"]["mapping"].items()
}
COMMON = set.intersection(*(set(each["properties"]) for each in MECHANISMS.values()))


def section_schema(section: str) -> dict[str, Any]:
    section, _, key = section.partition(".")
    if section == "privacy" and key in ("", *MECHANISMS):
        schema = MECHANISMS[key or "dp-sgd"]
        wanted = COMMON if not key else set(schema["properties"]) - COMMON
        return {**schema, "properties": {name: each for name, each in schema["properties"].items() if name in wanted}}
    if section == "privacy":
        properties = next(each["properties"] for each in MECHANISMS.values() if key in each["properties"])
    elif key:
        properties = section_schema(section)["properties"]
    else:
        return behind(SCHEMA["properties"][section]["$ref"])
    (reference,) = [each["$ref"] for each in properties[key]["anyOf"] if "$ref" in each]
    return behind(reference)


SECTIONS = [
    *SCHEMA["properties"],
    "compression.error_feedback",
    *(f"privacy.{key}" for key in (*MECHANISMS, "start", "adaptive")),
]
KEYS = [(section, key) for section in SECTIONS for key in section_schema(section)["properties"]]


def documented() -> dict[tuple[str, str], list[str]]:
    """Return (section, key) → the other cells of its row; a stage's key belongs to the section `compression`.

    Where a line says that a key has keys of its own, a table of those follows.
    """
    rows: dict[tuple[str, str], list[str]] = {}
    section = ""
    for line in TEXT.splitlines():
        if heading := re.match(r"## `\[(\w+)\]`", line):
            section = heading[1]
        elif inner := re.match(r"`([\w-]+)` has (?:two )?keys of its own:$", line):
            section = f"{section.partition('.')[0]}.{inner[1]}"
        elif row := re.match(r"\| `(\w+)` \| (.*) \|$", line):
            rows[section, row[1]] = row[2].split(" | ")
    return rows


def test_exactly_the_keys_there_are_are_documented() -> None:
    assert sorted(documented()) == sorted([*KEYS, ("compression", "codec")])


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_documented_type_default_and_bounds_are_the_real_ones(section: str, key: str) -> None:
    kind, default, bounds, meaning = documented()[section, key]
    schema = section_schema(section)["properties"][key]
    (value, *_) = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]

    words = {None: "table", "integer": "integer", "number": "number", "array": "list of stages", "boolean": "boolean"}
    assert kind == words.get(value.get("type"), "name" if value.get("pattern") == NAME_PATTERN else "text")

    if key == "mechanism":
        assert all(f'"{mechanism}"' in bounds for mechanism in MECHANISMS)
        return
    if key in section_schema(section).get("required", []):
        assert default == "required"
    elif schema.get("default") is not None:
        assert tomllib.loads(f"x = {default.strip('`')}")["x"] == schema["default"]
        assert type(tomllib.loads(f"x = {default.strip('`')}")["x"]) is type(schema["default"])
    elif kind == "list of stages":
        stages = parse_job({**MINIMAL, section: {}}, "x").model_dump()[section][key]
        assert tomllib.loads(f"x = {default.strip('`')}")["x"] == stages
    else:
        assert default in {"none", "`cohort`", "half of `buffer`, rounded up"}

    for bound in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "maxLength", "minItems", "maxItems"):
        if bound in value:
            assert re.search(rf"(?<![\d.]){re.escape(str(value[bound]))}(?![\d.])", bounds), bound
    assert ("above" in bounds) == ("exclusiveMinimum" in value)
    assert ("below" in bounds) == ("exclusiveMaximum" in value)
    assert all(f'"{choice}"' in bounds for choice in value.get("enum", []))
    assert meaning.endswith(".")


def test_the_size_limit_is_documented() -> None:
    assert f"at most {MAX_JOB_BYTES} bytes" in TEXT


def test_every_job_in_the_document_loads(tmp_path: Path) -> None:
    blocks = [block for block in re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL) if "[job]" in block]
    assert len(blocks) == 2
    for block in blocks:
        path = tmp_path / "job.toml"
        path.write_text(block, encoding="utf-8")
        load_job(path)


# -- the schema ----------------------------------------------------------------------------------------------------

MINIMAL: dict[str, Any] = {
    "job": {"name": "digits", "rounds": 20},
    "task": {"name": "digits"},
    "schedule": {"cohort": 5},
}


def test_committed_schema_is_current() -> None:
    """Renew it with ``json.dumps(job_schema(), indent=2)`` and a newline."""
    assert (DOCS / "job.schema.json").read_text(encoding="utf-8") == json.dumps(SCHEMA, indent=2) + "\n"


def schema_accepts(tree: object) -> bool:
    validator: Any = importlib.import_module("jsonschema").Draft202012Validator  # ships no type annotations
    committed = json.loads((DOCS / "job.schema.json").read_text(encoding="utf-8"))
    validator.check_schema(committed)
    return bool(validator(committed).is_valid(tree))


def reader_accepts(tree: object) -> bool:
    try:
        parse_job(tree, "job.toml")
    except JobFileError:
        return False
    return True


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("job", {"seed": 7, "description": "x"}),
        ("task", {"partition": {"kind": "dirichlet", "alpha": 0.3}, "list": [1, "a", True]}),
        ("adapter", {"name": "lora", "rank": 16}),
        ("adapter", {}),
        ("training", {"learning_rate": 1, "optimizer": "sgd", "max_grad_norm": 0.5}),
        ("compression", {"uplink": [{"codec": "top-k", "fraction": 0.01}, {"codec": "rice"}]}),
        ("aggregator", {"max_abs": 0.5, "max_examples": 2**31}),
        ("server_optimizer", {"name": "adam", "beta": 0.9}),
        ("privacy", {"mechanism": "dp-sgd", "clip": 1, "noise_multiplier": 1.1, "delta": 1e-5, "sampling": 0.1}),
        ("privacy", {"mechanism": "dp-fedavg", "clip": 1, "epsilon": 3, "delta": 1e-5, "adaptive": {"rate": 0.1}}),
        ("privacy", {"mechanism": "rqm", "delta": 1e-5, "start": {"clip": 1.0, "noise_multiplier": 2}}),
        ("schedule", {"over_select": 1.3, "buffer": 4, "quorum": 2, "deadline_s": 0.001, "max_retries": 0}),
    ],
)
def test_schema_accepts_what_the_reader_accepts(section: str, keys: dict[str, Any]) -> None:
    tree = {**MINIMAL, section: {**MINIMAL.get(section, {}), **keys}}
    assert reader_accepts(tree)
    assert schema_accepts(tree)


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("job", {"name": "a b"}),
        ("job", {"rounds": 0}),
        ("job", {"rounds": "20"}),
        ("job", {"rounds": True}),
        ("job", {"rounds": 1.5}),
        ("job", {"seed": 2**53}),
        ("job", {"round": 3}),
        ("task", {"name": "../x"}),
        ("task", {"data": "x" * 2001}),
        ("adapter", {"name": 5}),
        ("training", {"learning_rate": 0}),
        ("training", {"optimizer": "lion"}),
        ("training", {"local_epoch": 1}),
        ("compression", {"uplink": []}),
        ("compression", {"uplink": [{"fraction": 0.1}]}),
        ("compression", {"uplink": [{"codec": "raw"}] * 9}),
        ("compression", {"uplink": "raw"}),
        ("aggregator", {"max_abs": 0}),
        ("server_optimizer", {"name": ""}),
        ("privacy", {"mechanism": "dp", "delta": 1e-5}),
        ("privacy", {"mechanism": "rqm", "delta": 0}),
        ("privacy", {"mechanism": "rqm", "delta": 1e-5, "clip": 1}),
        ("privacy", {"mechanism": "dp-sgd", "clip": 0, "noise_multiplier": 1.1, "delta": 1e-5, "sampling": 0.1}),
        ("schedule", {"cohort": 0}),
        ("schedule", {"over_select": 0.5}),
        ("schedule", {"deadline_s": 0}),
        ("schedule", {"deadline_s": "60"}),
        ("schedule", {"buffer": 0}),
        ("other", {}),
    ],
)
def test_schema_refuses_what_the_reader_refuses(section: str, keys: dict[str, Any]) -> None:
    tree = {**MINIMAL, section: {**MINIMAL.get(section, {}), **keys}}
    assert not reader_accepts(tree)
    assert not schema_accepts(tree)


@pytest.mark.parametrize("section", MINIMAL)
def test_schema_and_reader_require_the_same_sections(section: str) -> None:
    tree = {name: keys for name, keys in MINIMAL.items() if name != section}
    assert not reader_accepts(tree)
    assert not schema_accepts(tree)
