"""Options and arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

DEFAULT_FOLDER: Final = Path("fedserver-state")

FolderOption = Annotated[
    Path, typer.Option("--folder", metavar="DIR", help="The server's state folder, made by `fedserver init`.")
]
JobArgument = Annotated[
    str,
    typer.Argument(
        metavar="JOB",
        help="A job: its id, the first 6 or more characters of its id, or its name if no other job has it.",
        show_default=False,
    ),
]
