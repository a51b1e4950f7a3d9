"""A model rounded to few bits by what it is asked: `calibrate`."""

import dataclasses
import os
from collections.abc import Callable, Iterator

import jax.numpy as jnp
from flax import nnx

from paligemma_jax.data.batches import Batches, make_batches
from paligemma_jax.data.record import RecordSource
from paligemma_jax.data.sources import open_source
from paligemma_jax.errors import DatasetError
from paligemma_jax.models.gptq import Texts
from paligemma_jax.models.inference_layout import unstack_layers
from paligemma_jax.models.quantization import calibrate_in_place, calibration_rounds
from paligemma_jax.models.quantization_config import Quantization
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.processing.processor import Processor

RECORDS, ROWS = 256, 8
Report = Callable[[int, int], None]  # records read, and how many there are to read


def calibrate(
    pipeline: Pipeline,
    data: RecordSource | str | os.PathLike[str],
    quantization: Quantization | str = "int4",
    *,
    records: int = RECORDS,
    batch_size: int = ROWS,
    seed: int = 0,
    progress: Report | None = None,
) -> Pipeline:
    """The pipeline with weights of few bits, those of 4 bits rounded to lose little in such texts.

    `data` are prompts with answers, of the kind that will be asked: a source of training data, or a
    path as `open_source` takes it. So many `records` of it, chosen by `seed`, are read `batch_size`
    at a time, once for each of `calibration_rounds`; texts that are too long are cut. The pipeline
    given stays as it is, and the result can be saved. Raises DatasetError, ConfigError, and
    MissingExtraError without grain.
    """
    source = open_source(data) if isinstance(data, str | os.PathLike) else data
    model = nnx.merge(*nnx.split(unstack_layers(pipeline.model)))  # another, of the same arrays
    rows = max(1, min(batch_size, records, len(source)))
    count = min(records, len(source)) // rows
    total = count * rows * len(calibration_rounds(model.config))
    done = 0

    def texts() -> Iterator[Texts]:
        nonlocal done
        found = _read(source, pipeline.processor, rows, seed)
        for _ in range(count):
            yield _next(found)
            done += rows
            if progress:
                progress(done, total)
        found.close()

    calibrate_in_place(model, quantization, texts)
    return dataclasses.replace(pipeline, model=model)


def _read(source: RecordSource, processor: Processor, rows: int, seed: int) -> Batches:
    return make_batches(
        source,
        processor,
        batch_size=rows,
        length=processor.max_text_length,
        seed=seed,
        epochs=1,
        on_overflow="truncate",
    )


def _next(batches: Batches) -> Texts:
    found = next(batches)
    batch = found.batch
    if batch.images is None or batch.mask_ar is None:
        raise DatasetError(
            f"The records {', '.join(found.ids)} have no pictures. Prompts about pictures fit, for "
            "the model is rounded by what it sees. Name other data: --calibrate DATA"
        )
    tokens, mask_ar, real = (
        jnp.asarray(x)[:, :-1] for x in (batch.tokens, batch.mask_ar, batch.mask_input)
    )
    return Texts(jnp.asarray(batch.images), tokens, mask_ar, real)
