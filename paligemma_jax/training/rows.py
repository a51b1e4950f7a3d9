"""Which rows of a batch a process reads."""

import jax
from jax.sharding import Mesh

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.mesh import DATA, FSDP
from paligemma_jax.training.sharding import batch_sharding


def share_of_rows(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """The number of this process's part of every batch, from 0 up, and how many parts there are.

    Processes whose devices only split tensors have the same part. Raises ConfigError where rows do
    not go evenly over the devices, or those of a process are no such part.
    """
    ways = mesh.shape[DATA] * mesh.shape[FSDP]
    if batch_size % ways:
        near = max(ways, batch_size // ways * ways)
        raise ConfigError(
            f"A batch of {batch_size} rows does not go evenly over {ways} devices. A multiple "
            f"fits. Say: --config.batch_size={near}"
        )
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    spans = {rows[0].indices(batch_size)[:2] for rows in places if rows}
    first, last = min(low for low, _ in spans), max(high for _, high in spans)
    size = last - first
    if sum(high - low for low, high in spans) != size or batch_size % size or first % size:
        raise ConfigError(
            f"On this mesh process {jax.process_index()} of {jax.process_count()} would read the "
            f"rows {sorted(spans)} of {batch_size}, which are no even part. A data axis, times "
            "fsdp, that is a multiple of the processes or divides them fits. For example: "
            "--config.mesh='Axes(fsdp=-1)'"
        )
    return first // size, batch_size // size
