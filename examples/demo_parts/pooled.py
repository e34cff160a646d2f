"""Print, as JSON, what a job's adapter reaches on all clients' data in one place: `pooled.py JOB NUM_CLIENTS`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from fedcore.jobfile import load_job
from fedsim.pooled import measure


def main() -> None:
    """Measure and print."""
    job, num_clients = load_job(Path(sys.argv[1])), int(sys.argv[2])
    options = [{"shard": str(shard), "num_shards": str(num_clients)} for shard in range(num_clients)]
    print(json.dumps(asdict(measure(job, options))))


if __name__ == "__main__":
    main()
