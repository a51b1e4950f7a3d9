"""The training loop: steps, and all that happens between them.

WORKDIR/config.json        the settings
WORKDIR/metrics.jsonl      numbers by step
WORKDIR/checkpoints/       to go on from
WORKDIR/bad_batches.jsonl  steps whose loss was no number, with the ids of their records
WORKDIR/samples.png        answers to validation records, at the last evaluation
WORKDIR/loss.png, report.html
WORKDIR/model/             the result, for `from_pretrained`; adapter/ beside it with LoRA

What a run starts from: records, the checkpoint's weights on the devices, and an optimizer.

The result of a run: a model that `from_pretrained` reads, and adapters alone.

SIGTERM and Ctrl-C: the step is finished, the run saved, and then it ends.

Which rows of a batch a process reads.

Losses of records that are not trained on.

What a model in training answers to some records, drawn on their pictures.

Fine-tuning in one call.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from PIL import Image

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.data.batches import TrainBatch, make_batches
from paligemma_jax.data.contact_sheet import Panel, contact_sheet
from paligemma_jax.data.mixture import Mixture
from paligemma_jax.data.record import Record, RecordSource
from paligemma_jax.drawing import INK
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.loading import (
    enable_compilation_cache,
    find_checkpoint,
    from_pretrained,
    load_processor,
)
from paligemma_jax.models.lora import add_lora, is_adapter, merge_lora
from paligemma_jax.models.paligemma import GraphDef, PaliGemma, from_params, split_model
from paligemma_jax.models.quantization import quantize_stacked
from paligemma_jax.models.sharding import DATA, FSDP, leaf_sharding, make_mesh
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.processing.masks import MaskCodec
from paligemma_jax.processing.processor import Batch, Processor
from paligemma_jax.training.checkpoints import Checkpoints, Restored
from paligemma_jax.training.config import (
    TrainConfig,
    describe,
    first_records,
    mask_codec,
    open_records,
)
from paligemma_jax.training.distributed import (
    agree,
    barrier,
    batch_sharding,
    ending_together,
    ending_with_the_lost,
    is_first,
    place_batch,
    state_shardings,
    stop_agreed,
)
from paligemma_jax.training.logging import (
    METRICS,
    SAMPLES,
    JsonLines,
    Pace,
    TensorBoard,
    WeightsAndBiases,
    Writer,
    progress_bar,
    read_metrics,
    save_picture,
    work_of,
    write_report,
)
from paligemma_jax.training.optimizer import Duration, Run, make_optimizer
from paligemma_jax.training.step import (
    LossWatch,
    StepConfig,
    TrainState,
    batch_loss,
    example_mean,
    init_state,
    make_train_step,
)
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.convert import export_from_all
from paligemma_jax.weights.formats import CheckpointMetadata
from paligemma_jax.weights.load import load_stacked
from paligemma_jax.weights.peft import save_adapter
from paligemma_jax.weights.tensors import TensorSpec, as_float_dtype, expected_shapes
from paligemma_jax.weights.views import cast, model_weights, to_host, with_resolution


@dataclasses.dataclass(frozen=True)
class Start:
    """A run at step 0.

    Attributes:
      config: of the model, with the run's resolution and soft-cap.
      path: of the checkpoint.
      fingerprint: of the checkpoint's files; frozen weights are read from there again.
      stored_dtypes: of the checkpoint's weights, by path.
      graphdef: the model without its arrays, adapters included.
      state: on the devices; `shardings` are those of its arrays.
    """

    config: PaliGemmaConfig
    path: Path
    fingerprint: str
    processor: Processor
    mask_codec: bytes | None
    stored_dtypes: dict[str, np.dtype]
    graphdef: GraphDef
    optimizer: optax.GradientTransformation
    mesh: Mesh
    state: TrainState
    shardings: TrainState


def prepare(config: TrainConfig, total_steps: int, records: int) -> Start:
    """Loads the checkpoint and puts everything on the devices; raises CheckpointError, ConfigError.

    `records` is the number of training records.
    """
    enable_compilation_cache()
    mesh = make_mesh(config.mesh)
    _check_microbatches(config)
    path = find_checkpoint(config.model)
    processor = load_processor(path)
    if config.resolution is not None:
        image = dataclasses.replace(processor.image, size=config.resolution)
        processor = dataclasses.replace(processor, image=image)
    with open_checkpoint(path) as checkpoint:
        stored = {name: spec.dtype for name, spec in checkpoint.specs.items()}
        codec = checkpoint.mask_codec_bytes
    model = load_base(config, mesh)
    if config.quantize is not None:
        model = quantize_stacked(model, config.quantize)
    if config.lora is not None:
        model = add_lora(model, config.lora, nnx.Rngs(config.seed))
    graphdef, arrays = split_model(model)
    run = Run(total_steps=total_steps, batch_size=config.batch_size, data_size=records)
    optimizer = make_optimizer(config.optimizer, arrays, run)
    trainable = config.optimizer.trainable(arrays)

    def initial(arrays: dict[str, Any]) -> TrainState:
        master = as_float_dtype(config.master_dtype)
        ema = config.step.ema is not None
        return init_state(arrays, trainable, optimizer, dtype=master, ema=ema)

    shapes = jax.eval_shape(initial, arrays)
    shardings = state_shardings(shapes, mesh)
    placed = {
        name: _put(array, shardings.trainable.get(name) or shardings.frozen[name])
        for name, array in arrays.items()
    }
    moving = {name: placed[name] for name in trainable}

    def begin(moving: dict[str, Any]) -> tuple[Any, ...]:
        made = initial(moving)
        return made.step, made.trainable, made.opt_state, made.ema

    lie = (shardings.step, shardings.trainable, shardings.opt_state, shardings.ema)
    step, master, opt_state, ema = jax.jit(begin, out_shardings=lie)(moving)
    frozen = {name: placed[name] for name in shapes.frozen}
    state = TrainState(step, master, frozen, opt_state, ema)
    return Start(
        config=model.config,
        path=path,
        fingerprint=_fingerprint(path),
        processor=processor,
        mask_codec=codec,
        stored_dtypes=stored,
        graphdef=graphdef,
        optimizer=optimizer,
        mesh=mesh,
        state=state,
        shardings=shardings,
    )


def load_base(config: TrainConfig, mesh: Mesh) -> PaliGemma:
    """The checkpoint's model with stacked layers, split over the mesh as it is read.

    Weights to be trained are in `master_dtype`, the others in `dtype`.
    """
    path = find_checkpoint(config.model)
    with open_checkpoint(path) as checkpoint:
        wanted = with_resolution(checkpoint.config, config.resolution)
        if config.final_logit_softcap is not None:
            cap = dataclasses.replace(wanted.llm, final_logit_softcap=config.final_logit_softcap)
            wanted = dataclasses.replace(wanted, llm=cap)
        names = expected_shapes(wanted)
        plain = config.lora is None
        trained = set(config.optimizer.trainable(names)) if plain else set()

        def how(name: str, spec: TensorSpec) -> tuple[np.dtype, NamedSharding]:
            dtype = as_float_dtype(config.master_dtype if name in trained else config.dtype)
            found = dataclasses.replace(spec, dtype=dtype)
            return dtype, leaf_sharding(name, found, mesh)

        _, params = load_stacked(checkpoint, resolution=config.resolution, placement=how)
    return from_params(wanted, params, as_float_dtype(config.dtype).name)


def _put(array: Any, sharding: Any) -> jax.Array:
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return jax.jit(jnp.copy, out_shardings=sharding)(array)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _check_microbatches(config: TrainConfig) -> None:
    parts = config.step.microbatches
    if config.batch_size % parts:
        raise ConfigError(
            f"A batch of {config.batch_size} rows does not go into {parts} microbatches. A number "
            f"that divides it fits. Say for example: --config.step.microbatches=1"
        )


def _fingerprint(path: Path) -> str:
    """Changes when the checkpoint is another one: names and sizes of files, and the manifest."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        if file.name == "MANIFEST.json":
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def is_trained(config: TrainConfig, prefix: str, names: Any) -> bool:
    """Whether any weight under `prefix` is trained itself, adapters left aside."""
    chosen = config.optimizer.schedules.cover(names, "schedules")
    return any(
        schedule is not None and name.startswith(prefix) and not is_adapter(name)
        for name, schedule in chosen.items()
    )


