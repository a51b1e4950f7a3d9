"""`paligemma convert`: a published checkpoint into a self-contained store."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.arrays import as_bytes
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.source import Progress
from paligemma_jax.weights.store import StoreContents, write_store

# Bits of the exponent, all set in infinities and NaNs.
_EXPONENT = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
_BLOCK = 16 << 20  # elements


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    mask_codec: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes the store `target` from a big_vision npz, a Hugging Face directory, or another store.

    Dtypes stay. `tokenizer` is needed where none lies beside the weights; `mask_codec`, such as
    vae-oid.npz, where masks are wanted and none lies there. Tensors pass one by one; `target`
    appears when all is written and digested, and never replaces anything. Raises CheckpointError.
    """
    with open_checkpoint(source, tokenizer=tokenizer, mask_codec=mask_codec) as checkpoint:
        words = checkpoint.tokenizer_bytes
        if words is None:
            raise CheckpointError(
                f"There is no tokenizer beside {checkpoint.path}. A tokenizer.model, or a Hugging "
                "Face tokenizer.json, of PaliGemma fits. Copy it there, or name it: paligemma "
                f"convert {source} {target} --tokenizer tokenizer.model"
            )
        contents = StoreContents(
            checkpoint.config,
            checkpoint.processor_settings,
            words,
            checkpoint.mask_codec_bytes,
            checkpoint.origin,
        )
        arrays = _finite(checkpoint.path, checkpoint.tensors(progress=progress))
        write_store(Path(target).expanduser(), contents, arrays, checkpoint.nbytes)


def _finite(
    path: Path, arrays: Iterable[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Passes arrays on; CheckpointError at the first that has an infinity or NaN."""
    for name, array in arrays:
        bits = np.frombuffer(as_bytes(array), f"u{array.itemsize}")
        exponent = bits.dtype.type(_EXPONENT[array.dtype.name])
        for start in range(0, bits.size, _BLOCK):
            if np.any((bits[start : start + _BLOCK] & exponent) == exponent):
                raise CheckpointError(
                    f"{name} of {path} holds infinite values or NaN. Finite weights fit: the "
                    "training that made them diverged. Take an earlier checkpoint."
                )
        del bits
        yield name, array
        del array  # or it would stay while the next one is read
