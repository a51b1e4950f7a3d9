"""Importing the package is quick and loads none of the heavy things that only some tasks need."""

import json
import subprocess
import sys
import textwrap

import pytest

HEAVY = {"tensorflow", "torch", "grain", "transformers", "matplotlib", "orbax", "tensorstore"}


def run_python(program: str) -> str:
    """Standard output of `program` in a fresh interpreter."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def test_imports_are_light():
    program = """
        import json, sys
        import paligemma_jax
        paligemma_jax.from_pretrained  # its names are loaded on first use
        import paligemma_jax.cli
        print(json.dumps(sorted(sys.modules)))
    """
    loaded = {name.partition(".")[0] for name in json.loads(run_python(program))}
    assert {"jax", "flax"} <= loaded
    assert not HEAVY & loaded


def test_opening_a_model_loads_nothing_of_training_or_evaluation():
    program = """
        import json, sys
        import paligemma_jax
        paligemma_jax.from_pretrained
        print(json.dumps(sorted(n for n in sys.modules if n.startswith("paligemma_jax."))))
    """
    loaded = json.loads(run_python(program))
    assert "paligemma_jax.pipeline" in loaded
    others = {"benchmark", "cli", "data", "evaluation", "training"}
    assert not [name for name in loaded if name.split(".")[1] in others]


def test_import_starts_no_backend():
    # jax refuses to change the number of devices once a backend has started.
    program = """
        import jax
        import paligemma_jax; paligemma_jax.from_pretrained
        jax.config.update("jax_num_cpu_devices", 3)
        print(jax.local_device_count("cpu"))
    """
    assert run_python(program).strip() == "3"


@pytest.mark.slow
def test_import_costs_little_beyond_jax_and_flax():
    program = """
        import time
        start = time.process_time()
        import jax, flax.nnx
        middle = time.process_time()
        import paligemma_jax; paligemma_jax.from_pretrained
        print((time.process_time() - start) / (middle - start))
    """
    # jax and flax take 1.3 s on a laptop, so 2 s beyond them would be a ratio of 2.5.
    assert min(float(run_python(program)) for _ in range(3)) < 2.0