MODEL, ADAPTER = "model", "adapter"
_finish_log = logging.getLogger(__name__)


def trained_model(config: TrainConfig, start: Start, state: TrainState) -> PaliGemma:
    """The model as trained, of averaged weights where there are any, adapters merged.

    Adapters of a quantized base are merged into the weights as they were before rounding.
    """
    arrays = {**state.params, **(state.ema or {})}
    model = start.graphdef.merge_flat(arrays)
    if config.lora is None:
        return model
    if config.quantize is None:
        return merge_lora(model)
    base = add_lora(load_base(config, start.mesh), config.lora, nnx.Rngs(0))
    graphdef, floats = split_model(base)
    learned = {n: arrays[n] for n in floats if n in state.trainable or is_adapter(n)}
    return merge_lora(graphdef.merge_flat({**floats, **learned}))


def write_model(target: Path, config: TrainConfig, start: Start, state: TrainState) -> None:
    """Writes `target` as a store, in the checkpoint's dtypes unless `save_dtype` says otherwise.

    One that is there already is kept under another name. Of several processes each calls this, and
    the first one writes. Raises CheckpointError.
    """
    weights = model_weights(trained_model(config, start, state))
    dtypes = dict(start.stored_dtypes)
    if config.save_dtype is not None:
        dtypes = dict.fromkeys(weights.specs, as_float_dtype(config.save_dtype))
    weights = cast(weights, dtypes)
    metadata = CheckpointMetadata(
        start.processor.to_dict(),
        start.processor.tokenizer.to_bytes(),
        start.mask_codec,
        {"kind": "fine-tuned", "base": start.path.name, "step": int(state.step)},
    )
    if is_first():
        _make_room(target)
    export_from_all(target, weights, metadata)
    barrier("the model that is written")


