"""The functional form of a model: what it is without its arrays, and its arrays.

graphdef, params = model.split()
logits = jax.jit(graphdef.apply)(params, images, tokens, mask_ar)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.paths import flatten


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """What is left of a model, of whatever form, without its arrays; hashable.

    `paths` are those of the model's tree, in its order: "llm/layers/attn/q_einsum/w".
    """

    graphdef: Any
    treedef: Any
    paths: tuple[str, ...]

    def apply(self, params: Mapping[str, Any], *args: Any) -> Any:
        """What the model with these parameters answers: logits of images, tokens and mask_ar.

        Raises as `merge`.
        """
        return self.merge(params)(*args)

    def merge(self, params: Mapping[str, Any]) -> Any:
        """The model around parameters as `split` gives them, nested; nothing is copied or cast.

        Raises as `check`.
        """
        self.check(params)
        return self.fill(flatten(params))

    def check(self, params: Mapping[str, Any]) -> None:
        """Raises ConfigError that names all parameters that are missing or too many.

        Shapes are not looked at.
        """
        found, known = flatten(params), set(self.paths)
        problems = [f"missing     {path}" for path in self.paths if path not in found]
        problems += [f"unexpected  {path}" for path in found if path not in known]
        if problems:
            count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
            listing = "\n  ".join(problems)
            raise ConfigError(
                f"The parameters do not fit the model ({count}):\n  {listing}\nThose of a model "
                "of the same configuration and form fit. Take them from one: graphdef, params = "
                "model.split()"
            )

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
