"""Which recipe the weights of a model are rounded by: `recipe_of`."""

import jax
from flax import nnx

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.formats import Float8, Format, Int4, Int8, Int8Dynamic
from paligemma_jax.models.integers import FLOAT8, is_rounded
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantized_matrix import DynamicMatrix, Matrix, QuantizedMatrix
from paligemma_jax.models.recipe import Mixed
from paligemma_jax.models.recipe_text import KINDS
from paligemma_jax.models.rounded_targets import rounded_targets
from paligemma_jax.models.unrolled import is_unrolled


def recipe_of(model: PaliGemma) -> Mixed | None:
    """The recipe that an unrolled model was quantized by; None for weights as they were trained.

    Raises ConfigError for a stacked model that is quantized, and for one of which parts of a kind
    are in different formats.
    """
    if not any(map(is_rounded, jax.tree.leaves(model))):
        return None
    if not is_unrolled(model):
        raise ConfigError(
            "The weights of this model are rounded while its layers are stacked, as the base of "
            "adapters. A model that from_pretrained or quantize gives fits. Save the adapters "
            "alone: save_adapter(model, path)"
        )
    return Mixed(**{kind: _format_of_kind(model, kind) for kind in KINDS})


def _format_of_kind(model: PaliGemma, kind: str) -> Format | None:
    recipe = Mixed(**{**dict.fromkeys(KINDS), kind: Int8()})
    found: set[Format | None] = set()
    matrices: list[tuple[Matrix, int]] = []
    for rounded in rounded_targets(model.config, recipe):
        for owner in rounded.owners:
            matrix = getattr(_at(model, owner), "matrix", None)
            found.add(None if matrix is None else _format(matrix, rounded.shape[1]))
            if matrix is not None:
                matrices.append((matrix, rounded.shape[1]))
    grouped = {f for f in found if isinstance(f, Int4) and f.group is not None}
    if len(grouped) == 1 and found <= grouped | {Int4(None)}:
        (format,) = grouped
        if all(matrix.scale[...].shape[1] == format.groups(n) for matrix, n in matrices):
            return format
    if len(found) != 1:
        names = ", ".join(sorted(map(str, found)))
        raise ConfigError(
            f"Weights of one kind ({kind}) are in several formats: {names}. One format for each "
            "kind fits. Quantize with a recipe: quantize(model, Mixed(...))"
        )
    return found.pop()


def _at(model: PaliGemma, path: str) -> nnx.Module:
    found = model
    for name in path.split("/"):
        found = found[int(name)] if isinstance(found, nnx.List) else getattr(found, name)
    return found


def _format(matrix: Matrix, columns: int) -> Format:
    match matrix:
        case DynamicMatrix():
            return Int8Dynamic()
        case QuantizedMatrix(layout=layout, values=values, scale=scale):
            if values[...].dtype == FLOAT8:
                return Float8()
            groups = scale[...].shape[1]
            if layout.bits == 8:
                return Int8()
            return Int4(None if groups == 1 else columns // groups)
    raise TypeError(f"{type(matrix).__name__} has no format.")
