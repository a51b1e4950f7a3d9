"""PEFT adapters: directories of adapter_config.json and adapter_model.safetensors, in and out."""

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.models.lora import Arrays, adaptable, adapters, find_places, put_adapters
from paligemma_jax.models.lora_spec import LoRA
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.weights.json_file import read_json
from paligemma_jax.weights.peft_config import AdapterConfig, parse_config
from paligemma_jax.weights.peft_config_writer import config_values
from paligemma_jax.weights.peft_names import Module, find_modules, read_key, spell
from paligemma_jax.weights.peft_whole import WholeTensors, whole_tensors
from paligemma_jax.weights.safetensors_file import SafeTensor, read_header
from paligemma_jax.weights.safetensors_writer import write_tensors
from paligemma_jax.weights.staging import staged

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
