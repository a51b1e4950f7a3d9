"""The training loop: steps, and all that happens between them.

WORKDIR/config.json        the settings
WORKDIR/metrics.jsonl      numbers by step
WORKDIR/checkpoints/       to go on from
WORKDIR/bad_batches.jsonl  steps whose loss was no number, with the ids of their records
WORKDIR/samples.png        answers to validation records, at the last evaluation
WORKDIR/loss.png, report.html
WORKDIR/model/             the result, for `from_pretrained`; adapter/ beside it with LoRA
"""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from paligemma_jax.answering.prompted_model import PromptedModel
from paligemma_jax.data import RecordSource, TrainBatch, make_batches
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.pretrained import load_processor
from paligemma_jax.processing.batch import Batch
from paligemma_jax.processing.processor import Processor
from paligemma_jax.training.bad_loss import LossWatch
from paligemma_jax.training.checkpoints import Checkpoints, Restored
from paligemma_jax.training.config import TrainConfig, describe
from paligemma_jax.training.failures import ending_together, ending_with_the_lost
from paligemma_jax.training.finish import ADAPTER, MODEL, FineTuned, write_adapter, write_model
from paligemma_jax.training.metrics_log import (
    METRICS,
    JsonLines,
    TensorBoard,
    WeightsAndBiases,
    Writer,
    read_metrics,
)
from paligemma_jax.training.processes import agree, barrier, is_first, stop_agreed
from paligemma_jax.training.records import first_records, mask_codec, open_records
from paligemma_jax.training.report import SAMPLES, save_picture, write_report
from paligemma_jax.training.rows import share_of_rows
from paligemma_jax.training.samples import answer_records, draw_samples
from paligemma_jax.training.schedules import Duration, Run
from paligemma_jax.training.sharding import make_mesh, place_batch
from paligemma_jax.training.signals import StopRequest
from paligemma_jax.training.speed import Pace, work_of
from paligemma_jax.training.start import Start, is_trained, prepare
from paligemma_jax.training.state import TrainState
from paligemma_jax.training.step import make_train_step
from paligemma_jax.training.validation import Validation

CHECKPOINTS = "checkpoints"
_FINISHED = "finished.json"
# Settings that may change between a stop and going on: they change no update.
_FREE = {
    "validation", "validation_transforms", "workers", "mesh", "log_every", "evaluate_every",
    "checkpoint_every", "keep", "best", "evaluate_batches", "samples", "sample_tokens",
    "tensorboard", "wandb", "save_dtype", "bad_loss",
}  # fmt: skip
_log = logging.getLogger(__name__)

_Seen = tuple[
    int, Mapping[str, jax.Array], tuple[str, ...]
]  # step, its numbers, ids of its records
Progress = Callable[[int, int, Mapping[str, float]], None]  # step, steps in all, newest numbers


def train(
    config: TrainConfig,
    workdir: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    changed: bool = False,
) -> FineTuned:
    """Runs or continues training; everything it writes is in `workdir`.

    After a kill at any moment the same call goes on from the last checkpoint, with the very same
    losses as if nothing had happened. SIGTERM and Ctrl-C save and return (`finished` is False).
    With `changed`, a run goes on although settings have changed that decide what is learned.

    Of several processes each calls this, with a workdir that all of them see. An error in one ends
    them all: see `ending_together`.

    Raises:
      ConfigError: for settings that do not fit, before anything is loaded where possible.
      DatasetError: for records that cannot be used.
      CheckpointError: for a model that cannot be read, and a disk that is full.
      DivergedError: where the loss was no number, see `bad_loss`.
      ProcessesError: where another process does not come to where all must be.
    """
    with ending_together(), contextlib.ExitStack() as exits, ending_with_the_lost():
        return _Training(config, Path(workdir).expanduser(), progress, changed, exits).run()


