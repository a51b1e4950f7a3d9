"""Gemma's SentencePiece tokenizer with PaliGemma's location and segmentation pieces."""

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import sentencepiece

from paligemma_jax.errors import CheckpointError, InvalidPromptError
from paligemma_jax.processing.sentencepiece_proto import append_user_pieces
from paligemma_jax.processing.tokenizer_json import model_from_tokenizer_json

LOC_PIECES = tuple(f"<loc{i:04d}>" for i in range(1024))
SEG_PIECES = tuple(f"<seg{i:03d}>" for i in range(128))
_WANTED = "A SentencePiece model of Gemma or PaliGemma (tokenizer.model) fits"
_REMEDY = "Copy tokenizer.model from the published checkpoint next to the weights."


class Tokenizer:
    """Text <-> ids. Text is not normalised; ids of control pieces never come from text.

    The 1,024 `<loc>` and 128 `<seg>` pieces are those of the model, or are appended behind its last
    piece in big_vision's order. Typed `<eos>` or `<image>` is plain text; `<loc0123>` is its piece.
    The character U+2581 comes back as a space: SentencePiece writes spaces with it.
    """

    pad_id: ClassVar[int] = 0
    eos_id: ClassVar[int] = 1
    bos_id: ClassVar[int] = 2

    def __init__(self, model: bytes, name: str = "The tokenizer", *, append: bool = True):
        """See `from_bytes`; `name` begins error messages."""
        if model[:64].lstrip().startswith(b"{"):
            model = model_from_tokenizer_json(model, name)
        processor = _load(model, name)
        _check_special_ids(processor, name)
        if processor.piece_to_id(LOC_PIECES[0]) == processor.unk_id():
            if not append:
                raise CheckpointError(
                    f"{name} has no <loc> and <seg> pieces: it is Gemma's, not PaliGemma's. A "
                    f"model with both fits. {_REMEDY}"
                )
            model = append_user_pieces(model, LOC_PIECES + SEG_PIECES)
            processor = _load(model, name)
        self._model = model
        self._processor = processor
        self.vocab_size: int = processor.vocab_size()
        self.loc_start: int = _block_start(processor, LOC_PIECES, name)
        self.seg_start: int = _block_start(processor, SEG_PIECES, name)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, append: bool = True) -> "Tokenizer":
        """Reads `tokenizer.model`, or Hugging Face's `tokenizer.json`; raises CheckpointError.

        With `append=False` a model without `<loc>` and `<seg>` pieces is refused.
        """
        path = Path(path)
        if not path.is_file():
            kind = "is a directory" if path.is_dir() else "does not exist"
            raise CheckpointError(f"The tokenizer {path} {kind}. {_WANTED}. {_REMEDY}")
        try:
            data = path.read_bytes()
        except OSError as e:
            raise CheckpointError(
                f"The tokenizer {path} cannot be read: {e.strerror}. {_WANTED}. "
                f"Look with: ls -l {path}"
            ) from e
        return cls(data, f"The tokenizer {path}", append=append)

    @classmethod
    def from_bytes(cls, model: bytes, *, append: bool = True) -> "Tokenizer":
        """From the contents of such a file."""
        return cls(model, append=append)

    def to_bytes(self) -> bytes:
        """The SentencePiece model with all pieces, for a file `tokenizer.model`."""
        return self._model

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return Tokenizer, (self._model,)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without bos or eos; InvalidPromptError if it is not valid text."""
        if not isinstance(text, str):
            raise InvalidPromptError(
                f"{type(text).__name__} is no text. A str fits. "
                "Decode bytes with: data.decode('utf-8')"
            )
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise InvalidPromptError(
                f"The text holds half a character at position {e.start}: {text[e.start]!r}. Valid "
                "Unicode fits. Clean it with: text.encode('utf-8', 'replace').decode()"
            ) from e
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first eos, pad and bos skipped; InvalidPromptError for an unknown id."""
        kept = []
        for token in map(int, ids):
            if token == self.eos_id:
                break
            if not 0 <= token < self.vocab_size:
                raise InvalidPromptError(
                    f"Token {token} is unknown. Ids from 0 to {self.vocab_size - 1} fit. Check "
                    "that the tokenizer belongs to the model: tokenizer.check_fits(vocab_size)"
                )
            if token not in (self.pad_id, self.bos_id):
                kept.append(token)
        return self._processor.decode(kept)

    def piece(self, token: int) -> str:
        """The piece of one id as SentencePiece spells it, spaces as U+2581."""
        if not 0 <= token < self.vocab_size:
            raise InvalidPromptError(
                f"Token {token} is unknown. Ids from 0 to {self.vocab_size - 1} fit. "
                "See tokenizer.vocab_size."
            )
        return self._processor.id_to_piece(int(token))

    @functools.cached_property
    def longest_piece(self) -> int:
        """Characters of the longest piece: no text has fewer than len(text) / longest_piece ids."""
        return max(map(len, self._processor.id_to_piece(list(range(self.vocab_size)))))

    def check_fits(self, vocab_size: int) -> None:
        """Raises CheckpointError unless `vocab_size` embedding rows go with this tokenizer."""
        if self.vocab_size != vocab_size:
            raise CheckpointError(
                f"The tokenizer has {self.vocab_size:,} pieces, <loc> and <seg> included, but the "
                f"model has {vocab_size:,} embedding rows. The two must be equal. {_REMEDY}"
            )


def _load(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except (RuntimeError, ValueError) as e:  # ValueError: its own message may be broken text
        raise CheckpointError(f"{name} {_describe(model)}. {_WANTED}. {_REMEDY}") from e
    return processor


def _describe(data: bytes) -> str:
    if not data:
        return "is empty"
    if data.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the model itself (run: git lfs pull)"
    try:
        data[:1024].decode("ascii")
    except UnicodeDecodeError:
        return "is no SentencePiece model, or a damaged one"
    return f"is text, not a SentencePiece model; it begins with {data[:40]!r}"


def _check_special_ids(processor: sentencepiece.SentencePieceProcessor, name: str) -> None:
    found = {"pad": processor.pad_id(), "eos": processor.eos_id(), "bos": processor.bos_id()}
    wanted = {"pad": Tokenizer.pad_id, "eos": Tokenizer.eos_id, "bos": Tokenizer.bos_id}
    if found != wanted:
        raise CheckpointError(
            f"{name} has the special ids {found}, which are not Gemma's. {wanted} fit. {_REMEDY}"
        )


def _block_start(
    processor: sentencepiece.SentencePieceProcessor, pieces: tuple[str, ...], name: str
) -> int:
    """Id of the first of `pieces`; all must be there, in order, and be found whole in text."""
    start = processor.piece_to_id(pieces[0])
    wanted = list(range(start, start + len(pieces)))
    if start == processor.unk_id() or processor.encode("".join(pieces)) != wanted:
        raise CheckpointError(
            f"{name} holds the pieces {pieces[0]} to {pieces[-1]} only in part or out of order. "
            f"All {len(pieces):,} in one block, or none of <loc> and <seg>, fit. {_REMEDY}"
        )
    return start
