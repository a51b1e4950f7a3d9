"""PEFT adapters: directories of adapter_config.json and adapter_model.safetensors, in and out."""

import dataclasses
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from paligemma_jax.errors import CheckpointError, ConfigError, problem_list
from paligemma_jax.filesystem import read_json, staged
from paligemma_jax.models.lora import (
    Arrays,
    LoRA,
    adaptable,
    adapters,
    find_places,
    put_adapters,
)
from paligemma_jax.models.paligemma import PaliGemma, flatten, from_params, nest, to_params
from paligemma_jax.weights.huggingface import (
    EMBEDDING,
    LM_HEAD,
    HFTensor,
    hf_tensors,
    part_shape,
)
from paligemma_jax.weights.peft_config import (
    AdapterConfig,
    Module,
    config_values,
    find_modules,
    parse_config,
    peft_key,
    read_key,
)
from paligemma_jax.weights.safetensors_io import SafeTensor, read_header, write_tensors
from paligemma_jax.weights.tensors import expected_shapes

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_TABLES = {EMBEDDING: "llm/embedder/input_embedding", LM_HEAD: "llm/lm_head/w"}

Sides = dict[str, dict[str, SafeTensor]]  # lora_A and lora_B by the canonical name of the module


def load_adapter(model: PaliGemma, path: str | os.PathLike[str]) -> PaliGemma:
    """The model with the adapters of a PEFT directory, ready to go on training or to be merged.

    Reads the names of every version of transformers, and ranks and alphas that differ by module;
    tensors trained whole (modules_to_save) take the place of the model's. `model` must be stacked,
    without adapters, and stays as it is. Adapters are float32. Raises ConfigError for another
    model, and CheckpointError that names every problem of the directory, at most twenty.
    """
    directory = Path(path).expanduser()
    modules = find_modules(model.config, adaptable(model))
    config, problems = parse_config(read_json(directory / CONFIG))
    valid = not problems
    whole = _WholeTensors(model)
    sides: Sides = {}
    names: dict[tuple[str, str], str] = {}
    several: set[str] = set()
    for key, tensor in _read_header(directory).items():
        name, side, adapter = read_key(key)
        if tensor.dtype is None:
            problems.append(f"dtype       {key}: {tensor.kind}, expected F32, F16 or BF16")
        if side is None:
            whole.add(key, name, tensor)
            continue
        several |= {adapter} if adapter else set()
        if name not in modules:
            problems.append(f"unexpected  {key} {tensor.shape}: no such layer takes adapters")
            continue
        first = names.setdefault((name, side), key)
        if first != key:
            problems.append(f"duplicate   {key} and {first} are the same tensor")
        sides.setdefault(name, {})[side] = tensor
    if len(several) > 1:
        problems.append(f"unexpected  several adapters: {', '.join(sorted(several))}")
    if valid:
        problems += whole.problems(config) + _adapter_problems(sides, modules, config)
    if problems:
        raise CheckpointError(
            f"Adapter {directory} does not match the model {problem_list(problems)}\n"
            "Expected LoRA adapters of this size of PaliGemma, as PEFT and save_adapter write "
            f"them. Compare {CONFIG} with the model that the adapter was trained on."
        )
    arrays, targets = _adapter_arrays(sides, modules, config)
    lora = LoRA(
        rank=config.r,
        alpha=config.lora_alpha,
        rslora=config.use_rslora,
        dropout=config.lora_dropout,
        targets="|".join(map(re.escape, sorted(targets))),
    )
    return put_adapters(whole.replaced(), lora, arrays)


def _read_header(directory: Path) -> dict[str, SafeTensor]:
    if not (directory / TENSORS).is_file():
        pickled = (directory / "adapter_model.bin").exists()
        only = ", only the pickled adapter_model.bin, which is refused" if pickled else ""
        raise CheckpointError(
            f"{directory} has no {TENSORS}{only}. Save the adapter again with PEFT: "
            "model.save_pretrained(directory)"
        )
    return read_header(directory / TENSORS)


