"""big_vision's npz, written array by array and layer by layer.

Names: google-research/big_vision, utils.py (commit 0127fb6): keys of the tree joined with "/",
below "params/"; bfloat16 is stored as 2-byte void, for numpy has no name for it.
"""

import dataclasses
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np

from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.arrays import BFLOAT16, aligned_empty, as_bytes
from paligemma_jax.weights.big_vision import big_vision_name
from paligemma_jax.weights.companions import BIG_VISION_TOKENIZER, MASK_CODEC
from paligemma_jax.weights.contents import Contents
from paligemma_jax.weights.source import Weights, piece_shapes

SUFFIX = ".npz"
FILE = f"model{SUFFIX}"


@dataclasses.dataclass(frozen=True)
class BigVision:
    """big_vision's npz: the file alone where the target's name ends in .npz.

    Otherwise a directory of the file, the tokenizer and, where there is one, the mask codec. The
    file cannot tell the decoder's query scale and soft-caps: its readers know them.
    """

    name: ClassVar[str] = "big_vision"
    few_bits: ClassVar[bool] = False

    def is_file(self, target: Path) -> bool:
        """Whether `target` is to be one file."""
        return target.suffix == SUFFIX

    def needs_tokenizer(self, target: Path) -> bool:
        """Whether a tokenizer goes along."""
        return not self.is_file(target)

    def check(self, target: Path, weights: Weights) -> None:
        """Raises CheckpointError for what cannot be written, before anything is."""
        if not weights.config.llm.tie_embeddings:
            raise CheckpointError(
                f"{target} cannot be written: these weights have an output head of their own "
                "(llm/lm_head/w), and big_vision's models answer with the table of tokens. "
                'format="orbax" and format="huggingface" fit. Choose one of them: '
                "paligemma convert SOURCE TARGET --to huggingface"
            )

    def write(self, target: Path, weights: Weights, contents: Contents) -> None:
        """Writes into an empty directory, or over an empty file."""
        if target.is_dir():
            (target / BIG_VISION_TOKENIZER).write_bytes(contents.tokenizer or b"")
            if contents.mask_codec is not None:
                (target / MASK_CODEC).write_bytes(contents.mask_codec)
            target = target / FILE
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            for name in weights.specs:
                _write_array(archive, weights, name)


def _write_array(archive: zipfile.ZipFile, weights: Weights, name: str) -> None:
    spec = weights.specs[name]
    descr = "|V2" if spec.dtype == BFLOAT16 else spec.dtype.str
    header = {"descr": descr, "fortran_order": False, "shape": spec.shape}
    member = zipfile.ZipInfo(f"params/{big_vision_name(name)}.npy")  # with no date of today
    with archive.open(member, "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        buffer = aligned_empty((0,), spec.dtype)
        shapes = piece_shapes(name, spec.shape)
        for shape, fill in zip(shapes, weights.pieces(name, spec.dtype), strict=True):
            if buffer.shape != shape:
                buffer = aligned_empty(shape, spec.dtype)
            fill(buffer)
            file.write(as_bytes(buffer))
