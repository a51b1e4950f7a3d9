"""Trains the demo model: `python -m checkpoints.training.train --mask_codec FILE --workdir DIR`.

With the library's model, loop, optimizer chain and checkpoints. Its own are the batches of the
synthetic world, Muon, a loss that smooths coordinates over nearby bins, and a linear probe, no part
of the model, that teaches the encoder to see.

Letters: I images, B examples of a group, n images an example, T text tokens, V vocabulary.
"""

import collections
import dataclasses
import functools
import multiprocessing
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
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
    ImageConfig,
    build_tokenizer,
    make_batch,
)
from checkpoints.training.prompts import MaskCodes, build_mask_codes
from paligemma_jax.config import GemmaConfig, PaliGemmaConfig, SigLIPConfig
from paligemma_jax.demo.scene import HELD_OUT, TRAINING
from paligemma_jax.models.paligemma import PaliGemma, split_model
from paligemma_jax.models.sharding import Rules
from paligemma_jax.processing.masks import MaskCodec
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.training.checkpoints import Checkpoints
from paligemma_jax.training.logging import Throughput, progress_display
from paligemma_jax.training.optimizer import (
    Constant,
    Fraction,
    OptimizerConfig,
    RunLength,
    Steps,
    make_optimizer,
)
from paligemma_jax.training.step import TrainState, TrainStep, init_state, token_nll
from paligemma_jax.training.trainer import CHECKPOINTS, Loop, LoopConfig
from paligemma_jax.weights.mask_vae import load_mask_vae

