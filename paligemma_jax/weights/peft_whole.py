"""Tensors that an adapter has whole (modules_to_save of PEFT), in place of the base's."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.abstract import from_params, to_params
from paligemma_jax.models.lora import adapters
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.weights.hf_names import EMBEDDING, LM_HEAD, HFTensor, hf_tensors, part_shape
from paligemma_jax.weights.safetensors_file import SafeTensor
from paligemma_jax.weights.tree import expected_shapes, flatten, nest

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
