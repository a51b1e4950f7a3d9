"""--mesh: the model over the two devices that the tests simulate."""

import json
from pathlib import Path

import pytest
from PIL import Image

from paligemma_jax.cli import options
from paligemma_jax.cli.output import load_pipeline
from paligemma_jax.generation.devices import row_parts
from paligemma_jax.models.sharding import NAMES
from tests.cli.conftest import Run


def test_a_model_over_two_devices_answers_as_on_one(run: Run, store: Path, picture: Path):
    command = ["caption", picture, "--model", store, "--dtype", "float32", "--json"]
    alone, both = (run(*command, *more) for more in ([], ["--mesh", "tensor=2"]))
    assert both.code == 0, both.err
    one, two = json.loads(alone.out), json.loads(both.out)
    assert (two["answer"], two["tokens"]) == (one["answer"], one["tokens"])
    assert two["logprob"] == pytest.approx(one["logprob"], abs=1e-3)


@pytest.mark.parametrize(("axes", "parts"), [("data=2", 2), ("tensor=-1", 1), (None, 1)])
def test_how_many_parts_rows_are_split_into(store: Path, axes: str | None, parts: int):
    parser = options.argparse.ArgumentParser()
    options.add_model(parser)
    parser.set_defaults(progress=False)
    argv = ["--model", str(store), *(["--mesh", axes] if axes else [])]
    assert row_parts(load_pipeline(parser.parse_args(argv)).model) == parts


def test_figures_of_a_benchmark_over_a_mesh(run: Run, store: Path, tmp_path: Path):
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "a.png")
    rows = [{"id": i, "image": "a.png", "question": f"{i}?", "answer": "no"} for i in range(3)]
    (tmp_path / "gqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["eval", "--task", "gqa", "--data", tmp_path, "--model", store, "--batch-size", "1"]
    done = run(*command, "--mesh", "data=2", "--max-new-tokens", "4")
    assert done.code == 0 and done.out.startswith("GQA: acc"), done.err


@pytest.mark.parametrize("axes", ["tensor", "tensor=0", "model=2", "data=2,data=2", "tensor=x", ""])
def test_what_is_no_mesh(run: Run, picture: Path, axes: str):
    outcome = run("caption", picture, "--mesh", axes)
    assert outcome.code == 2 and "data, fsdp, tensor" in outcome.err


def test_a_mesh_that_does_not_fit(run: Run, store: Path, picture: Path):
    outcome = run("caption", picture, "--model", store, "--mesh", "tensor=3")
    assert outcome.code == 1 and "2 devices" in outcome.err and "--mesh fsdp=-1" in outcome.err


def test_the_command_knows_the_same_axes():
    assert options.MESH_AXES == NAMES
