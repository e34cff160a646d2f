"""Server plugins that wait in the middle of a closing round until a test lets them go on (`tests.support.gate`).

`environment` makes a server process find them as it finds any third party's: by entry points.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from fedagg.optimizers.none import NoOptimizer
from fedcodec.base import Coded
from fedcodec.quantisers.floats import Raw
from fedcore.draws import Draws
from fedcore.layout import Vector

ENTRY_POINTS = """\
[roundtable.server_optimizers]
gated = gated_plugins:GatedOptimizer
[roundtable.codecs]
gated = gated_plugins:GatedCodec
"""


def wait_at(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as gate:
        gate.recv(1)


class GatedOptimizer(NoOptimizer):
    """`none`, which waits while the step is computed: nothing of the version is durable."""

    name: ClassVar[str] = "gated"
    gate: int = Field(ge=1, le=65535)

    def step(self, mean_D: Vector, slots_D: Mapping[str, Vector], version: int) -> Vector:
        wait_at(self.gate)
        return super().step(mean_D, slots_D, version)


class GatedCodec(Raw):
    """`raw`, which waits while the new version is encoded for the clients: its vector is written, its record is not."""

    name: ClassVar[str] = "gated"
    wire_id: ClassVar[int] = 40_000
    gate: int = Field(ge=1, le=65535)

    def encode(self, values_n: Vector, num_zeros: int, rng: Draws) -> Coded:
        wait_at(self.gate)
        return super().encode(values_n, num_zeros, rng)


def environment(site: Path) -> dict[str, str]:
    """Install the plugins in a folder, and return what lets a process find them there."""
    info = site / "gated_plugins-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gated-plugins\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (site / "gated_plugins.py").symlink_to(Path(__file__))
    return {"PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])}
