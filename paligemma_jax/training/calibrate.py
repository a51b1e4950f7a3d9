"""Calibrated quantization: weights rounded for the prompts that a model is used with."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator

import jax.numpy as jnp
from flax import nnx

from paligemma_jax.data.batches import TrainBatch, make_batches
from paligemma_jax.data.record import RecordSource
from paligemma_jax.data.sources import open_source
from paligemma_jax.errors import DatasetError
from paligemma_jax.models.gptq import Texts
from paligemma_jax.models.inference_layout import unstack_layers
from paligemma_jax.models.quantization import calibrate_in_place, calibration_rounds
from paligemma_jax.models.quantization_config import Quantization
from paligemma_jax.pipeline import Pipeline

SAMPLES, BATCH_SIZE = 256, 8
Progress = Callable[[int, int], None]  # samples read, and how many there are to read


def calibrate(
    pipeline: Pipeline,
    data: RecordSource | str | os.PathLike[str],
    quantization: Quantization | str = "int4",
    *,
    samples: int = SAMPLES,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: Progress | None = None,
) -> Pipeline:
    """The pipeline with quantized weights, those of 4 bits rounded to lose little on `data`.

    `data` are prompts with answers, of the kind that the model will be used for: a source of
    training data, or a path as `open_source` takes it. So many `samples` of it, chosen by `seed`,
    are read `batch_size` at a time, once for each of `calibration_rounds`; texts that are too long
    are cut. The pipeline given stays as it is, and the result can be saved. Raises DatasetError,
    ConfigError, and MissingExtraError without grain.
    """
    source = open_source(data) if isinstance(data, str | os.PathLike) else data
    model = nnx.merge(*nnx.split(unstack_layers(pipeline.model)))  # another, of the same arrays
    size = max(1, min(batch_size, samples, len(source)))
    count = min(samples, len(source)) // size
    total = count * size * len(calibration_rounds(model.config))
    done = 0

    def texts() -> Iterator[Texts]:
        nonlocal done
        with make_batches(
            source,
            pipeline.processor,
            batch_size=size,
            length=pipeline.processor.max_text_length,
            seed=seed,
            epochs=1,
            on_overflow="truncate",
        ) as batches:
            for found in itertools.islice(batches, count):
                yield _texts(found)
                done += size
                if progress:
                    progress(done, total)

    calibrate_in_place(model, quantization, texts)
    return dataclasses.replace(pipeline, model=model)


def _texts(found: TrainBatch) -> Texts:
    batch = found.batch
    if batch.images is None or batch.mask_ar is None:
        raise DatasetError(
            f"expected records with images to calibrate with, got {', '.join(found.ids)} without."
        )
    tokens, mask_ar, real = (
        jnp.asarray(x)[:, :-1] for x in (batch.tokens, batch.mask_ar, batch.mask_input)
    )
    return Texts(jnp.asarray(batch.images), tokens, mask_ar, real)
