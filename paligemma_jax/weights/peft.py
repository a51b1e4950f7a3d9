"""PEFT adapters: directories of adapter_config.json and adapter_model.safetensors, in and out.

adapter_config.json of PEFT: what of it we know, and all that we cannot do at once.

PEFT's names of what adapters are on, and where ours keep the same numbers.

A module is one `torch.nn.Linear` of Hugging Face's PaliGemma: one part of one layer's weights. It
has three names, by the version of transformers that wrote it:

    up to 4.51  language_model.model.layers.0...        vision_tower.vision_model.encoder...
    4.52 to 4   model.language_model.layers.0...        model.vision_tower.vision_model.encoder...
    5           model.language_model.layers.0...        model.vision_tower.encoder...

What adapter_config.json says of our adapters, in words that hold for every version's names.

Tensors that an adapter has whole (modules_to_save of PEFT), in place of the base's.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.filesystem import read_json, staged
from paligemma_jax.models.lora import (
    Arrays,
    LoRA,
    Place,
    adaptable,
    adapters,
    find_places,
    put_adapters,
    scale_of,
)
from paligemma_jax.models.paligemma import PaliGemma, flatten, from_params, nest, to_params
from paligemma_jax.weights.huggingface import (
    EMBEDDING,
    LM_HEAD,
    HFTensor,
    canonical_key,
    hf_tensors,
    part_shape,
)
from paligemma_jax.weights.safetensors_io import SafeTensor, read_header, write_tensors
from paligemma_jax.weights.tensors import expected_shapes

# Fields that say nothing about the numbers, or only together with another that is refused.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "fan_in_fan_out",  # of the base's weights; PEFT itself ignores it for Linear
    "inference_mode",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Initialisations after which the base is another one.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LINEAR = re.compile(r".*(_proj|\.fc[12]|projector\.linear)")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The fields of adapter_config.json that matter, under PEFT's names."""

    r: int
    lora_alpha: int | float
    use_rslora: bool
    lora_dropout: int | float
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, int | float]
    modules_to_save: tuple[str, ...]

    def targets(self, spellings: tuple[str, ...]) -> bool:
        """Whether a module has an adapter, by PEFT's rules, under any of its names."""
        return any(self._targets(name) for name in spellings)

    def _targets(self, name: str) -> bool:
        if _matches(self.exclude_modules, name):
            return False
        if any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in self.modules_to_save):
            return False
        if self.target_modules == "all-linear":
            return _LINEAR.fullmatch(name) is not None
        if not _matches(self.target_modules, name):
            return False
        if isinstance(self.target_modules, str) or not self.layers_to_transform:
            return True
        patterns = self.layers_pattern or (r"[^.]*",)
        found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in patterns)
        layer = next((int(match[1]) for match in found if match), None)
        return layer in self.layers_to_transform

    def rank(self, spellings: tuple[str, ...]) -> int:
        """The rank of a module's adapter."""
        return _pattern(self.rank_pattern, spellings, self.r)

    def scale(self, spellings: tuple[str, ...]) -> float:
        """What B A of a module is multiplied by."""
        alpha = _pattern(self.alpha_pattern, spellings, self.lora_alpha)
        return scale_of(self.rank(spellings), alpha, self.use_rslora)


