"""The process of one job of a benchmark: a JSON file in, a line of JSON for each record out."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paligemma_jax.benchmark.record import Record

Report = Callable[[Record], None]


def serve_job(run: Callable[[dict[str, Any], Report], None]) -> None:
    """Calls `run` with the job in the file that the command line names, and what takes records."""
    job = json.loads(Path(sys.argv[1]).read_text())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print

    def report(record: Record) -> None:
        print(json.dumps(record.to_dict()), file=out, flush=True)

    run(job, report)
