"""Opening a checkpoint of any format."""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError
from paligemma_jax.models.mask_vae import MaskVAE
from paligemma_jax.models.quantization_config import QuantizationConfig
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.weights.big_vision import BigVisionSource
from paligemma_jax.weights.companions import (
    MASK_CODECS,
    big_vision_processor,
    find_mask_codec,
    find_parts,
    find_tokenizer,
    hugging_face_processor,
)
from paligemma_jax.weights.huggingface import HuggingFaceSource
from paligemma_jax.weights.mask_vae import load_mask_vae
from paligemma_jax.weights.store import StoreSource, is_store
from paligemma_jax.weights.tensors import (
    SCALE,
    VALUES,
    DTypeLike,
    Fill,
    Progress,
    Source,
    TensorSpec,
    as_float_dtype,
    largest_first,
    read_tensor,
)
from paligemma_jax.weights.views import weight_counts

_WANTED = (
    "A Hugging Face directory, a big_vision .npz file, or a directory written by "
    "`paligemma convert` fits."
)
_HELP = "Check the path with: paligemma info PATH"


class Checkpoint:
    """An opened checkpoint: its configuration, what lies beside the weights, and its tensors.

    Nothing but headers is read before `tensors`. Use it in a `with` statement, or `close` it.

    Attributes:
      kind: "big_vision" (npz), "huggingface" (directory) or "store" (ours).
      config: inferred from the files, or the one given.
      specs: shape and stored dtype of each parameter by its path; of few bits, see `StoreSource`.
      quantization: that the weights are rounded by; None for floats.
    """

    def __init__(
        self, source: Source, tokenizer: Path | None = None, mask_codec: Path | None = None
    ):
        self._source = source
        self._tokenizer_path = tokenizer
        self._mask_codec_path = mask_codec
        self.kind: str = source.kind
        self.path: Path = source.path
        self.config: PaliGemmaConfig = source.config
        self.specs: dict[str, TensorSpec] = dict(source.specs)
        self.quantization: QuantizationConfig | None = (
            source.quantization if isinstance(source, StoreSource) else None
        )

    @functools.cached_property
    def processor_settings(self) -> dict[str, Any]:
        """How the checkpoint wants pictures and prompts, for `Processor.from_dict`."""
        if isinstance(self._source, StoreSource):
            return self._source.processor
        if isinstance(self._source, HuggingFaceSource):
            return hugging_face_processor(self.path, self.config)
        return big_vision_processor(self.config)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer given, stored, or found beside the weights; None if there is none.

        Raises CheckpointError if it is damaged or has another number of pieces than the model.
        """
        path = self._tokenizer_path
        if path is None and isinstance(self._source, StoreSource):
            tokenizer = Tokenizer.from_bytes(self._source.read_tokenizer())
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

        Raises CheckpointError if it is damaged, or no codec of 128 codes.
        """
        path = self._mask_codec_file
        return None if path is None else load_mask_vae(path)

    @property
    def mask_codec_bytes(self) -> bytes | None:
        """The file of `mask_codec`, as it is."""
        path = self._mask_codec_file
        return None if path is None or self.mask_codec is None else path.read_bytes()

    @property
    def _mask_codec_file(self) -> Path | None:
        return self._mask_codec_path or find_mask_codec(self.path)

    @property
    def sliding_window(self) -> int | None:
        """The window that Hugging Face's implementation would use; `config` itself has none."""
        if isinstance(self._source, HuggingFaceSource):
            return self._source.sliding_window
        return self.origin.get("sliding_window")

    @property
    def origin(self) -> dict[str, Any]:
        """Where the weights came from: "kind" and, for Hugging Face's, "sliding_window"."""
        if isinstance(self._source, StoreSource):
            return self._source.origin
        if isinstance(self._source, HuggingFaceSource):
            return {"kind": self.kind, "sliding_window": self._source.sliding_window}
        return {"kind": self.kind}

    @property
    def nbytes(self) -> int:
        """Size of the parameters as stored."""
        return sum(spec.nbytes for spec in self.specs.values())

    def require_floats(self) -> None:
        """Raises CheckpointError where weights are rounded already."""
        if self.quantization is not None:
            raise CheckpointError(
                f"The weights in {self.path} are rounded already ({str(self.quantization)}). To "
                "train, to round in another way, and for adapters, weights as they were trained "
                "fit; training rounds them itself where it is told to (quantize). Name the "
                "checkpoint that these were made of, or take the floats that are left: paligemma "
                f"convert {self.path} TARGET --dequantize"
            )

    def tensors(
        self, dtype: DTypeLike = None, progress: Progress | None = None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Every parameter, the largest first, read when asked for and cast to `dtype` if given.

        Arrays are in C order and aligned, so that `jax.device_put` on a CPU takes them uncopied.
        """
        wanted = None if dtype is None else as_float_dtype(dtype)
        done = 0
        for name in largest_first(self.specs):
            if progress:
                progress(name, done, self.nbytes)
            yield name, self.read(name, wanted or self.specs[name].dtype)
            done += self.specs[name].nbytes
        if progress:
            progress("", done, self.nbytes)

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        """One parameter, its layers stacked, in aligned C order."""
        return read_tensor(self._source, name, dtype)

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        """What fills arrays with each piece of a parameter in turn; see `Weights`."""
        return self._source.pieces(name, dtype)

    @property
    def sliceable(self) -> Any:
        """What reads parts of pieces, if the files let one; see `read_boxes`."""
        return getattr(self._source, "sliceable", None)

    def close(self) -> None:
        """Releases open files."""
        self._source.close()

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
    """Opens a store, a Hugging Face directory, or an npz file of big_vision's, whole or in parts.

    A directory with one npz is taken for the npz. `config` replaces the inferred one; `tokenizer`
    is a SentencePiece model or tokenizer.json to use instead of the one found, and so is
    `mask_codec`, an npz such as vae-oid.npz; `verify` checks the digests of a store.

    Raises CheckpointError, naming every tensor that does not fit.
    """
    path = Path(path).expanduser()
    words = None if tokenizer is None else Path(tokenizer).expanduser()
    codec = None if mask_codec is None else Path(mask_codec).expanduser()
    if path.is_dir():
        return Checkpoint(_open_directory(path, config, verify), words, codec)
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} is only a part of a checkpoint. {_WANTED} Give the directory: {path.parent}"
        )
    parts = find_parts(path)
    if path.is_file() and path not in parts:
        parts = [path]
    if parts:
        return Checkpoint(BigVisionSource(path, parts, config), words, codec)
    raise CheckpointError(f"{path} does not exist. {_WANTED} {_HELP}")


def _open_directory(path: Path, config: PaliGemmaConfig | None, verify: bool) -> Source:
    if is_store(path):
        return StoreSource(path, config, verify=verify)
    files = sorted(p.name for p in path.iterdir())
    if "adapter_config.json" in files and "config.json" not in files:
        raise CheckpointError(
            f"{path} holds a PEFT adapter, no whole model. {_WANTED} Merge it into its base with "
            "transformers and peft first: model.merge_and_unload().save_pretrained(directory)"
        )
    if "config.json" in files or any(name.endswith(".safetensors") for name in files):
        return HuggingFaceSource(path, config)
    weights = [n for n in files if ".npz" in n and n not in MASK_CODECS]
    archives = {str(find_parts(path / n)[:1] or n): n for n in weights}
    if len(archives) == 1:
        name = next(iter(archives.values()))
        return BigVisionSource(path / name, find_parts(path / name) or [path / name], config)
    if archives:
        raise CheckpointError(
            f"{path} holds {len(archives)} npz files: {', '.join(archives.values())}. One fits. "
            "Give the path of the file itself."
        )
    holds = f"holds {', '.join(files[:5])}" if files else "is empty"
    raise CheckpointError(f"{path} is no checkpoint: it {holds}. {_WANTED} {_HELP}")


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