def parse_config(values: Mapping[str, Any]) -> tuple[AdapterConfig | None, list[str]]:
    """The configuration, and a line for everything in it that is malformed or beyond us."""
    read = _Reader(values)
    kind = values.get("peft_type")
    if kind != "LORA":
        read.refuse("peft_type", "only LORA fits")
    config = AdapterConfig(
        r=read.number("r", 8, whole=True),
        lora_alpha=read.number("lora_alpha", 8),
        use_rslora=read.flag("use_rslora"),
        lora_dropout=read.number("lora_dropout", 0.0, lowest=0, below=1),
        target_modules=read.names("target_modules"),
        exclude_modules=read.names("exclude_modules"),
        layers_to_transform=read.layers("layers_to_transform"),
        layers_pattern=_as_tuple(read.names("layers_pattern")),
        rank_pattern=read.pattern("rank_pattern", whole=True),
        alpha_pattern=read.pattern("alpha_pattern", whole=False),
        modules_to_save=_as_tuple(read.names("modules_to_save")),
    )
    if values.get("bias", "none") != "none":
        read.refuse("bias", "biases that were trained too cannot be read; 'none' fits")
    initial = values.get("init_lora_weights", True)
    if isinstance(initial, str) and initial.startswith(_CHANGES_BASE):
        read.refuse("init_lora_weights", "such adapters change the base model too")
    known = {field.name for field in dataclasses.fields(AdapterConfig)} | _HARMLESS
    for name in values.keys() - known - {"peft_type", "bias", "init_lora_weights"}:
        if values[name] not in (None, False, "", [], {}):
            hint = "DoRA has no place here; merge it with PEFT first" if "dora" in name else None
            read.refuse(name, hint or "its meaning is not known here; null or false fits")
    return (None if read.problems else config), sorted(read.problems)


class _Reader:
    """Reads one field after the other, and keeps a list of what is wrong."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = values
        self.problems: list[str] = []

    def refuse(self, name: str, why: str) -> None:
        value = self._values.get(name)
        self.problems.append(f"config      {name} is {value!r}: {why}")

    def number(
        self,
        name: str,
        default: int | float,
        whole: bool = False,
        lowest: int | float = 1e-30,
        below: int | float = 1e30,
    ) -> Any:
        value = self._values.get(name, default)
        if not _is_number(value, whole) or not lowest <= value < below:
            self.refuse(name, "a positive whole number fits" if whole else "a number fits")
            return default
        return value

    def flag(self, name: str) -> bool:
        value = self._values.get(name) or False
        if not isinstance(value, bool):
            self.refuse(name, "true or false fits")
        return bool(value)

    def names(self, name: str) -> str | tuple[str, ...]:
        """A regular expression, or a list of endings."""
        value = self._values.get(name)
        if value is None:
            return ()
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return tuple(value)
        if not isinstance(value, str):
            self.refuse(name, "a list of names, or a regular expression, fits")
            return ()
        return value if self._compiles(name, value) else ()

    def layers(self, name: str) -> tuple[int, ...]:
        value = self._values.get(name)
        value = [value] if isinstance(value, int) else value or []
        if not (isinstance(value, list) and all(_is_number(one, True) for one in value)):
            self.refuse(name, "a list of numbers of layers fits")
            return ()
        return tuple(value)

    def pattern(self, name: str, whole: bool) -> Mapping[str, Any]:
        value = self._values.get(name) or {}
        good = isinstance(value, dict) and all(
            _is_number(one, whole) and one > 0 for one in value.values()
        )
        if not good:
            self.refuse(name, "an object of names and positive numbers fits")
            return {}
        return {key: one for key, one in value.items() if self._compiles(name, key)}

    def _compiles(self, name: str, pattern: str) -> bool:
        try:
            re.compile(pattern)
        except re.error as e:
            self.refuse(name, f"{pattern!r} is no regular expression ({e})")
            return False
        return True


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and (isinstance(value, int) or not whole)


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pattern(pattern: Mapping[str, Any], spellings: tuple[str, ...], default: Any) -> Any:
    """The value of the first key that one of the names ends with, as PEFT looks it up."""
    for key, value in pattern.items():
        if any(re.match(rf"(.*\.)?({key})$", name) for name in spellings):
            return value
    return default


_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")


@dataclasses.dataclass(frozen=True)
class Module:
    """One module that an adapter can be on.

    Attributes:
      name: canonical, see `canonical_key`; "language_model.layers.0.self_attn.k_proj".
      place: where ours has its adapter.
      index: of its adapter in the arrays there: layer, part.
    """

    name: str
    place: Place
    index: tuple[int, ...]

    @property
    def spellings(self) -> tuple[str, str, str]:
        """See `spellings`."""
        return spellings(self.name)

    def key(self, side: str, old_names: bool = False) -> str:
        """PEFT's key of lora_A or lora_B, in transformers 5 or as before 4.52."""
        return spell(f"{self.name}.lora_{side}.weight", old_names)

    @property
    def shapes(self) -> tuple[int, int]:
        """Widths of its inputs and outputs."""
        ins = outs = 1
        for size in self.place.inputs:
            ins *= size
        for size in self.place.outputs:
            outs *= size
        return ins, outs


