"""From nothing to the first token in a fresh process: `python -m ...starting WEIGHTS DTYPE`.

Prints one line of JSON: when the first token was there (seconds since the epoch; the parent knows
when it started the process), how long importing, loading and the first token took, and how much of
that went into programs: compiling them, or reading them back.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from paligemma_jax.benchmark.subjects import Precision


def start_to_first_token(
    weights: Path, dtype: Precision, cache: Path, environment: dict[str, str], limit: float
) -> dict[str, float]:
    """Seconds of a whole start (`start`) and of its parts, with compiled programs kept in `cache`.

    Raises subprocess.SubprocessError if the process fails or takes more than `limit` seconds.
    """
    environment = environment | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # as the command has it
    }
    command = [sys.executable, "-m", __name__, str(weights), dtype.value]
    began = time.time()
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=min(max(limit, 0.0), 24 * 3600.0),
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return {"start": found.pop("at") - began, **found}


def main() -> None:
    """The fresh process."""
    weights, dtype = Path(sys.argv[1]), Precision(sys.argv[2])
    begin = time.perf_counter()
    import jax

    from paligemma_jax.benchmark.ours import Compilations, open_ours
    from paligemma_jax.benchmark.subjects import random_prompts

    jax.local_devices()
    imported = time.perf_counter()
    compilations = Compilations()
    ours = open_ours(weights, dtype)
    jax.block_until_ready(ours.model)
    loaded = time.perf_counter()
    ours.first_token(*random_prompts(ours.config, 1))()
    end = time.perf_counter()
    found = {
        "at": time.time(),
        "import": imported - begin,
        "load": loaded - imported,
        "first_token": end - loaded,
        "programs": compilations.stop().seconds,
    }
    print(json.dumps(found), flush=True)
    os._exit(0)  # nothing is left to tidy up


if __name__ == "__main__":
    main()
