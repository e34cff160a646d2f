"""Generate the Python stubs beside the .proto files of proto/fedproto (make stubs).

`--check` generates them into a temporary folder instead and fails when the committed ones differ.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO_ROOT = ROOT / "proto"
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(out: Path) -> None:
    """Run protoc over every .proto file, with `out` as the root that holds fedproto/.

    Raises:
        SystemExit: protoc refused a file; its message is on standard error.
    """
    protos = sorted(str(path.relative_to(PROTO_ROOT)) for path in PROTO_ROOT.rglob("*.proto"))
    if not protos:
        return
    # The mypy plugins are found beside the interpreter even when the environment is not activated.
    bin_dir = Path(sys.executable).parent
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"--proto_path={PROTO_ROOT}",
        f"--plugin=protoc-gen-mypy={bin_dir / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={bin_dir / 'protoc-gen-mypy_grpc'}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
        *protos,
    ]
    if subprocess.run(command, cwd=PROTO_ROOT, check=False).returncode != 0:
        raise SystemExit("protoc failed")


def generated_files(root: Path) -> dict[str, bytes]:
    """Return the generated files under `root`, by path relative to it."""
    paths = (path for pattern in GENERATED for path in root.rglob(pattern))
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def differences(committed: dict[str, bytes], fresh: dict[str, bytes]) -> list[str]:
    """Return one line for every file that is missing, superfluous or stale."""
    lines = [f"missing: {path}" for path in sorted(fresh.keys() - committed.keys())]
    lines += [f"superfluous: {path}" for path in sorted(committed.keys() - fresh.keys())]
    lines += [f"stale: {path}" for path in sorted(fresh.keys() & committed.keys()) if fresh[path] != committed[path]]
    return lines


def main() -> int:
    """Generate or check; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed stubs, write nothing")
    if not parser.parse_args().check:
        for path in generated_files(PROTO_ROOT):
            (PROTO_ROOT / path).unlink()
        generate(PROTO_ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        found = differences(generated_files(PROTO_ROOT), generated_files(Path(folder)))
    for line in found:
        print(line)
    if found:
        print("the stubs do not match the .proto files: run make stubs and commit the result")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
