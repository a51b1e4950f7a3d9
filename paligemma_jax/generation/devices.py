"""A model on several devices, each of which answers some rows of every batch."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.paligemma import PaliGemma

_ROWS = "rows"


def on_devices(model: PaliGemma, devices: Sequence[Any] | None = None) -> PaliGemma:
    """The model with its weights whole on each device; all of this process if none are named.

    What it is asked then is split by rows among them, where their number divides that of the rows
    (which are filled up to powers of two). Answers are those of one device. On one device nothing
    changes. Raises ConfigError for no devices.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    if not devices:
        raise ConfigError(
            "There are no devices to put the model on. At least one fits. Call for example: "
            "on_devices(model, jax.local_devices())"
        )
    if len(devices) == 1:
        return model
    everywhere = NamedSharding(Mesh(np.array(devices), (_ROWS,)), PartitionSpec())
    return jax.tree.map(lambda leaf: jax.device_put(leaf, everywhere), model)


def by_rows(model: PaliGemma) -> Callable[[Any], jax.Array]:
    """What puts an array [B, ...] where the model expects it: split if that is `on_devices`."""
    first = next(iter(jax.tree.leaves(model)), None)
    everywhere = getattr(first, "sharding", None)
    if not isinstance(everywhere, NamedSharding) or everywhere.mesh.axis_names != (_ROWS,):
        return jnp.asarray
    split = NamedSharding(everywhere.mesh, PartitionSpec(_ROWS))

    def place(array: Any) -> jax.Array:
        fits = array.shape[0] % split.mesh.size == 0
        return jax.device_put(array, split if fits else everywhere)

    return place
