"""Opening a checkpoint of any format: its configuration, tensors, tokenizer and mask codec."""

import dataclasses
import functools
import os
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError
from paligemma_jax.models.mask_vae import MaskVAE
from paligemma_jax.models.quantization_config import QuantizationConfig
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.weights.big_vision import BigVisionReader
from paligemma_jax.weights.formats import CheckpointReader
from paligemma_jax.weights.huggingface import HuggingFaceReader
from paligemma_jax.weights.mask_vae import load_mask_vae
from paligemma_jax.weights.sidecar_files import (
    MASK_CODECS,
    find_mask_codec,
    find_parts,
    find_tokenizer,
)
from paligemma_jax.weights.store import OrbaxReader, is_native
from paligemma_jax.weights.tensors import SCALE, VALUES, TensorSource
from paligemma_jax.weights.views import weight_counts

_EXPECTED = (
    "Expected a Hugging Face directory, a big_vision .npz file, or a directory written by "
    "paligemma convert."
)


class Checkpoint(TensorSource):
    """An opened checkpoint: its configuration, what lies beside the weights, and its tensors.

    Nothing but headers is read before tensors are. Use it in a `with` statement, or `close` it.

    Attributes:
      kind: its format: "big_vision" (npz), "huggingface" (directory) or "orbax" (native).
      path: of the file or directory.
      config: inferred from the files, or the one given.
      specs: shape and stored dtype of each parameter by its path; of quantized ones, see `store`.
      origin: where the weights came from: "kind" and, from Hugging Face, "sliding_window".
      quantization: the formats of quantized weights; None for floats.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        tokenizer: Path | None = None,
        mask_codec: Path | None = None,
    ):
        self._reader = reader
        self._tokenizer_path = tokenizer
        self._mask_codec_path = mask_codec
        self.kind: str = reader.kind
        self.path: Path = reader.path
        self.config = reader.config
        self.specs = reader.specs
        self.origin: dict[str, Any] = reader.origin
        self.quantization: QuantizationConfig | None = reader.quantization

    def read_chunk(self, name: str, index: int, out: np.ndarray) -> None:
        self._reader.read_chunk(name, index, out)

    def read_slice(
        self, name: str, index: int, part: tuple[slice, ...], dtype: np.dtype
    ) -> np.ndarray:
        return self._reader.read_slice(name, index, part, dtype)

    @functools.cached_property
    def processor_settings(self) -> dict[str, Any]:
        """How the checkpoint wants images and prompts, for `Processor.from_dict`."""
        return self._reader.processor_settings()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer given, stored, or found beside the weights; None if there is none.

        Raises CheckpointError if it is damaged or has another number of pieces than the model.
        """
        path = self._tokenizer_path
        if path is None and isinstance(self._reader, OrbaxReader):
            tokenizer = Tokenizer.from_bytes(self._reader.read_tokenizer())
        else:
            path = path or find_tokenizer(self.kind, self.path)
            tokenizer = None if path is None else Tokenizer.from_file(path)
        if tokenizer is not None:
            tokenizer.check_fits(self.config.llm.vocab_size)
        return tokenizer

    @property
    def tokenizer_bytes(self) -> bytes | None:
        """The SentencePiece model of `tokenizer`."""
        return None if self.tokenizer is None else self.tokenizer.to_bytes()

    @functools.cached_property
    def mask_codec(self) -> MaskVAE | None:
        """The codec of <seg> tokens given, stored, or found beside the weights; None without one.

        Raises CheckpointError if it is damaged, or not a codec of 128 codes.
        """
        path = self._mask_codec_path or find_mask_codec(self.path)
        return None if path is None else load_mask_vae(path)

    @property
    def mask_codec_bytes(self) -> bytes | None:
        """The file of `mask_codec`, as it is."""
        path = self._mask_codec_path or find_mask_codec(self.path)
        return None if path is None or self.mask_codec is None else path.read_bytes()

    def require_floats(self) -> None:
        """Raises CheckpointError where weights are quantized already."""
        if self.quantization is not None:
            raise CheckpointError(
                f"The weights in {self.path} are already quantized "
                f"({self.quantization}). Training, adapters and another quantization "
                "need floats (training quantizes them itself, see quantize). Name the checkpoint "
                "that these were made of, or take the floats that are left: paligemma convert "
                f"{shlex.quote(str(self.path))} TARGET --dequantize"
            )

    def close(self) -> None:
        """Releases open files."""
        self._reader.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    config: PaliGemmaConfig | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    mask_codec: str | os.PathLike[str] | None = None,
    verify: bool = True,
) -> Checkpoint:
    """Opens a native checkpoint, a Hugging Face directory, or a big_vision npz, whole or in parts.

    A directory with one npz is taken for the npz. `config` replaces the inferred one; `tokenizer`
    is a SentencePiece model or tokenizer.json to use instead of the one found, and so is
    `mask_codec`, an npz such as vae-oid.npz; `verify` compares the checksums of a native one.

    Raises CheckpointError, naming every tensor that does not match, at most twenty.
    """
    path = Path(path).expanduser()
    beside = [None if p is None else Path(p).expanduser() for p in (tokenizer, mask_codec)]
    if path.is_dir():
        return Checkpoint(_open_directory(path, config, verify), *beside)
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} is only a part of a checkpoint. Pass the directory: {path.parent}"
        )
    parts = find_parts(path)
    if path.is_file() and path not in parts:
        parts = [path]
    if parts:
        return Checkpoint(BigVisionReader(path, parts, config), *beside)
    raise CheckpointError(f"{path} does not exist. {_EXPECTED}")


