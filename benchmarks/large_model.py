"""What federated fine-tuning of a large model costs: `python -m benchmarks.large_model --device cuda`.

A model of Llama's architecture with random weights, made on the device: nothing is downloaded. Each way to train it
runs in processes of its own, in turn, with the client's own loop, plain PEFT too (`large_model_steps.py`). Then the
update of Fed-SB, and that of LoRA, is encoded and sent to a real server; and the server's factors that Fed-SB starts
with are computed. Prints tables, then one line of JSON. A way that fails, for lack of memory say, is a row, and makes
the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import machine
from benchmarks.codecs import SEED, spread
from benchmarks.deployment import deployed
from benchmarks.echo_client import TASK
from benchmarks.timed_client import SENT
from fedagg.lowrank import start
from fedclient.pieces import Pieces
from fedclient.residuals import encoding_error
from fedcodec import Pipeline, build_pipeline
from fedcore.jobfile import parse_job
from fedcore.layout import Vector
from fedserver.cost.shapes import Shapes, find_model, shapes_of

WAYS: Final = ("lora-sb", "lora", "peft")
GRADIENTS: Final = "gradients"
CODECS: Final = ("raw", "int8")
SERVER_ROWS: Final = {
    "disk_ms": "frames to disk, SHA-256",
    "check_ms": "decode and check",
    "fold_ms": "fold (decodes too)",
    "version_ms": "version write",
}
CPU: Final = "cpu_ms"  # the server's, of a whole round


def measure(arguments: Sequence[str]) -> dict[str, Any]:
    """Return all figures, for arguments as on the command line."""
    options, load = parse(arguments), machine.load()
    shapes = shapes_of(find_model(options.model), heads=False)
    ways: dict[str, dict[str, Any]] = {}
    for _ in range(options.passes):
        for way in options.ways:
            ways[way] = joined(ways.get(way, {}), _in_child(arguments, way))
    fed_sb = [options.rank**2 for _ in shapes.matrices]
    lora = [size for _, m, n in shapes.matrices for size in (options.lora_rank * n, m * options.lora_rank)]
    return {
        "machine": machine.describe() | {name: version(name) for name in ("torch", "transformers", "peft")},
        "command": shlex.join(["python", "-m", "benchmarks.large_model", *arguments]),
        "options": vars(options),
        "steps": {way: _step_figures(found, options) for way, found in ways.items()},
        "gradients": _in_child(arguments, GRADIENTS),
        "updates": [
            {"update": name, "codec": codec, **update_figures(sizes, codec, options.repeats)}
            for name, sizes in ((f"Fed-SB, rank {options.rank}", fed_sb), (f"LoRA, rank {options.lora_rank}", lora))
            for codec in options.codecs
        ],
        "svd": svd_figures(shapes, options.rank),
        "load_before": load,
    }


def _in_child(arguments: Sequence[str], part: str) -> dict[str, Any]:
    """Measure a part in a process of its own, whose peak of memory is that of this part."""
    command = [sys.executable, "-m", "benchmarks.large_model_steps", part, *arguments]
    sys.stderr.write(f"{part} …\n")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        sys.stderr.write(error.stderr)
        last = (error.stderr.strip().splitlines() or ["no words"])[-1]
        return {"failed": f"{part}: exit status {error.returncode}: {last}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def joined(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Join passes: lists go on, of numbers the larger one stays."""
    if "failed" in before:
        return before
    return now | {
        name: before[name] + value if isinstance(value, list) else max(before[name], value)
        for name, value in now.items()
        if name in before and not isinstance(value, str)
    }


