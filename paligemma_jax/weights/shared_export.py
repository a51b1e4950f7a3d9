"""Writing a model that several processes hold in parts."""

from pathlib import Path

import jax

from paligemma_jax.weights.contents import Contents
from paligemma_jax.weights.export import export_weights
from paligemma_jax.weights.orbax_tree import write_tree
from paligemma_jax.weights.source import Weights
from paligemma_jax.weights.staging import staging_path
from paligemma_jax.weights.store import arrays_to_store
from paligemma_jax.weights.store_arrays import PARAMS


def export_from_all(target: Path, weights: Weights, contents: Contents) -> None:
    """`export_weights` as a store in a directory that all processes see; each of them calls this.

    Each gathers the same pieces in the same order, and the first one writes. It is not done when
    the others are: a barrier should follow. What goes wrong in one process only, the others do not
    learn here. Raises CheckpointError.
    """
    if jax.process_index() == 0:
        export_weights(target, weights, contents)
    else:
        write_tree(staging_path(target.absolute()) / PARAMS, arrays_to_store(weights))