def write_adapter(target: Path, config: TrainConfig, start: Start, state: TrainState) -> bool:
    """Writes the adapters as PEFT has them, with what else was trained; whether there is any.

    Nothing is written, and why is logged, where PEFT's format cannot hold all that was trained. Of
    several processes each calls this, and the first one writes.
    """
    if config.lora is None:
        return False
    whole = [name for name in state.trainable if not is_adapter(name)]
    arrays = {**state.params, **(state.ema or {})}
    arrays |= {name: to_host(arrays[name]) for name in _of_modules(arrays, whole)}
    problem = ""
    if is_first():
        _make_room(target)
        try:
            save_adapter(start.graphdef.merge_flat(arrays), target, whole=whole)
        except ConfigError as e:
            problem = str(e)
            _finish_log.warning("The model is written, adapters alone are not: %s", e)
    return not agree("the adapters that are written", problem)


def _of_modules(names: Iterable[str], whole: Iterable[str]) -> list[str]:
    """Of `names` the adapters, and `whole` with all that is in the same layers."""
    layers = {name.rpartition("/")[0] for name in whole} - {"img", "llm"}  # those are no layers
    return [
        name
        for name in names
        if is_adapter(name) or name in whole or name.rpartition("/")[0] in layers
    ]


def _make_room(target: Path) -> None:
    number = 1
    while os.path.lexists(aside := target.with_name(f"{target.name}_before_{number}")):
        number += 1
    if os.path.lexists(target):
        os.rename(target, aside)


@dataclasses.dataclass(frozen=True)
class FineTuned:
    """What a run has come to.

    Attributes:
      workdir: with metrics.jsonl, report.html and checkpoints/.
      step: updates made.
      finished: whether those were all; if not, the same call goes on.
      model: a directory for `from_pretrained`; None before the run has finished.
      adapter: of LoRA, as PEFT reads it; None without.
      metrics: the last value of each.
      stopped_by: the name of the signal that ended it early.
    """

    workdir: Path
    step: int
    finished: bool
    model: Path | None
    adapter: Path | None
    metrics: dict[str, float]
    stopped_by: str | None = None

    def load(self, **options: Any) -> Any:
        """The trained model, ready to be asked: `from_pretrained(self.model, ...)`."""
        if self.model is None:
            raise CheckpointError(
                f"The run in {self.workdir} was stopped at step {self.step}, and has no model yet. "
                "A finished run fits. Make the same call again to go on."
            )
        return from_pretrained(self.model, **options)


_ASKED = (signal.SIGTERM, signal.SIGINT)


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
            for number in _ASKED if jax.process_count() == 1 else (signal.SIGINT,):
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


