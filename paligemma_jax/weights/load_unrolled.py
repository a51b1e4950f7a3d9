"""Loading a checkpoint as a model for inference, layer by layer and each array where it stays."""

import math
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantization import abstract_quantized
from paligemma_jax.models.recipe import Recipe, find_recipe
from paligemma_jax.models.rounded_targets import RoundedTarget, rounded_targets
from paligemma_jax.models.unrolled import Target, abstract_unrolled, fill, targets
from paligemma_jax.weights.arrays import DTypeLike, aligned_empty, as_float_dtype
from paligemma_jax.weights.changed_weights import cast_floats
from paligemma_jax.weights.checkpoint import Checkpoint
from paligemma_jax.weights.load import POSITIONS
from paligemma_jax.weights.places import DefaultDevice, OverMesh, Places
from paligemma_jax.weights.resample import resample_position_embeddings
from paligemma_jax.weights.rounded_weights import RoundedWeights
from paligemma_jax.weights.source import Progress, Weights, read_pieces, read_tensor, read_together


def load_unrolled(
    checkpoint: Checkpoint,
    config: PaliGemmaConfig,
    dtype: DTypeLike,
    *,
    recipe: Recipe | str | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> PaliGemma:
    """The model with its layers one by one, its floats and activations of `dtype`.

    `config` may have another resolution than the checkpoint's; position embeddings are resampled
    then. A `recipe` rounds floats one by one, as they are read; weights that are stored rounded go
    where they stay as they are. Peak memory is that of the model and of one layer's largest
    parameter. On a `mesh`, which has all three axes, no device ever holds more than its shards,
    one rounded parameter on its way to the others apart. Raises CheckpointError, and ConfigError
    for an unknown recipe.
    """
    weights = cast_floats(checkpoint, as_float_dtype(dtype))
    formats = checkpoint.recipe
    if recipe is not None and formats is None:
        formats = find_recipe(recipe)
        weights = RoundedWeights(weights, formats)
    model = abstract_unrolled(config, dtype)
    few_bits: dict[str, RoundedTarget] = {}
    if formats is not None:
        few_bits = {r.target.paths[0]: r for r in rounded_targets(config, formats)}
        model = abstract_quantized(model, formats)
    places = DefaultDevice() if mesh is None else OverMesh(model, mesh)
    return fill(model, dict(_arrays(weights, config, few_bits, places, progress)))


def _arrays(
    weights: Weights,
    config: PaliGemmaConfig,
    few_bits: dict[str, RoundedTarget],
    places: Places,
    progress: Progress | None,
) -> Iterator[tuple[str, jax.Array]]:
    """Every parameter of the unrolled form by its path, read when asked for, the largest first.

    Each is written where it stays, layer by layer: no stacked parameter is ever in memory.
    """
    done, total = 0, sum(spec.nbytes for spec in weights.specs.values())
    for target in sorted(targets(config), key=lambda t: -math.prod(t.shape) * (t.depth or 1)):
        rounded = few_bits.get(target.paths[0])
        paths = [piece.path for piece in target.pieces]
        if rounded is not None:
            paths = [rounded.values, rounded.scale]
        if progress:
            progress(paths[0], done, total)
        if rounded is not None:
            yield from _few_bits_of(weights, rounded, places)
        elif paths == [POSITIONS]:
            array = read_tensor(weights, POSITIONS, weights.specs[POSITIONS].dtype)
            array = resample_position_embeddings(array, config.img.num_patches)
            yield POSITIONS, places.put(POSITIONS, array)
        else:
            yield from _layers_of(weights, target, places)
        done += sum(weights.specs[path].nbytes for path in paths)
    if progress:
        progress("", done, total)


def _layers_of(weights: Weights, target: Target, places: Places) -> Iterator[tuple[str, jax.Array]]:
    dtype = weights.specs[target.pieces[0].path].dtype
    if target.depth is None:
        (path,) = target.paths
        yield path, places.read(weights, path, dtype)
        return
    layers = zip(*(weights.pieces(piece.path, dtype) for piece in target.pieces), strict=True)
    for path, fills in zip(target.paths, layers, strict=True):
        array = aligned_empty(target.shape, dtype)
        for piece, copy in zip(target.pieces, fills, strict=True):
            copy(piece.view(array))
        yield path, places.put(path, array)


def _few_bits_of(
    weights: Weights, rounded: RoundedTarget, places: Places
) -> Iterator[tuple[str, jax.Array]]:
    names = (rounded.values, rounded.scale)
    if rounded.target.depth is None:
        layers = iter([read_together(weights, names)])
    else:
        layers = read_pieces(weights, names)
    for owner, arrays in zip(rounded.owners, layers, strict=True):
        values, scale = map(jax.device_put, arrays)
        del arrays
        for name, array in (("values", rounded.on_device(values, scale)), ("scale", scale)):
            yield f"{owner}/matrix/{name}", places.put(f"{owner}/matrix/{name}", array)
