"""Everything that a training run is told, as typed values.

Configurations by name or file: "jsonl:size=10b,resolution=448" and `--config.x.y=value`.

A file has `get_config(arg: str) -> ConfigDict`. Values are numbers, text, and the objects of
`paligemma_jax.training.choices`, whose fields can be changed like keys; new ones are written as in
Python: --config.lora=LoRA(rank=16). Nothing but those names is ever called.

What a run's settings call records -> a source of them.
"""

import ast
import dataclasses
import difflib
import importlib.util
import math
import os
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from paligemma_jax.data.mixture import ConcatSource, Mixture, MixtureComponent, Sampler
from paligemma_jax.data.readers import Reader
from paligemma_jax.data.record import Record, RecordSource, Transform
from paligemma_jax.data.sources import SequenceSource, open_source
from paligemma_jax.data.transforms import RandomAnswer
from paligemma_jax.errors import ConfigError
from paligemma_jax.loading import find_checkpoint
from paligemma_jax.models.lora import TRAINABLE, LoRA
from paligemma_jax.models.quantization_config import Quantization
from paligemma_jax.models.sharding import Axes, Rules
from paligemma_jax.processing.masks import MaskCodec
from paligemma_jax.processing.processor import Overflow
from paligemma_jax.training.checkpoints import Best
from paligemma_jax.training.optimizer import (
    KERNELS,
    Adam,
    Cosine,
    Duration,
    Epochs,
    Method,
    OptimizerConfig,
    Run,
    Schedule,
    Share,
    Steps,
)
from paligemma_jax.training.step import BadLoss, Skip, SkipBadLoss, StepConfig, StopAtBadLoss
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.tensors import as_float_dtype

