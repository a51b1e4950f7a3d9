"""Trains the demo model: `python -m paligemma_jax.demo.train --mask_codec FILE --workdir DIR`.

Restartable: batches are a function of the step, and the state on disk is replaced atomically.
"""

import collections
import functools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from ml_collections import config_flags

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.demo import objective
from paligemma_jax.demo.batches import BatchConfig, PictureConfig, make_batch
from paligemma_jax.demo.mask_codes import MaskCodes, build_mask_codes
from paligemma_jax.demo.recipe import Recipe
from paligemma_jax.demo.run_state import STATE_FILE, initial_state, restore_state, save_state
from paligemma_jax.demo.splits import HELD_OUT, TRAINING
from paligemma_jax.models.abstract import from_params
from paligemma_jax.processing.mask_codec import MaskCodec
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.weights.mask_vae import load_mask_vae

PREFETCH = 6
_worker: list[tuple[Tokenizer, MaskCodes]] = []  # one per worker process


def _start_worker(model: bytes, codes: MaskCodes) -> None:
    _worker.append((Tokenizer.from_bytes(model), codes))


def _work(
    config: BatchConfig, picture: PictureConfig, seed: int, split: int, index: int
) -> dict[str, Any]:
    tokenizer, codes = _worker[0]
    return make_batch(tokenizer, config, picture, seed, split, index, codes)


def batches(
    pool: Any,
    config: BatchConfig,
    picture: PictureConfig,
    seed: int,
    split: int,
    start: int,
    stop: int,
) -> Iterator[dict[str, Any]]:
    """Batches start..stop-1, made ahead in worker processes."""
    pending: collections.deque[AsyncResult] = collections.deque()
    following = start
    while following < stop or pending:
        while following < stop and len(pending) < PREFETCH:
            pending.append(pool.apply_async(_work, (config, picture, seed, split, following)))
            following += 1
        yield pending.popleft().get()


def on_device(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch without what only the host needs."""
    return {
        name: {k: v for k, v in part.items() if k != "task"} if isinstance(part, dict) else part
        for name, part in batch.items()
    }


Objective = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@functools.partial(
    jax.jit, static_argnames=("objective_of", "optimizer"), donate_argnames=("params", "opt_state")
)
def train_step(
    params: Any,
    opt_state: Any,
    batch: Any,
    targets: jax.Array,
    *,
    objective_of: Objective,
    optimizer: optax.GradientTransformation,
) -> tuple[Any, Any, dict[str, jax.Array]]:
    """One update of the float32 parameters; returns the parts of the loss."""
    (total, parts), grads = jax.value_and_grad(objective_of, has_aux=True)(params, batch, targets)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    norm = optax.tree.norm(grads)
    return optax.apply_updates(params, updates), opt_state, parts | {"loss": total, "grad": norm}


def objectives(
    config: PaliGemmaConfig, pair_weight: float, patch_weight: float
) -> tuple[Objective, Objective]:
    """What the first steps minimise (the encoder alone, on its patches), and the later ones."""

    def see(params: Any, batch: Any, _: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = from_params(config, params["model"], jnp.float32)
        features = objective.patch_features(model, batch["pictures"])
        value = objective.patch_loss(params["probe"], features, batch["patches"])
        return value, {"patch": value}

    def answer(
        params: Any, batch: Any, targets: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = from_params(config, params["model"], jnp.float32)
        return objective.loss(model, params["probe"], batch, targets, pair_weight, patch_weight)

    return see, answer


def evaluate(
    params: Any,
    config: PaliGemmaConfig,
    loc_start: int,
    held_out: list[dict[str, Any]],
) -> dict[str, float]:
    """Share of teacher-forced answers that are right, by task (boxes within 20 bins of 1,024)."""
    check = jax.jit(
        lambda params, batch: objective.row_correct(
            from_params(config, params, jnp.float32), batch, loc_start, loc_tolerance=20
        )
    )
    right: dict[str, list[bool]] = collections.defaultdict(list)
    for batch in held_out:
        correct = check(params, on_device(batch))
        for group in objective.GROUPS:
            for task, ok in zip(batch[group]["task"], np.asarray(correct[group]), strict=True):
                right[str(task)].append(bool(ok))
    return {task: float(np.mean(values)) for task, values in sorted(right.items())}


def train(recipe: Recipe, codes: MaskCodes, workdir: Path) -> Any:
    """Runs or continues training; returns the parameters. Everything it writes is in `workdir`."""
    workdir.mkdir(parents=True, exist_ok=True)
    run = initial_state(recipe, workdir)
    tokenizer, model_config, optimizer = run.tokenizer, run.config, run.optimizer
    params, opt_state = run.params, run.opt_state
    start = 0
    if (workdir / STATE_FILE).exists():
        start, (params, opt_state) = restore_state(workdir, (params, opt_state))
        print(f"continuing after step {start}", flush=True)
    targets = jnp.asarray(objective.soft_targets(tokenizer, recipe.loc_sigma))
    see, answer = objectives(model_config, recipe.pair_weight, recipe.patch_weight)

    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(1, _start_worker, (tokenizer.to_bytes(), codes)) as pool,
        open(workdir / "metrics.jsonl", "a") as log,
    ):

        def stream(split: int, start: int, stop: int) -> Iterator[dict[str, Any]]:
            return batches(pool, recipe.batch, recipe.picture, recipe.seed, split, start, stop)

        def report(values: dict[str, Any]) -> None:
            line = json.dumps(values)
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()

        held_out = list(stream(HELD_OUT, 0, 8))
        began, waited = time.monotonic(), 0.0
        tick = began
        source = stream(TRAINING, start, recipe.total_steps)
        for step in range(start + 1, recipe.total_steps + 1):
            asked = time.monotonic()
            batch = on_device(next(source))
            waited += time.monotonic() - asked
            minimise = see if step <= recipe.patch_steps else answer
            params, opt_state, values = train_step(
                params, opt_state, batch, targets, objective_of=minimise, optimizer=optimizer
            )
            if step % recipe.log_every == 0 or step == recipe.total_steps:
                losses = {k: round(float(v), 4) for k, v in values.items()}
                if not np.isfinite(losses["loss"]):
                    raise FloatingPointError(f"The loss is {losses['loss']} at step {step}.")
                now = time.monotonic()
                pace = {"s_per_step": round((now - tick) / recipe.log_every, 3)}
                report({"step": step} | losses | pace | {"data_wait": round(waited, 2)})
                tick, waited = now, 0.0
            if step % recipe.evaluate_every == 0 or step == recipe.total_steps:
                shares = evaluate(params["model"], model_config, tokenizer.loc_start, held_out)
                report({"step": step, "correct": {k: round(v, 3) for k, v in shares.items()}})
                tick = time.monotonic()
            if step % recipe.checkpoint_every == 0 or step == recipe.total_steps:
                save_state(workdir, step, (params, opt_state))
    return params["model"]


def main(_: list[str]) -> None:
    """Entry point."""
    values = flags.FLAGS
    codes = build_mask_codes(MaskCodec(load_mask_vae(Path(values.mask_codec))))
    train(Recipe.from_config(values.config), codes, Path(values.workdir))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/demo.py", "The training recipe.")
    flags.DEFINE_string("mask_codec", None, "What train_codec wrote.", required=True)
    flags.DEFINE_string("workdir", None, "Where state and metrics go.", required=True)
    app.run(main)
