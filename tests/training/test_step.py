"""The step: big_vision's losses and gradients, and everything around them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.paligemma import split_model
from paligemma_jax.models.sharding import Rules
from paligemma_jax.processing.processor import Batch
from paligemma_jax.training.optimizer import (
    SGD,
    Constant,
    Cosine,
    OptimizerConfig,
    Run,
    Share,
    make_optimizer,
)
from paligemma_jax.training.step import (
    Skip,
    StepConfig,
    TrainState,
    init_state,
    loss_and_gradient,
    make_train_step,
    most_supervised,
    token_mean,
)
from paligemma_jax.weights.big_vision import big_vision_name
from tests.goldens import BIG_VISION, assert_gradient_norms, big_vision
from tests.tiny import prompts, random_model, tiny_config

RUN = Run(total_steps=10)
KEY = jax.random.key(3)
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in BIG_VISION if name != "pg2"]
TEXT, ROWS = 9, 4


def own(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Copies, which a step may be given."""
    return {path: jnp.array(leaf, copy=True) for path, leaf in params.items()}


@functools.cache
def golden_step(name: str) -> tuple[Any, Any, Any]:
    """The weights before a step, the gradient, and the step's metrics."""
    golden = big_vision(name)
    graphdef, params = split_model(golden.model(final_logit_softcap=0.0))
    image, text = golden["image"], golden["text"]
    batch = Batch(
        images=image if image.ndim == 5 else image[:, None],
        tokens=text,
        mask_ar=golden["mask_ar"],
        mask_input=np.ones(text.shape, bool),
        mask_loss=golden["mask_loss"],
    )
    # The first momentum is the gradient itself.
    method = SGD(momentum=0.9)
    config = OptimizerConfig(learning_rate=0.1, method=method, clip_norm=None)
    optimizer = make_optimizer(config, params, RUN)
    step = make_train_step(graphdef, optimizer, StepConfig(logit_columns=4, remat="none"))
    state, metrics = step(init_state(own(params), tuple(params), optimizer), batch, KEY)
    gradient = optax.tree_utils.tree_get(state.opt_state, "trace")
    return params, gradient, metrics


@pytest.mark.parametrize("name", ["pg2", *OTHERS])
def test_loss_and_gradient_are_those_of_big_vision(name: str):
    golden = big_vision(name)
    _, gradient, metrics = golden_step(name)
    np.testing.assert_allclose(metrics["loss"], golden["loss"], rtol=1e-5)
    norms = {big_vision_name(k): float(np.linalg.norm(g)) for k, g in gradient.items()}
    assert_gradient_norms(name, norms)
    supervised = golden["mask_loss"][:, 1:].sum(1)
    assert metrics["supervised_mean"] == pytest.approx(supervised.mean())
    assert metrics["supervised_max"] == supervised.max()
    assert not metrics["not_finite"] and not metrics["skipped"]


def test_an_update_is_that_of_plain_optax_on_the_same_gradient():
    params, gradient, metrics = golden_step("pg2")
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-5)
    some = ["img/head/kernel", "img/head/bias", "llm/final_norm/scale"]
    params, gradient = ({path: tree[path] for path in some} for tree in (params, gradient))
    schedule = Cosine(warmup=Share(0.2))
    config = OptimizerConfig(
        learning_rate=0.1, schedules=Rules(((".*", schedule),)), weight_decay=0.01, clip_norm=0.5
    )
    ours = make_optimizer(config, params, RUN)
    kernels = {path: path.endswith("/kernel") for path in params}
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.scale_by_adam(),
        optax.scale(0.1),
        optax.add_decayed_weights(0.01, kernels),
        optax.scale_by_schedule(schedule.factor(RUN)),
        optax.scale(-1.0),
    )

    def two_steps(optimizer: optax.GradientTransformation) -> Any:
        state, new = optimizer.init(params), params
        for _ in range(2):  # the first of a warm-up does nothing
            updates, state = optimizer.update(gradient, state, new)
            new = optax.apply_updates(new, updates)
        return new

    after, expected = jax.jit(lambda: (two_steps(ours), two_steps(theirs)))()
    for path in params:
        np.testing.assert_allclose(after[path], expected[path], rtol=1e-6, atol=1e-7)


def tiny_batch(seed: int = 0, supervised: tuple[int, ...] = (3, 1, 2, 3)) -> Batch:
    """Rows of TEXT + 1 tokens, the last few of each to be learnt."""
    batch = prompts([TEXT + 1] * ROWS, TEXT + 1, seed=seed)
    learnt = np.arange(TEXT + 1)[None] > TEXT - np.array(supervised)[:, None]
    mask = learnt.astype(np.int32)
    return dataclasses.replace(batch, mask_ar=mask, mask_loss=mask)


@functools.cache
def tiny() -> tuple[Any, dict[str, jax.Array]]:
    return split_model(random_model(tiny_config()))