def share_of_rows(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """The number of this process's part of every batch, from 0 up, and how many parts there are.

    Processes whose devices only split tensors have the same part. Raises ConfigError where rows do
    not go evenly over the devices, or those of a process are no such part.
    """
    ways = mesh.shape[DATA] * mesh.shape[FSDP]
    if batch_size % ways:
        near = max(ways, batch_size // ways * ways)
        raise ConfigError(
            f"A batch of {batch_size} rows does not go evenly over {ways} devices. A multiple "
            f"fits. Say: --config.batch_size={near}"
        )
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    spans = {rows[0].indices(batch_size)[:2] for rows in places if rows}
    first, last = min(low for low, _ in spans), max(high for _, high in spans)
    size = last - first
    if sum(high - low for low, high in spans) != size or batch_size % size or first % size:
        raise ConfigError(
            f"On this mesh process {jax.process_index()} of {jax.process_count()} would read the "
            f"rows {sorted(spans)} of {batch_size}, which are no even part. A data axis, times "
            "fsdp, that is a multiple of the processes or divides them fits. For example: "
            "--config.mesh='Axes(fsdp=-1)'"
        )
    return first // size, batch_size // size


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
        step = StepConfig(remat="none", logit_columns=config.step.logit_columns)

        def loss(arrays: dict[str, jax.Array], batch: Any) -> jax.Array:
            model = start.graphdef.merge_flat(arrays)
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
            max_bad_records=config.max_bad_records,
        ) as batches:
            for number, one in zip(range(self._batches), batches, strict=False):
                first = number * size + part * local
                real = np.arange(first, first + local) < self._rows
                batch = dataclasses.replace(one.batch, row_mask=real)
                rows = min(self._rows - number * size, size)
                loss = self._loss(arrays, place_batch(batch, self._start.mesh))
                total += float(loss) * rows
        return total / self._rows


_RIGHT, _WRONG = "#15803d", "#b91c1c"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A record and what the model answered; the record's own answers are `expected`."""

    record: Record
    answer: str

    @property
    def expected(self) -> tuple[str, ...]:
        return self.record.answers or (self.record.suffix,)

    @property
    def exact(self) -> bool:
        """Whether the answer is one of those expected, letter by letter."""
        return self.answer in self.expected


def answer_records(
    model: Pipeline, records: Sequence[Record], max_new_tokens: int, batch_size: int
) -> list[Sample]:
    """Greedy answers to the prompts of the records."""
    made: list[Sample] = []
    by_count: dict[int, list[int]] = {}
    for place, record in enumerate(records):  # those of a batch have equally many pictures
        by_count.setdefault(len(record.images), []).append(place)
    answers: dict[int, str] = {}
    for count, places in by_count.items():
        chosen = [records[place] for place in places]
        said = model.generate(
            [list(record.images) for record in chosen] if count else None,
            [record.prefix for record in chosen],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        answers |= {place: one.text for place, one in zip(places, said, strict=True)}
    made += [Sample(record, answers[place]) for place, record in enumerate(records)]
    return made


def draw_samples(samples: Sequence[Sample], codec: MaskCodec | None = None) -> Image.Image:
    """One image of all: each with the boxes and masks answered, prompt, answer and target."""
    panels = []
    for sample in samples:
        texts = [(sample.record.prefix, INK), (sample.answer, _RIGHT if sample.exact else _WRONG)]
        if not sample.exact:
            texts.append((sample.expected[0], _RIGHT))
        panels.append(Panel(sample.record.images, sample.answer, tuple(texts)))
    return contact_sheet(panels, codec)


CHECKPOINTS = "checkpoints"
_FINISHED = "finished.json"
# Settings that may change between a stop and going on: they change no update.
_FREE = {
    "validation", "validation_transforms", "workers", "mesh", "log_every", "evaluate_every",
    "checkpoint_every", "keep", "best", "evaluate_batches", "samples", "sample_tokens",
    "tensorboard", "wandb", "save_dtype", "bad_loss",
}  # fmt: skip
_loop_log = logging.getLogger(__name__)

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
            self.start.graphdef,
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
            max_bad_records=config.max_bad_records,
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
        _loop_log.info("Going on after step %d.", restored.step)
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
            model = self.start.graphdef.merge_flat({**self.state.params, **(self.state.ema or {})})
            samples = answer_records(
                Pipeline(model, self.start.processor),
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


def finetune(
    model: str | os.PathLike[str],
    records: Any,
    workdir: str | os.PathLike[str],
    *,
    validation: Any = None,
    progress: bool | None = None,
    changed: bool = False,
    **settings: Any,
) -> FineTuned:
    """Fine-tunes a checkpoint; the same call goes on with a run that was stopped or killed.

        result = pg.finetune("demo", records, "runs/digits", duration=Steps(200), lora=LoRA(rank=8))
        print(result.load().ocr("digits.png"))

    Args:
      model: what `from_pretrained` takes.
      records: a path, a source of `paligemma_jax.data`, a list of dicts with "image", "prefix"
        and "suffix", or a `Mixture` of such by weights.
      workdir: where everything is written: checkpoints, metrics, a report, and the model.
      validation: records to measure on during training.
      progress: whether to show a bar; None shows it on terminals and in notebooks.
      changed: go on although settings have changed that decide what is learned.
      settings: fields of `TrainConfig`.

    Raises ConfigError, naming the nearest field, and as `paligemma_jax.training.trainer.train`.
    """
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    for name in settings:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"finetune has no setting {name!r}.{hint} Fields of TrainConfig fit: "
                f"{', '.join(names)}"
            )
    config = TrainConfig(model=os.fspath(model), train=records, validation=validation, **settings)
    wanted = sys.stderr.isatty() or "ipykernel" in sys.modules if progress is None else progress
    with progress_bar() if wanted else contextlib.nullcontext() as update:
        return train(config, workdir, progress=update, changed=changed)