def _open_directory(path: Path, config: PaliGemmaConfig | None, verify: bool) -> CheckpointReader:
    if is_native(path):
        return OrbaxReader(path, config, verify=verify)
    files = sorted(p.name for p in path.iterdir())
    if "adapter_config.json" in files and "config.json" not in files:
        raise CheckpointError(
            f"{path} holds a PEFT adapter, not a whole model. Load it onto its base model: "
            f"from_pretrained(BASE, adapter={str(path)!r})"
        )
    if "config.json" in files or any(name.endswith(".safetensors") for name in files):
        return HuggingFaceReader(path, config)
    weights = [n for n in files if ".npz" in n and n not in MASK_CODECS]
    archives = {str(find_parts(path / n)[:1] or n): n for n in weights}
    if len(archives) == 1:
        name = next(iter(archives.values()))
        return BigVisionReader(path / name, find_parts(path / name) or [path / name], config)
    if archives:
        raise CheckpointError(
            f"{path} holds {len(archives)} npz files: {', '.join(archives.values())}. Pass the "
            "path of one of them."
        )
    holds = f"holds {', '.join(files[:5])}" if files else "is empty"
    raise CheckpointError(f"{path} is not a checkpoint: it {holds}. {_EXPECTED}")


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is, from its headers.

    `dtypes` counts parameters by stored dtype, or by their bits ("int4"); `scale_nbytes` is what
    the scales of the latter take of `nbytes`.
    """

    path: Path
    kind: str
    config: PaliGemmaConfig
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    processor: dict[str, Any]
    has_tokenizer: bool
    has_mask_codec: bool
    quantization: QuantizationConfig | None
    scale_nbytes: int
    origin: dict[str, Any]


def describe(path: str | os.PathLike[str]) -> CheckpointInfo:
    """Reads what `paligemma info PATH` prints, no weights; raises CheckpointError."""
    with open_checkpoint(path) as checkpoint:
        dtypes: Counter[str] = Counter()
        scales = 0
        for name, spec in checkpoint.specs.items():
            if name.endswith(SCALE):
                scales += spec.nbytes
            elif not name.endswith(VALUES):
                dtypes[spec.dtype.name] += spec.size
        if checkpoint.quantization is not None:
            dtypes.update(weight_counts(checkpoint.config, checkpoint.quantization))
        return CheckpointInfo(
            path=checkpoint.path,
            kind=checkpoint.kind,
            config=checkpoint.config,
            parameters=sum(dtypes.values()),
            nbytes=checkpoint.nbytes,
            dtypes=dict(dtypes),
            processor=checkpoint.processor_settings,
            has_tokenizer=checkpoint.tokenizer is not None,
            has_mask_codec=checkpoint.mask_codec is not None,
            quantization=checkpoint.quantization,
            scale_nbytes=scales,
            origin=checkpoint.origin,
        )
