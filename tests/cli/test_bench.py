"""`paligemma bench` at its smallest size; times are not looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paligemma_jax.benchmark.bench import bench
from tests.cli.conftest import Run


def test_tiny(run: Run, tmp_path: Path):
    target = tmp_path / "run.json"
    outcome = run(
        "bench", "--size", "tiny", "--quick", "--implementation", "paligemma-jax", "--json", target,
        "--progress",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "decode, batch 1" in outcome.out and "not run" in outcome.out
    assert "tiny paligemma-jax float32" in outcome.err
    values = json.loads(target.read_text())
    assert values["size"] == "tiny" and {"device", "date", "jax"} <= set(values["environment"])
    assert {m["case"] for m in values["measurements"]} >= {"load", "image encoding, batch 1"}
    assert not any(result["error"] for result in values["results"])
    assert {target["verdict"] for target in values["targets"]} == {"not run"}

    again = run("bench", "--size", "tiny", "--json", target)
    assert again.code == 1 and "--force" in again.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--size", "gpu", "--quick"], "paligemma bench --size cpu"),
        (["--model", "paligemma-4b"], "paligemma models"),
        (["--json", "no/such/file.json"], "mkdir -p"),
    ],
)
def test_what_cannot_be(run: Run, argv: list[str], words: str):
    outcome = run("bench", *argv)
    assert outcome.code == 1 and words in outcome.err


def test_the_time_is_up(tmp_path: Path):
    target = tmp_path / "run.json"
    found = bench("tiny", minutes=0, json=target)
    assert found.results == () and json.loads(target.read_text())["results"] == []
    assert "not run" in str(found)


def test_no_baseline_is_imported_by_the_library():
    program = """
import sys
import paligemma_jax as pg
import paligemma_jax.benchmark.bench, paligemma_jax.benchmark.report
pg.from_pretrained
loaded = {"torch", "transformers"} & set(sys.modules)
sys.exit(str(loaded) if loaded else 0)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
