"""Everything that a training run is told: `TrainConfig`, configurations by name or file, overrides.

A configuration ("jsonl:size=10b,resolution=448") is a file with `get_config(arg) -> ConfigDict`.
On the command line `--config.x=value` changes a setting and `--config.x.y=value` a field of it;
values are Python literals and calls of the names in `callable_names`: --config.lora=LoRA(rank=16).
"""

import ast
import dataclasses
import difflib
import functools
import importlib.util
import math
import numbers
import os
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from paligemma_jax.data import (
    coco,
    mixture,
    object_readers,
    readers,
    record,
    sources,
    tasks,
    transforms,
)
from paligemma_jax.data.mixture import ConcatSource, Mixture, MixtureComponent, Sampler
from paligemma_jax.data.readers import Reader
from paligemma_jax.data.record import Record, RecordSource, Transform
from paligemma_jax.data.sources import SequenceSource, open_source
from paligemma_jax.data.transforms import RandomAnswer
from paligemma_jax.errors import ConfigError
from paligemma_jax.models import layers, lora, quantization_config, sharding
from paligemma_jax.models.layers import Remat
from paligemma_jax.models.lora import TRAINABLE, LoRA
from paligemma_jax.models.quantization_config import Quantization
from paligemma_jax.models.sharding import Axes, Rules
from paligemma_jax.processing import processor
from paligemma_jax.processing.masks import MaskCodec
from paligemma_jax.processing.processor import Overflow
from paligemma_jax.training import checkpoints, optimizer
from paligemma_jax.training.checkpoints import Best
from paligemma_jax.training.optimizer import (
    KERNELS,
    Adam,
    Cosine,
    Duration,
    Epochs,
    Fraction,
    Optimizer,
    OptimizerConfig,
    RunLength,
    Schedule,
    Steps,
)
from paligemma_jax.training.step import StepConfig
from paligemma_jax.weights.tensors import as_float_dtype

ALL = ".*"
_UNIONS = (typing.Union, types.UnionType)