@dataclasses.dataclass(frozen=True)
class AdapterKey:
    """What a key of adapter_model.safetensors says.

    Attributes:
      name: canonical, of the module; or of the whole tensor, with ".weight".
      side: "A", "B", or None for a tensor that was trained whole (modules_to_save).
      adapter: the adapter's name where the key has one.
    """

    name: str
    side: str | None
    adapter: str | None = None


def spellings(name: str) -> tuple[str, str, str]:
    """What a canonical name is in transformers 5, in 4.52 and later, and before."""
    with_room = re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)
    old = re.sub(r"^language_model\.", "language_model.model.", with_room)
    return f"model.{name}", f"model.{with_room}", old


def spell(name: str, old_names: bool) -> str:
    """PEFT's key of a tensor with this canonical name."""
    return f"base_model.model.{spellings(name)[2 if old_names else 0]}"


def find_modules(config: PaliGemmaConfig, places: dict[str, Place]) -> dict[str, Module]:
    """Every module that an adapter can be on, by its canonical name."""
    modules = {}
    for tensor in hf_tensors(config):
        path = tensor.path.rpartition("/")[0]
        if path not in places or not tensor.key.endswith(".weight"):
            continue
        place = places[path]
        for layer in range(place.depth) if place.depth is not None else (None,):
            name = tensor.key.format(layer).removesuffix(".weight")
            index = () if layer is None else (layer,)
            modules[name] = Module(name, place, index + _part(tensor))
    return modules


def _part(tensor: HFTensor) -> tuple[int, ...]:
    return () if tensor.part is None else (tensor.part,)


def read_key(key: str) -> AdapterKey:
    """The meaning of a key in any of its spellings."""
    key = re.sub(r"^(base_model\.model\.)+", "", key)
    match = _KEY.fullmatch(key)
    if match is None:
        whole = re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.(weight|bias)$)", "", key)
        return AdapterKey(canonical_key(whole), None)
    return AdapterKey(canonical_key(match["module"]), match["side"], match["adapter"])


_LAYER = re.compile(r"(?P<tower>.+?)\.(?:encoder\.)?layers\.(?P<layer>\d+)\.(?P<leaf>.+)")


def config_values(
    spec: LoRA,
    saved: Mapping[Module, tuple[int, float]],
    modules: Iterable[Module],
    base: str | None,
    modules_to_save: Sequence[str] = (),
) -> dict[str, Any]:
    """The fields, for adapters of the given ranks and scales on some of all modules.

    `modules_to_save` names modules that are beside them whole.

    Regular expressions name the modules: PEFT's lists of endings such as "q_proj" would have the
    image encoder's too.
    """
    every = list(modules)
    alpha = _number(spec.rank if spec.alpha is None else spec.alpha)
    ranks: dict[int, list[Module]] = {}
    alphas: dict[int | float, list[Module]] = {}
    for module, (rank, scale) in saved.items():
        own = _alpha(scale, rank, spec)
        if rank != spec.rank:
            ranks.setdefault(rank, []).append(module)
        if own != alpha:
            alphas.setdefault(own, []).append(module)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": alpha,
        "use_rslora": spec.rslora,
        "lora_dropout": spec.dropout,
        "target_modules": f".*({'|'.join(_patterns(saved, every))})",
        "rank_pattern": {key: value for value in ranks for key in _patterns(ranks[value], every)},
        "alpha_pattern": {key: a for a in alphas for key in _patterns(alphas[a], every)},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": list(modules_to_save) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_dora": False,
    }


