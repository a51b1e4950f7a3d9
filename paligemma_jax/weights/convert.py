"""Converting checkpoints and exporting models, in any format, whole or not at all.

Layers pass one by one, so that memory does not depend on the model's size.
"""

import dataclasses
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError, ConfigError, problem_list
from paligemma_jax.filesystem import staged, staging_path
from paligemma_jax.models.quantization_config import Quantization, QuantizationConfig
from paligemma_jax.weights.big_vision import BigVision
from paligemma_jax.weights.checkpoint import Checkpoint, open_checkpoint
from paligemma_jax.weights.formats import CheckpointFormat, CheckpointMetadata
from paligemma_jax.weights.huggingface import HuggingFace
from paligemma_jax.weights.sidecar_files import SUMS, changed_files, hugging_face_tokenizer_files
from paligemma_jax.weights.store import PARAMS, Orbax, arrays_to_store, damaged, write_arrays
from paligemma_jax.weights.tensors import (
    DTypeLike,
    Progress,
    TensorSource,
    as_float_dtype,
    read_chunks,
    shape_problems,
    tensor_groups,
    validation_error,
)
from paligemma_jax.weights.views import (
    Checked,
    Dequantized,
    Quantized,
    cast_floats,
    float_shapes,
    quantized_specs,
    resampled,
    with_resolution,
)

FORMATS: dict[str, CheckpointFormat] = {
    format.name: format for format in (Orbax(), HuggingFace(), BigVision())
}