@dataclasses.dataclass(frozen=True)
class Data:
    """Records on disk, opened when a run starts; see `paligemma_jax.data.open_source`.

    Attributes:
      path: a file or a directory in any known layout.
      split: which part of a directory.
      reader: makes a record of each example, of JSON lines and TensorFlow Datasets.
      images: the directory of the images, where it is not the layout's.
      masks: COCO's masks are the answer, by the mask codec of the checkpoint.
    """

    path: str
    split: str = "train"
    reader: Reader | None = None
    images: str | None = None
    masks: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One fine-tuning run; configs/base.py says what each field is good for.

    Attributes:
      model: what `from_pretrained` takes.
      resolution: pixels a side; the position embeddings are resampled. None: the checkpoint's.
      train: records: a path, `Data`, a source, a list of dicts, a tuple of several of them, or a
        `Mixture` of them by weights.
      validation: records to measure on during training; None for none.
      transforms: applied to training records, in turn; a part of a mixture may have its own.
      validation_transforms: those of validation records; None: the same ones.
      text_length: tokens of prompt and answer.
      on_overflow: what happens to longer ones.
      max_bad_fraction: fraction of unusable records that are skipped and logged; 0.0: the first
        one is an error.
      workers: processes that read ahead.
      batch_size: examples of one update, over all devices and processes.
      duration: how long to train.
      seed: of the order of records, their transforms, dropout and new adapters.
      learning_rate, optimizer, schedule, lr_multipliers, weight_decay, weight_decay_multipliers,
        max_grad_norm: see `OptimizerConfig`.
      trainable: regular expression over parameter paths; the rest is frozen. None: all, or the
        adapters' with `lora`.
      schedules: a schedule by path, in place of `schedule` and `trainable`; None freezes.
      loss_reduction, label_smoothing, dropout, gradient_accumulation_steps, remat, ema: see
        `StepConfig`.
      lora: adapters to train; None for none.
      quantize: quantized weights beneath the adapters (QLoRA); None keeps floats.
      final_logit_softcap: 0.0 is off, better for transfers (big_vision); None: the checkpoint's.
      dtype: of activations, and of frozen weights.
      master_dtype: of trained weights and the optimizer's state.
      mesh: how devices share the work.
      max_skipped_steps: updates in a row with a non-finite loss or gradient that are skipped; one
        more stops the run.
      loss_spike_factor: a loss so many times the median of the last 50 stops the run too.
      log_every, evaluate_every, checkpoint_every: how often.
      max_to_keep: checkpoints kept, besides the best one.
      best: which checkpoint is the best, and becomes the result; None takes the last.
      evaluate_batches: of the validation records, at most; None takes all.
      samples: validation records answered and drawn at every evaluation.
      sample_max_new_tokens: the length of such an answer at most.
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
    max_bad_fraction: float = 0.0
    workers: int = 0
    batch_size: int = 32
    duration: Duration = Epochs(1)
    seed: int = 0
    learning_rate: float = 1e-5
    optimizer: Optimizer = Adam()
    schedule: Schedule = Cosine(warmup=Fraction(0.05))
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    trainable: str | None = None
    schedules: Rules[Schedule | None] | None = None
    lr_multipliers: Rules[float] = Rules(())
    weight_decay_multipliers: Rules[float] = KERNELS
    loss_reduction: str = "example"
    label_smoothing: float = 0.0
    dropout: float = 0.0
    gradient_accumulation_steps: int = 1
    remat: Remat = "full"
    ema: float | None = None
    lora: LoRA | None = None
    quantize: Quantization | str | None = None
    final_logit_softcap: float | None = 0.0
    dtype: str = "bfloat16"
    master_dtype: str = "float32"
    mesh: Axes = Axes(fsdp=-1)
    max_skipped_steps: int = 0
    loss_spike_factor: float | None = None
    log_every: Duration = Steps(10)
    evaluate_every: Duration = Fraction(0.1)
    checkpoint_every: Duration = Steps(500)
    max_to_keep: int = 2
    best: Best | None = None
    evaluate_batches: int | None = 16
    samples: int = 8
    sample_max_new_tokens: int = 128
    tensorboard: bool | None = None
    wandb: str | None = None
    save_dtype: str | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name}: {problem}"
            for name, hint in _hints(type(self)).items()
            if (problem := _type_problem(getattr(self, name), hint))
        ] or self._invalid_values()
        if problems:
            raise ConfigError(
                f"Invalid settings ({len(problems)}): {'; '.join(problems)}. "
                "Change them in the file, or on the command line: --config.NAME=VALUE"
            )
        for name in (self.dtype, self.master_dtype, self.save_dtype or "float32"):
            as_float_dtype(name)
        _ = self.step_config, self.optimizer_config  # these validate their own settings

    def _invalid_values(self) -> list[str]:
        least = dict(
            batch_size=1, text_length=2, max_to_keep=1, workers=0, seed=0, samples=0,
            sample_max_new_tokens=1, max_skipped_steps=0,
        )  # fmt: skip
        expected = {name: f"at least {n}" for name, n in least.items() if getattr(self, name) < n}
        if self.evaluate_batches is not None and self.evaluate_batches < 1:
            expected["evaluate_batches"] = "at least 1, or None for all"
        if not 0 <= self.max_bad_fraction < 1:
            expected["max_bad_fraction"] = "a fraction from 0 to below 1"
        if self.loss_spike_factor is not None and not self.loss_spike_factor > 1:
            expected["loss_spike_factor"] = "a number above 1, or None"
        if not 0 < self.learning_rate < math.inf:
            expected["learning_rate"] = "a positive, finite number"
        if not 0 <= self.weight_decay < math.inf:
            expected["weight_decay"] = "0 or more, and finite"
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            expected["max_grad_norm"] = "a positive number or None"
        if self.batch_size % max(self.gradient_accumulation_steps, 1):
            expected["gradient_accumulation_steps"] = f"a divisor of batch_size={self.batch_size}"
        problems = [f"{k}: expected {v}, got {getattr(self, k)}" for k, v in expected.items()]
        if self.schedules is not None and self.trainable is not None:
            problems.append("schedules and trainable: expected one of them, got both")
        if self.quantize is not None and self.lora is None:
            problems.append("quantize: quantized weights cannot be trained; add lora=LoRA()")
        if self.best is not None and self.validation is None:
            problems.append("best: expected validation records to measure on, got none")
        return problems

    @classmethod
    def from_config(cls, config: ConfigDict | Mapping[str, Any]) -> "TrainConfig":
        """Raises ConfigError for settings that are unknown or invalid."""
        known = _hints(cls)
        unknown = [f"{name}.{did_you_mean(name, known)}" for name in config if name not in known]
        if unknown:
            raise ConfigError(
                f"The configuration has unknown settings: {' '.join(unknown)} Settings are the "
                "fields of TrainConfig, see configs/base.py"
            )
        values: dict[str, Any] = {name: config[name] for name in config}
        return cls(**values)

    def to_config(self) -> ConfigDict:
        """Inverse of `from_config`, to be changed by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return ConfigDict(values, type_safe=False).lock()

    @functools.cached_property
    def optimizer_config(self) -> OptimizerConfig:
        """The optimizer's settings, with a schedule for every path."""
        schedules = self.schedules
        if schedules is None:
            pattern = self.trainable or (ALL if self.lora is None else TRAINABLE)
            rest = () if pattern == ALL else ((ALL, None),)
            schedules = Rules(((pattern, self.schedule), *rest))
        values = self._fields_of(OptimizerConfig)
        values["schedules"] = schedules
        return OptimizerConfig(**values)

    @functools.cached_property
    def step_config(self) -> StepConfig:
        """How an update is computed."""
        return StepConfig(**self._fields_of(StepConfig), skip_nonfinite=self.max_skipped_steps > 0)

    def _fields_of(self, cls: type) -> dict[str, Any]:
        """The settings that are fields of `cls` under the same name."""
        return {name: getattr(self, name) for name in _hints(cls) if hasattr(self, name)}

    def total_steps(self, records: int) -> int:
        """Updates of the whole run over so many records."""
        run = RunLength(total_steps=0, batch_size=self.batch_size, data_size=records)
        steps = self.duration.steps(run)
        if steps < 1:
            raise ConfigError(
                f"expected a duration of at least one step of {self.batch_size} examples, got "
                f"{self.duration!r}, which is {steps}. Write --config.duration='Steps(1000)'"
            )
        return steps

    def settings(self) -> dict[str, str]:
        """Every setting as text; what decides whether a checkpoint belongs to the same run."""
        return {f.name: _as_text(getattr(self, f.name)) for f in dataclasses.fields(self)}


