"""The one command for a GPU, at tiny sizes on whatever is here."""

import json
from pathlib import Path

import pytest

from paligemma_jax.errors import ConfigError
from tests.gpu.on_gpu import main, measure_all


def test_all_of_it_is_written(tmp_path: Path):
    folder = tmp_path / "new" / "folder"
    measure_all(folder, minutes=0, size="tiny", questions=("--tiny", "--questions", "g"))
    assert json.loads((folder / "answers.json").read_text())["answers"][0]["question"] == "g"
    assert (folder / "answers.md").read_text().startswith("| question |")
    assert json.loads((folder / "bench.json").read_text())["size"] == "tiny"
    assert "### Goals" in (folder / "bench.md").read_text()
    with pytest.raises(ConfigError, match="answers.json already"):
        measure_all(folder, minutes=0, size="tiny")


def test_questions_that_fail_stop_nothing(tmp_path: Path):
    measure_all(tmp_path, minutes=0, size="tiny", questions=("--questions", "z"))
    assert "no question 'z'" in (tmp_path / "answers.md").read_text()
    assert (tmp_path / "bench.md").exists()


def test_no_gpu_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "out")])
    assert "paligemma bench --size cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