ALL = ".*"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One fine-tuning run; configs/base.py says what each field is good for.

    Attributes:
      model: what `from_pretrained` takes.
      resolution: pixels a side; the position embeddings are resampled. None: the checkpoint's.
      train: records: a path, `Data`, a source, a list of dicts, a tuple of several of them, or a
        `Mixture` of them by weights.
      validation: records to look at during training; None for none.
      transforms: changes made to training records, in turn; a part of a mixture may have its own.
      validation_transforms: those made to validation records; None: the same ones.
      text_length: tokens of prompt and answer.
      on_overflow: what happens to longer ones.
      max_bad_records: fraction of unusable records that are skipped and logged; 0.0: the first
        one is an error.
      workers: processes that read ahead.
      batch_size: rows of one update, over all devices and processes.
      duration: how long to train.
      seed: of the order of records, their transforms, dropout and new adapters.
      learning_rate, method, schedule, weight_decay, clip_norm: see `OptimizerConfig`.
      trainable: regular expression over parameter paths; the rest is frozen. None: all, or the
        adapters' with `lora`.
      schedules: a schedule by path, in place of `schedule` and `trainable`; None freezes.
      rate_factors: further factors on the learning rate by path.
      decays: factors on the weight decay by path.
      step: how an update is computed: label smoothing, dropout, microbatches, memory.
      lora: adapters to train; None for none.
      quantize: weights of few bits beneath the adapters (QLoRA); None keeps floats.
      final_logit_softcap: 0.0 is off, better for transfers (big_vision); None: the checkpoint's.
      dtype: of activations, and of frozen weights.
      master_dtype: of trained weights and the optimizer's state.
      mesh: how devices share the work.
      bad_loss: `StopAtBadLoss()` or `SkipBadLoss()`.
      log_every, evaluate_every, checkpoint_every: how often.
      keep: checkpoints kept, besides the best one.
      best: which checkpoint is the best, and becomes the result; None takes the last.
      evaluate_batches: of the validation records, at most; None takes all.
      samples: validation records answered and drawn at every evaluation.
      sample_tokens: where such an answer is cut.
      tensorboard: whether to write for it; None: where it is installed.
      wandb: the project at Weights & Biases to report to; None: no report. Needs the extra "wandb".
      save_dtype: of the resulting model's weights; None: the checkpoint's.
    """

    model: str = "demo"
    resolution: int | None = None
    train: Any = None
    validation: Any = None
    transforms: tuple[Transform, ...] = (RandomAnswer(),)
    validation_transforms: tuple[Transform, ...] | None = None
    text_length: int = 128
    on_overflow: Overflow = "error"
    max_bad_records: float = 0.0
    workers: int = 0
    batch_size: int = 32
    duration: Duration = Epochs(1)
    seed: int = 0
    learning_rate: float = 1e-5
    method: Method = Adam()
    schedule: Schedule = Cosine(warmup=Share(0.05))
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    trainable: str | None = None
    schedules: Rules[Schedule | None] | None = None
    rate_factors: Rules[float] = Rules(())
    decays: Rules[float] = KERNELS
    step: StepConfig = StepConfig()
    lora: LoRA | None = None
    quantize: Quantization | str | None = None
    final_logit_softcap: float | None = 0.0
    dtype: str = "bfloat16"
    master_dtype: str = "float32"
    mesh: Axes = Axes(fsdp=-1)
    bad_loss: BadLoss = StopAtBadLoss()
    log_every: Duration = Steps(10)
    evaluate_every: Duration = Share(0.1)
    checkpoint_every: Duration = Steps(500)
    keep: int = 2
    best: Best | None = None
    evaluate_batches: int | None = 16
    samples: int = 8
    sample_tokens: int = 128
    tensorboard: bool | None = None
    wandb: str | None = None
    save_dtype: str | None = None

    def __post_init__(self) -> None:
        problems = [*self._bad_numbers(), *self._contradictions()]
        if problems:
            raise ConfigError(
                f"The configuration does not fit: {'; '.join(problems)}. Change it in the file, or "
                "on the command line: --config.NAME=VALUE"
            )
        for name in (self.dtype, self.master_dtype, self.save_dtype or "float32"):
            as_float_dtype(name)

    def _bad_numbers(self) -> list[str]:
        least = {
            "batch_size": 1,
            "text_length": 2,
            "keep": 1,
            "workers": 0,
            "seed": 0,
            "samples": 0,
            "sample_tokens": 1,
        }
        problems = [
            f"{name} is {getattr(self, name)!r}, must be a whole number from {bound} up"
            for name, bound in least.items()
            if not isinstance(getattr(self, name), int) or getattr(self, name) < bound
        ]
        rate, decay = self.learning_rate, self.weight_decay
        if not (isinstance(rate, int | float) and math.isfinite(rate) and rate > 0):
            problems.append(f"learning_rate is {rate!r}, must be positive and finite")
        if not (isinstance(decay, int | float) and math.isfinite(decay) and decay >= 0):
            problems.append(f"weight_decay is {decay!r}, must be 0 or more, and finite")
        if self.clip_norm is not None and not self.clip_norm > 0:
            problems.append(f"clip_norm is {self.clip_norm}, must be positive or None")
        return problems

    def _contradictions(self) -> list[str]:
        problems = []
        if self.schedules is not None and self.trainable is not None:
            problems.append("schedules and trainable are both given, and both say what is trained")
        if self.quantize is not None and self.lora is None:
            problems.append(
                "quantize is given without lora, and rounded weights cannot be trained; add "
                "lora=LoRA()"
            )
        if self.best is not None and self.validation is None:
            problems.append("best is given without validation records to measure on")
        if self.step.skip is not None:
            problems.append("step.skip is given; say it with bad_loss=SkipBadLoss()")
        return problems

    @classmethod
    def from_config(cls, config: ConfigDict) -> "TrainConfig":
        """Raises ConfigError for fields that are unknown or do not fit."""
        values: Mapping[str, Any] = {name: config[name] for name in config}
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ConfigError(
                f"The configuration has unknown settings: {', '.join(unknown)}. There are: "
                f"{', '.join(known)}. Begin with a copy of configs/base.py"
            )
        return cls(**values)

    def to_config(self) -> ConfigDict:
        """Inverse of `from_config`, to be changed by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return ConfigDict(values, type_safe=False).lock()

    @property
    def optimizer(self) -> OptimizerConfig:
        """The part that is the optimizer's."""
        return OptimizerConfig(
            learning_rate=self.learning_rate,
            method=self.method,
            schedules=self._schedules(),
            rate_factors=self.rate_factors,
            weight_decay=self.weight_decay,
            decays=self.decays,
            clip_norm=self.clip_norm,
        )

    @property
    def step_config(self) -> StepConfig:
        """How an update is computed, bad ones included."""
        skip = Skip() if isinstance(self.bad_loss, SkipBadLoss) else None
        return dataclasses.replace(self.step, skip=skip)

    def total_steps(self, records: int) -> int:
        """Updates of the whole run over so many records."""
        run = Run(total_steps=0, batch_size=self.batch_size, data_size=records)
        steps = self.duration.steps(run)
        if steps < 1:
            raise ConfigError(
                f"duration={self.duration!r} is {steps} steps of {self.batch_size} rows. At least "
                "one step fits. Say for example: --config.duration='Steps(1000)'"
            )
        return steps

    def _schedules(self) -> Rules[Schedule | None]:
        if self.schedules is not None:
            return self.schedules
        pattern = self.trainable or (ALL if self.lora is None else TRAINABLE)
        if pattern == ALL:
            return Rules(((ALL, self.schedule),))
        return Rules(((pattern, self.schedule), (ALL, None)))


