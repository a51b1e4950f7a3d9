"""`paligemma convert`: a checkpoint of any format into any other."""

import os
from pathlib import Path

from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.models.recipe import Mixed, Recipe, find_recipe, spell_recipe
from paligemma_jax.weights.arrays import DTypeLike, as_float_dtype
from paligemma_jax.weights.changed_weights import Finite, cast_floats
from paligemma_jax.weights.checkpoint import Checkpoint, open_checkpoint
from paligemma_jax.weights.companions import hugging_face_tokenizer_files
from paligemma_jax.weights.contents import Contents
from paligemma_jax.weights.export import export_weights
from paligemma_jax.weights.formats import Format, find_format
from paligemma_jax.weights.load import with_resolution
from paligemma_jax.weights.rounded_weights import RoundedWeights, WidenedWeights
from paligemma_jax.weights.source import Progress, Weights


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str | Format = "orbax",
    dtype: DTypeLike = None,
    resolution: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    mask_codec: str | os.PathLike[str] | None = None,
    quantize: Recipe | str | None = None,
    dequantize: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes `target` from a big_vision npz, a Hugging Face directory, or a store.

    Layers pass one by one, so that memory does not depend on the model's size. `target` appears
    when all is written, and never replaces anything.

    Args:
      source: path of the checkpoint.
      target: path of the new one.
      format: "orbax" (our store), "huggingface" (sharded safetensors with all that transformers
        wants), "big_vision" (an npz where `target` ends in .npz, else a directory with one), or one
        of their classes, such as `HuggingFace(shard_bytes=2_000_000_000)`.
      dtype: "bfloat16", "float32" or "float16"; the stored dtypes stay without it.
      resolution: resamples the position embeddings to pictures of so many pixels a side.
      tokenizer: needed where none lies beside the weights.
      mask_codec: such as vae-oid.npz, where masks are wanted and none lies beside the weights.
      quantize: "int8", "int4" or any other recipe (see `find_recipe`): weights are rounded, in the
        dtype they have or are cast to, and stored so. Only our own store has room for them.
      dequantize: makes floats of weights that are stored rounded, of bfloat16 or `dtype`.
      verify: reads `target` again and compares it with `source` tensor by tensor.
      progress: called with what is being written, bytes done and bytes in all.

    Raises CheckpointError and ConfigError; nothing is left behind then.
    """
    writer = find_format(format)
    with open_checkpoint(source, tokenizer=tokenizer, mask_codec=mask_codec) as checkpoint:
        words = checkpoint.tokenizer_bytes
        if words is None and writer.needs_tokenizer(Path(target)):
            raise CheckpointError(
                f"There is no tokenizer beside {checkpoint.path}. A tokenizer.model, or a Hugging "
                "Face tokenizer.json, of PaliGemma fits. Copy it there, or name it: paligemma "
                f"convert {source} {target} --tokenizer tokenizer.model"
            )
        recipe = _recipe(checkpoint, quantize, dequantize)
        weights: Weights = checkpoint
        if quantize is not None and recipe is not None:
            if dtype is not None:  # first, as on loading
                weights = cast_floats(weights, as_float_dtype(dtype))
            finite = Finite(weights, str(checkpoint.path), checkpoint.specs)
            weights = RoundedWeights(finite, recipe)
        elif dequantize and checkpoint.recipe is not None:
            widened = as_float_dtype(dtype or "bfloat16")
            weights = WidenedWeights(checkpoint, checkpoint.recipe, widened)
        from_hub = checkpoint.kind == "huggingface" and tokenizer is None
        contents = Contents(
            _processor(checkpoint, resolution),
            words,
            checkpoint.mask_codec_bytes,
            checkpoint.origin,
            recipe,
            hugging_face_tokenizer_files(checkpoint.path) if from_hub else {},
        )
        export_weights(
            target,
            weights,
            contents,
            writer,
            what=str(checkpoint.path),
            dtype=dtype,
            resolution=resolution,
            verify=verify,
            progress=progress,
        )


def _recipe(
    checkpoint: Checkpoint, quantize: Recipe | str | None, dequantize: bool
) -> Mixed | None:
    """What weights are to be rounded by when they are written."""
    wanted = None if quantize is None else find_recipe(quantize)
    stored = checkpoint.recipe
    if wanted is not None and dequantize:
        raise ConfigError(
            "quantize and dequantize are both given. One of them fits. Leave the other out."
        )
    if dequantize:
        if stored is None:
            raise ConfigError(
                f"The weights of {checkpoint.path} are floats, and there is nothing to dequantize. "
                "A store of few bits fits. Leave dequantize=True (--dequantize) out."
            )
        return None
    if wanted is not None and stored is not None:
        raise ConfigError(
            f"The weights of {checkpoint.path} are rounded already ({spell_recipe(stored)}), and "
            "rounding them again would lose more. Weights as they were trained fit. Convert from "
            "where those are: paligemma convert SOURCE TARGET --quantize RECIPE"
        )
    return wanted or stored


def _processor(checkpoint: Checkpoint, resolution: int | None) -> dict[str, object]:
    """The processor's settings, for pictures of the new size."""
    settings = dict(checkpoint.processor_settings)
    size = with_resolution(checkpoint.config, resolution).img.image_size
    if size != checkpoint.config.img.image_size:
        settings["image"] = {**settings["image"], "size": size}
    return settings
