"""Losses of records that are not trained on."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.data import make_batches
from paligemma_jax.data.mixture import Mixture
from paligemma_jax.data.record import Record, RecordSource
from paligemma_jax.models.remat import KeepAll
from paligemma_jax.training.config import TrainConfig
from paligemma_jax.training.objective import example_mean
from paligemma_jax.training.rows import share_of_rows
from paligemma_jax.training.sharding import place_batch
from paligemma_jax.training.start import Start
from paligemma_jax.training.state import TrainState
from paligemma_jax.training.step import StepConfig, batch_loss


@dataclasses.dataclass(frozen=True)
class _Filled:
    """A source made longer by its own records, so that batches come out even."""

    source: RecordSource
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:
        return self.source[index % len(self.source)]


class Validation:
    """The mean loss over the same records every time, without dropout or smoothing.

    Rows that only fill the last batch do not count. Records of a `Mixture` come by its weights, but
    in the order of each part.
    """

    def __init__(self, config: TrainConfig, start: Start, source: RecordSource):
        self._config, self._start, self._source = config, start, source
        size = config.batch_size
        batches = -(-len(source) // size)
        most = config.evaluate_batches
        self._batches = batches if most is None else min(batches, most)
        self._rows = min(len(source), self._batches * size)
        step = StepConfig(remat=KeepAll(), logit_columns=config.step.logit_columns)

        def loss(arrays: dict[str, jax.Array], batch: Any) -> jax.Array:
            model = start.skeleton.fill(arrays)
            mask = jnp.asarray(batch.mask_loss)[:, 1:]
            weights = example_mean(mask, batch.row_mask)
            return batch_loss(model, batch, weights, step, jax.random.key(0))

        self._loss = jax.jit(loss)

    def measure(self, state: TrainState) -> dict[str, float]:
        """`validation_loss`, and `validation_loss_ema` where there is an average."""
        found = {"validation_loss": self._mean(state.params)}
        if state.ema is not None:
            found["validation_loss_ema"] = self._mean({**state.params, **state.ema})
        return found

    def _mean(self, arrays: dict[str, jax.Array]) -> float:
        config = self._config
        part, parts = share_of_rows(self._start.mesh, config.batch_size)
        transforms = config.validation_transforms
        size = config.batch_size
        local = size // parts
        source = self._source
        total = 0.0
        with make_batches(
            source if isinstance(source, Mixture) else _Filled(source, self._batches * size),
            self._start.processor,
            batch_size=local,
            length=config.text_length,
            seed=config.seed,
            transforms=config.transforms if transforms is None else transforms,
            shuffle=False,
            process_index=part,
            process_count=parts,
            on_overflow=config.on_overflow,
            bad_records=config.bad_records,
        ) as batches:
            for number, one in zip(range(self._batches), batches, strict=False):
                first = number * size + part * local
                real = np.arange(first, first + local) < self._rows
                batch = dataclasses.replace(one.batch, row_mask=real)
                rows = min(self._rows - number * size, size)
                loss = self._loss(arrays, place_batch(batch, self._start.mesh))
                total += float(loss) * rows
        return total / self._rows
