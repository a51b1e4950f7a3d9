"""Writes a trained demo model as a checkpoint: `python -m checkpoints.training.export --help`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from checkpoints.training.train import Recipe, initial_state, restore_state
from paligemma_jax.models.paligemma import flatten
from paligemma_jax.processing.image import ImagePreprocessing
from paligemma_jax.processing.processor import Processor
from paligemma_jax.weights.convert import export_weights
from paligemma_jax.weights.formats import CheckpointMetadata
from paligemma_jax.weights.mask_vae import load_mask_vae
from paligemma_jax.weights.views import ArrayWeights


def export(recipe: Recipe, workdir: Path, mask_codec: Path, target: Path) -> int:
    """Stores the parameters in bfloat16 with processor and codec; returns the step they are from.

    Raises CheckpointError if `target` exists or `mask_codec` is no codec.
    """
    load_mask_vae(mask_codec)
    run = initial_state(recipe, workdir)
    step, state = restore_state(workdir, (run.params, run.opt_state))
    params = jax.tree.map(lambda w: np.asarray(w.astype(jnp.bfloat16)), state[0]["model"])
    processor = Processor(
        run.tokenizer,
        ImagePreprocessing(run.config.img.image_size),
        max_text_length=run.config.text_length,
    )
    metadata = CheckpointMetadata(
        processor.to_dict(),
        run.tokenizer.to_bytes(),
        mask_codec.read_bytes(),
        {"kind": "demo", "step": step},
    )
    export_weights(target, ArrayWeights(run.config, flatten(params)), metadata)
    return step


def main(_: list[str]) -> None:
    """Entry point."""
    values = flags.FLAGS
    recipe, codec = Recipe.from_config(values.config), Path(values.mask_codec)
    step = export(recipe, Path(values.workdir), codec, Path(values.target))
    print(f"wrote {values.target}, the model after step {step:,}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/demo.py", "The training recipe.")
    flags.DEFINE_string("workdir", None, "Where training left its state.", required=True)
    flags.DEFINE_string("mask_codec", None, "What train_codec wrote.", required=True)
    flags.DEFINE_string("target", None, "Directory to write; must not exist.", required=True)
    app.run(main)