def _adapter_problems(
    sides: Sides, modules: Mapping[str, Module], config: AdapterConfig
) -> list[str]:
    """A line for every adapter tensor that does not match this configuration and the model."""
    lines = []
    for name, module in modules.items():
        found = sides.get(name, {})
        if not config.targets(module):
            keys = (f"{name}.lora_{side}.weight" for side in sorted(found))
            lines += [f"unexpected  {key}: target_modules leaves it out" for key in keys]
            continue
        rank, (ins, outs) = config.rank(module), module.shape
        for side, shape in (("A", (rank, ins)), ("B", (outs, rank))):
            key, tensor = f"{name}.lora_{side}.weight", found.get(side)
            if tensor is None:
                lines.append(f"missing     {key} {shape}")
            elif tensor.shape != shape:
                expected = f"model and {CONFIG} {shape}"
                lines.append(f"shape       {key}: adapter {tensor.shape}, {expected}")
            elif tensor.dtype is not None and not np.all(np.isfinite(_read(tensor))):
                lines.append(f"values      {key} is not finite")
    if not sides and not lines:
        lines.append("missing     any adapter: target_modules matches no layer")
    return lines


def _adapter_arrays(
    sides: Sides, modules: Mapping[str, Module], config: AdapterConfig
) -> tuple[dict[str, Arrays], set[str]]:
    """The adapters by the path of their place, and the names of the parts that have one."""
    by_place: dict[str, list[Module]] = {}
    for name in sides:
        by_place.setdefault(modules[name].place.path, []).append(modules[name])
    arrays, targets = {}, set()
    for path, found in by_place.items():
        place = found[0].place
        rank = max(map(config.rank, found))
        a = np.zeros((*place.lead, *place.inputs, rank), np.float32)
        b = np.zeros((*place.lead, rank, *place.outputs), np.float32)
        scale = np.zeros(place.lead, np.float32)
        for module in found:
            pair, own = sides[module.name], config.rank(module)
            a[module.index][..., :own] = _read(pair["A"]).T.reshape(*place.inputs, own)
            b[module.index][:own] = _read(pair["B"]).T.reshape(own, *place.outputs)
            scale[module.index] = config.scale(module)
            targets.add(place.names[module.index[-1]] if place.axes.parts else path)
        arrays[path] = Arrays(jnp.asarray(a), jnp.asarray(b), jnp.asarray(scale))
    return arrays, targets


def _read(tensor: SafeTensor) -> np.ndarray:
    return tensor.read().astype(np.float32)


class _WholeTensors:
    """Tensors that an adapter has whole (modules_to_save), by their canonical names.

    Rows of embedding tables beyond the vocabulary are dropped. A head that comes without an
    embedding table, or the other way round, makes a tied model untied: PEFT trains a copy of the
    one and leaves the other alone.
    """

    def __init__(self, model: PaliGemma):
        self._model = model
        self._params = flatten(to_params(model))
        untied = dataclasses.replace(model.config.llm, tie_embeddings=False)
        config = dataclasses.replace(model.config, llm=untied)
        self._shapes = expected_shapes(config)
        self._places: dict[str, tuple[HFTensor, tuple[int, ...]]] = {}
        for tensor in hf_tensors(config):
            layers = range(self._shapes[tensor.path][0] if tensor.layered else 1)
            self._places |= {tensor.key.format(n): (tensor, _index(tensor, n)) for n in layers}
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
        expected = place.shape(part_shape(place, self._shapes[place.path]))
        found = tensor.shape
        if name in _TABLES and len(found) == 2 and found[0] > expected[0]:
            found = (expected[0], found[1])
        if found != expected:
            self._problems.append(f"shape       {key}: adapter {tensor.shape}, model {expected}")
        elif self._current(place.path) is None:
            self._problems.append(f"quantized   {key}: the model's own is quantized")

    def problems(self, config: AdapterConfig) -> list[str]:
        """A line for everything that does not match."""
        return self._problems + [
            f"missing     the tensors of {saved!r}, which modules_to_save names"
            for saved in config.saved_modules
            if not any(re.match(rf"(^|.*\.){re.escape(saved)}\.", name) for name in self._tensors)
        ]

    def replaced(self) -> PaliGemma:
        """The model with the tensors that were added; the very same if there were none."""
        if not self._tensors:
            return self._model
        config, params = self._model.config, dict(self._params)
        changed: dict[str, np.ndarray] = {}
        for name, tensor in self._tensors.items():
            place, index = self._places[name]
            array = changed.setdefault(place.path, np.array(self._current(place.path)))
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
        """The model's parameter; that of a head that is tied is the embedding table."""
        if path == _TABLES[LM_HEAD] and path not in self._params:
            path = _TABLES[EMBEDDING]
        return self._params.get(path)


