"""`paligemma convert`: a checkpoint of any format into any other.

The formats that a model is written in, by name.

Two sets of weights, compared value by value.

Writing a model in any format, whole or not at all, with its layers passing one by one.

Writing a model that several processes hold in parts.

Whether a checkpoint's bytes are still those that were written.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import jax
import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.filesystem import staged, staging_path
from paligemma_jax.models.quantization_config import Quantization, QuantizationConfig
from paligemma_jax.weights.big_vision import BigVision
from paligemma_jax.weights.checkpoint import Checkpoint, open_checkpoint
from paligemma_jax.weights.companions import Contents, hugging_face_tokenizer_files
from paligemma_jax.weights.huggingface import HuggingFace
from paligemma_jax.weights.load import with_resolution
from paligemma_jax.weights.store import (
    PARAMS,
    SUMS,
    Orbax,
    arrays_to_store,
    find_changed,
    write_tree,
)
from paligemma_jax.weights.tensors import (
    DTypeLike,
    Progress,
    Weights,
    aligned_empty,
    as_float_dtype,
    families,
    find_problems,
    piece_shapes,
    read_pieces,
    require_fit,
)
from paligemma_jax.weights.views import (
    Finite,
    Resampled,
    RoundedWeights,
    Watched,
    WidenedWeights,
    cast_floats,
    few_bit_specs,
    float_shapes,
)


@runtime_checkable
class Format(Protocol):
    """Writes a model in one of the formats it is published or kept in.

    Attributes:
      few_bits: whether it has room for weights of few bits.
    """

    name: ClassVar[str]
    few_bits: ClassVar[bool]

    def is_file(self, target: Path) -> bool:
        """Whether `target` is to be one file; else it is a directory."""
        ...

    def needs_tokenizer(self, target: Path) -> bool:
        """Whether a tokenizer goes along."""
        ...

    def check(self, target: Path, weights: Weights) -> None:
        """Raises CheckpointError or ConfigError for what cannot be written."""
        ...

    def write(self, target: Path, weights: Weights, contents: Contents) -> None:
        """Writes into an empty directory, or over an empty file, piece by piece; raises OSError."""
        ...


FORMATS: dict[str, Format] = {
    format.name: format for format in (Orbax(), HuggingFace(), BigVision())
}


def find_format(format: str | Format) -> Format:
    """The format of a name, or the very one given; raises ConfigError for an unknown name."""
    if not isinstance(format, str):
        return format
    if format not in FORMATS:
        raise ConfigError(
            f"There is no format {format!r}. {', '.join(FORMATS)} fit. Say for example: "
            'format="huggingface" (--to huggingface)'
        )
    return FORMATS[format]


def require_equal(written: Weights, wanted: Weights, path: Path) -> None:
    """Raises one CheckpointError that names every tensor of `path` which is not as it was wanted.

    Bits are compared, piece by piece.
    """
    problems = find_problems(
        {name: spec.shape for name, spec in written.specs.items()},
        {name: spec.shape for name, spec in wanted.specs.items()},
    )
    problems += _config_problems(written.config, wanted.config)
    found = written.specs
    for family in families(wanted.specs):
        if all(n in found and found[n].shape == wanted.specs[n].shape for n in family):
            problems += _differences(written, wanted, family)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        listing = "\n  ".join(problems)
        raise CheckpointError(
            f"{path} was not written as it should be ({count}):\n  {listing}\n"
            "A disk and memory without faults fit. Nothing of it was left behind. Convert again, "
            "to another disk: paligemma convert SOURCE TARGET --verify"
        )


def _config_problems(written: PaliGemmaConfig, wanted: PaliGemmaConfig) -> list[str]:
    """Fields that differ, except those that no published format has."""
    llm = dataclasses.replace(written.llm, sliding_window=wanted.llm.sliding_window)
    written = dataclasses.replace(written, llm=llm, text_length=wanted.text_length)
    pairs = ((written.img, wanted.img), (written.llm, wanted.llm))
    return [
        f"config      {field.name}: {getattr(a, field.name)!r}, not {getattr(b, field.name)!r}"
        for a, b in pairs
        for field in dataclasses.fields(a)
        if not _alike(getattr(a, field.name), getattr(b, field.name))
    ]


def _alike(a: object, b: object) -> bool:
    """Whether two values are equal; floats may be rounded where files have them squared."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12)
    return a == b


