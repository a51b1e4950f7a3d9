"""Writing a safetensors file of arrays that are at hand."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from paligemma_jax.weights.arrays import FLOATS, as_bytes

_KINDS = {FLOATS["float32"]: "F32", FLOATS["float16"]: "F16", FLOATS["bfloat16"]: "BF16"}
_ALIGNMENT = 8  # bytes, of where the tensors begin


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays, marked as PyTorch tensors, as transformers and PEFT mark theirs."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    arrays, end = [], 0
    for name, array in sorted(tensors.items()):
        array = np.ascontiguousarray(array)
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": _KINDS[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
        arrays.append(array)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            file.write(as_bytes(array))