def _index(tensor: HFTensor, layer: int) -> tuple[int, ...]:
    """Where a tensor of a layer is in our stacked parameter."""
    return ((layer,) if tensor.layered else ()) + (() if tensor.part is None else (tensor.part,))


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
        are written whole (PEFT's modules_to_save). Not the embedding tables.
      old_names: name tensors as transformers did before 4.52; otherwise as in transformers 5.

    Raises ConfigError for a model without adapters, CheckpointError where nothing can be written.
    """
    found = adapters(model)
    if not found:
        raise ConfigError(
            "This model has no adapters to save: pass one from add_lora or load_adapter, before "
            "merge_lora. Pipeline.save writes a merged model."
        )
    spec = next(iter(found.values())).spec
    modules = find_modules(model.config, find_places(model))
    tensors: dict[str, np.ndarray] = {}
    saved: dict[Module, tuple[int, float]] = {}
    for where, layer in found.items():
        found_arrays = (getattr(layer, name)[...] for name in ("lora_a", "lora_b", "lora_scale"))
        a, b, scale = map(np.asarray, found_arrays)
        for module in modules.values():
            factor = float(scale[module.index]) if module.place.path == where else 0.0
            if not factor:
                continue
            own_a, own_b = a[module.index], b[module.index]
            rank = _rank(own_a, own_b, factor, spec)
            ins, outs = module.shape
            saved[module] = rank, factor
            own_a, own_b = own_a.reshape(ins, -1)[:, :rank].T, own_b.reshape(-1, outs)[:rank].T
            tensors[peft_key(f"{module.name}.lora_A.weight", old_names)] = own_a
            tensors[peft_key(f"{module.name}.lora_B.weight", old_names)] = own_b
    others = _whole_tensors(model, whole)
    tensors |= {peft_key(name, old_names): tensor for name, tensor in others.items()}
    names = sorted({name.rpartition(".")[0] for name in others})
    config = config_values(spec, saved, modules.values(), base, names)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    with staged(Path(path).expanduser(), nbytes) as directory:
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_tensors(directory / TENSORS, tensors)


def _rank(a: np.ndarray, b: np.ndarray, scale: float, spec: LoRA) -> int:
    """The rank of one adapter: that of all, unless it was loaded with another.

    Adapters of lower ranks than their neighbors are filled up with zeros.
    """
    rank = a.shape[-1]
    used = np.any(a.reshape(-1, rank), axis=0) | np.any(b.reshape(rank, -1), axis=1)
    own = max(int(np.max(np.nonzero(used)[0], initial=0)) + 1, 1)
    usual = own <= spec.rank <= rank and np.float32(scale) == np.float32(spec.scale)
    return spec.rank if usual else own


def _whole_tensors(model: PaliGemma, paths: Collection[str]) -> dict[str, np.ndarray]:
    """The parameters at `paths`, with all others of their modules, by canonical names.

    Raises ConfigError for what is no parameter of floats, for embedding tables, which have more
    rows at Hugging Face, and for layers with an adapter.
    """
    params = flatten(to_params(model))
    owners = {path.rpartition("/")[0] for path in paths} - adapters(model).keys()
    chosen = [
        tensor
        for tensor in hf_tensors(model.config)
        if tensor.path.rpartition("/")[0] in owners and tensor.path not in _TABLES.values()
    ]
    wrong = set(paths) - {tensor.path for tensor in chosen if tensor.path in params}
    if wrong:
        raise ConfigError(
            f"{', '.join(sorted(wrong))} cannot be written whole beside adapters: expected "
            "kernels, biases and scales of layers without an adapter, such as "
            "whole=['img/head/kernel']"
        )
    arrays: dict[str, np.ndarray] = {}
    for tensor in chosen:
        ours = np.asarray(params[tensor.path])
        for layer in range(len(ours) if tensor.layered else 1):
            arrays[tensor.key.format(layer)] = tensor.to_theirs(ours[_index(tensor, layer)])
    return arrays
