"""The mask codec's file: an npz with the names and layouts PaliGemma was published with.

Names are those of a PyTorch module: convolutions `weight` [out, in, h, w] and `bias`, transposed
convolutions `weight` [in, out, h, w], and the codebook `_vq_vae._embedding` [K, E].
"""

import dataclasses
import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paligemma_jax.errors import CheckpointError, problem_list
from paligemma_jax.models.mask_vae import MaskVAE, MaskVAEConfig
from paligemma_jax.weights.big_vision import NpzFile
from paligemma_jax.weights.tensors import FLOATS, shape_problems

NUM_EMBEDDINGS = 128  # as many as there are <seg> tokens
CODEBOOK = "_vq_vae._embedding"
_CONV, _TRANSPOSED = (2, 3, 1, 0), (2, 3, 0, 1)  # to [h, w, in, out]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Where a published array goes: our path, and how its axes are turned (None: as they are)."""

    path: tuple[str | int, ...]
    axes: tuple[int, ...] | None


def _entries() -> dict[str, _Entry]:
    modules: dict[str, tuple[tuple[str | int, ...], tuple[int, ...]]] = {}
    for i in range(4):
        modules[f"encoder.{2 * i}"] = (("encoder", "halvings", i), _CONV)
        modules[f"decoder.{4 + 2 * i}"] = (("decoder", "doublings", i), _TRANSPOSED)
    for i in range(2):
        for number, name in ((0, "first"), (2, "second"), (4, "last")):
            modules[f"encoder.{8 + i}.net.{number}"] = (("encoder", "residuals", i, name), _CONV)
            modules[f"decoder.{2 + i}.net.{number}"] = (("decoder", "residuals", i, name), _CONV)
    modules["encoder.10"] = (("encoder", "out"), _CONV)
    modules["decoder.0"] = (("decoder", "into"), _CONV)
    modules["decoder.12"] = (("decoder", "out"), _CONV)
    entries = {CODEBOOK: _Entry(("codebook",), None)}
    for name, (path, axes) in modules.items():
        entries[f"{name}.weight"] = _Entry((*path, "kernel"), axes)
        entries[f"{name}.bias"] = _Entry((*path, "bias"), None)
    return entries


def load_mask_vae(path: Path) -> MaskVAE:
    """Reads a codec file.

    Raises:
      CheckpointError: naming every array that is missing, unexpected or of the wrong shape, and for
        a codebook of another size than the number of <seg> tokens.
    """
    if not path.is_file():
        raise CheckpointError(
            f"There is no mask codec {path}. Pass the path of the published one: "
            "mask_codec='vae-oid.npz' (--mask-codec vae-oid.npz)"
        )
    file = NpzFile(path, [path])
    try:
        found = {name: array.shape for name, array in file.arrays.items()}
        config = _config(path, found)
        model = nnx.eval_shape(lambda: MaskVAE(config, rngs=nnx.Rngs(0)))
        state = nnx.state(model)
        expected = {name: _published_shape(state, entry) for name, entry in _entries().items()}
        problems = shape_problems(found, expected)
        if problems:
            raise CheckpointError(
                f"{path} is not a mask codec {problem_list(problems)}\n"
                "Expected the arrays of vae-oid.npz. Download it again, or export yours with those "
                "names."
            )
        for name, entry in _entries().items():
            array = file.read(name, FLOATS["float32"])
            if not np.isfinite(array).all():
                raise CheckpointError(
                    f"{path}: {name} holds values that are not finite. Download the file again."
                )
            _leaf(state, entry.path).set_value(
                jnp.asarray(array if entry.axes is None else array.transpose(entry.axes))
            )
    finally:
        file.close()
    nnx.update(model, state)
    return model


def mask_vae_bytes(model: MaskVAE, dtype: str = "float32") -> bytes:
    """The file of a codec, as `load_mask_vae` and big_vision read it."""
    state = nnx.state(model)
    arrays = {}
    for name, entry in _entries().items():
        array = np.asarray(_leaf(state, entry.path)[...])
        if entry.axes is not None:
            array = array.transpose(np.argsort(entry.axes))
        arrays[name] = np.ascontiguousarray(array).astype(dtype)
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def _leaf(state: Any, path: tuple[str | int, ...]) -> nnx.Variable[jax.Array]:
    for part in path:
        state = state[part]
    return state


def _published_shape(state: Any, entry: _Entry) -> tuple[int, ...]:
    shape = _leaf(state, entry.path).get_value().shape
    if entry.axes is None:
        return tuple(shape)
    return tuple(shape[i] for i in np.argsort(entry.axes))


def _config(path: Path, found: dict[str, tuple[int, ...]]) -> MaskVAEConfig:
    shape = found.get(CODEBOOK, (NUM_EMBEDDINGS, 512))
    if len(shape) != 2 or shape[0] != NUM_EMBEDDINGS:
        raise CheckpointError(
            f"{path} has a codebook {CODEBOOK} of shape {list(shape)}, expected "
            f"[{NUM_EMBEDDINGS}, width]: one row for each <seg> token. Use the codec that the "
            "checkpoint was trained with; PaliGemma's is vae-oid.npz."
        )
    return MaskVAEConfig(num_embeddings=shape[0], embedding_dim=shape[1])
