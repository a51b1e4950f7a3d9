"""The chain of big_vision, written out by hand; optax's optimizers where it equals them; schedules.

Step 0 is the first update.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paligemma_jax.config import VARIANTS
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.paligemma import abstract_params, flatten
from paligemma_jax.models.sharding import Rules
from paligemma_jax.training.optimizer import (
    SGD,
    Adafactor,
    Adam,
    AdamW,
    Constant,
    Cosine,
    Duration,
    Epochs,
    Examples,
    Fraction,
    Linear,
    OptimizerConfig,
    ReciprocalSquareRoot,
    RunLength,
    Schedule,
    Steps,
    make_optimizer,
)

RUN = RunLength(total_steps=10)
SHAPES = {
    "img/head/kernel": (3, 2),
    "img/head/bias": (2,),
    "llm/linear/w": (2, 3),
    "llm/norm": (2,),
}
FREE = ("img/head/bias", "img/head/kernel", "llm/linear/w")
SCHEDULE = Cosine(warmup=Steps(2))


def arrays(seed: int, paths: tuple[str, ...] = FREE) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=SHAPES[k]), jnp.float32) for k in paths}


def run(optimizer: optax.GradientTransformation, params: Any, steps: int = 4) -> Any:
    """Parameters after some updates with random gradients."""
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step_of(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        params, state = step_of(arrays(10 + step, tuple(params)), state, params)
    return params


def assert_same(actual: Any, expected: Any) -> None:
    assert actual.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(actual[path], expected[path], rtol=1e-5, atol=1e-5)


def test_the_chain_by_hand():
    config = OptimizerConfig(
        learning_rate=0.1,
        schedules=Rules((("llm/norm", None), ("llm/.*", Constant()), (".*", SCHEDULE))),
        lr_multipliers=Rules((("img/.*/bias", 3.0),)),
        weight_decay=0.02,
        max_grad_norm=1.0,
    )
    params = arrays(0)
    actual = run(make_optimizer(config, SHAPES, RUN), params)

    wanted = {k: np.asarray(v, np.float64) for k, v in params.items()}
    m, v = ({k: np.zeros(SHAPES[k]) for k in wanted} for _ in range(2))
    factor: Any = SCHEDULE.factor(RUN)
    for step in range(4):
        g = {k: np.asarray(x, np.float64) for k, x in arrays(10 + step).items()}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        assert norm > 1.0  # so that it is clipped
        for k in wanted:
            m[k] = 0.9 * m[k] + 0.1 * g[k] / norm
            v[k] = 0.999 * v[k] + 0.001 * (g[k] / norm) ** 2
            mean, square = m[k] / (1 - 0.9 ** (step + 1)), v[k] / (1 - 0.999 ** (step + 1))
            update = 0.1 * (3.0 if k == "img/head/bias" else 1.0) * mean / (np.sqrt(square) + 1e-8)
            if k == "img/head/kernel":
                update = update + 0.02 * wanted[k]
            wanted[k] = wanted[k] - (1.0 if k[0] == "l" else float(factor(step))) * update
    assert_same(actual, wanted)


def test_the_first_update_of_a_warmup_is_zero():
    config = OptimizerConfig(learning_rate=1.0, schedules=Rules(((".*", SCHEDULE),)))
    assert_same(run(make_optimizer(config, FREE, RUN), arrays(0), steps=1), arrays(0))


@pytest.mark.parametrize(
    ("optimizer", "theirs"),
    [
        (Adam(), optax.adam(0.1)),
        (AdamW(weight_decay=0.3), optax.adamw(0.1, weight_decay=0.3)),
        (SGD(), optax.sgd(0.1)),
        (SGD(momentum=0.9, nesterov=True), optax.sgd(0.1, 0.9, nesterov=True)),
    ],
)
def test_optax_optimizers(optimizer: Any, theirs: optax.GradientTransformation):
    config = OptimizerConfig(
        learning_rate=0.1,
        optimizer=optimizer,
        weight_decay_multipliers=Rules(((".*", 1.0),)),
        max_grad_norm=None,
    )
    assert_same(run(make_optimizer(config, FREE, RUN), arrays(0)), run(theirs, arrays(0)))


def test_adafactor_by_hand():
    method = Adafactor(factored_from=2, momentum_dtype=jnp.float32)
    config = OptimizerConfig(learning_rate=0.1, optimizer=method, max_grad_norm=None)
    actual = run(make_optimizer(config, FREE, RUN), arrays(0), steps=3)

    wanted = {k: np.asarray(x, np.float64) for k, x in arrays(0).items()}
    rows: dict[str, Any] = dict.fromkeys(FREE, 0.0)
    columns, momentum = dict(rows), dict(rows)
    for step in range(3):
        keep = min(0.999, 1.0 - (step + 1.0) ** -0.8)
        for k, g in arrays(10 + step).items():
            square = np.asarray(g, np.float64) ** 2 + 1e-30
            if square.ndim == 1:
                rows[k] = keep * rows[k] + (1 - keep) * square
                direction = g / np.sqrt(rows[k])
            else:
                rows[k] = keep * rows[k] + (1 - keep) * square.mean(1, keepdims=True)
                columns[k] = keep * columns[k] + (1 - keep) * square.mean(0, keepdims=True)
                direction = g / np.sqrt(rows[k] * columns[k] / rows[k].mean())
            momentum[k] = 0.9 * momentum[k] + 0.1 * direction
            wanted[k] = wanted[k] - 0.1 * momentum[k]
    assert_same(actual, wanted)


def test_moments_are_small_in_adafactor():
    config = OptimizerConfig(learning_rate=0.1, optimizer=Adafactor())
    weights = {"a/w": jax.ShapeDtypeStruct((5, 64, 96), jnp.float32)}
    state = jax.eval_shape(make_optimizer(config, weights, RUN).init, weights)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert size < 5 * 64 * 96 * 2 + 5 * (64 + 96) * 4 + 64  # momentum in bfloat16, rows, columns


def test_kernels_decay_as_in_big_vision():
    paths = flatten(abstract_params(VARIANTS["paligemma2-3b-pt-224"]))
    config = OptimizerConfig(learning_rate=0.0, weight_decay=1.0, max_grad_norm=None)
    optimizer = make_optimizer(config, paths, RUN)
    ones = {path: np.ones(1, np.float32) for path in paths}
    updates: Any = jax.jit(lambda x: optimizer.update(x, optimizer.init(x), x)[0])(ones)
    decayed = {path for path, update in updates.items() if update[0]}
    attention = {f"img/blocks/attn/{name}/kernel" for name in ("q", "k", "v", "out")}
    others = {"patch_embed", "head", "blocks/mlp/fc1", "blocks/mlp/fc2"}
    assert decayed == attention | {f"img/{name}/kernel" for name in others}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedules": Rules(((".*", None),))}, "every one is frozen"),
        ({"schedules": Rules((("img/.*", Constant()),))}, "schedules has no rule for 2 of 4"),
        ({"lr_multipliers": Rules((("lmm/.*", 2.0),))}, "lr_multipliers has rules that match no"),
        ({"lr_multipliers": Rules((("llm/.*", 0.0),))}, "A schedule of None freezes"),
        ({"optimizer": AdamW(), "weight_decay": 0.1}, "and AdamW"),
        (
            {"weight_decay": 0.1, "weight_decay_multipliers": Rules(((".*/kernle", 1.0),))},
            "weight_decay_multipliers has rules that",
        ),
    ],
)
def test_mistakes(changes: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(OptimizerConfig(learning_rate=0.1, **changes), SHAPES, RUN)


LENGTH = RunLength(total_steps=100, batch_size=8, data_size=80)


def values(schedule: Schedule, *steps: int) -> list[float]:
    factor: Any = schedule.factor(LENGTH)
    return [float(factor(step)) for step in steps]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(), {0: 1.0, 99: 1.0}),
        (Cosine(), {0: 1.0, 50: 0.5, 75: 0.5 * (1 + math.cos(0.75 * math.pi)), 100: 0.0}),
        # The first update of a warm-up does nothing, and the decay begins when it ends.
        (Cosine(warmup=Fraction(0.05)), {0: 0.0, 1: 0.2, 5: 1.0, 100: 0.0, 120: 0.0}),
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
        (Fraction(0.05), 5),
        (Fraction(0.001), 1),  # never nothing, unless nothing is asked for
        (Fraction(0.0), 0),
        (Examples(20), 2),  # to the nearest
        (Epochs(0.5), 5),
    ],
)
def test_durations(duration: Duration, steps: int):
    assert duration.steps(LENGTH) == steps


def test_durations_that_cannot_be():
    with pytest.raises(ConfigError, match="fraction of training"):
        Fraction(5)
    nan, inf = float("nan"), float("inf")
    for kind, count in [
        (Steps, -1),
        (Steps, True),
        (Examples, inf),
        (Epochs, nan),
        (Fraction, nan),
    ]:
        with pytest.raises(ConfigError, match=f"got {count!r}"):
            kind(count)
    with pytest.raises(ConfigError, match="data_size.* got None"):
        Epochs(1).steps(RunLength(total_steps=3, batch_size=2))
    with pytest.raises(ConfigError, match="got 100 steps of 100"):
        Cosine(warmup=Steps(100)).factor(LENGTH)
