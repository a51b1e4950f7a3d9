"""The training loop, `train` and `finetune`: steps, and all that happens between them.

WORKDIR/config.json        the settings
WORKDIR/metrics.jsonl      numbers by step
WORKDIR/checkpoints/       to continue from
WORKDIR/bad_batches.jsonl  steps whose loss was not finite, with the ids of their examples
WORKDIR/samples.png        answers to validation records, at the last evaluation
WORKDIR/loss.png, report.html
WORKDIR/model/             the result, for `from_pretrained`; adapter/ beside it with LoRA
"""

import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import jax

from paligemma_jax.data.record import RecordSource
from paligemma_jax.errors import CheckpointError, ConfigError, MissingExtraError
from paligemma_jax.loading import enable_compilation_cache, find_checkpoint, processor_of
from paligemma_jax.models.lora import is_adapter
from paligemma_jax.models.sharding import make_mesh
from paligemma_jax.processing.masks import MaskCodec
from paligemma_jax.training.checkpoints import Checkpoints, Restored
from paligemma_jax.training.config import TrainConfig, open_records
from paligemma_jax.training.distributed import (
    barrier,
    ending_together,
    ending_with_the_lost,
    is_first,
    place_batch,
    stop_agreed,
)
from paligemma_jax.training.logging import (
    METRICS,
    JsonLines,
    Progress,
    TensorBoard,
    Throughput,
    WeightsAndBiases,
    Writer,
    progress_display,
    read_metrics,
    training_flops,
)
from paligemma_jax.training.optimizer import RunLength
from paligemma_jax.training.report import write_report
from paligemma_jax.training.setup import (
    ADAPTER,
    MODEL,
    FineTuneResult,
    Setup,
    export,
    fingerprint,
    has_result,
    open_batches,
    set_up,
)
from paligemma_jax.training.step import DivergenceGuard, TrainState, TrainStep
from paligemma_jax.training.validation import Validation
from paligemma_jax.weights.checkpoint import open_checkpoint

CHECKPOINTS = "checkpoints"
# Settings that may change before a run continues: they change no update.
_FREE = {
    "validation", "validation_transforms", "workers", "mesh", "log_every", "evaluate_every",
    "checkpoint_every", "max_to_keep", "best", "evaluate_batches", "samples",
    "sample_max_new_tokens", "tensorboard", "wandb", "save_dtype", "max_skipped_steps",
    "loss_spike_factor",
}  # fmt: skip
_log = logging.getLogger(__name__)