def _patterns(chosen: Iterable[Module], every: Iterable[Module]) -> list[str]:
    """Regular expressions that match the ends of exactly the chosen modules' names."""
    wanted, there = _by_leaf(chosen), _by_leaf(every)
    groups: dict[tuple[str, str], list[str]] = {}
    for (tower, leaf), layers in wanted.items():
        if not layers:
            numbers = ""
        elif layers == there[tower, leaf]:
            numbers = r"\d+"
        else:
            numbers = "|".join(map(str, sorted(layers)))
        groups.setdefault((tower, numbers), []).append(re.escape(leaf))
    return [
        rf"{tower}\..*layers\.({numbers})\.({'|'.join(leaves)})"
        if numbers
        else rf"{tower}\.({'|'.join(leaves)})"
        for (tower, numbers), leaves in groups.items()
    ]


def _by_leaf(modules: Iterable[Module]) -> dict[tuple[str, str], set[int]]:
    """The layers of each kind of module; none for one that is of no layer."""
    found: dict[tuple[str, str], set[int]] = {}
    for module in modules:
        match = _LAYER.fullmatch(module.name)
        if match is None:
            tower, _, leaf = module.name.partition(".")
            found[tower, leaf] = set()
        else:
            found.setdefault((match["tower"], match["leaf"]), set()).add(int(match["layer"]))
    return found


def _alpha(scale: float, rank: int, spec: LoRA) -> int | float:
    """The roundest alpha that the scale, in float32, is made of."""
    exact = scale / scale_of(rank, 1, spec.rslora)
    for alpha in (round(exact), float(f"{exact:.6g}")):
        if np.float32(scale_of(rank, alpha, spec.rslora)) == np.float32(scale):
            return _number(alpha)
    return exact


def _number(value: int | float) -> int | float:
    return int(value) if value == int(value) else value


_TABLES = {EMBEDDING: "llm/embedder/input_embedding", LM_HEAD: "llm/lm_head/w"}


class WholeTensors:
    """Collects them by their canonical names; rows of tables beyond the vocabulary are dropped.

    A head that comes without a table of tokens, or the other way round, makes a tied model untied:
    PEFT trains a copy of the one and leaves the other alone.
    """

    def __init__(self, model: PaliGemma):
        self._model = model
        self._params = flatten(to_params(model))
        untied = dataclasses.replace(model.config.llm, tie_embeddings=False)
        config = dataclasses.replace(model.config, llm=untied)
        self._shapes = expected_shapes(config)
        self._places: dict[str, tuple[HFTensor, int | None]] = {}
        for tensor in hf_tensors(config):
            layers = range(self._shapes[tensor.path][0]) if tensor.layered else (None,)
            self._places |= {tensor.key.format(layer): (tensor, layer) for layer in layers}
        self._tensors: dict[str, SafeTensor] = {}
        self._problems: list[str] = []

    def add(self, key: str, name: str, tensor: SafeTensor) -> None:
        """Takes the tensor `name` that the file calls `key`."""
        if name not in self._places:
            self._problems.append(f"unexpected  {key} {tensor.shape}")
            return
        if name in self._tensors:
            self._problems.append(f"duplicate   {key} is there under another name too")
        self._tensors[name] = tensor
        place, _ = self._places[name]
        ours = self._shapes[place.path]
        expected = place.shape(part_shape(place, ours))
        found = tensor.shape
        if name in _TABLES and len(found) == 2 and found[0] > expected[0]:
            found = (expected[0], found[1])
        if found != expected:
            self._problems.append(f"shape       {key}: adapter {tensor.shape}, model {expected}")
        elif self._current(place.path) is None:
            self._problems.append(f"quantized   {key}: the model's own is rounded to integers")

    def misfits(self, modules_to_save: tuple[str, ...]) -> list[str]:
        """A line for everything that does not fit."""
        return self._problems + [
            f"missing     the tensors of {saved!r}, which modules_to_save names"
            for saved in modules_to_save
            if not any(re.match(rf"(^|.*\.){re.escape(saved)}\.", name) for name in self._tensors)
        ]

    def replaced(self) -> PaliGemma:
        """The model with the tensors that were added; the very same if there were none."""
        if not self._tensors:
            return self._model
        config, params = self._model.config, dict(self._params)
        changed: dict[str, np.ndarray] = {}
        for name, tensor in self._tensors.items():
            place, layer = self._places[name]
            array = changed.setdefault(place.path, np.array(self._current(place.path)))
            index = (() if layer is None else (layer,)) + (
                () if place.part is None else (place.part,)
            )
            rows = slice(0, array.shape[0]) if name in _TABLES else slice(None)
            target = array[index]
            target[...] = place.to_ours(tensor.read(rows), target.shape).astype(array.dtype)
        params |= {path: jnp.asarray(array) for path, array in changed.items()}
        if config.llm.tie_embeddings and changed.keys() & set(_TABLES.values()):
            head = params.setdefault(_TABLES[LM_HEAD], self._params[_TABLES[EMBEDDING]])
            if np.array_equal(head, params[_TABLES[EMBEDDING]]):
                del params[_TABLES[LM_HEAD]]
            else:
                llm = dataclasses.replace(config.llm, tie_embeddings=False)
                config = dataclasses.replace(config, llm=llm)
        return from_params(config, nest(params), self._model.dtype)

    def _current(self, path: str) -> Any:
        """The model's parameter; that of a head that is tied is the table."""
        if path == _TABLES[LM_HEAD] and path not in self._params:
            path = _TABLES[EMBEDDING]
        return self._params.get(path)


