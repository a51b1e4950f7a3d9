"""Trains the demo model: `python -m checkpoints.training.train --mask_codec FILE --workdir DIR`.

Restartable: batches are a function of the step, and the state on disk is replaced atomically.

The demo model's loss: cross-entropy on answers, coordinates smoothed over nearby bins.

Letters: I pictures, R rows, n pictures a row, T text tokens, V vocabulary.

Optimizer of the demo model: Muon on the matrices, Adam on tables, biases and norms.

A training recipe (configs/demo.py) as typed values.

Initial weights that know that space is smooth: sine-cosine position and coordinate embeddings.

Both are ordinary trained parameters afterwards; the start only saves a small model the many steps
it would need to find out that patch 9 is under patch 1 and <loc0500> beside <loc0501>.

What a training run of the demo model starts from and leaves on disk.
"""

import collections
import dataclasses
import functools
import json
import multiprocessing
import os
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
from flax import nnx
from ml_collections import ConfigDict, config_flags
from optax.contrib import MuonDimensionNumbers, muon

from checkpoints.training.data import (
    NUM_CHARACTERS,
    NUM_COLORS,
    NUM_KINDS,
    BatchConfig,
    PictureConfig,
    build_tokenizer,
    make_batch,
)
from checkpoints.training.prompts import MaskCodes, build_mask_codes
from paligemma_jax.config import GemmaConfig, PaliGemmaConfig, SigLIPConfig
from paligemma_jax.demo.scene import HELD_OUT, TRAINING
from paligemma_jax.models.paligemma import PaliGemma, from_params, to_params
from paligemma_jax.processing.masks import MaskCodec
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.training.step import token_nll
from paligemma_jax.weights.mask_vae import load_mask_vae

GROUPS = ("short", "long", "pair")
NUM_LOC = 1024
PROBE_SIZES = (NUM_KINDS, NUM_COLORS, NUM_CHARACTERS, 4)


def soft_targets(tokenizer: Tokenizer, sigma: float) -> np.ndarray:
    """Target distribution f32[V, V] a token: itself, or for <loc> a Gaussian of `sigma` bins."""
    table = np.eye(tokenizer.vocab_size, dtype=np.float32)
    bins = np.arange(NUM_LOC)
    near = np.exp(-0.5 * ((bins[:, None] - bins[None]) / sigma) ** 2)
    loc = slice(tokenizer.loc_start, tokenizer.loc_start + NUM_LOC)
    table[loc, loc] = near / near.sum(axis=1, keepdims=True)
    return table


def group_logits(model: PaliGemma, image_tokens: jax.Array, group: Any) -> jax.Array:
    """Teacher-forced logits [R, T-1, V] of one group of rows, from encoded pictures [I, P, W]."""
    rows = group["text"].shape[0]
    images = image_tokens[group["image"]].reshape(rows, -1, image_tokens.shape[-1])
    return model.forward(images, group["text"][:, :-1], group["mask_ar"][:, :-1])


def patch_features(model: PaliGemma, pictures: jax.Array) -> jax.Array:
    """Encoder output [I, P, D] of uint8 pictures [I, size, size, 3]."""
    return model.img.encode(pictures.astype(jnp.float32) / 127.5 - 1.0)


def patch_loss(probe: Any, features: jax.Array, patches: Any) -> jax.Array:
    """How badly a linear probe reads kind, colour, character and box off the patch features."""
    out = features @ probe["kernel"] + probe["bias"]
    kind, colour, character, box = jnp.split(out, np.cumsum(PROBE_SIZES)[:-1], axis=-1)
    total = jnp.zeros(())
    for logits, target in (
        (kind, patches["kind"]),
        (colour, patches["colour"]),
        (character, patches["character"]),
    ):
        nll = token_nll(logits, target)
        weight = jnp.where(target > 0, 4.0, 1.0)  # most patches show nothing
        total += jnp.sum(nll * weight) / jnp.sum(weight)
    shown = (patches["kind"] > 0)[..., None]
    distance = jnp.abs(box - patches["box"]) * shown
    return total + 10.0 * jnp.sum(distance) / jnp.maximum(4 * jnp.sum(shown), 1)


