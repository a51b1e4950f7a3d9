"""The bar counts from where a run goes on, and its time left leaves compilation out."""

import time

import pytest

from paligemma_jax.training.logging import progress_bar


def test_time_left_is_that_of_later_steps(capsys: pytest.CaptureFixture[str]):
    with progress_bar() as update:
        time.sleep(0.5)  # compilation
        for step in range(101, 104):
            update(step, 200, {"loss": 0.25})
            time.sleep(0.15)
    shown = capsys.readouterr().err.split("\r")
    assert "103/200" in shown[-1] and "loss 0.25" in shown[-1]
    left = shown[-1].split("<")[1].split(",")[0]
    assert "00:05" < left < "00:45", shown[-1]