def describe(config: TrainConfig) -> dict[str, str]:
    """Every setting as text; what decides whether a checkpoint belongs to the same run."""
    return {f.name: _say(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _say(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    text = value.__name__ if hasattr(value, "__name__") else repr(value)
    return text if len(text) < 2000 and " at 0x" not in text else type(value).__name__


def load_config(spec: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Any:
    """The ConfigDict of "NAME:ARGS", to be changed and returned as one's own.

    NAME is a configuration of configs/, such as "jsonl", or the path of a Python file; ARGS go to
    its `get_config`. `overrides` are "name=value" or "name.field=value". Raises ConfigError,
    listing the configurations there are, or every override that cannot be applied.
    """
    text = os.fspath(spec)
    name, _, arg = text.partition(".py:" if ".py" in text else ":")
    config = _get_config(_config_path(name.removesuffix(".py")))(arg)
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"get_config of {name} must return an ml_collections ConfigDict, got "
            f"{type(config).__name__}. Begin with a copy of configs/base.py"
        )
    override(config, overrides)
    return config


def config_directory() -> Path:
    """Where configs/ is: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """The names of the configurations that come with the library."""
    directory = config_directory()
    paths = (path.relative_to(directory) for path in directory.rglob("*.py"))
    return sorted(path.with_suffix("").as_posix() for path in paths if path.stem != "__init__")


def parse_arg(arg: str, **defaults: Any) -> Any:
    """A ConfigDict of what the argument of a file says: "size=10b,resolution=448,final_split".

    Types are those of the defaults; a name alone means True. Raises ConfigError for others, with
    the nearest name.
    """
    found = ConfigDict(defaults)
    for entry in filter(None, (part.strip() for part in arg.split(","))):
        name, equals, value = entry.partition("=")
        if name not in defaults:
            raise ConfigError(
                f"The file's argument {name!r} is unknown.{_nearest(name, defaults)} "
                f"{' and '.join(defaults)} fit. Write for example {_example(defaults)}"
            )
        if isinstance(defaults[name], str):
            found[name] = value
        else:
            found[name] = _fit(name, parse_value(value) if equals else True, defaults[name])
    return found


def override(config: ConfigDict, overrides: Iterable[str]) -> None:
    """Changes `config` by "name.field=value" texts; ConfigError lists all that do not fit."""

    hints = typing.get_type_hints(TrainConfig)
    problems = []
    for text in overrides:
        name, equals, value = text.partition("=")
        try:
            if not equals:
                raise ConfigError("it has no value; write --config.name=value")
            parts = name.split(".")
            before = _child(config, parts[0], parts[0])
            changed = _changed(before, parts[1:], value, parts[0], hints.get(parts[0]))
            with config.unlocked(), config.ignore_type():
                config[parts[0]] = changed
        except ConfigError as e:
            problems.append(f"--config.{name}: {e}")
    if problems:
        listing = "\n  ".join(problems)
        raise ConfigError(
            f"{len(problems)} of the settings on the command line do not fit:\n  {listing}\n"
            "Names and values as in the configuration file fit."
        )


def parse_value(text: str) -> Any:
    """A Python literal, or a call of a name in `paligemma_jax.training.choices`; else the text."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        return text
    if not any(isinstance(node, ast.Call) for node in ast.walk(tree)):
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError):
            return text
    return _evaluate(tree)


def _evaluate(node: ast.expr) -> Any:
    from paligemma_jax.training import choices

    known = {name: value for name, value in vars(choices).items() if not name.startswith("_")}
    match node:
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            if name not in known:
                raise ConfigError(f"{name} is unknown.{_nearest(name, known)}")
            values = {k.arg: _evaluate(k.value) for k in keywords if k.arg}
            try:
                return known[name](*map(_evaluate, args), **values)
            except TypeError as e:
                raise ConfigError(f"{name}(...) does not fit: {e}") from e
        case ast.Tuple(elts=entries):
            return tuple(map(_evaluate, entries))
        case ast.List(elts=entries):
            return list(map(_evaluate, entries))
        case _:
            try:
                return ast.literal_eval(node)
            except ValueError as e:
                raise ConfigError(f"{ast.unparse(node)} is no literal") from e


def _changed(value: Any, path: Sequence[str], text: str, name: str, annotation: Any) -> Any:
    """`value` with the field at `path` made what `text` says."""
    if not path:
        if isinstance(value, str) and isinstance(parse_value(text), int | float):
            return text  # a name that happens to look like a number
        return _fit(name, parse_value(text), value, annotation)
    full = f"{name}.{path[0]}"
    child = _child(value, path[0], full)
    field = typing.get_type_hints(type(value)).get(path[0])
    return dataclasses.replace(value, **{path[0]: _changed(child, path[1:], text, full, field)})


def _child(value: Any, name: str, full: str) -> Any:
    if isinstance(value, ConfigDict):
        names = list(value.keys())
    elif dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.init]
    else:
        raise ConfigError(f"{full.rpartition('.')[0]} is {value!r}, which has no fields")
    if name not in names:
        raise ConfigError(
            f"there is no such setting.{_nearest(name, names)} There are: {', '.join(names)}"
        )
    return value[name] if isinstance(value, ConfigDict) else getattr(value, name)


def _fit(name: str, new: Any, old: Any, annotation: Any = None) -> Any:
    """`new` as the type of `old`; ConfigError where it is another kind of thing."""
    if isinstance(old, bool) or isinstance(new, bool):
        fits = isinstance(new, bool) and (isinstance(old, bool) or old is None)
    elif isinstance(old, float) and isinstance(new, int):
        return float(new)
    elif old is None or new is None:
        optional = annotation is None or type(None) in typing.get_args(annotation) or old is None
        fits = optional and not (new is not None and _refused(new, annotation))
    elif isinstance(old, int | float | str):
        fits = isinstance(new, type(old)) or annotation is typing.Any
    else:
        fits = not isinstance(new, int | float | str) or _plain(annotation)
    if not fits:
        raise ConfigError(
            f"{new!r} is {_kind(new)}; {_kind(old)} such as {old!r} fits"
            if old is not None
            else f"{new!r} does not fit {annotation}"
        )
    return new


def _refused(new: Any, annotation: Any) -> bool:
    """Whether a plain value is given where its type is not among those of the field."""
    options = typing.get_args(annotation)
    plain = [option for option in options if option in (int, float, str, bool)]
    if not isinstance(new, int | float | str) or not options:
        return False
    return not any(isinstance(new, (int, float) if kind is float else kind) for kind in plain)


def _plain(annotation: Any) -> bool:
    return annotation is typing.Any or any(
        k in (int, float, str) for k in typing.get_args(annotation)
    )


def _kind(value: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
    return names.get(type(value), f"a {type(value).__name__}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""


def _example(defaults: Mapping[str, Any]) -> str:
    name, value = next(iter(defaults.items()))
    return f"{name}={value}"


def _config_path(name: str) -> Path:
    """The file of a configuration: one of configs/, or else a path with or without ".py"."""
    shipped, given = config_directory() / f"{name}.py", Path(f"{name}.py").expanduser()
    for path in (given, shipped) if os.path.dirname(name) else (shipped, given):
        if path.is_file():
            return path
    names = config_names()
    raise ConfigError(
        f"There is no configuration {name!r}.{_nearest(name, names)} There are: "
        f"{', '.join(names)}; or give the path of a Python file with get_config(arg)"
    )


def _get_config(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise ConfigError(
            f"{path} has no function get_config. A file with get_config(arg), which returns a "
            "ConfigDict, fits. Begin with a copy of configs/base.py"
        )
    return get_config


@dataclasses.dataclass(frozen=True)
class Data:
    """Records on disk, opened when a run starts; see `paligemma_jax.data.open_source`.

    Attributes:
      path: a file or a directory in any known layout.
      split: which part of a directory.
      reader: makes a record of a row, of JSON lines and TensorFlow Datasets.
      images: the folder of the pictures, where it is not the layout's.
      masks: COCO's masks are the answer, by the mask codec of the checkpoint.
    """

    path: str
    split: str = "train"
    reader: Reader | None = None
    images: str | None = None
    masks: bool = False


def open_records(
    given: Any, what: str, *, split: str = "train", codec: MaskCodec | None = None
) -> RecordSource:
    """The records of a path, `Data`, a source, or a sequence of records or dicts.

    A tuple of several of them are joined, and each part of a `Mixture` is opened. `what` names them
    in errors, `split` is the part of a path that is a directory, and `codec` is for COCO's masks.
    Raises DatasetError, and ConfigError for nothing, or a mixture where none can be.
    """
    if given is None:
        raise ConfigError(
            f"There are no records: {what} is not set. A path or a source of records fits. Say "
            f"for example: --config.{what}=data/train.jsonl"
        )
    if isinstance(given, str | os.PathLike):
        return open_source(given, split)
    if isinstance(given, Mixture):
        return given.opened(
            lambda one, place: open_records(one, f"{what}[{place}]", split=split, codec=codec)
        )
    if isinstance(given, MixtureComponent):
        raise ConfigError(
            f"{what} is a part of a mixture, without the mixture. All parts together fit: "
            "Mixture(MixtureComponent(captions, 3.0), MixtureComponent(boxes, 1.0))"
        )
    if isinstance(given, Data):
        if given.masks and codec is None:
            raise ConfigError(
                f"The masks of {given.path} cannot be made into tokens: the checkpoint has no mask "
                "codec. One with it fits: paligemma convert SOURCE TARGET --mask-codec vae-oid.npz"
            )
        return open_source(
            given.path,
            given.split,
            images=given.images,
            reader=given.reader,
            codec=codec if given.masks else None,
        )
    if isinstance(given, tuple) and any(not isinstance(one, Mapping | Record) for one in given):
        if any(isinstance(one, Mixture | MixtureComponent) for one in given):
            raise ConfigError(
                f"{what} is a tuple with a mixture or a part of one in it. One mixture of all "
                "fits: Mixture(MixtureComponent(captions, 3.0), MixtureComponent(boxes, 1.0))"
            )
        return ConcatSource(
            tuple(open_records(one, what, split=split, codec=codec) for one in given)
        )
    if not isinstance(given, list | tuple) and _is_source(given):
        return given
    return SequenceSource(given, name=what)


def first_records(source: RecordSource, count: int) -> list[Record]:
    """So many records to look at: those of a mixture by its weights."""
    if not isinstance(source, Mixture):
        return [source[number] for number in range(count)]
    sampler = Sampler.of(source, seed=0, shuffle=False)
    return [source[sampler[position].number] for position in range(count)]


def mask_codec(model: str) -> MaskCodec | None:
    """That of a checkpoint; None where it has none."""
    with open_checkpoint(find_checkpoint(model)) as checkpoint:
        vae = checkpoint.mask_codec
    return None if vae is None else MaskCodec(vae)


def _is_source(given: Any) -> bool:
    return isinstance(given, RecordSource) and len(given) > 0 and isinstance(given[0], Record)