def _step_figures(found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    if "failed" in found:
        return found
    step = spread(found.pop("steps_s"), 5)
    tokens_per_s = options.batch * options.length / step["median"]
    return {"step_s": step, "tokens_per_s": round(tokens_per_s, 1), "read_s": spread(found.pop("reads_s"), 5), **found}


def update_figures(sizes: Sequence[int], codec: str, repeats: int) -> dict[str, Any]:
    """Return the time that an update of tensors of these sizes takes to be encoded and sent, and the server's."""
    pipeline = build_pipeline([{"codec": codec}])
    sys.stderr.write(f"update of {sum(sizes):,} values, {codec} …\n")
    values_D = np.random.default_rng(SEED).standard_normal(sum(sizes), dtype=np.float32)
    own: dict[str, Any] = {"values": values_D.size, "bytes": len(_encoded(pipeline, values_D, sizes))}
    own["encode_s"] = timed(lambda: _encoded(pipeline, values_D, sizes), repeats)
    return own | _served(values_D.size, codec, repeats)


def _encoded(pipeline: Pipeline, values_D: Vector, sizes: Sequence[int]) -> Pieces:
    """Do what a client does between training and signing: encode, take the error's norm, and the digest."""
    frame = Pieces(*pipeline.parts(values_D, np.random.default_rng(SEED), sizes))
    if not pipeline.traits.lossless:
        whole = frame[:]
        encoding_error(values_D, pipeline.open(whole, sizes))
        frame = Pieces(whole)
    frame.sha256()
    return frame


def _served(num_values: int, codec: str, repeats: int) -> dict[str, Any]:
    """Send updates of one client over loopback, mutual TLS; the server has clocks in it (`timed_server.py`)."""
    job = parse_job(
        {
            "job": {"name": "large-model", "rounds": repeats + 1},
            "task": {"name": TASK, "num_values": num_values},
            "compression": {"uplink": [{"codec": codec}]},
            "schedule": {"cohort": 1},
        },
        "benchmark",
    )
    with tempfile.TemporaryDirectory(prefix="roundtable-bench-") as folder:
        clocks = Path(folder) / "clocks"
        with deployed(1, ("-m", "benchmarks.timed_server", str(clocks))) as server:
            server.start_clients("benchmarks.timed_client", 1)
            server.run(job)
            sent_s = [json.loads(line) for line in (server.homes[0] / SENT).read_text(encoding="ascii").splitlines()]
        lines = [json.loads(line) for line in clocks.read_text(encoding="ascii").splitlines()]
    rounds = list(pairwise(lines[1:]))  # from the end of version 1: the first update is left out
    found = {
        name: spread([(new["wall_s"][row] - old["wall_s"].get(row, 0.0)) * 1000 for old, new in rounds], 3)
        for name, row in SERVER_ROWS.items()
    }
    found[CPU] = spread([(new["process_cpu_s"] - old["process_cpu_s"]) * 1000 for old, new in rounds], 1)
    return {"send_s": spread(sent_s[2:], 5), "server": found}  # version 0 is sent too, raw


def svd_figures(shapes: Shapes, rank: int) -> dict[str, Any]:
    """Return the server's time to decompose the sign of a sum of gradients, which is random here, for each shape."""
    rng = np.random.default_rng(SEED)
    rows: list[dict[str, Any]] = []
    for (m, n), count in sorted(Counter((m, n) for _, m, n in shapes.matrices).items()):
        total_mn = rng.standard_normal((m, n))
        sys.stderr.write(f"SVD of {m} × {n} …\n")
        rows.append({"m": m, "n": n, "count": count, "s": timed(partial(start, total_mn, rank, 1e-3), 1, first=0)})
    return {"shapes": rows, "model_s": round(sum(row["s"]["median"] * row["count"] for row in rows), 3)}


def timed(call: Callable[[], object], repeats: int, first: int = 1) -> dict[str, float]:
    """Return the wall time of `call`; `first` times more do not count."""
    found = []
    for _ in range(first + repeats):
        began_s = time.perf_counter()
        call()
        found.append(time.perf_counter() - began_s)
    return spread(found[first:], 5)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", default="llama-3.2-3b", help="a table of fedserver/cost/models, or a file like it")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--head-dim", type=int, default=128, help="of an attention head; tables do not say")
    parser.add_argument("--rank", type=int, default=200, help="of lora-sb")
    parser.add_argument("--lora-rank", type=int, default=32, help="of lora, ours and PEFT's")
    parser.add_argument("--batch", type=int, default=4, help="samples of a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sample")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations twice")
    parser.add_argument("--tf32", action="store_true", help="let float32 products use TF32; the client does not")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the processor; 1 is the client's default")
    parser.add_argument("--passes", type=int, default=3, help="how often the ways to train take turns")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of a pass that do not count")
    parser.add_argument("--steps", type=int, default=10, help="steps of a pass that count")
    parser.add_argument("--samples", type=int, default=64, help="of the gradients that lora-sb starts from")
    parser.add_argument("--repeats", type=int, default=3, help="of everything else, after a first time")
    return parser.parse_args(arguments)


