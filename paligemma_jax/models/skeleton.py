"""A model without its arrays, and the arrays by flat path."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """What is left of a model, of whatever form, without its arrays; hashable.

    `paths` are those of the model's tree, in its order: "llm/layers/attn/q_einsum/w".
    """

    graphdef: Any
    treedef: Any
    paths: tuple[str, ...]

    def fill(self, arrays: Mapping[str, Any]) -> Any:
        """The model around arrays by flat path; nothing is copied."""
        state = jax.tree.unflatten(self.treedef, [arrays[path] for path in self.paths])
        return nnx.merge(self.graphdef, state)


def take_apart(model: nnx.Module) -> tuple[Skeleton, dict[str, Any]]:
    """The skeleton and the arrays (or shapes) by flat path; nothing is copied."""
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
    arrays = {"/".join(_name(key) for key in path[:-1]): leaf for path, leaf in leaves}
    return Skeleton(graphdef, treedef, tuple(arrays)), arrays


def _name(key: Any) -> str:
    """A part of a path; the last key of each, the variable's own, is left out above."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