GROUPS = ("short", "long", "pair")
CONFIG = Path(__file__).with_name("demo_config.py")
NUM_LOC = 1024
LOC_TOLERANCE = 20  # bins within which a coordinate counts as right while training
PROBE_SIZES = (NUM_KINDS, NUM_COLORS, NUM_CHARACTERS, 4)
PREFETCH = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that demo_config.py says; the comments there explain each field."""

    seed: int
    total_steps: int
    model: dict[str, Any]
    batch: BatchConfig
    optimizer: dict[str, float]
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
        return cls(batch=BatchConfig(**values.pop("batch")), **values)

    def architecture(self, vocab_size: int) -> PaliGemmaConfig:
        """The model's, with a vocabulary of `vocab_size` pieces."""
        return PaliGemmaConfig(
            img=SigLIPConfig(**self.model["img"]),
            llm=GemmaConfig(vocab_size=vocab_size, **self.model["llm"]),
            text_length=self.model["text_length"],
        )

    @property
    def image(self) -> ImageConfig:
        """Size of the images and of their grid of patches."""
        size = self.model["img"]["image_size"]
        return ImageConfig(size=size, side=size // self.model["img"]["patch_size"])

    @property
    def optimizer_config(self) -> OptimizerConfig:
        """Muon on the matrices and Adam on the rest, each with its own peak."""
        values = self.optimizer
        rate, matrices = values["learning_rate"], "|".join(f".*{re.escape(k)}" for k in _MATRICES)
        schedule = Constant(
            warmup=Steps(int(values["warmup_steps"])), cooldown=Fraction(values["cooldown"])
        )
        return OptimizerConfig(
            learning_rate=rate,
            optimizer=Muon(weight_decay=values["weight_decay"]),
            schedules=Rules(((".*", schedule),)),
            lr_multipliers=Rules(
                ((matrices, 1.0), (".*", values["adam_learning_rate"] / rate)),
            ),
            max_grad_norm=values["max_grad_norm"],
        )


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


@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon on matrices, with updates of Adam's size (root mean square 0.2); Adam on the rest."""

    weight_decay: float

    def transformation(self, decays: Mapping[str, float]) -> optax.GradientTransformation:
        """See `paligemma_jax.training.optimizer.Optimizer`."""

        def dimensions(params: Any) -> Any:
            return {
                path: next((v for k, v in _MATRICES.items() if path.endswith(k)), None)
                for path in params
            }

        return optax.chain(
            muon(
                1.0,
                weight_decay=self.weight_decay,
                adam_b2=0.98,
                muon_weight_dimension_numbers=dimensions,
                consistent_rms=0.2,
            ),
            optax.scale(-1.0),  # the chain descends by itself
        )


class ProbedModel(nnx.Module):
    """The model and, while it trains, a linear probe on its patch features.

    Position and coordinate embeddings start as sines and cosines, and are ordinary trained weights
    afterwards: that saves a small model the many steps it would need to find out that patch 9 is
    under patch 1 and <loc0500> beside <loc0501>.
    """

    def __init__(self, config: PaliGemmaConfig, loc_start: int, seed: int):
        self.model = PaliGemma(config, rngs=nnx.Rngs(seed))
        self.probe_weight = nnx.Param(jnp.zeros((config.img.width, sum(PROBE_SIZES))))
        self.probe_bias = nnx.Param(jnp.zeros(sum(PROBE_SIZES)))
        side = config.img.image_size // config.img.patch_size
        axis = _waves((np.arange(side) + 0.5) / side, config.img.width // 2, max_cycles=side / 2)
        grid = np.concatenate([np.repeat(axis, side, axis=0), np.tile(axis, (side, 1))], axis=1)
        self.model.img.pos_embed[...] = jnp.asarray(0.5 * grid[None])
        table = np.array(self.model.llm.embedder.input_embedding[...])
        width = config.llm.width
        waves = _waves(np.linspace(0.0, 1.0, NUM_LOC), width, max_cycles=40.0)
        rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]
        loc = slice(loc_start, loc_start + NUM_LOC)
        # As long as a random embedding, mostly shared with the neighboring bins.
        table[loc] = 0.9 * waves @ rotation * np.sqrt(2.0 / width) + 0.3 * table[loc]
        self.model.llm.embedder.input_embedding[...] = jnp.asarray(table)

    def patch_features(self, images: jax.Array) -> jax.Array:
        """Encoder output [I, P, D] of uint8 images [I, size, size, 3]."""
        return self.model.img.encode(images.astype(jnp.float32) / 127.5 - 1.0)

    def logits(self, features: jax.Array, group: Any) -> jax.Array:
        """Teacher-forced logits [B, T-1, V] of a group, from features of all images."""
        image_tokens = self.model.img.head(features)
        examples, width = group["text"].shape[0], image_tokens.shape[-1]
        images = image_tokens[group["image"]].reshape(examples, -1, width)
        return self.model.forward(images, group["text"][:, :-1], group["mask_ar"][:, :-1])

    def patch_loss(self, features: jax.Array, patches: Any) -> jax.Array:
        """How badly the probe reads kind, color, character and box off the patch features."""
        out = features @ self.probe_weight[...] + self.probe_bias[...]
        kind, color, character, box = jnp.split(out, np.cumsum(PROBE_SIZES)[:-1], axis=-1)
        total = jnp.zeros(())
        for logits, name in ((kind, "kind"), (color, "color"), (character, "character")):
            nll = token_nll(logits, patches[name])
            weight = jnp.where(patches[name] > 0, 4.0, 1.0)  # most patches show nothing
            total += jnp.sum(nll * weight) / jnp.sum(weight)
        shown = (patches["kind"] > 0)[..., None]
        distance = jnp.abs(box - patches["box"]) * shown
        return total + 10.0 * jnp.sum(distance) / jnp.maximum(4 * jnp.sum(shown), 1)


def _waves(x: np.ndarray, width: int, max_cycles: float) -> np.ndarray:
    """[len(x), width] sines and cosines of x in 0..1, from half a cycle to `max_cycles`."""
    angle = 2 * np.pi * x[:, None] * np.geomspace(0.5, max_cycles, width // 2)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def soft_targets(tokenizer: Tokenizer, sigma: float) -> np.ndarray:
    """Target distribution f32[V, V] by token: itself, or for <loc> a Gaussian of `sigma` bins."""
    table = np.eye(tokenizer.vocab_size, dtype=np.float32)
    bins = np.arange(NUM_LOC)
    near = np.exp(-0.5 * ((bins[:, None] - bins[None]) / sigma) ** 2)
    loc = slice(tokenizer.loc_start, tokenizer.loc_start + NUM_LOC)
    table[loc, loc] = near / near.sum(axis=1, keepdims=True)
    return table


def loss(
    model: ProbedModel, batch: Any, step: jax.Array, recipe: Recipe
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Nats per target token, summed over groups, and the patches' loss; and each part.

    In the first `patch_steps` of the recipe the patches' loss alone.
    """
    features = model.patch_features(batch["images"])
    patch = model.patch_loss(features, batch["patches"])

    def answers() -> tuple[jax.Array, dict[str, jax.Array]]:
        parts = {}
        for name in GROUPS:
            group = batch[name]
            logp = jax.nn.log_softmax(model.logits(features, group))
            nll = -jnp.sum(batch["targets"][group["text"][:, 1:]] * logp, axis=-1)
            mask = group["mask_loss"][:, 1:]
            parts[name] = jnp.sum(nll * mask) / jnp.sum(mask)
        total = parts["short"] + parts["long"] + recipe.pair_weight * parts["pair"]
        return total + recipe.patch_weight * patch, parts

    def patches() -> tuple[jax.Array, dict[str, jax.Array]]:
        return patch, dict.fromkeys(GROUPS, jnp.zeros(()))

    total, parts = jax.lax.cond(step < recipe.patch_steps, patches, answers)
    return total, parts | {"patch": patch}


class Accuracy:
    """Fraction of teacher-forced answers that are right, by task: a quick look, not a metric."""

    def __init__(self, graphdef: Any, loc_start: int, batches: list[dict[str, Any]]):
        self._batches = batches

        def correct(params: Any, batch: Any) -> dict[str, jax.Array]:
            model: ProbedModel = graphdef.merge_flat(params)
            features = model.patch_features(batch["images"])
            found = {}
            for name in GROUPS:
                guess = jnp.argmax(model.logits(features, batch[name]), axis=-1)
                target = batch[name]["text"][:, 1:]
                is_loc = (target >= loc_start) & (target < loc_start + NUM_LOC)
                near = is_loc & (jnp.abs(guess - target) <= LOC_TOLERANCE)
                is_target = batch[name]["mask_loss"][:, 1:] > 0
                found[name] = jnp.all((guess == target) | near | ~is_target, axis=1)
            return found

        self._correct = jax.jit(correct)

    def __call__(self, state: TrainState) -> dict[str, float]:
        right: dict[str, list[bool]] = collections.defaultdict(list)
        for batch in self._batches:
            correct = self._correct(state.params, on_device(batch))
            for group in GROUPS:
                for task, ok in zip(batch[group]["task"], np.asarray(correct[group]), strict=True):
                    right[f"correct/{task}"].append(bool(ok))
        return {task: float(np.mean(values)) for task, values in sorted(right.items())}


def on_device(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch without what only the host needs."""
    return {
        name: {k: v for k, v in part.items() if k != "task"} if isinstance(part, dict) else part
        for name, part in batch.items()
    }


_worker: list[tuple[Tokenizer, MaskCodes]] = []  # one per worker process


def _start_worker(model: bytes, codes: MaskCodes) -> None:
    _worker.append((Tokenizer.from_bytes(model), codes))


def _work(recipe: Recipe, split: int, index: int) -> dict[str, Any]:
    tokenizer, codes = _worker[0]
    return make_batch(tokenizer, recipe.batch, recipe.image, recipe.seed, split, index, codes)


class WorldBatches:
    """Batches of one split from 0 up, made ahead in worker processes: see `BatchIterator`."""

    def __init__(self, pool: Any, recipe: Recipe, split: int):
        self._make = functools.partial(pool.apply_async, _work)
        self._about = recipe, split
        self._next = 0
        self._pending: collections.deque[Any] = collections.deque()

    def __next__(self) -> Any:
        while len(self._pending) < PREFETCH:
            number = self._next + len(self._pending)
            self._pending.append(self._make((*self._about, number)))
        batch = self._pending.popleft().get()
        self._next += 1
        return SimpleNamespace(batch=batch, ids=(f"batch {self._next - 1}",))

    def state(self) -> bytes:
        return str(self._next).encode()

    def restore(self, state: bytes) -> None:
        self._pending.clear()
        self._next = int(state)


@dataclasses.dataclass(frozen=True)
class Start:
    """A run at step 0, with its own vocabulary."""

    tokenizer: Tokenizer
    config: PaliGemmaConfig
    graphdef: Any
    optimizer: optax.GradientTransformation
    state: TrainState


def start(recipe: Recipe, workdir: Path) -> Start:
    """Everything at step 0; the vocabulary is built once and kept beside the checkpoints."""
    path = workdir / "tokenizer.model"
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        beside.write_bytes(build_tokenizer(recipe.seed))
        beside.replace(path)
    tokenizer = Tokenizer.from_file(path)
    config = recipe.architecture(tokenizer.vocab_size)
    graphdef, params = split_model(ProbedModel(config, tokenizer.loc_start, recipe.seed))
    run = RunLength(total_steps=recipe.total_steps)
    optimizer = make_optimizer(recipe.optimizer_config, params, run)
    return Start(tokenizer, config, graphdef, optimizer, init_state(params, params, optimizer))


def train(recipe: Recipe, codes: MaskCodes, workdir: Path, *, bar: bool = False) -> TrainState:
    """Runs or continues training; returns the last state. Everything it writes is in `workdir`."""
    begin = start(recipe, workdir)
    targets = jnp.asarray(soft_targets(begin.tokenizer, recipe.loc_sigma))
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(1, _start_worker, (begin.tokenizer.to_bytes(), codes)) as pool,
        Checkpoints(workdir / CHECKPOINTS) as checkpoints,
        progress_display(bar) as progress,
    ):
        held_out = WorldBatches(pool, recipe, HELD_OUT)
        accuracy = Accuracy(
            begin.graphdef, begin.tokenizer.loc_start, [next(held_out).batch for _ in range(8)]
        )
        loop = Loop(
            LoopConfig(
                total_steps=recipe.total_steps,
                log_every=recipe.log_every,
                evaluate_every=recipe.evaluate_every,
                checkpoint_every=recipe.checkpoint_every,
                seed=recipe.seed,
                tensorboard=False,
                settings={k: str(v) for k, v in dataclasses.asdict(recipe).items()},
            ),
            workdir,
            TrainStep(
                begin.graphdef, begin.optimizer, loss_fn=functools.partial(loss, recipe=recipe)
            ),
            begin.state,
            WorldBatches(pool, recipe, TRAINING),
            checkpoints,
            place=lambda batch: on_device(batch) | {"targets": targets},
            throughput=Throughput(recipe.batch.scenes * (recipe.batch.short + recipe.batch.long)),
            evaluate=accuracy,
            progress=progress,
        )
        loop.run()
    return loop.state


def main(_: list[str]) -> None:
    """Entry point."""
    values = flags.FLAGS
    codes = build_mask_codes(MaskCodec(load_mask_vae(Path(values.mask_codec))))
    train(Recipe.from_config(values.config), codes, Path(values.workdir), bar=True)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", str(CONFIG), "Training configuration.")
    flags.DEFINE_string("mask_codec", None, "What mask_codec.py wrote.", required=True)
    flags.DEFINE_string("workdir", None, "Where checkpoints and metrics go.", required=True)
    app.run(main)
