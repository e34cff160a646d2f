"""The command `fedserver`. Each file beside this one holds the commands of one concern; docs/cli.md has them all.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from fedcore.cli import new_app, run_app
from fedserver.cli import catalogue, costs, exporting, jobs, members, privacy, serving

app = new_app("Roundtable's server: trains one set of adapter weights across clients that keep their data.")
for room in (serving, jobs, exporting, members, catalogue, costs, privacy):
    room.register(app)


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    sys.exit(run_app(app, "fedserver"))