def _as_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    text = value.__name__ if hasattr(value, "__name__") else repr(value)
    return text if len(text) < 2000 and " at 0x" not in text else type(value).__name__


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The types of the fields that `cls` is made of."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _type_problem(value: Any, hint: Any) -> str:
    """What is wrong with the type of a value; "" for nothing."""
    if _has_type(value, hint):
        return ""
    names = [getattr(option, "__name__", str(option)) for option in _options(hint)]
    return f"expected {' or '.join(names)}, got {value!r}"[:200]


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union; of another type, itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)


def _has_type(value: Any, hint: Any) -> bool:
    if len(options := _options(hint)) > 1:
        return any(_has_type(value, option) for option in options)
    kind = typing.get_origin(hint) or hint
    if kind is typing.Literal:
        return value in typing.get_args(hint)
    if isinstance(value, bool) and kind in (int, float):
        return False
    kind = {int: numbers.Integral, float: numbers.Real, Any: object}.get(kind, kind)
    try:
        return isinstance(value, kind)
    except TypeError:  # a type that cannot be checked
        return True


def load_config(spec: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Any:
    """The ConfigDict of "NAME:ARGS", to be changed and returned as one's own.

    NAME is a configuration of configs/, such as "jsonl", or the path of a Python file: a name with
    a directory or ".py" is always the user's file. ARGS go to its `get_config`. `overrides` are
    "name=value" or "name.field=value". Raises ConfigError, listing the configurations there are,
    or every override that cannot be applied.
    """
    text = os.fspath(spec)
    name, _, arg = text.partition(".py:" if ".py" in text else ":")
    path = _config_path(f"{name}.py" if ".py:" in text else name)
    module_spec: Any = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up
    module_spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    config = get_config(arg) if get_config else None
    if not isinstance(config, ConfigDict):
        what = f"a {type(config).__name__} of it" if get_config else "no such function"
        raise ConfigError(
            f"expected get_config(arg) in {path} that returns an ml_collections ConfigDict, got "
            f"{what}. Begin with a copy of configs/base.py"
        )
    override(config, overrides)
    return config


def config_directory() -> Path:
    """Where configs/ is: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _config_path(name: str) -> Path:
    """The file of a configuration: a bare name is one of configs/, or else NAME.py here."""
    given = Path(f"{name.removesuffix('.py')}.py").expanduser()
    is_path = name.endswith(".py") or os.path.dirname(name)
    for path in (given,) if is_path else (config_directory() / f"{name}.py", given):
        if path.is_file():
            return path
    directory = config_directory()
    found = (path.relative_to(directory) for path in directory.rglob("*.py"))
    names = sorted(path.with_suffix("").as_posix() for path in found if path.stem != "__init__")
    raise ConfigError(
        f"There is no configuration {name!r}.{did_you_mean(name, names)} There are: "
        f"{', '.join(names)}; or give the path of a Python file with get_config(arg)"
    )


def parse_arg(arg: str, **defaults: Any) -> Any:
    """A ConfigDict of what the argument of a file says: "size=10b,resolution=448,final_split".

    Types are those of the defaults; a name alone means True. Raises ConfigError for others, with
    the nearest name.
    """
    found = ConfigDict(defaults)
    for entry in filter(None, (part.strip() for part in arg.split(","))):
        name, equals, text = entry.partition("=")
        if name not in defaults:
            raise ConfigError(
                f"The configuration has no argument {name!r}.{did_you_mean(name, defaults)} "
                f"There are: {', '.join(defaults)}"
            )
        kind = type(defaults[name])
        value = (text if kind is str else parse_value(text)) if equals else True
        if problem := _type_problem(value, kind):
            raise ConfigError(f"argument {name}: {problem}")
        found[name] = kind(value)
    return found


def override(config: ConfigDict, overrides: Iterable[str]) -> None:
    """Changes `config` by "name.field=value" texts; ConfigError lists all that are wrong."""
    problems = []
    for text in overrides:
        name, equals, value = text.partition("=")
        try:
            if not equals:
                raise ConfigError("expected a value; write --config.name=value")
            hints = {known: hint for known, hint in _hints(TrainConfig).items() if known in config}
            first, *_ = path = name.split(".")
            with config.unlocked(), config.ignore_type():
                config[first] = _changed(config, hints, path, value)
        except ConfigError as e:
            problems.append(f"--config.{name}: {e}")
    if problems:
        listing = "\n  ".join(problems)
        raise ConfigError(f"{len(problems)} settings cannot be changed so:\n  {listing}")


def _changed(owner: Any, hints: Mapping[str, Any], path: list[str], text: str) -> Any:
    """The new value of the first name of `path` in `owner`, with the field at its end `text`."""
    name, *rest = path
    if name not in hints:
        raise ConfigError(
            f"there is no such setting.{did_you_mean(name, hints)} There are: {', '.join(hints)}"
        )
    old, hint = getattr(owner, name), hints[name]
    if rest:
        if not dataclasses.is_dataclass(old) or isinstance(old, type):
            raise ConfigError(f"{name} is {old!r}, which has no fields")
        return dataclasses.replace(old, **{rest[0]: _changed(old, _hints(type(old)), rest, text)})
    new = parse_value(text)
    if not _has_type(new, hint) and _has_type(text, hint):
        return text  # a name that happens to look like a number
    if problem := _type_problem(new, hint):
        raise ConfigError(f"{problem}; it is {old!r}")
    options = _options(hint)
    return float(new) if type(new) is int and float in options and int not in options else new


def parse_value(text: str) -> Any:
    """A Python literal, or a call of one of `callable_names`; else the text itself."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if not any(isinstance(node, ast.Call) for node in ast.walk(tree)):
            return ast.literal_eval(tree)
    except (SyntaxError, ValueError, TypeError):
        return text
    return _evaluate(tree)


def _evaluate(node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            known = callable_names()
            if name not in known:
                raise ConfigError(f"{name} is unknown.{did_you_mean(name, known)}")
            values = {k.arg: _evaluate(k.value) for k in keywords if k.arg}
            try:
                return known[name](*map(_evaluate, args), **values)
            except TypeError as e:
                raise ConfigError(f"{name}(...) cannot be made: {e}") from e
        case ast.Tuple(elts=entries) | ast.List(elts=entries):
            return (tuple if isinstance(node, ast.Tuple) else list)(map(_evaluate, entries))
    try:
        return ast.literal_eval(node)
    except ValueError as e:
        raise ConfigError(f"expected a literal, got {ast.unparse(node)}") from e


@functools.cache
def callable_names() -> Mapping[str, type]:
    """What a setting on the command line may call: the public dataclasses of these modules."""
    modules = [
        coco, mixture, object_readers, readers, record, sources, tasks, transforms, layers, lora,
        quantization_config, sharding, processor, checkpoints, optimizer, sys.modules[__name__],
    ]  # fmt: skip
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and dataclasses.is_dataclass(value) and name[0] != "_"
    }


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " Did you mean ...?" with the nearest known name; "" if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""


def open_records(
    given: Any, what: str, *, split: str = "train", codec: MaskCodec | None = None
) -> RecordSource:
    """The records of a path, `Data`, a source, or a sequence of records or dicts.

    A tuple of several of them are joined, and each part of a `Mixture` is opened. `what` names them
    in errors, `split` is the part of a path that is a directory, and `codec` is for COCO's masks.
    Raises DatasetError, and ConfigError for nothing, or a mixture where none can be.
    """

    def opened(one: Any, place: Any = None) -> RecordSource:
        name = what if place is None else f"{what}[{place}]"
        return open_records(one, name, split=split, codec=codec)

    if given is None:
        raise ConfigError(
            f"expected records, got none: {what} is not set. Give a path or a source, for example "
            f"--config.{what}=data/train.jsonl"
        )
    if isinstance(given, str | os.PathLike):
        return open_source(given, split)
    if isinstance(given, Data):
        if given.masks and codec is None:
            raise ConfigError(
                f"The masks of {given.path} cannot become tokens: the checkpoint has no mask codec."
                " Add one: paligemma convert SOURCE TARGET --mask-codec vae-oid.npz"
            )
        options: Any = dict(images=given.images, reader=given.reader)
        return open_source(given.path, given.split, codec=codec if given.masks else None, **options)
    if isinstance(given, Mixture):
        return given.opened(opened)
    parts = given if isinstance(given, tuple) else ()
    if any(isinstance(one, Mixture | MixtureComponent) for one in (given, *parts)):
        shown = "a tuple with a mixture or a part of one in it" if parts else "a part of a mixture"
        raise ConfigError(
            f"{what} is {shown}. Write one mixture of all: Mixture(MixtureComponent(captions, 3.0),"
            " MixtureComponent(boxes))"
        )
    if any(not isinstance(one, Mapping | Record) for one in parts):
        return ConcatSource(tuple(map(opened, parts)))
    if not isinstance(given, list | tuple) and isinstance(given, RecordSource):
        if len(given) > 0 and isinstance(given[0], Record):
            return given
    return SequenceSource(given, name=what)


def first_records(source: RecordSource, count: int) -> list[Record]:
    """So many records to look at: those of a mixture by its weights."""
    if not isinstance(source, Mixture):
        return [source[number] for number in range(count)]
    sampler = Sampler.of(source, seed=0, shuffle=False)
    return [source[sampler[position].number] for position in range(count)]
