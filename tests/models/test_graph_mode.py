"""The model keeps to the part of nnx that its announced tree mode leaves as it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = ("models/test_gemma.py", "models/test_paligemma.py", "generation/test_loop.py")


@pytest.mark.slow
def test_key_tests_pass_in_tree_mode():
    """flax FLIP 5310: NNX_GRAPH_MODE and NNX_GRAPH_UPDATES will be false by default."""
    environment = {**os.environ, "NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    files = [str(TESTS / file) for file in FILES]
    run = subprocess.run(
        [*command, *files], cwd=TESTS.parent, env=environment, text=True, capture_output=True
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
