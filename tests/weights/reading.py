"""One process of two that read a checkpoint together: run by test_on_mesh.py.

python -m tests.weights.reading CHECKPOINT ADDRESS PROCESS
"""

import json
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from paligemma_jax.models import sharding
from paligemma_jax.models.paligemma import flatten
from paligemma_jax.models.sharding import Axes, leaf_sharding, make_mesh
from paligemma_jax.weights import tensors
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.huggingface import HuggingFaceReader
from paligemma_jax.weights.load import load_params, load_stacked
from paligemma_jax.weights.store import OrbaxReader
from paligemma_jax.weights.tensors import FLOATS, TensorSpec

SMALL = 2048  # bytes; larger arrays are split
CHUNK_ROWS = 400  # of an embedding table


def main() -> None:
    """Prints a line of JSON: bytes read, as float32, and what is not as it should be."""
    path, address, number = sys.argv[1:]
    jax.distributed.initialize(address, 2, int(number))
    tensors.CHUNK_ROWS = CHUNK_ROWS
    read = 0

    def counted(own: Any) -> Any:
        def read_slice(self: Any, name: str, index: int, part: Any, dtype: Any) -> np.ndarray:
            nonlocal read
            found = own(self, name, index, part, dtype)
            whole = tensors.chunk_shapes(name, self.specs[name].shape)[index]
            read += 4 * (found.size if isinstance(self, HuggingFaceReader) else np.prod(whole))
            return found

        return read_slice

    for kind in (HuggingFaceReader, OrbaxReader):
        kind.read_slice = counted(kind.read_slice)
    mesh = make_mesh(Axes(fsdp=-1))
    sharding.MIN_BYTES = SMALL

    def placement(name: str, spec: TensorSpec) -> tuple[np.dtype, NamedSharding]:
        return FLOATS["float32"], leaf_sharding(name, spec, mesh)

    with open_checkpoint(path) as checkpoint:
        found = flatten(load_stacked(checkpoint, placement=placement)[1])
    counts = int(read)
    expected = flatten(load_params(path, dtype="float32")[1])
    wrong = [
        name
        for name, array in found.items()
        for shard in array.addressable_shards
        if not np.array_equal(shard.data, np.asarray(expected[name])[shard.index])
    ]
    print(json.dumps({"read": counts, "wrong": wrong}))


if __name__ == "__main__":
    main()