def tables(found: dict[str, Any]) -> str:
    """Return the figures in Markdown; behind a median, the extremes."""
    options, gradients = found["options"], found["gradients"]
    on: dict[str, Any] = next((row for row in (*found["steps"].values(), gradients) if "failed" not in row), {})
    about = f"{options['model']}, {on.get('parameters', 0):,} parameters in {on.get('dtype')}, on {on.get('device')};"
    lines = [
        f"{about} steps of {options['batch']} × {options['length']} tokens\n",
        "| training | tokens/s | × PEFT | step, ms | memory before, MiB | at its peak, MiB | read, ms |",
        _rule(7),
    ]
    peft = found["steps"].get("peft", {}).get("tokens_per_s")
    for way, row in found["steps"].items():
        if "failed" in row:
            lines.append(f"| {way} | {row['failed']} |")
            continue
        ratio = f"{row['tokens_per_s'] / peft:.2f}" if peft else "–"
        cells = (f"{row['tokens_per_s']:,.0f}", ratio, _ms(row["step_s"]), f"{row['before_mib']:,.0f}")
        lines.append(f"| {way} | {' | '.join(cells)} | {row['peak_mib']:,.0f} | {_ms(row['read_s'])} |")
    clocks = (*SERVER_ROWS, CPU)
    columns = ("update", "codec", "values", "bytes", "encode, ms", "send, ms", *clocks)
    lines += ["", f"| {' | '.join(columns)} |", _rule(len(columns))]
    for row in found["updates"]:
        cells = (row["update"], row["codec"], f"{row['values']:,}", f"{row['bytes']:,}")
        server = (f"{row['server'][name]['median']:,.1f}" for name in clocks)
        lines.append(f"| {' | '.join((*cells, _ms(row['encode_s']), _ms(row['send_s']), *server))} |")
    said = gradients.get("failed") or f"{_ms(gradients['gradients_s'])}, peak {gradients['peak_mib']:,.0f} MiB"
    lines += ["", "| start of Fed-SB | times | ms |", _rule(3)]
    lines.append(f"| gradients of {options['samples']} samples | 1 | {said} |")
    lines += [
        f"| SVD of {row['m']} × {row['n']} | {row['count']} | {_ms(row['s'])} |" for row in found["svd"]["shapes"]
    ]
    return "\n".join([*lines, f"| SVDs of the model, at the medians | 1 | {found['svd']['model_s'] * 1000:,.0f} |"])


def _rule(columns: int) -> str:
    return "|---|" + "---:|" * (columns - 1)


def _ms(seconds: dict[str, float]) -> str:
    return "{median:,.1f} ({min:,.1f}–{max:,.1f})".format(**{name: value * 1000 for name, value in seconds.items()})


def main() -> None:
    """Measure, print."""
    found = measure(sys.argv[1:])
    sys.stdout.write(f"{tables(found)}\n\n{json.dumps(found, ensure_ascii=False)}\n")
    sys.exit(any("failed" in row for row in (*found["steps"].values(), found["gradients"])))


if __name__ == "__main__":
    main()