def find_format(format: str | CheckpointFormat) -> CheckpointFormat:
    """The format of a name, or the very one given; raises ConfigError for an unknown name."""
    if not isinstance(format, str):
        return format
    if format not in FORMATS:
        raise ConfigError(
            f"Unknown format {format!r}: expected {', '.join(FORMATS)}. Pass for example "
            'format="huggingface" (--to huggingface)'
        )
    return FORMATS[format]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str | CheckpointFormat = "orbax",
    dtype: DTypeLike = None,
    resolution: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    mask_codec: str | os.PathLike[str] | None = None,
    quantize: Quantization | str | None = None,
    dequantize: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes `target` from a big_vision npz, a Hugging Face directory, or a native checkpoint.

    Layers pass one by one, so that memory does not depend on the model's size. `target` appears
    when all is written, and never replaces anything.

    Args:
      source: path of the checkpoint.
      target: path of the new one.
      format: "orbax" (native), "huggingface" (sharded safetensors with all that transformers
        wants), "big_vision" (an npz where `target` ends in .npz, else a directory with one), or one
        of their classes, such as `HuggingFace(shard_bytes=2_000_000_000)`.
      dtype: "bfloat16", "float32" or "float16"; the stored dtypes stay without it.
      resolution: resamples the position embeddings to images of so many pixels a side.
      tokenizer: needed where none lies beside the weights.
      mask_codec: such as vae-oid.npz, where masks are wanted and none lies beside the weights.
      quantize: "int8", "int4" or any other `QuantizationConfig`: weights are
        quantized, in the dtype they have or are cast to, and stored so. Native checkpoints only.
      dequantize: makes floats of weights that are stored quantized, of bfloat16 or `dtype`.
      verify: reads `target` again and compares it with `source` tensor by tensor.
      progress: called with what is being written, bytes done and bytes in all.

    Raises CheckpointError and ConfigError; nothing is left behind then.
    """
    writer = find_format(format)
    with open_checkpoint(source, tokenizer=tokenizer, mask_codec=mask_codec) as checkpoint:
        if checkpoint.tokenizer is None and not writer.is_file(Path(target)):
            raise CheckpointError(
                f"There is no tokenizer beside {checkpoint.path}. Copy a tokenizer.model or "
                "tokenizer.json of PaliGemma there, or name it: paligemma convert "
                f"{shlex.quote(str(source))} {shlex.quote(str(target))} --tokenizer tokenizer.model"
            )
        quantization = _quantization(checkpoint, quantize, dequantize)
        weights: TensorSource = checkpoint
        if quantize is not None and quantization is not None:
            if dtype is not None:  # first, as on loading
                weights = cast_floats(weights, as_float_dtype(dtype))
            checked = Checked(weights, str(checkpoint.path), checkpoint.specs)
            weights = Quantized(checked, quantization)
        elif dequantize and checkpoint.quantization is not None:
            floats = as_float_dtype(dtype or "bfloat16")
            weights = Dequantized(checkpoint, checkpoint.quantization, floats)
        settings = dict(checkpoint.processor_settings)
        size = with_resolution(checkpoint.config, resolution).img.image_size
        if size != checkpoint.config.img.image_size:
            settings["image"] = {**settings["image"], "size": size}
        from_hub = checkpoint.kind == "huggingface" and tokenizer is None
        metadata = CheckpointMetadata(
            settings,
            checkpoint.tokenizer_bytes,
            checkpoint.mask_codec_bytes,
            checkpoint.origin,
            quantization,
            hugging_face_tokenizer_files(checkpoint.path) if from_hub else {},
        )
        export_weights(
            target,
            weights,
            metadata,
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
    """How the weights are to be quantized when they are written."""
    wanted = None if quantize is None else QuantizationConfig.of(quantize)
    stored = checkpoint.quantization
    if wanted is not None and dequantize:
        raise ConfigError("quantize and dequantize are both given. Leave one of them out.")
    if dequantize and stored is None:
        raise ConfigError(
            f"The weights of {checkpoint.path} are floats: there is nothing to dequantize. Leave "
            "dequantize=True (--dequantize) out."
        )
    if wanted is not None and stored is not None:
        raise ConfigError(
            f"The weights of {checkpoint.path} are already quantized ({stored}), and "
            "quantizing them again would lose more. Convert from the floats they were made of: "
            "paligemma convert SOURCE TARGET --quantize FORMAT"
        )
    return None if dequantize else wanted or stored


def export_weights(
    target: str | os.PathLike[str],
    weights: TensorSource,
    metadata: CheckpointMetadata,
    format: str | CheckpointFormat = "orbax",
    *,
    what: str = "the model",
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
      weights: must match their configuration and `metadata.quantization`, and be finite.
      metadata: what goes along with them.
      format: "orbax", "huggingface", "big_vision", or one of their classes with its settings.
      what: the weights are, in messages.
      dtype: casts every float; stored dtypes stay otherwise, and quantized ones in any case.
      resolution: resamples the position embeddings to images of so many pixels a side.
      verify: reads what was written again, and compares it with `weights` bit by bit.
      progress: called with what is being written, bytes done and bytes in all.

    Raises CheckpointError and ConfigError.
    """
    writer, path = find_format(format), Path(target).expanduser()
    source = resampled(weights, resolution)
    if dtype is not None:
        source = cast_floats(source, as_float_dtype(dtype))
    quantization = metadata.quantization
    quantized = quantized_specs(source.config, quantization)
    expected = {name: spec.shape for name, spec in quantized.items()}
    expected |= float_shapes(source.config, quantization)
    found = {name: spec.shape for name, spec in source.specs.items()}
    problems = shape_problems(found, expected)
    if problems:
        raise validation_error(what, problems)
    if path.suffix in (".npz", ".safetensors") and not writer.is_file(path):
        raise ConfigError(
            f"{path} is the name of a file, and {writer.name} is a directory. Leave {path.suffix} "
            'out, or pass format="big_vision" (--to big_vision) for an .npz'
        )
    if quantization is not None and not writer.quantized:
        raise CheckpointError(
            f"{path} cannot be written: the weights of {what} are quantized "
            f"({quantization}), and {writer.name} holds floats only. Write a native "
            "checkpoint, or the floats that are left: paligemma convert SOURCE TARGET --to "
            f"{writer.name} --dequantize"
        )
    writer.check(path, source)
    if metadata.tokenizer is None and not writer.is_file(path):
        raise CheckpointError(
            f"There is no tokenizer to write into {path}. Copy PaliGemma's tokenizer.model to "
            "where the weights are."
        )
    total = source.nbytes * (2 if verify else 1)
    checked = Checked(source, what, weights.specs, progress, total)
    beside = len(metadata.tokenizer or b"") + len(metadata.mask_codec or b"")
    with staged(path, source.nbytes + beside, is_file=writer.is_file(path)) as staging:
        writer.write(staging, checked, metadata)
        if verify:
            # An npz does not tell all of its configuration.
            config = source.config if isinstance(writer, BigVision) else None
            with open_checkpoint(staging, config=config) as written:
                _require_equal(written, checked, path)
        if progress:
            progress("", total, total)