def test_parts_and_rematerialisation_change_nothing():
    graphdef, params = tiny()
    batch = dataclasses.replace(tiny_batch(), row_mask=np.array([True, True, False, True]))
    frozen = {path: leaf for path, leaf in params.items() if path.startswith("img/blocks/")}
    trainable = {path: leaf for path, leaf in params.items() if path not in frozen}

    def of(config: StepConfig) -> Any:
        return jax.jit(functools.partial(loss_and_gradient, graphdef, config=config))(
            trainable, frozen, batch, key=KEY
        )

    whole = of(StepConfig(mean=token_mean, label_smoothing=0.1, remat="none"))
    parts: Any = dict(microbatches=2, logit_columns=2, most_supervised=3)
    split = of(StepConfig(mean=token_mean, label_smoothing=0.1, remat="dots", **parts))
    assert whole[1].keys() == trainable.keys()
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@functools.cache
def dropping_steps() -> dict[str, Any]:
    """Three steps with dropout, average and skipping; the second one's pictures are not finite."""
    graphdef, params = tiny()
    rules = Rules((("img/.*", None), (".*", Constant())))
    config = OptimizerConfig(learning_rate=0.01, schedules=rules)
    optimizer = make_optimizer(config, params, RUN)
    step = make_train_step(graphdef, optimizer, StepConfig(dropout=0.5, ema=0.75, skip=Skip()))
    start = init_state(own(params), config.trainable(params), optimizer, ema=True)
    batch = tiny_batch()
    assert batch.images is not None
    broken = dataclasses.replace(batch, images=np.full_like(batch.images, np.nan))
    states, metrics = [], []  # no view of `start`, or its memory could not be given away
    state = start
    for given in (batch, broken, batch):
        state, values = step(state, given, KEY)
        states.append(jax.tree.map(lambda x: np.array(x), state))
        metrics.append({name: float(value) for name, value in values.items()})
    again, values = step(init_state(own(params), state.trainable, optimizer, ema=True), batch, KEY)
    return dict(start=start, states=states, metrics=metrics, again=float(values["loss"]))


def test_skipping():
    states, metrics = (dropping_steps()[name] for name in ("states", "metrics"))
    assert [m["skipped"] for m in metrics] == [m["not_finite"] for m in metrics] == [0, 1, 0]
    assert np.isnan(metrics[1]["loss"]) and metrics[1]["update_norm"] == 0
    kept = dataclasses.replace(states[1], step=states[0].step)
    jax.tree.map(np.testing.assert_array_equal, kept, states[0])
    assert [int(state.step) for state in states] == [1, 2, 3]


def test_the_average_of_the_weights():
    after = dropping_steps()["states"][0]
    for path, weight in after.trainable.items():
        wanted = 0.75 * tiny()[1][path] + 0.25 * weight
        np.testing.assert_allclose(after.ema[path], wanted, rtol=1e-5, atol=1e-6)


def test_dropout_is_of_the_key_and_the_step():
    metrics, again = (dropping_steps()[name] for name in ("metrics", "again"))
    assert again == metrics[0]["loss"] != metrics[2]["loss"]


def test_what_is_given_away():
    start = dropping_steps()["start"]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((start.trainable, start.ema)))
    assert start.frozen and not any(leaf.is_deleted() for leaf in start.frozen.values())


def test_master_weights_are_float32_unless_asked_otherwise():
    graphdef, params = split_model(random_model(tiny_config(), param_dtype=jnp.bfloat16))
    rules = Rules((("llm/layers/attn/.*", Constant()), (".*", None)))
    config = OptimizerConfig(learning_rate=0.01, schedules=rules)
    optimizer = make_optimizer(config, params, RUN)
    paths = config.trainable(params)

    def dtypes(tree: Any) -> set[str]:
        return {str(leaf.dtype) for leaf in jax.tree.leaves(tree) if leaf.ndim}

    def after(**kw: Any) -> TrainState:
        step = make_train_step(graphdef, optimizer)
        return jax.eval_shape(
            lambda: step(init_state(params, paths, optimizer, **kw), tiny_batch(), KEY)[0]
        )

    state = after(ema=True)
    assert len(paths) == 3 and set(state.params) == set(params)
    assert dtypes((state.trainable, state.opt_state, state.ema)) == {"float32"}
    assert dtypes(state.frozen) == {"bfloat16"}
    state = after(dtype=jnp.bfloat16)
    assert dtypes((state.trainable, state.opt_state)) == {"bfloat16"}


@pytest.mark.parametrize(("supervised", "most"), [((2, 1, 1, 1), 2), ((3, 1, 1, 1), 4)])
def test_programs_are_for_the_longest_answer(supervised: tuple[int, ...], most: int):
    config, batch = StepConfig(logit_columns=2), tiny_batch(supervised=supervised)
    assert most_supervised(batch, config) == most
    assert most_supervised(batch, dataclasses.replace(config, most_supervised=7)) == 7
    assert most_supervised(jax.tree.map(jnp.asarray, batch), config) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(mask_loss=None), "no mask_loss"),
        (dict(), "4 rows does not go into 3 microbatches"),
    ],
)
def test_batches_that_do_not_fit(changes: Any, message: str):
    graphdef, params = tiny()
    batch = dataclasses.replace(tiny_batch(), **changes)
    with pytest.raises(ConfigError, match=message):
        loss_and_gradient(graphdef, params, {}, batch, StepConfig(microbatches=3), KEY)


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError, match="dropout is 1.0.*; ema is 2.0.*; microbatches"):
        StepConfig(dropout=1.0, ema=2.0, microbatches=0)