def loss(
    model: PaliGemma,
    probe: Any,
    batch: Any,
    targets: jax.Array,
    pair_weight: float,
    patch_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean loss a supervised token, in nats, summed over groups; the patches'; and each part."""
    features = patch_features(model, batch["pictures"])
    image_tokens = model.img.head(features)
    parts = {"patch": patch_loss(probe, features, batch["patches"])}
    for name in GROUPS:
        group = batch[name]
        logp = jax.nn.log_softmax(group_logits(model, image_tokens, group))
        nll = -jnp.sum(targets[group["text"][:, 1:]] * logp, axis=-1)
        mask = group["mask_loss"][:, 1:]
        parts[name] = jnp.sum(nll * mask) / jnp.sum(mask)
    answers = parts["short"] + parts["long"] + pair_weight * parts["pair"]
    return answers + patch_weight * parts["patch"], parts


def row_correct(
    model: PaliGemma, batch: Any, loc_start: int, loc_tolerance: int
) -> dict[str, jax.Array]:
    """Whether each row's answer is right under teacher forcing, bool[R] a group.

    A <loc> counts as right within `loc_tolerance` bins: a quick look while training, not a metric.
    """
    image_tokens = model.img.head(patch_features(model, batch["pictures"]))
    out = {}
    for name in GROUPS:
        group = batch[name]
        guess = jnp.argmax(group_logits(model, image_tokens, group), axis=-1)
        target = group["text"][:, 1:]
        is_loc = (target >= loc_start) & (target < loc_start + NUM_LOC)
        right = jnp.where(is_loc, jnp.abs(guess - target) <= loc_tolerance, guess == target)
        out[name] = jnp.all(right | (group["mask_loss"][:, 1:] == 0), axis=1)
    return out


# Axes of each stacked weight that are contracted and produced; the rest are batch axes.
_MATRICES: dict[str, MuonDimensionNumbers] = {
    "patch_embed/kernel": MuonDimensionNumbers((0, 1, 2), 3),
    "attn/q/kernel": MuonDimensionNumbers(1, (2, 3)),
    "attn/k/kernel": MuonDimensionNumbers(1, (2, 3)),
    "attn/v/kernel": MuonDimensionNumbers(1, (2, 3)),
    "attn/out/kernel": MuonDimensionNumbers((1, 2), 3),
    "fc1/kernel": MuonDimensionNumbers(1, 2),
    "fc2/kernel": MuonDimensionNumbers(1, 2),
    "img/head/kernel": MuonDimensionNumbers(0, 1),
    "q_einsum/w": MuonDimensionNumbers(2, (1, 3)),
    "kv_einsum/w": MuonDimensionNumbers(3, (2, 4)),
    "attn_vec_einsum/w": MuonDimensionNumbers((1, 2), 3),
    "gating_einsum/w": MuonDimensionNumbers(2, 3),
    "linear/w": MuonDimensionNumbers(1, 2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Peaks are learning rates; see configs/demo.py."""

    peak: float
    adam_peak: float
    weight_decay: float
    warmup_steps: int
    decay_share: float
    grad_clip_norm: float


def schedule(config: OptimizerConfig, peak: float, total_steps: int) -> optax.Schedule:
    """Linear warm-up, plateau, linear decay to zero over the last `decay_share` of the steps."""
    decay = max(1, round(config.decay_share * total_steps))
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, config.warmup_steps),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, decay),
        ],
        [config.warmup_steps, max(config.warmup_steps, total_steps - decay)],
    )


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Muon with update size matched to Adam's (root mean square 0.2), clipped by global norm."""
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip_norm),
        muon(
            schedule(config, config.peak, total_steps),
            weight_decay=config.weight_decay,
            adam_b2=0.98,
            adam_learning_rate=schedule(config, config.adam_peak, total_steps),
            muon_weight_dimension_numbers=_dimensions,
            consistent_rms=0.2,
        ),
    )


def _dimensions(params: Any) -> Any:
    def find(path: Any, _: Any) -> MuonDimensionNumbers | None:
        name = "/".join(str(getattr(p, "key", getattr(p, "name", p))) for p in path)
        return next((v for k, v in _MATRICES.items() if name.endswith(k)), None)

    return jax.tree_util.tree_map_with_path(find, params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that configs/demo.py says; the comments there explain each field."""

    seed: int
    total_steps: int
    model: dict[str, Any]
    batch: BatchConfig
    optimizer: OptimizerConfig
    loc_sigma: float
    pair_weight: float
    patch_steps: int
    patch_weight: float
    log_every: int
    evaluate_every: int
    checkpoint_every: int

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Recipe":
        """Raises TypeError for fields that are missing or unknown."""
        values: dict[str, Any] = config.to_dict()
        batch = BatchConfig(**values.pop("batch"))
        optimizer = OptimizerConfig(**values.pop("optimizer"))
        return cls(batch=batch, optimizer=optimizer, **values)

    def architecture(self, vocab_size: int) -> PaliGemmaConfig:
        """The model's, with a vocabulary of `vocab_size` pieces."""
        return PaliGemmaConfig(
            img=SigLIPConfig(**self.model["img"]),
            llm=GemmaConfig(vocab_size=vocab_size, **self.model["llm"]),
            text_length=self.model["text_length"],
        )

    @property
    def picture(self) -> PictureConfig:
        """Size of the pictures and of their grid of patches."""
        size = self.model["img"]["image_size"]
        return PictureConfig(size=size, side=size // self.model["img"]["patch_size"])


def initial_model(config: PaliGemmaConfig, loc_start: int, seed: int) -> PaliGemma:
    """A float32 model with random weights and structured position and <loc> embeddings."""
    model = PaliGemma(config, rngs=nnx.Rngs(seed))
    side = config.img.image_size // config.img.patch_size
    model.img.pos_embed[...] = jnp.asarray(_grid_waves(side, config.img.width)[None])
    table = np.array(model.llm.embedder.input_embedding[...])
    width = config.llm.width
    waves = _waves(np.linspace(0.0, 1.0, NUM_LOC), width, max_cycles=40.0)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]
    loc = slice(loc_start, loc_start + NUM_LOC)
    # As long as a random row, mostly shared with the neighbouring bins.
    table[loc] = 0.9 * waves @ rotation * np.sqrt(2.0 / width) + 0.3 * table[loc]
    model.llm.embedder.input_embedding[...] = jnp.asarray(table)
    return model


def _waves(x: np.ndarray, width: int, max_cycles: float) -> np.ndarray:
    """[len(x), width] sines and cosines of x in 0..1, from half a cycle to `max_cycles`."""
    cycles = np.geomspace(0.5, max_cycles, width // 2)
    angle = 2 * np.pi * x[:, None] * cycles
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def _grid_waves(side: int, width: int) -> np.ndarray:
    """[side * side, width]: half the features for the row, half for the column."""
    axis = _waves((np.arange(side) + 0.5) / side, width // 2, max_cycles=side / 2)
    rows, columns = np.repeat(axis, side, axis=0), np.tile(axis, (side, 1))
    return np.concatenate([rows, columns], axis=1) * 0.5


STATE_FILE = "state.npz"


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run starts from: vocabulary, architecture, optimizer, parameters and its state."""

    tokenizer: Tokenizer
    config: PaliGemmaConfig
    optimizer: optax.GradientTransformation
    params: Any
    opt_state: Any


def initial_state(recipe: Recipe, workdir: Path) -> Run:
    """Everything at step 0, with the run's own vocabulary."""
    tokenizer = run_tokenizer(workdir / "tokenizer.model", recipe.seed)
    model_config = recipe.architecture(tokenizer.vocab_size)
    optimizer = make_optimizer(recipe.optimizer, recipe.total_steps)
    probe_shape = (model_config.img.width, sum(PROBE_SIZES))
    params = {
        "model": to_params(initial_model(model_config, tokenizer.loc_start, recipe.seed)),
        "probe": {"kernel": jnp.zeros(probe_shape), "bias": jnp.zeros(probe_shape[1:])},
    }
    return Run(tokenizer, model_config, optimizer, params, optimizer.init(params))


def run_tokenizer(path: Path, seed: int) -> Tokenizer:
    """The run's own vocabulary: built once, kept beside the state it belongs to."""
    if not path.exists():
        beside = path.with_suffix(".tmp")
        beside.write_bytes(build_tokenizer(seed))
        os.replace(beside, path)
    return Tokenizer.from_file(path)


def save_state(workdir: Path, step: int, state: Any) -> None:
    """Writes beside, flushes, then renames: a kill leaves the old state or the new one."""
    leaves: dict[str, Any] = {
        f"{i:04d}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))
    }
    path = workdir / STATE_FILE
    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as file:
        np.savez(file, step=step, **leaves)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def restore_state(workdir: Path, state: Any) -> tuple[int, Any]:
    """Step and state as saved, in the structure of `state`."""
    with np.load(workdir / STATE_FILE) as stored:
        leaves = [jnp.asarray(stored[f"{i:04d}"]) for i in range(len(stored.files) - 1)]
        return int(stored["step"]), jax.tree.unflatten(jax.tree.structure(state), leaves)


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
        features = patch_features(model, batch["pictures"])
        value = patch_loss(params["probe"], features, batch["patches"])
        return value, {"patch": value}

    def answer(
        params: Any, batch: Any, targets: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = from_params(config, params["model"], jnp.float32)
        return loss(model, params["probe"], batch, targets, pair_weight, patch_weight)

    return see, answer


def evaluate(
    params: Any,
    config: PaliGemmaConfig,
    loc_start: int,
    held_out: list[dict[str, Any]],
) -> dict[str, float]:
    """Share of teacher-forced answers that are right, by task (boxes within 20 bins of 1,024)."""
    check = jax.jit(
        lambda params, batch: row_correct(
            from_params(config, params, jnp.float32), batch, loc_start, loc_tolerance=20
        )
    )
    right: dict[str, list[bool]] = collections.defaultdict(list)
    for batch in held_out:
        correct = check(params, on_device(batch))
        for group in GROUPS:
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
    targets = jnp.asarray(soft_targets(tokenizer, recipe.loc_sigma))
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
