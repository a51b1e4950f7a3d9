"""One process of two that read a checkpoint together: run by test_on_mesh.py.

python -m tests.weights.reading CHECKPOINT ADDRESS PROCESS
"""

import json
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from paligemma_jax.models.paligemma import flatten
from paligemma_jax.models.sharding import RULES, Axes, Fsdp, leaf_sharding, make_mesh
from paligemma_jax.weights import tensors as pieces
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.huggingface import HuggingFaceSource
from paligemma_jax.weights.load import load_on_mesh, load_params
from paligemma_jax.weights.store import PieceArrays
from paligemma_jax.weights.tensors import FLOATS, TensorSpec

SMALL = 2048  # bytes; larger arrays are split
TABLE_ROWS = 400  # of a piece of the table


def main() -> None:
    """Prints a line of JSON: bytes read, as float32, and what is not as it should be."""
    path, address, number = sys.argv[1:]
    jax.distributed.initialize(address, 2, int(number))
    pieces.TABLE_ROWS = TABLE_ROWS
    read = 0

    def counted(own: Any) -> Any:
        def read_box(self: Any, name: str, piece: int, box: Any, dtype: Any) -> np.ndarray:
            nonlocal read
            part = own(self, name, piece, box, dtype)
            whole = pieces.piece_shapes(name, self.specs[name].shape)[piece]
            read += 4 * (part.size if isinstance(self, HuggingFaceSource) else np.prod(whole))
            return part

        return read_box

    for kind in (HuggingFaceSource, PieceArrays):
        kind.read_box = counted(kind.read_box)
    mesh = make_mesh(Axes(fsdp=-1))
    layout = Fsdp(small=SMALL)

    def wanted(name: str, spec: TensorSpec) -> tuple[np.dtype, NamedSharding]:
        rules = type(RULES)(((".*", (layout,)),))
        return FLOATS["float32"], leaf_sharding(name, spec, mesh, rules)

    with open_checkpoint(path) as checkpoint:
        found = flatten(load_on_mesh(checkpoint, checkpoint.config, wanted))
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
