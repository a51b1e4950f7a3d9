"""The questions to a GPU and the command for one, at tiny sizes on whatever is here."""

import json
from pathlib import Path

import pytest

from paligemma_jax.errors import ConfigError
from tests.gpu import gpu_probe
from tests.gpu.gpu_probe import QUESTIONS, TINY, Answer, ask, attempt, main, markdown
from tests.gpu.on_gpu import main as on_gpu
from tests.gpu.on_gpu import measure_all

# On CPUs: cuDNN is not there, and jax 0.10 knows no command buffers' option.
MAY_FAIL = ("cudnn", "no CUDA graphs", "no Triton", "fused by option")


@pytest.mark.parametrize("letter", sorted(QUESTIONS))
def test_every_question_is_answered(letter: str):
    answers = ask(letter, TINY, seconds=600)
    assert {answer.question for answer in answers} == {letter}
    failed = [a for a in answers if a.value is None and not any(m in a.case for m in MAY_FAIL)]
    assert failed == []
    assert answers[-1].case == "time to find out"
    assert len(markdown(answers).splitlines()) == len(answers) + 2


def test_what_fails_says_why_and_ends_nothing():
    def fails() -> tuple[float, str, str]:
        raise ValueError("no such\nthing")

    answer = attempt("b", "a case", fails)
    assert answer.value is None and answer.note == "ValueError: no such thing"
    assert "| b | a case | - | ValueError: no such thing |" in markdown([answer])


def test_a_question_that_fails(monkeypatch: pytest.MonkeyPatch):
    def fails(sizes: object):
        raise RuntimeError("lost")

    monkeypatch.setitem(gpu_probe.QUESTIONS, "a", fails)
    answers = ask("ag", TINY, seconds=600)
    assert answers[0] == Answer("a", "all", None, "", "RuntimeError: lost")
    assert any(a.question == "g" and a.value for a in answers)


def test_no_time_left():
    answers = ask("gf", TINY, seconds=0.0)
    assert [a.note for a in answers if a.case == "the rest"] == 2 * ["no time was left"]


def test_answers_as_json_and_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "answers.json"
    main(["--tiny", "--questions", "g", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["platform"] == "cpu" and found["answers"][0]["question"] == "g"
    assert "| g |" in capsys.readouterr().out


def test_unknown_questions(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--questions", "z"])
    assert "no question 'z'; there are abcdefg" in capsys.readouterr().err


def test_the_one_command_writes_everything(tmp_path: Path):
    folder = tmp_path / "new" / "folder"
    measure_all(folder, minutes=0, size="tiny", questions=("--tiny", "--questions", "g"))
    assert json.loads((folder / "answers.json").read_text())["answers"][0]["question"] == "g"
    assert (folder / "answers.md").read_text().startswith("| question |")
    assert json.loads((folder / "bench.json").read_text())["size"] == "tiny"
    assert "### Targets" in (folder / "bench.md").read_text()
    with pytest.raises(ConfigError, match="answers.json"):
        measure_all(folder, minutes=0, size="tiny")


def test_questions_that_fail_stop_nothing(tmp_path: Path):
    measure_all(tmp_path, minutes=0, size="tiny", questions=("--questions", "z"))
    assert "no question 'z'" in (tmp_path / "answers.md").read_text()
    assert (tmp_path / "bench.md").exists()


def test_without_a_gpu_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        on_gpu([str(tmp_path / "out")])
    assert "paligemma bench --size cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
