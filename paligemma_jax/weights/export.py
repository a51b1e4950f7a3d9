"""Writing a model in any format, whole or not at all, with its layers passing one by one."""

import os
from pathlib import Path

from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.models.recipe import spell_recipe
from paligemma_jax.weights.arrays import DTypeLike, as_float_dtype
from paligemma_jax.weights.changed_weights import Finite, Resampled, Watched, cast_floats
from paligemma_jax.weights.compare import require_equal
from paligemma_jax.weights.contents import Contents
from paligemma_jax.weights.formats import Format, find_format
from paligemma_jax.weights.load import with_resolution
from paligemma_jax.weights.npz_writer import BigVision
from paligemma_jax.weights.rounded_weights import few_bit_specs, float_shapes
from paligemma_jax.weights.source import Progress, Weights
from paligemma_jax.weights.staging import staged
from paligemma_jax.weights.strict import require_fit


def export_weights(
    target: str | os.PathLike[str],
    weights: Weights,
    contents: Contents,
    format: str | Format = "orbax",
    *,
    what: str | None = None,
    dtype: DTypeLike = None,
    resolution: int | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes a new checkpoint, as one directory or file that appears when all of it is written.

    Peak memory is that of some layers, whatever the model's size. An existing `target` is never
    touched, and an error, a full disk or a kill leaves none.

    Args:
      target: which does not exist yet.
      weights: must fit their configuration and `contents.recipe`, and be finite.
      contents: what goes along with them.
      format: "orbax", "huggingface", "big_vision", or one of their classes with its settings.
      what: the weights are, in messages; "the model" otherwise.
      dtype: casts every float; stored dtypes stay otherwise, and those of few bits in any case.
      resolution: resamples the position embeddings to pictures of so many pixels a side.
      verify: reads what was written again, and compares it with `weights` bit by bit.
      progress: called with what is being written, bytes done and bytes in all.

    Raises CheckpointError and ConfigError.
    """
    writer, path = find_format(format), Path(target).expanduser()
    what = what or "the model"
    changed = _changed(weights, dtype, resolution)
    found = {name: spec.shape for name, spec in changed.specs.items()}
    few_bits = {} if contents.recipe is None else few_bit_specs(changed.config, contents.recipe)
    wanted = {name: spec.shape for name, spec in few_bits.items()}
    require_fit(what, found, wanted | float_shapes(changed.config, contents.recipe))
    _check_name(path, writer)
    if contents.recipe is not None and not writer.few_bits:
        raise CheckpointError(
            f"{path} cannot be written: the weights of {what} are rounded to few bits "
            f"({spell_recipe(contents.recipe)}), and {writer.name} has room for floats only. Our "
            "own store fits, or the floats that are left of them. Say: paligemma convert SOURCE "
            f"TARGET --to {writer.name} --dequantize"
        )
    writer.check(path, changed)
    if contents.tokenizer is None and writer.needs_tokenizer(path):
        raise CheckpointError(
            f"There is no tokenizer to write into {path}. The tokenizer.model of PaliGemma fits. "
            "Copy it to where the weights are."
        )
    nbytes = sum(spec.nbytes for spec in changed.specs.values())
    watched = Watched(changed, progress or _nobody, nbytes * (2 if verify else 1))
    finite = Finite(watched, what, weights.specs)
    beside = len(contents.tokenizer or b"") + len(contents.mask_codec or b"")
    with staged(path, nbytes + beside, is_file=writer.is_file(path)) as staging:
        writer.write(staging, finite, contents)
        if verify:
            _verify(staging, path, writer, watched)
        watched.finish()


def _changed(weights: Weights, dtype: DTypeLike, resolution: int | None) -> Weights:
    config = with_resolution(weights.config, resolution)
    if config != weights.config:
        weights = Resampled(weights, config)
    if dtype is not None:
        weights = cast_floats(weights, as_float_dtype(dtype))
    return weights


def _check_name(path: Path, writer: Format) -> None:
    """Directories are not to be called like files, which they would be taken for."""
    if path.suffix in (".npz", ".safetensors") and not writer.is_file(path):
        raise ConfigError(
            f"{path} is the name of a file, and {writer.name} is a directory. A name without "
            f'{path.suffix} fits, or format="big_vision" (--to big_vision) for an .npz. Try: '
            f"{path.with_suffix('')}"
        )


def _verify(staging: Path, target: Path, writer: Format, wanted: Weights) -> None:
    from paligemma_jax.weights.checkpoint import open_checkpoint

    config = wanted.config if isinstance(writer, BigVision) else None  # a file that tells none
    with open_checkpoint(staging, config=config) as checkpoint:
        require_equal(checkpoint, wanted, target)


def _nobody(name: str, done: int, total: int) -> None:
    """Hears of no progress."""
