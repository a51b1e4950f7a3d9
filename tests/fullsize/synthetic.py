"""Random-weight PaliGemma checkpoints in both published formats, written one tensor at a time.

The same seed gives the same weights in both. Used at full size by the marked tests, at tiny size by
tests/weights.
"""

import zipfile
from pathlib import Path

import numpy as np

from paligemma_jax.benchmark.huggingface import RandomTensors
from paligemma_jax.benchmark.huggingface import hub_config as hub_config
from paligemma_jax.benchmark.huggingface import make_tokenizer as make_tokenizer
from paligemma_jax.benchmark.huggingface import write_hugging_face as write_hugging_face
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.weights.big_vision import big_vision_name
from paligemma_jax.weights.huggingface import EMBEDDING, part_shape
from paligemma_jax.weights.tensors import (
    FLOATS,
    aligned_empty,
    as_bytes,
    copy_into,
    expected_shapes,
)


def write_big_vision(
    path: Path, config: PaliGemmaConfig, *, seed: int = 0, dtype: str = "bfloat16"
) -> None:
    """An npz as big_vision writes it: flat "params/..." keys, bfloat16 as 2-byte void."""
    tensors = RandomTensors(config, seed=seed, dtype=dtype)
    # In C order of ours: by layer, then by part.
    keys: dict[str, list[tuple[int, int, str]]] = {}
    for key, (tensor, layer, _) in tensors.entries.items():
        keys.setdefault(tensor.path, []).append((layer, tensor.part or 0, key))
    descr = "|V2" if dtype == "bfloat16" else np.dtype(dtype).str
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for ours, shape in expected_shapes(config).items():
            member = f"params/{big_vision_name(ours)}.npy"
            with archive.open(member, "w", force_zip64=True) as file:
                header = {"descr": descr, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for _, _, key in sorted(keys[ours]):
                    file.write(as_bytes(_in_our_layout(tensors, key, shape, dtype)))


def _in_our_layout(
    tensors: RandomTensors, key: str, ours: tuple[int, ...], dtype: str
) -> np.ndarray:
    tensor, _, _ = tensors.entries[key]
    theirs = tensors.whole(key)
    if tensor.key == EMBEDDING:
        return theirs[: ours[0]]
    shape = part_shape(tensor, ours)
    array = aligned_empty(shape, FLOATS[dtype])
    copy_into(array, tensor.to_ours(theirs, shape))
    return array