def _differences(written: Weights, wanted: Weights, family: Sequence[str]) -> list[str]:
    """A line for each tensor of which any value differs; see `families`."""
    problems = []
    for name in family:
        spec, found = wanted.specs[name], written.specs[name]
        if found.dtype != spec.dtype:
            problems.append(f"dtype       {name}: {found.dtype}, not {spec.dtype}")
    if problems:
        return problems
    differ = [0] * len(family)
    for pairs in zip(read_pieces(written, family), read_pieces(wanted, family), strict=True):
        for number, both in enumerate(zip(*pairs, strict=True)):
            bits = [array.view(f"u{array.itemsize}") for array in both]
            differ[number] += int(np.count_nonzero(np.not_equal(*bits)))
    return [
        f"values      {name}: {count:,} of {wanted.specs[name].size:,} differ"
        for name, count in zip(family, differ, strict=True)
        if count
    ]


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
      weights: must fit their configuration and `contents.quantization`, and be finite.
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
    few_bits = (
        {}
        if contents.quantization is None
        else few_bit_specs(changed.config, contents.quantization)
    )
    wanted = {name: spec.shape for name, spec in few_bits.items()}
    require_fit(what, found, wanted | float_shapes(changed.config, contents.quantization))
    _check_name(path, writer)
    if contents.quantization is not None and not writer.few_bits:
        raise CheckpointError(
            f"{path} cannot be written: the weights of {what} are rounded to few bits "
            f"({str(contents.quantization)}), and {writer.name} has room for floats only. Our "
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


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str | Format = "orbax",
    dtype: DTypeLike = None,
    resolution: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    mask_codec: str | os.PathLike[str] | None = None,
    quantize: Quantization | str | None = None,
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
      quantize: "int8", "int4" or any other `QuantizationConfig`: weights are quantized, in
        the dtype they have or are cast to, and stored so. Only our own store has room for them.
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
        quantization = _quantization(checkpoint, quantize, dequantize)
        weights: Weights = checkpoint
        if quantize is not None and quantization is not None:
            if dtype is not None:  # first, as on loading
                weights = cast_floats(weights, as_float_dtype(dtype))
            finite = Finite(weights, str(checkpoint.path), checkpoint.specs)
            weights = RoundedWeights(finite, quantization)
        elif dequantize and checkpoint.quantization is not None:
            widened = as_float_dtype(dtype or "bfloat16")
            weights = WidenedWeights(checkpoint, checkpoint.quantization, widened)
        from_hub = checkpoint.kind == "huggingface" and tokenizer is None
        contents = Contents(
            _processor(checkpoint, resolution),
            words,
            checkpoint.mask_codec_bytes,
            checkpoint.origin,
            quantization,
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


def _quantization(
    checkpoint: Checkpoint, quantize: Quantization | str | None, dequantize: bool
) -> QuantizationConfig | None:
    """What weights are to be rounded by when they are written."""
    wanted = None if quantize is None else QuantizationConfig.of(quantize)
    stored = checkpoint.quantization
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
            f"The weights of {checkpoint.path} are rounded already ({str(stored)}), and "
            "rounding them again would lose more. Weights as they were trained fit. Convert from "
            "where those are: paligemma convert SOURCE TARGET --quantize FORMAT"
        )
    return wanted or stored


def _processor(checkpoint: Checkpoint, resolution: int | None) -> dict[str, object]:
    """The processor's settings, for pictures of the new size."""
    settings = dict(checkpoint.processor_settings)
    size = with_resolution(checkpoint.config, resolution).img.image_size
    if size != checkpoint.config.img.image_size:
        settings["image"] = {**settings["image"], "size": size}
    return settings


def export_from_all(target: Path, weights: Weights, contents: Contents) -> None:
    """`export_weights` as a store in a directory that all processes see; each of them calls this.

    Each gathers the same pieces in the same order, and the first one writes. It is not done when
    the others are: a barrier should follow. What goes wrong in one process only, the others do not
    learn here. Raises CheckpointError.
    """
    if jax.process_index() == 0:
        export_weights(target, weights, contents)
    else:
        write_tree(staging_path(target.absolute()) / PARAMS, arrays_to_store(weights))


def check(path: str | os.PathLike[str], progress: Progress | None = None) -> None:
    """Reads all of a checkpoint and compares the digests it carries; raises CheckpointError.

    A store has them of every file and array, an npz of every array (CRC-32), and a Hugging Face
    directory in SHA256SUMS, which we write and the published ones do not have.
    """
    with open_checkpoint(path) as checkpoint:
        if checkpoint.kind != "huggingface":
            _read_through(checkpoint, progress)
        elif (checkpoint.path / SUMS).is_file():
            _compare(checkpoint.path)
        else:
            raise CheckpointError(
                f"{path} carries no digests to check: it has no {SUMS}. A checkpoint written by "
                f"paligemma convert does. Run: paligemma convert {path} TARGET"
            )


def _read_through(weights: Weights, progress: Progress | None) -> None:
    total = sum(spec.nbytes for spec in weights.specs.values())
    done = 0
    for name, spec in weights.specs.items():
        if progress:
            progress(name, done, total)
        shapes = piece_shapes(name, spec.shape)
        for shape, fill in zip(shapes, weights.pieces(name, spec.dtype), strict=True):
            fill(aligned_empty(shape, spec.dtype))
        done += spec.nbytes
    if progress:
        progress("", total, total)


def _compare(directory: Path) -> None:
    problems = find_changed(directory)
    if problems:
        listing = "\n  ".join(problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise CheckpointError(
            f"{directory} is damaged ({count}):\n  {listing}\n"
            "Files exactly as they were written fit. Copy them again, or convert again: paligemma "
            "convert SOURCE TARGET --to huggingface"
        )