def export_from_all(target: Path, weights: TensorSource, metadata: CheckpointMetadata) -> None:
    """`export_weights` as a native checkpoint in a directory that all processes see.

    Each process calls this, gathers the same chunks in the same order, and the first one writes. It
    is not done when the others are: a barrier should follow. What goes wrong in one process only,
    the others do not learn here. Raises CheckpointError.
    """
    if jax.process_index() == 0:
        export_weights(target, weights, metadata)
    else:
        write_arrays(staging_path(target.absolute()) / PARAMS, arrays_to_store(weights))


def _require_equal(written: TensorSource, wanted: TensorSource, path: Path) -> None:
    """Raises one CheckpointError that names every tensor which was not written as it should be."""
    found = written.specs
    problems = shape_problems(
        {name: spec.shape for name, spec in found.items()},
        {name: spec.shape for name, spec in wanted.specs.items()},
    )
    problems += _config_problems(written.config, wanted.config)
    for group in tensor_groups(wanted.specs):
        if all(n in found and found[n].shape == wanted.specs[n].shape for n in group):
            problems += _differences(written, wanted, group)
    if problems:
        raise CheckpointError(
            f"{path} was not written as it should be {problem_list(problems)}\n"
            "The disk or memory is at fault. Nothing was left behind. Convert again, to another "
            "disk: paligemma convert SOURCE TARGET --verify"
        )


def _config_problems(written: PaliGemmaConfig, wanted: PaliGemmaConfig) -> list[str]:
    """Fields that differ, except those that no published format has."""
    llm = dataclasses.replace(written.llm, sliding_window=wanted.llm.sliding_window)
    problems = []
    for a, b in ((written.img, wanted.img), (llm, wanted.llm)):
        for field in dataclasses.fields(a):
            one, other = getattr(a, field.name), getattr(b, field.name)
            # Floats may be rounded where files have them squared.
            rounded = isinstance(one, float) and math.isclose(one, other, rel_tol=1e-12)
            if one != other and not rounded:
                problems.append(f"config      {field.name}: {one!r}, not {other!r}")
    return problems


def _differences(written: TensorSource, wanted: TensorSource, group: Sequence[str]) -> list[str]:
    """A line for each tensor of which the dtype or any bit differs; see `tensor_groups`."""
    specs = [(name, written.specs[name].dtype, wanted.specs[name].dtype) for name in group]
    problems = [f"dtype       {name}: {a}, not {b}" for name, a, b in specs if a != b]
    if problems:
        return problems
    differ = [0] * len(group)
    for pairs in zip(read_chunks(written, group), read_chunks(wanted, group), strict=True):
        for number, both in enumerate(zip(*pairs, strict=True)):
            bits = [array.view(f"u{array.itemsize}") for array in both]
            differ[number] += int(np.count_nonzero(np.not_equal(*bits)))
    return [
        f"values      {name}: {count:,} of {wanted.specs[name].size:,} differ"
        for name, count in zip(group, differ, strict=True)
        if count
    ]


def check(path: str | os.PathLike[str], progress: Progress | None = None) -> None:
    """Reads all of a checkpoint and compares its checksums; raises CheckpointError.

    A native checkpoint has them of every file and array, an npz of every array (CRC-32), and a
    Hugging Face directory in SHA256SUMS, which we write and the published ones do not have.
    """
    with open_checkpoint(path) as checkpoint:
        if checkpoint.kind != "huggingface":
            done = 0
            for name, spec in checkpoint.specs.items():
                if progress:
                    progress(name, done, checkpoint.nbytes)
                for _ in read_chunks(checkpoint, [name]):
                    pass
                done += spec.nbytes
            if progress:
                progress("", done, done)
        elif (checkpoint.path / SUMS).is_file():
            problems = changed_files(checkpoint.path)
            if problems:
                raise damaged(checkpoint.path, problems)
        else:
            raise CheckpointError(
                f"{path} carries no checksums: it has no {SUMS}. A checkpoint written by paligemma "
                f"convert does: paligemma convert {shlex.quote(str(path))} TARGET"
            )