@runtime_checkable
class BatchIterator(Protocol):
    """Batches whose position can be saved: `data.Batches`, or one's own."""

    def __next__(self) -> Any:
        """An object with `batch`, which the step takes, and `ids` of its examples."""
        ...

    def state(self) -> bytes: ...

    def restore(self, state: bytes) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What a loop does between steps; see `TrainConfig`, whose durations are numbers here.

    Attributes:
      settings: of the run as text; a run continues only with the same ones, those in `_FREE` aside.
      base: fingerprint of what the run started from; likewise.
      checkpoint_best: checkpoint at every evaluation.
    """

    total_steps: int
    log_every: int = 10
    evaluate_every: int = 1000
    checkpoint_every: int = 1000
    seed: int = 0
    max_skipped_steps: int = 0
    loss_spike_factor: float | None = None
    checkpoint_best: bool = False
    tensorboard: bool | None = None
    wandb: str | None = None
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    base: str = ""


class Loop:
    """Steps, and what happens between them, whatever the model and its loss.

    Continues from the newest intact checkpoint; raises ConfigError where that is of a run with
    other settings, unless `allow_config_change`. Everything is written to `workdir`.

    Attributes:
      state: after `step` updates.
      metrics: the last value of each.
      stopped_by: the name of the signal that ended the run early.
    """

    def __init__(
        self,
        config: LoopConfig,
        workdir: Path,
        step_fn: Callable[[TrainState, Any, jax.Array], tuple[TrainState, Mapping[str, jax.Array]]],
        state: TrainState,
        batches: BatchIterator,
        checkpoints: Checkpoints,
        *,
        place: Callable[[Any], Any],
        throughput: Throughput,
        evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
        progress: Progress | None = None,
        allow_config_change: bool = False,
    ):
        self.config, self.workdir = config, workdir
        self.state, self.step = state, 0
        self.metrics: dict[str, float] = {}
        self.stopped_by: str | None = None
        self._step_fn, self._batches, self._checkpoints = step_fn, batches, checkpoints
        self._place, self._evaluate_state = place, evaluate
        self._throughput, self._progress = throughput, progress
        self._guard = DivergenceGuard(workdir, config.max_skipped_steps, config.loss_spike_factor)
        saved = _saved_part(state)
        if checkpoints.agreed_steps():  # the fresh arrays would stand beside those that are read
            saved = _shapes_of(saved)
        restored = checkpoints.restore_latest(saved)
        if restored is not None:
            self._resume(restored, allow_config_change)
        self._first = self.step

    def run(self) -> None:
        """Makes the steps that are left, or stops where a signal asks for it; then reports."""
        config = self.config
        key = jax.random.key(config.seed)
        pending = None
        with contextlib.ExitStack() as exits, StopRequest() as stop:
            self._writers = self._open_writers(exits)
            if self.step == 0:
                self._evaluate()
            self._throughput.restart()
            while self.step < config.total_steps and not stop_agreed(bool(stop), self.step):
                one = next(self._batches)
                self.state, values = self._step_fn(self.state, self._place(one.batch), key)
                self.step += 1
                # The step before is looked at while this one is computed.
                self._look_at(pending)
                pending = self.step, values, one.ids
                self._checkpoints.check()
                last = self.step == config.total_steps
                evaluating = last or self.step % config.evaluate_every == 0
                saving = last or self.step % config.checkpoint_every == 0
                if evaluating or saving:
                    self._look_at(pending)
                    pending = None
                    measured = self._evaluate() if evaluating else {}
                    if saving or (measured and config.checkpoint_best):
                        self._save(measured)
                    self._throughput.restart()
            self._look_at(pending)
            if self.step < config.total_steps:
                self._save({})
                self.stopped_by = stop.signal.name if stop.signal else None
            self._checkpoints.wait()
        barrier("the last checkpoint")  # the first process gives it its name
        if is_first():
            self._report()

    def best_state(self) -> TrainState:
        """The state of the best checkpoint, or the last one where none was chosen by a metric."""
        best = self._checkpoints.best_step()
        if best is None or best == self.step:
            return self.state
        try:
            tree = self._checkpoints.restore(best, _saved_part(self.state)).tree
        except OSError as e:
            raise CheckpointError(
                f"The best checkpoint, {self._checkpoints.path(best)}, cannot be read: {e}. Set it "
                "aside, and make the same call again."
            ) from e
        return dataclasses.replace(tree, frozen=self.state.frozen)

    def _resume(self, restored: Restored, allow_config_change: bool) -> None:
        before, config = restored.info["settings"], self.config
        differences = [
            f"{name} is {value}, and was {before[name]}"
            for name, value in config.settings.items()
            if name in before and before[name] != value and name not in _FREE
        ]
        if restored.info["base"] != config.base:
            differences.append("the files of the checkpoint it started from are others than before")
        if differences and not allow_config_change:
            listing = "\n  ".join(differences)
            raise ConfigError(
                f"{self.workdir} holds a run with other settings:\n  {listing}\nUse those, or a "
                "new directory. To continue all the same: --allow-config-change "
                "(train(..., allow_config_change=True))"
            )
        self.state = dataclasses.replace(restored.tree, frozen=self.state.frozen)
        self.step = restored.step
        self._guard.restore(restored.info["losses"])
        self._batches.restore(restored.position)
        _log.info("Continuing after step %d.", restored.step)

    def _open_writers(self, exits: contextlib.ExitStack) -> list[Writer]:
        if not is_first():
            return []
        config = self.config
        (self.workdir / "config.json").write_text(json.dumps(dict(config.settings), indent=1))
        writers: list[Writer] = [JsonLines(self.workdir / METRICS, self.step or -1)]
        if config.tensorboard is not False:
            missing = () if config.tensorboard else (MissingExtraError,)  # None: where installed
            with contextlib.suppress(*missing):
                writers.append(TensorBoard(self.workdir))
        if config.wandb is not None:
            writers.append(WeightsAndBiases(self.workdir, config.wandb, config.settings))
        for writer in writers:
            exits.callback(writer.close)
        return writers

    def _look_at(self, seen: tuple[int, Mapping[str, jax.Array], tuple[str, ...]] | None) -> None:
        """Checks the numbers of a step, and logs every `log_every`th."""
        if seen is None:
            return
        step, values, ids = seen
        total = self.config.total_steps
        numbers = {name: float(value) for name, value in values.items()}
        self._guard.check(step, numbers["loss"], numbers["grad_norm"], ids)
        if step == self._first + 1:  # it was compiled
            self._throughput.restart()
        else:
            self._throughput.count_step()
        if step % self.config.log_every == 0 or step == total:
            skipped = {"bad_steps": self._guard.skipped, "skipped_records": self._skipped_records()}
            numbers |= self._throughput.rates()
            self._write(step, numbers | {k: float(v) for k, v in skipped.items() if v})
        if self._progress is not None:
            self._progress(step, total, self.metrics | {"loss": numbers["loss"]})

    def _skipped_records(self) -> int:
        return len(getattr(self._batches, "skipped", ()))

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        self.metrics |= values
        for writer in self._writers:
            writer.write(step, values)

    def _evaluate(self) -> Mapping[str, float]:
        if self._evaluate_state is None:
            return {}
        measured = self._evaluate_state(self.state)
        self._write(self.step, measured)
        return measured

    def _save(self, measured: Mapping[str, float]) -> None:
        config, position = self.config, self._batches.state()
        info = dict(settings=dict(config.settings), base=config.base, losses=self._guard.state())
        tree = _saved_part(self.state)
        self._checkpoints.save(self.step, tree, position=position, info=info, metrics=measured)

    def _report(self) -> None:
        total, lines = self.config.total_steps, read_metrics(self.workdir / METRICS)
        for line in lines:
            self.metrics |= {name: value for name, value in line.items() if name != "step"}
        words = "finished" if self.step == total else f"stopped by {self.stopped_by or 'a request'}"
        outcome = {
            "run": f"{words} at step {self.step:,} of {total:,}",
            "skipped": f"{self._skipped_records()} records, {self._guard.skipped} steps",
        }
        write_report(self.workdir, lines, self.config.settings, outcome)


def _saved_part(state: TrainState) -> TrainState:
    """All that steps change; frozen weights are read from the checkpoint again."""
    return dataclasses.replace(state, frozen={})


def _shapes_of(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of arrays that are freed."""

    def shape(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        leaf.delete()
        return shape

    return jax.tree.map(shape, state)


class StopRequest:
    """Set by the first SIGTERM or SIGINT inside the block; a second one acts as without it.

    Does nothing outside the main thread, where Python delivers no signals. In a run of several
    processes, which must stop at the same step, SIGTERM is left to JAX, which tells all of them,
    and SIGINT is handed on to it as SIGTERM.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            both = (signal.SIGTERM, signal.SIGINT)
            for number in both if jax.process_count() == 1 else (signal.SIGINT,):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self.__exit__()
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)


def train(
    config: TrainConfig,
    workdir: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    allow_config_change: bool = False,
) -> FineTuneResult:
    """Runs or continues training; everything it writes is in `workdir`.

    After a kill at any moment the same call continues from the last checkpoint, with the very same
    losses as if nothing had happened. SIGTERM and Ctrl-C save and return (`finished` is False).
    With `allow_config_change`, a run continues although settings have changed that decide what is
    learned.

    Of several processes each calls this, with a workdir that all of them see. An error in one ends
    them all: see `ending_together`.

    Raises:
      ConfigError: for invalid settings, before anything is loaded where possible.
      DatasetError: for records that cannot be used.
      CheckpointError: for a model that cannot be read, and a disk that is full.
      DivergedError: where the loss was not finite, see `max_skipped_steps`.
      ProcessesError: where another process does not come to where all must be.
    """
    workdir = Path(workdir).expanduser()
    enable_compilation_cache()
    with ending_together(), contextlib.ExitStack() as exits, ending_with_the_lost():
        checkpoint = exits.enter_context(open_checkpoint(find_checkpoint(config.model)))
        vae = checkpoint.mask_codec
        codec = None if vae is None else MaskCodec(vae)
        records = open_records(config.train, "train", codec=codec)
        held_out: RecordSource | None = None
        if config.validation is not None:
            held_out = open_records(config.validation, "validation", split="valid", codec=codec)
        run = RunLength(
            total_steps=config.total_steps(len(records)),
            batch_size=config.batch_size,
            data_size=len(records),
        )
        checkpoints = exits.enter_context(
            Checkpoints(workdir / CHECKPOINTS, config.max_to_keep, config.best)
        )
        mesh = make_mesh(config.mesh)
        processor = processor_of(checkpoint, config.resolution)
        how: Any = dict(transforms=config.transforms, workers=config.workers)
        batches = exits.enter_context(open_batches(config, records, processor, mesh, **how))
        setup = set_up(config, checkpoint, processor, mesh, run)

        def place(batch: Any) -> Any:
            placed = place_batch(batch, mesh)
            if jax.process_count() > 1:
                return placed
            # A mask that stays on the host tells the step how many targets there are.
            return dataclasses.replace(placed, mask_loss=batch.mask_loss)

        validation = None
        if held_out is not None:
            validation = Validation(config, setup, held_out, codec, workdir)
        optimizer, shardings = setup.optimizer, setup.shardings
        loop = Loop(
            _loop_config(config, run, fingerprint(checkpoint.path)),
            workdir,
            TrainStep(setup.graphdef, optimizer, config.step_config, shardings=shardings),
            setup.state,
            batches,
            checkpoints,
            place=place,
            throughput=_throughput(config, setup, len(records[0].images)),
            evaluate=validation,
            progress=progress,
            allow_config_change=allow_config_change,
        )
        loop.run()
        finished = loop.step == run.total_steps
        if finished and not has_result(workdir, loop.step):
            export(workdir, config, setup, loop.best_state(), loop.step)
        adapter = workdir / ADAPTER
        return FineTuneResult(
            workdir,
            loop.step,
            finished,
            workdir / MODEL if finished else None,
            adapter if finished and adapter.is_dir() else None,
            loop.metrics,
            loop.stopped_by,
        )


def _loop_config(config: TrainConfig, run: RunLength, base: str) -> LoopConfig:
    names = {field.name for field in dataclasses.fields(LoopConfig)}
    values = {name: value for name, value in vars(config).items() if name in names}
    for name in ("log_every", "evaluate_every", "checkpoint_every"):
        values[name] = max(1, values[name].steps(run))
    values |= dict(total_steps=run.total_steps, checkpoint_best=config.best is not None)
    return LoopConfig(**values, settings=config.settings(), base=base)


def _throughput(config: TrainConfig, setup: Setup, images: int) -> Throughput:
    whole = [name for name in setup.state.trainable if not is_adapter(name)]
    flops = training_flops(
        setup.model_config,
        config.text_length,
        images=images,
        image_trained=any(name.startswith("img/") for name in whole),
        text_trained=any(name.startswith("llm/layers/") for name in whole),
    )
    tokens = images * setup.model_config.img.num_patches + config.text_length
    return Throughput(config.batch_size, tokens, flops)


def finetune(
    model: str | os.PathLike[str],
    records: Any,
    workdir: str | os.PathLike[str],
    *,
    validation: Any = None,
    progress: bool | None = None,
    allow_config_change: bool = False,
    **settings: Any,
) -> FineTuneResult:
    """Fine-tunes a checkpoint; the same call continues a run that was stopped or killed.

        result = pg.finetune("demo", records, "runs/digits", duration=Steps(200), lora=LoRA(rank=8))
        print(result.load().ocr("digits.png"))

    Args:
      model: what `from_pretrained` takes.
      records: a path, a source of `paligemma_jax.data`, a list of dicts with "image", "prefix"
        and "suffix", or a `Mixture` of such by weights.
      workdir: where everything is written: checkpoints, metrics, a report, and the model.
      validation: records to measure on during training.
      progress: whether to show a bar; None shows it on terminals and in notebooks.
      allow_config_change: continue although settings have changed that decide what is learned.
      settings: fields of `TrainConfig`.

    Raises ConfigError, naming the nearest field, and as `paligemma_jax.training.trainer.train`.
    """
    given = dict(model=os.fspath(model), train=records, validation=validation, **settings)
    config = TrainConfig.from_config(given)
    wanted = sys.stderr.isatty() or "ipykernel" in sys.modules if progress is None else progress
    with progress_display(bar=True) if wanted else contextlib.nullcontext() as update:
        return train(config, workdir, progress=update, allow_config_change=allow_config_change)
