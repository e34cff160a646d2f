"""A version of a job as files for other programs: weights, a PEFT adapter where it is one, model card, plot."""

from __future__ import annotations

from typing import Final

from fedserver.export.base import Exportable, Exported, Format
from fedserver.export.export import export_version

__all__: Final = ["Exportable", "Exported", "Format", "export_version"]
