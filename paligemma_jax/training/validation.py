"""Evaluation during training: the loss of records that are not trained on, and answers to some."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paligemma_jax.data.mixture import ConcatSource, Mixture
from paligemma_jax.data.record import Record, RecordSource
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.processing.masks import MaskCodec
from paligemma_jax.training.config import TrainConfig, first_records
from paligemma_jax.training.distributed import place_batch, process_shard
from paligemma_jax.training.report import SAMPLES, Sample, draw_samples, save_image
from paligemma_jax.training.setup import Setup, open_batches
from paligemma_jax.training.step import (
    StepConfig,
    TrainState,
    batch_loss,
    loss_weights,
    target_mask,
)


class Validation:
    """Measures a state: the mean loss over the same records every time, and sample answers.

    Without dropout or smoothing; examples that only fill the last batch do not count. Records of a
    `Mixture` come by its weights, but in the order of each part. Samples are written to
    samples.png; a run of several processes makes none.
    """

    def __init__(
        self,
        config: TrainConfig,
        setup: Setup,
        source: RecordSource,
        codec: MaskCodec | None,
        workdir: Path,
    ):
        self._config, self._setup, self._source = config, setup, source
        self._codec, self._workdir = codec, workdir
        size = config.batch_size
        batches = -(-len(source) // size)
        limit = config.evaluate_batches
        self._batches = batches if limit is None else min(batches, limit)
        self._examples = min(len(source), self._batches * size)

        def loss(arrays: Mapping[str, jax.Array], batch: Any) -> jax.Array:
            weights = loss_weights(target_mask(batch), batch.row_mask)
            model = setup.graphdef.merge_flat(arrays)
            return batch_loss(model, batch, weights, StepConfig(remat="none"), jax.random.key(0))

        self._loss = jax.jit(loss)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """validation_loss, validation_loss_ema with an EMA, and exact_match of the samples."""
        found = {"validation_loss": self._mean_loss(state.params)}
        if state.ema is not None:
            found["validation_loss_ema"] = self._mean_loss(state.averaged_params)
        count = min(self._config.samples, len(self._source))
        if count and jax.process_count() == 1:
            samples = self._answer(state, first_records(self._source, count))
            found["exact_match"] = sum(sample.exact_match for sample in samples) / count
            save_image(self._workdir / SAMPLES, draw_samples(samples, self._codec))
        return found

    def _mean_loss(self, arrays: Mapping[str, jax.Array]) -> float:
        config, mesh, source = self._config, self._setup.mesh, self._source
        size, total = config.batch_size, 0.0
        part, parts = process_shard(mesh, size)
        local = size // parts
        transforms = config.validation_transforms
        if not isinstance(source, Mixture):  # as many records as the batches have examples
            source = ConcatSource((source,) * -(-self._batches * size // len(source)))
        with open_batches(
            config,
            source,
            self._setup.processor,
            mesh,
            transforms=config.transforms if transforms is None else transforms,
            shuffle=False,
        ) as batches:
            for number, one in zip(range(self._batches), batches, strict=False):
                first = number * size + part * local
                real = np.arange(first, first + local) < self._examples
                batch = place_batch(dataclasses.replace(one.batch, row_mask=real), mesh)
                loss = float(self._loss(arrays, batch))
                total += loss * min(self._examples - number * size, size)
        return total / self._examples

    def _answer(self, state: TrainState, records: Sequence[Record]) -> list[Sample]:
        """Greedy answers to the prompts of the records."""
        model = self._setup.graphdef.merge_flat(state.averaged_params)
        pipeline = Pipeline(model, self._setup.processor)
        answers: dict[int, str] = {}
        for count in {len(record.images) for record in records}:  # the same within a batch
            chosen = [i for i, record in enumerate(records) if len(record.images) == count]
            generated = pipeline.generate(
                [list(records[i].images) for i in chosen] if count else None,
                [records[i].prefix for i in chosen],
                max_new_tokens=self._config.sample_max_new_tokens,
                batch_size=min(len(records), self._config.batch_size),
            )
            answers |= {i: one.text for i, one in zip(chosen, generated, strict=True)}
        return [Sample(record, answers[i]) for i, record in enumerate(records)]
