"""The step: big_vision's losses and gradients, and everything around them."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.paligemma import split_model
from paligemma_jax.models.sharding import Rules
from paligemma_jax.processing.processor import Batch
from paligemma_jax.training.optimizer import (
    SGD,
    Constant,
    OptimizerConfig,
    RunLength,
    make_optimizer,
)
from paligemma_jax.training.step import (
    DivergedError,
    DivergenceGuard,
    StepConfig,
    TrainState,
    TrainStep,
    chunked_loss,
    init_state,
    loss_and_gradient,
    loss_weights,
    max_targets,
    token_nll,
)
from paligemma_jax.weights.big_vision import big_vision_name
from tests.goldens import BIG_VISION, assert_gradient_norms, big_vision
from tests.tiny import prompts, random_model, tiny_config

RUN = RunLength(total_steps=10)
KEY = jax.random.key(3)
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in BIG_VISION if name != "pg2"]
TEXT, ROWS = 9, 4

RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(3, 7, 4)), jnp.float32)
TABLE = jnp.asarray(RNG.normal(size=(11, 4)), jnp.float32)
TARGETS = jnp.asarray(RNG.integers(0, 11, (3, 7)))
MASK = jnp.array([[0, 0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0]])


def head(hidden: jax.Array) -> jax.Array:
    return hidden @ TABLE.T


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_smoothing_spreads_over_the_other_classes(smoothing: float):
    wanted = np.full((3, 7, 11), smoothing / 10)
    np.put_along_axis(wanted, np.asarray(TARGETS)[..., None], 1 - smoothing, axis=-1)
    expected = -(wanted * np.asarray(jax.nn.log_softmax(head(HIDDEN)))).sum(-1)
    np.testing.assert_allclose(token_nll(head(HIDDEN), TARGETS, smoothing), expected, rtol=1e-5)


def test_losses_are_float32_and_survive_huge_logits():
    nll = token_nll((1e4 * head(HIDDEN)).astype(jnp.bfloat16), TARGETS)
    assert nll.dtype == jnp.float32 and np.isfinite(nll).all()


def test_means_over_examples_and_over_tokens():
    nll = np.asarray(token_nll(head(HIDDEN), TARGETS))
    # An example without targets counts, with a loss of zero.
    by_example = (nll[0, 2:5].mean() + nll[1, [1, 6]].mean()) / 3
    np.testing.assert_allclose(np.sum(nll * loss_weights(MASK)), by_example, rtol=1e-6)
    weights = loss_weights(MASK, reduction="token")
    np.testing.assert_allclose(np.sum(nll * weights), (nll * MASK).sum() / 5, rtol=1e-6)
    real = jnp.array([True, False, True])
    for reduction in ("example", "token"):
        found = np.asarray(loss_weights(MASK, real, reduction))
        np.testing.assert_allclose(found[::2], loss_weights(MASK[::2], None, reduction), rtol=1e-6)
        assert not found[1].any()


@pytest.mark.parametrize(
    ("smoothing", "chunk", "most"), [(0.0, 32, None), (0.1, 2, None), (0.1, 32, 3), (0.0, 2, 4)]
)
def test_loss_in_chunks_is_the_plain_one(smoothing: float, chunk: int, most: int | None):
    weights = loss_weights(MASK)

    def in_chunks(hidden: jax.Array, table: jax.Array) -> jax.Array:
        options: Any = dict(label_smoothing=smoothing, chunk=chunk, max_targets=most)
        return chunked_loss(lambda x: x @ table.T, hidden, TARGETS, weights, **options)

    def plain(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return jnp.sum(token_nll(hidden @ table.T, TARGETS, smoothing) * weights)

    actual, expected = jax.jit(
        lambda *x: [jax.value_and_grad(of, argnums=(0, 1))(*x) for of in (in_chunks, plain)]
    )(HIDDEN, TABLE)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_more_targets_than_are_computed_are_no_loss():
    losses = [
        chunked_loss(head, HIDDEN, TARGETS, loss_weights(MASK), max_targets=n) for n in (2, 3)
    ]
    assert np.isnan(losses[0]) and np.isfinite(losses[1])


def test_logits_of_all_positions_are_never_held():
    def largest(program: Any) -> int:
        """Entries of the largest array with a vocabulary axis, of any inner program too."""
        found = [0]
        for equation in program.eqns:
            shapes = [v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape")]
            found += [int(np.prod(s)) for s in shapes if 11 in s and len(s) > 2]
            found += [largest(sub) for sub in jaxprs_in_params(equation.params)]
        return max(found)

    def gradient(chunk: int) -> Any:
        weights = loss_weights(MASK)
        return jax.grad(lambda x: chunked_loss(head, x, TARGETS, weights, chunk=chunk))

    whole, few = (largest(jax.make_jaxpr(gradient(chunk))(HIDDEN).jaxpr) for chunk in (7, 2))
    assert whole == 3 * 7 * 11 and few == 3 * 2 * 11


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
    config = OptimizerConfig(learning_rate=0.1, optimizer=SGD(momentum=0.9), max_grad_norm=None)
    optimizer = make_optimizer(config, params, RUN)
    step = TrainStep(graphdef, optimizer, StepConfig(logit_chunk=4, remat="none"))
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
    assert metrics["target_tokens_mean"] == pytest.approx(supervised.mean())
    assert metrics["target_tokens_max"] == supervised.max()
    assert not metrics["nonfinite_grads"] and not metrics["skipped"]
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-5)


def tiny_batch(seed: int = 0, supervised: tuple[int, ...] = (3, 1, 2, 3)) -> Batch:
    """Rows of TEXT + 1 tokens, the last few of each to be learnt."""
    batch = prompts([TEXT + 1] * ROWS, TEXT + 1, seed=seed)
    learnt = np.arange(TEXT + 1)[None] > TEXT - np.array(supervised)[:, None]
    mask = learnt.astype(np.int32)
    return dataclasses.replace(batch, mask_ar=mask, mask_loss=mask)


@functools.cache
def tiny() -> tuple[Any, dict[str, jax.Array]]:
    return split_model(random_model(tiny_config()))


def test_accumulation_and_remat_change_nothing():
    graphdef, params = tiny()
    batch = dataclasses.replace(tiny_batch(), row_mask=np.array([True, True, False, True]))
    frozen = {path: leaf for path, leaf in params.items() if path.startswith("img/blocks/")}
    trainable = {path: leaf for path, leaf in params.items() if path not in frozen}

    def of(config: StepConfig) -> Any:
        return jax.jit(functools.partial(loss_and_gradient, graphdef, config=config))(
            trainable, frozen, batch, key=KEY
        )

    whole = of(StepConfig(loss_reduction="token", label_smoothing=0.1, remat="none"))
    parts: Any = dict(gradient_accumulation_steps=2, logit_chunk=2, max_targets=3)
    split = of(StepConfig(loss_reduction="token", label_smoothing=0.1, remat="dots", **parts))
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
    step = TrainStep(graphdef, optimizer, StepConfig(dropout=0.5, ema=0.75, skip_nonfinite=True))
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
    assert [m["skipped"] for m in metrics] == [m["nonfinite_grads"] for m in metrics] == [0, 1, 0]
    assert np.isnan(metrics[1]["loss"]) and metrics[1]["update_norm"] == 0
    kept = dataclasses.replace(states[1], step=states[0].step)
    jax.tree.map(np.testing.assert_array_equal, kept, states[0])
    assert [int(state.step) for state in states] == [1, 2, 3]


def test_ema():
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
        step = TrainStep(graphdef, optimizer)
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
    config, batch = StepConfig(logit_chunk=2), tiny_batch(supervised=supervised)
    assert max_targets(batch, config) == most
    assert max_targets(batch, dataclasses.replace(config, max_targets=7)) == 7
    assert max_targets(jax.tree.map(jnp.asarray, batch), config) is None


def test_loss_of_ones_own():
    graphdef, params = tiny()
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, optimizer=SGD()), params, RUN)

    def loss_fn(model: Any, batch: jax.Array, step: jax.Array) -> Any:
        return jnp.sum(model.img.head.bias[...] * batch), {"done": step + 0.0}

    step = TrainStep(graphdef, optimizer, loss_fn=loss_fn)
    state, metrics = step(init_state(own(params), tuple(params), optimizer), jnp.ones(()), KEY)
    assert metrics["done"] == 0 and state.step == 1
    moved = np.asarray(state.trainable["img/head/bias"] - params["img/head/bias"])
    assert (moved < 0).all() and metrics["grad_norm"] == pytest.approx(moved.size**0.5)


@pytest.mark.parametrize(
    ("changes", "message"), [(dict(mask_loss=None), "mask_loss"), (dict(), "the batch of 4, got 3")]
)
def test_invalid_batches(changes: Any, message: str):
    graphdef, params = tiny()
    batch = dataclasses.replace(tiny_batch(), **changes)
    with pytest.raises(ConfigError, match=message):
        config = StepConfig(gradient_accumulation_steps=3)
        loss_and_gradient(graphdef, params, {}, batch, config, KEY)


def test_invalid_settings():
    with pytest.raises(ConfigError, match="dropout.* 1.0; ema .* 2.0; loss_red.*; gradient_acc"):
        StepConfig(dropout=1.0, ema=2.0, loss_reduction="sum", gradient_accumulation_steps=0)


def test_bad_losses_stop_the_run_with_their_ids(tmp_path: Path):
    guard = DivergenceGuard(tmp_path, spike_factor=10.0)
    for step in range(1, 21):
        guard.check(step, 1.0, 1.0, ("a",))
    # Continuing later compares as if nothing had happened.
    later = DivergenceGuard(tmp_path, spike_factor=10.0)
    later.restore(json.loads(json.dumps(guard.state())))
    with pytest.raises(DivergedError, match="At step 21 the loss was 12, more than .* times 1"):
        later.check(21, 12.0, 1.0, ("b", "c"))
    with pytest.raises(DivergedError, match="the loss was nan"):
        guard.check(22, math.nan, 1.0, ("d",))
    lines = map(json.loads, (tmp_path / "bad_batches.jsonl").read_text().splitlines())
    assert [(line["step"], line["ids"]) for line in lines] == [(21, ["b", "c"]), (22, ["d"])]


def test_bad_losses_are_skipped_but_not_for_ever(tmp_path: Path):
    guard = DivergenceGuard(tmp_path, max_skipped=2)
    for loss in (math.nan, 1.0, math.inf, math.nan):
        guard.check(1, loss, 1.0, ())
    assert guard.skipped == 3
    with pytest.raises(DivergedError, match="gradient norm was inf .bad steps in a row: 3"):
        guard.check(5, 1.0, math.inf, ())
