"""Schedules by their formulas; step 0 is the first update."""

import math

import numpy as np
import pytest

from paligemma_jax.errors import ConfigError
from paligemma_jax.training.optimizer import (
    Constant,
    Cosine,
    Duration,
    Epochs,
    Examples,
    Linear,
    ReciprocalSquareRoot,
    Run,
    Schedule,
    Share,
    Steps,
)

RUN = Run(total_steps=100, batch_size=8, data_size=80)


def values(schedule: Schedule, *steps: int) -> list[float]:
    factor = schedule.factor(RUN)
    return [float(factor(step)) for step in steps]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(), {0: 1.0, 99: 1.0}),
        (Cosine(), {0: 1.0, 50: 0.5, 75: 0.5 * (1 + math.cos(0.75 * math.pi)), 100: 0.0}),
        # The first update of a warm-up does nothing, and the decay begins when it ends.
        (Cosine(warmup=Share(0.05)), {0: 0.0, 1: 0.2, 5: 1.0, 100: 0.0, 120: 0.0}),
        (Linear(warmup=Steps(20)), {0: 0.0, 10: 0.5, 20: 1.0, 60: 0.5, 100: 0.0}),
        (Linear(end=0.2, power=2.0), {0: 1.0, 50: 0.4, 100: 0.2}),
        (ReciprocalSquareRoot(timescale=4, warmup=Steps(4)), {0: 0.0, 2: 0.5, 4: 1.0, 16: 0.5}),
        (ReciprocalSquareRoot(timescale=4, shift=12), {0: 0.5}),
        (Constant(cooldown=Steps(10)), {90: 1.0, 95: 0.5, 100: 0.0}),
    ],
)
def test_factors(schedule: Schedule, expected: dict[int, float]):
    np.testing.assert_allclose(values(schedule, *expected), list(expected.values()), atol=1e-6)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (Steps(7), 7),
        (Share(0.05), 5),
        (Share(0.001), 1),  # never nothing, unless nothing is asked for
        (Share(0.0), 0),
        (Examples(20), 2),  # to the nearest
        (Epochs(0.5), 5),
    ],
)
def test_durations(duration: Duration, steps: int):
    assert duration.steps(RUN) == steps


def test_durations_that_cannot_be():
    with pytest.raises(ConfigError, match="share of 5"):
        Share(5)
    with pytest.raises(ConfigError, match="data_size, which is None"):
        Epochs(1).steps(Run(total_steps=3, batch_size=2))
    with pytest.raises(ConfigError, match="warm-up of 100 steps"):
        Cosine(warmup=Steps(100)).factor(RUN)
