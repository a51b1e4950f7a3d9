"""Writes a trained demo model as a checkpoint: `python -m checkpoints.training.export --help`."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from checkpoints.training.train import CONFIG, Recipe, start
from paligemma_jax.errors import CheckpointError
from paligemma_jax.processing.image import ImagePreprocessing
from paligemma_jax.processing.processor import Processor
from paligemma_jax.training.checkpoints import Checkpoints
from paligemma_jax.training.trainer import CHECKPOINTS
from paligemma_jax.weights.convert import export_weights
from paligemma_jax.weights.formats import CheckpointMetadata
from paligemma_jax.weights.mask_vae import load_mask_vae
from paligemma_jax.weights.views import ArrayWeights


def export(recipe: Recipe, workdir: Path, mask_codec: Path, target: Path) -> int:
    """Stores the parameters in bfloat16 with processor and codec; returns the step they are from.

    Raises CheckpointError if `target` exists, `mask_codec` is none, or nothing was trained.
    """
    load_mask_vae(mask_codec)
    begin = start(recipe, workdir)
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        restored = checkpoints.restore_latest(begin.state)
    if restored is None:
        raise CheckpointError(f"{workdir} has no checkpoints. Run checkpoints.training.train first")
    params = {
        path.removeprefix("model/"): np.asarray(weight.astype(jnp.bfloat16))
        for path, weight in restored.tree.trainable.items()
        if path.startswith("model/")
    }
    image = ImagePreprocessing(begin.config.img.image_size)
    processor = Processor(begin.tokenizer, image, max_text_length=begin.config.text_length)
    metadata = CheckpointMetadata(
        processor.to_dict(),
        begin.tokenizer.to_bytes(),
        mask_codec.read_bytes(),
        {"kind": "demo", "step": restored.step},
    )
    export_weights(target, ArrayWeights(begin.config, params), metadata)
    return restored.step


def main(_: list[str]) -> None:
    """Entry point."""
    values = flags.FLAGS
    recipe, codec = Recipe.from_config(values.config), Path(values.mask_codec)
    step = export(recipe, Path(values.workdir), codec, Path(values.target))
    print(f"wrote {values.target}, the model after step {step:,}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", str(CONFIG), "Training configuration.")
    flags.DEFINE_string("workdir", None, "Where training left its checkpoints.", required=True)
    flags.DEFINE_string("mask_codec", None, "What mask_codec.py wrote.", required=True)
    flags.DEFINE_string("target", None, "Directory to write; must not exist.", required=True)
    app.run(main)