class _Training:
    """One call of `train`."""

    def __init__(
        self,
        config: TrainConfig,
        workdir: Path,
        progress: Progress | None,
        changed: bool,
        exits: contextlib.ExitStack,
    ):
        self.config, self.workdir = config, workdir
        self.progress = progress or (lambda step, total, values: None)
        self.codec = mask_codec(config.model)
        self.records = open_records(config.train, "train", codec=self.codec)
        self.held_out: RecordSource | None = None
        if config.validation is not None:
            self.held_out = open_records(
                config.validation, "validation", split="valid", codec=self.codec
            )
        self.total = config.total_steps(len(self.records))
        self.checkpoints = exits.enter_context(
            Checkpoints(workdir / CHECKPOINTS, config.keep, config.best)
        )
        self.batches = exits.enter_context(self._make_batches(self.records))
        self.start: Start = prepare(config, self.total, len(self.records))
        self.settings = describe(config)
        self.state: TrainState = self.start.state
        self.metrics: dict[str, float] = {}
        self.watch = LossWatch(config.bad_loss, workdir)
        restored = self.checkpoints.restore_latest(_saved_part(self.state))
        self.first = 0 if restored is None else self._go_on(restored, changed)
        self.writers = self._open_writers(exits)
        self.validation = (
            None if self.held_out is None else Validation(config, self.start, self.held_out)
        )
        names = self.state.params
        work = work_of(
            self.start.config,
            config.text_length,
            images=len(self.records[0].images),
            image_trained=is_trained(config, "img/", names),
            text_trained=is_trained(config, "llm/layers/", names),
        )
        self.pace = Pace(work, config.batch_size)

    def run(self) -> FineTuned:
        config, total = self.config, self.total
        log, evaluate, save = (
            self._steps(every)
            for every in (config.log_every, config.evaluate_every, config.checkpoint_every)
        )
        step_of = make_train_step(
            self.start.skeleton,
            self.start.optimizer,
            config.step_config,
            shardings=self.start.shardings,
        )
        key = jax.random.key(config.seed)
        pending: _Seen | None = None
        step = self.first
        if step == 0 and self.validation is not None:
            self._write(0, self._evaluate(0))
        with StopRequest() as stop:
            self.pace.restart()
            while step < total and not stop_agreed(bool(stop), step):
                one: TrainBatch = next(self.batches)
                batch = self._place(one)
                self.state, values = step_of(self.state, batch, key)
                step += 1
                # The step before is looked at while this one is computed.
                self._see(pending, log, total)
                pending = (step, values, one.ids)
                self.checkpoints.check()
                last = step == total
                if last or step % evaluate == 0 or step % save == 0:
                    self._see(pending, log, total)
                    pending = None
                    measured = self._evaluate(step) if last or step % evaluate == 0 else {}
                    if measured:
                        self._write(step, measured)
                    if last or step % save == 0 or (measured and config.best is not None):
                        self._save(step, measured)
                    self.pace.restart()
            self._see(pending, log, total)
            if step < total:
                self._save(step, {})
            self.checkpoints.wait()
        barrier("the last checkpoint")  # the first process gives it its name
        return self._finish(step, stop)

    def _make_batches(self, records: RecordSource) -> Any:
        config = self.config
        part, parts = share_of_rows(make_mesh(config.mesh), config.batch_size)
        return make_batches(
            records,
            _processor(config),
            batch_size=config.batch_size // parts,
            length=config.text_length,
            seed=config.seed,
            transforms=config.transforms,
            workers=config.workers,
            process_index=part,
            process_count=parts,
            on_overflow=config.on_overflow,
            bad_records=config.bad_records,
        )

    def _place(self, one: TrainBatch) -> Batch:
        """The batch on the devices; a mask that stays here tells the step how much is to learn."""
        batch = place_batch(one.batch, self.start.mesh)
        if jax.process_count() > 1:
            return batch
        return dataclasses.replace(batch, mask_loss=one.batch.mask_loss)

    def _steps(self, every: Duration) -> int:
        size = self.config.batch_size
        run = Run(total_steps=self.total, batch_size=size, data_size=len(self.records))
        return max(1, every.steps(run))

    def _go_on(self, restored: Restored, changed: bool) -> int:
        """Takes up the run where it was saved; returns the step."""
        before = restored.info.get("settings", {})
        differences = [
            f"{name} is {value}, and was {before[name]}"
            for name, value in self.settings.items()
            if name in before and before[name] != value and name not in _FREE
        ]
        if restored.info.get("base") != self.start.fingerprint:
            differences.append(f"the files of {self.start.path} are others than before")
        if differences and not changed:
            listing = "\n  ".join(differences)
            raise ConfigError(
                f"{self.workdir} holds a run with other settings:\n  {listing}\nThe settings as "
                "they were fit, or a new directory. To go on all the same: --changed "
                "(train(..., changed=True))"
            )
        self.state = dataclasses.replace(restored.tree, frozen=self.state.frozen)
        self.watch.restore(restored.info.get("losses", {}))
        if restored.position:
            self.batches.restore(restored.position)
        _log.info("Going on after step %d.", restored.step)
        return restored.step

    def _open_writers(self, exits: contextlib.ExitStack) -> list[Writer]:
        if not is_first():
            return []
        (self.workdir / "config.json").write_text(json.dumps(self.settings, indent=1) + "\n")
        writers: list[Writer] = [JsonLines(self.workdir / METRICS, after=self.first or -1)]
        wanted = self.config.tensorboard
        if TensorBoard.installed() if wanted is None else wanted:
            writers.append(TensorBoard(self.workdir))
        if self.config.wandb is not None:
            writers.append(WeightsAndBiases(self.workdir, self.config.wandb, self.settings))
        for writer in writers:
            exits.callback(writer.close)
        return writers

    def _see(self, seen: "_Seen | None", log: int, total: int) -> None:
        """Looks at the numbers of a step, and reports every `log`th."""
        if seen is None:
            return
        step, values, ids = seen
        numbers = {name: float(value) for name, value in values.items()}
        self.watch.see(step, numbers["loss"], numbers["grad_norm"], ids)
        if step == self.first + 1:  # it was compiled
            self.pace.restart()
        else:
            self.pace.step()
        if step % log == 0 or step == total:
            numbers |= self.pace.rates()
            if self.watch.skipped:
                numbers["bad_steps"] = float(self.watch.skipped)
            if self.batches.skipped:
                numbers["skipped_records"] = float(len(self.batches.skipped))
            self._write(step, numbers)
        self.progress(step, total, self.metrics | {"loss": numbers["loss"]})

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        self.metrics |= values
        for writer in self.writers:
            writer.write(step, values)

    def _evaluate(self, step: int) -> dict[str, float]:
        """Losses of the validation records, and answers to some of them; none if there are none."""
        if self.validation is None or self.held_out is None:
            return {}
        values = self.validation.measure(self.state)
        count = min(self.config.samples, len(self.held_out))
        if count and jax.process_count() == 1:
            records = first_records(self.held_out, count)
            model = self.start.skeleton.fill({**self.state.params, **(self.state.ema or {})})
            samples = answer_records(
                PromptedModel(model, self.start.processor),
                records,
                self.config.sample_tokens,
                min(count, self.config.batch_size),
            )
            values["samples_exact"] = sum(sample.exact for sample in samples) / count
            save_picture(self.workdir / SAMPLES, draw_samples(samples, self.codec))
        return values

    def _save(self, step: int, measured: Mapping[str, float]) -> None:
        self.checkpoints.save(
            step,
            _saved_part(self.state),
            position=self.batches.state(),
            info={
                "settings": self.settings,
                "base": self.start.fingerprint,
                "losses": self.watch.state(),
            },
            metrics=measured,
        )

    def _finish(self, step: int, stop: StopRequest) -> FineTuned:
        finished = step == self.total
        stopped_by = None if finished or stop.signal is None else stop.signal.name
        model = adapter = None
        if finished:
            model = self.workdir / MODEL
            if not self._has_result(step):
                state = self._best_state(step)
                write_model(model, self.config, self.start, state)
                write_adapter(self.workdir / ADAPTER, self.config, self.start, state)
                if is_first():
                    text = json.dumps({"step": step, "settings": self.settings}, indent=1)
                    (self.workdir / _FINISHED).write_text(text + "\n")
            adapter = self.workdir / ADAPTER
            adapter = adapter if adapter.is_dir() else None
        if is_first():
            rows = read_metrics(self.workdir / METRICS)
            for row in rows:
                self.metrics |= {name: value for name, value in row.items() if name != "step"}
            words = "finished" if finished else f"stopped by {stopped_by or 'a request'}"
            outcome = {
                "run": f"{words} at step {step:,} of {self.total:,}",
                "records": f"{len(self.records):,} for training",
                "left out": f"{len(self.batches.skipped)} records, {self.watch.skipped} steps",
            }
            write_report(self.workdir, rows, self.settings, outcome)
        return FineTuned(self.workdir, step, finished, model, adapter, self.metrics, stopped_by)

    def _has_result(self, step: int) -> bool:
        return bool(agree("the result", "there is one" if self._finds_result(step) else ""))

    def _finds_result(self, step: int) -> bool:
        path = self.workdir / _FINISHED
        try:
            return json.loads(path.read_bytes())["step"] == step and (self.workdir / MODEL).is_dir()
        except (OSError, ValueError, KeyError):
            return False

    def _best_state(self, step: int) -> TrainState:
        best = self.checkpoints.best_step()
        if best is None or best == step:
            return self.state
        try:
            tree = self.checkpoints.restore(best, _saved_part(self.state)).tree
        except OSError as e:
            raise CheckpointError(
                f"The best checkpoint, of step {best}, cannot be read: {e}. Another one fits. Set "
                "it aside, and make the same call again."
            ) from e
        return dataclasses.replace(tree, frozen=self.state.frozen)


def _saved_part(state: TrainState) -> TrainState:
    """All that steps change; frozen weights are read from the checkpoint again."""
    return dataclasses.replace(state, frozen={})


def _processor(config: TrainConfig) -> Processor:
    processor = load_processor(config.model)
    if config.resolution is None:
        return processor
    image = dataclasses.replace(processor.image, size=config.resolution)
    return dataclasses.replace(processor, image=image)