def whole_tensors(
    model: PaliGemma, paths: Iterable[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The parameters at `paths` under canonical names, and the modules that these are of.

    A module comes with all of its parameters. Raises ConfigError for what is no parameter of
    floats, for tables, which have more rows at Hugging Face, and for layers with an adapter.
    """
    params = flatten(to_params(model))
    owners = {path.rpartition("/")[0] for path in paths} - adapters(model).keys()
    chosen = [
        tensor
        for tensor in hf_tensors(model.config)
        if tensor.path.rpartition("/")[0] in owners and tensor.path not in _TABLES.values()
    ]
    unfit = set(paths) - {tensor.path for tensor in chosen if tensor.path in params}
    if unfit:
        raise ConfigError(
            f"{', '.join(sorted(unfit))} cannot be written whole beside adapters. Kernels, biases "
            "and scales of layers without an adapter fit. Try whole=['img/head/kernel']."
        )
    arrays: dict[str, np.ndarray] = {}
    for tensor in chosen:
        ours = np.asarray(params[tensor.path])
        for layer in range(len(ours)) if tensor.layered else (None,):
            index = (() if layer is None else (layer,)) + (
                () if tensor.part is None else (tensor.part,)
            )
            arrays[tensor.key.format(layer)] = tensor.to_theirs(ours[index])
    return arrays, sorted({key.rpartition(".")[0] for key in arrays})


CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"


def load_adapter(model: PaliGemma, path: str | os.PathLike[str]) -> PaliGemma:
    """The model with the adapters of a PEFT directory, ready to go on training or to be merged.

    Names of every version of transformers fit, and ranks and alphas that differ by module; tensors
    trained whole (modules_to_save) take the place of the model's. `model` must be stacked, without
    adapters, and stays as it is. Adapters are float32. Raises ConfigError for an unfit model, and
    CheckpointError that names everything in the directory that does not fit.
    """
    directory = Path(path).expanduser()
    modules = find_modules(model.config, adaptable(model))
    config, problems = parse_config(read_json(directory / CONFIG))
    found = _Found(modules, WholeTensors(model))
    for key, tensor in _read_header(directory).items():
        found.add(key, tensor)
    problems += found.problems()
    if config is not None:
        problems += found.misfits(config)
    if config is None or problems:
        raise _misfit(directory, problems)
    arrays, names = _arrays(found, config)
    lora = LoRA(
        rank=config.r,
        alpha=config.lora_alpha,
        rslora=config.use_rslora,
        dropout=config.lora_dropout,
        targets="|".join(map(re.escape, sorted(names))),
    )
    return put_adapters(found.whole.replaced(), lora, arrays)


def save_adapter(
    model: PaliGemma,
    path: str | os.PathLike[str],
    *,
    base: str | None = None,
    whole: Collection[str] = (),
    old_names: bool = False,
) -> None:
    """Writes the model's adapters as a new directory that PEFT loads onto Hugging Face's PaliGemma.

    Other weights are written only where `whole` says so. A Roboflow package is such a directory
    with the base's Hugging Face directory in it as `base/`.

    Args:
      model: with adapters, from `add_lora` or `load_adapter`; its base may be quantized.
      path: which does not exist yet.
      base: name or path of the base, for programs that look for it by themselves.
      whole: paths of other parameters that were trained, such as "img/head/kernel"; their layers
        are written whole (PEFT's modules_to_save). Not the tables of tokens.
      old_names: name tensors as transformers did before 4.52; otherwise as in transformers 5.

    Raises ConfigError for a model without adapters, CheckpointError where nothing can be written.
    """
    found = adapters(model)
    if not found:
        raise ConfigError(
            "This model has no adapters to save. One from add_lora or load_adapter fits. Call "
            "save_adapter before merge_lora; Pipeline.save writes a merged model."
        )
    spec = next(iter(found.values())).spec
    modules = find_modules(model.config, find_places(model))
    tensors: dict[str, np.ndarray] = {}
    saved: dict[Module, tuple[int, float]] = {}
    for where, layer in found.items():
        a, b, scale = (np.asarray(x[...]) for x in (layer.lora_a, layer.lora_b, layer.lora_scale))
        for module in modules.values():
            factor = float(scale[module.index]) if module.place.path == where else 0.0
            if not factor:
                continue
            ours = a[module.index], b[module.index]
            rank = _rank(*ours, factor, spec)
            ins, outs = module.shapes
            saved[module] = rank, factor
            tensors[module.key("A", old_names)] = ours[0].reshape(ins, -1)[:, :rank].T
            tensors[module.key("B", old_names)] = ours[1].reshape(-1, outs)[:rank].T
    others, names = whole_tensors(model, whole)
    tensors |= {spell(name, old_names): tensor for name, tensor in others.items()}
    config = config_values(spec, saved, modules.values(), base, names)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    with staged(Path(path).expanduser(), nbytes) as directory:
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_tensors(directory / TENSORS, tensors)


def _rank(a: np.ndarray, b: np.ndarray, scale: float, spec: LoRA) -> int:
    """The rank of one adapter: that of all, unless it was loaded with another.

    Adapters of lower ranks than their neighbours are filled up with zeros.
    """
    rank = a.shape[-1]
    used = np.any(a.reshape(-1, rank), axis=0) | np.any(b.reshape(rank, -1), axis=1)
    own = max(int(np.max(np.nonzero(used)[0], initial=0)) + 1, 1)
    usual = own <= spec.rank <= rank and np.float32(scale) == np.float32(spec.scale)
    return spec.rank if usual else own


def _read_header(directory: Path) -> dict[str, SafeTensor]:
    if not (directory / TENSORS).is_file():
        pickled = (directory / "adapter_model.bin").exists()
        only = ", only the pickled adapter_model.bin, which is refused" if pickled else ""
        raise CheckpointError(
            f"{directory} has no {TENSORS}{only}. A directory that PEFT wrote with safetensors "
            "fits. Save the adapter again with: model.save_pretrained(directory)"
        )
    return read_header(directory / TENSORS)


class _Found:
    """The tensors of a file, sorted by what they are for."""

    def __init__(self, modules: Mapping[str, Module], whole: WholeTensors):
        self.modules = modules
        self.whole = whole
        self.sides: dict[str, dict[str, SafeTensor]] = {}
        self._names: dict[tuple[str, str], str] = {}
        self._adapters: set[str] = set()
        self._problems: list[str] = []

    def add(self, key: str, tensor: SafeTensor) -> None:
        meaning = read_key(key)
        if tensor.dtype is None:
            self._problems.append(f"dtype       {key}: {tensor.kind}, F32, F16 or BF16 fits")
        if meaning.side is None:
            self.whole.add(key, meaning.name, tensor)
            return
        if meaning.adapter:
            self._adapters.add(meaning.adapter)
        if meaning.name not in self.modules:
            self._problems.append(f"unexpected  {key} {tensor.shape}: no such layer takes adapters")
            return
        first = self._names.setdefault((meaning.name, meaning.side), key)
        if first != key:
            self._problems.append(f"duplicate   {key} and {first} are the same tensor")
        self.sides.setdefault(meaning.name, {})[meaning.side] = tensor

    def problems(self) -> list[str]:
        """A line for everything that would fit no configuration."""
        several = sorted(self._adapters)
        lines = [f"unexpected  several adapters: {', '.join(several)}"] if len(several) > 1 else []
        return lines + self._problems

    def misfits(self, config: AdapterConfig) -> list[str]:
        """A line for everything that does not fit this configuration and the model."""
        lines = self.whole.misfits(config.modules_to_save)
        for name, module in self.modules.items():
            sides = self.sides.get(name, {})
            targeted = config.targets(module.spellings)
            if not targeted:
                keys = (f"{name}.lora_{side}.weight" for side in sorted(sides))
                lines += [f"unexpected  {key}: target_modules leaves it out" for key in keys]
                continue
            rank = config.rank(module.spellings)
            ins, outs = module.shapes
            for side, shape in (("A", (rank, ins)), ("B", (outs, rank))):
                tensor = sides.get(side)
                if tensor is None:
                    lines.append(f"missing     {name}.lora_{side}.weight {shape}")
                elif tensor.shape != shape:
                    lines.append(
                        f"shape       {name}.lora_{side}.weight: adapter {tensor.shape}, "
                        f"model and {CONFIG} {shape}"
                    )
                elif tensor.dtype is not None and not np.all(np.isfinite(_read(tensor))):
                    lines.append(f"values      {name}.lora_{side}.weight is not finite")
        if not self.sides and not lines:
            lines.append("missing     any adapter: target_modules matches no layer")
        return lines


def _arrays(found: _Found, config: AdapterConfig) -> tuple[dict[str, Arrays], set[str]]:
    """The adapters by the path of their place, and the names of the parts that have one."""
    by_place: dict[str, list[Module]] = {}
    for name in found.sides:
        module = found.modules[name]
        by_place.setdefault(module.place.path, []).append(module)
    arrays, names = {}, set()
    for path, modules in by_place.items():
        place = modules[0].place
        rank = max(config.rank(module.spellings) for module in modules)
        a = np.zeros((*place.lead, *place.inputs, rank), np.float32)
        b = np.zeros((*place.lead, rank, *place.outputs), np.float32)
        scale = np.zeros(place.lead, np.float32)
        for module in modules:
            sides, own = found.sides[module.name], config.rank(module.spellings)
            a[module.index][..., :own] = _read(sides["A"]).T.reshape(*place.inputs, own)
            b[module.index][:own] = _read(sides["B"]).T.reshape(own, *place.outputs)
            scale[module.index] = config.scale(module.spellings)
            names.add(place.names[module.index[-1]] if place.axes.parts else path)
        arrays[path] = Arrays(jnp.asarray(a), jnp.asarray(b), jnp.asarray(scale))
    return arrays, names


def _read(tensor: SafeTensor) -> np.ndarray:
    return tensor.read().astype(np.float32)


def _misfit(directory: Path, problems: list[str]) -> CheckpointError:
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    listing = "\n  ".join(problems)
    return CheckpointError(
        f"Adapter {directory} does not fit the model ({count}):\n  {listing}\n"
        "LoRA adapters of exactly this size of PaliGemma fit, as PEFT and save_adapter write them. "
        f"Compare {CONFIG} with the model that the adapter was trained on."
    )
