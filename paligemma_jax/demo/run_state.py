"""What a training run of the demo model starts from and leaves on disk."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.demo import objective
from paligemma_jax.demo.initial import initial_model
from paligemma_jax.demo.optimizer import make_optimizer
from paligemma_jax.demo.recipe import Recipe
from paligemma_jax.demo.vocabulary import build_tokenizer
from paligemma_jax.models.abstract import to_params
from paligemma_jax.processing.tokenizer import Tokenizer

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
    probe_shape = (model_config.img.width, sum(objective.PROBE_SIZES))
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
