"""Gemma's SentencePiece tokenizer with PaliGemma's location and segmentation pieces.

Reading text is left to the sentencepiece library, which does not tell the types of pieces: the few
fields of a model file that are needed are read and written here (numbers of fields:
google/sentencepiece, src/sentencepiece_model.proto), without the protobuf package. transformers 5
saves only tokenizer.json: its vocabulary and merges came from a SentencePiece model, and are enough
to build one that encodes alike.
"""

import enum
import functools
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece

from paligemma_jax.errors import CheckpointError, InvalidPromptError

_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5  # wire types
_BPE = 2


class PieceType(enum.IntEnum):
    """`ModelProto.SentencePiece.Type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))


def _field(number: int, value: int | bytes | float) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | _BYTES) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | _FLOAT) + struct.pack("<f", value)
    return _varint(number << 3 | _VARINT) + _varint(value)


def _piece(piece: str, score: float, kind: PieceType) -> bytes:
    return _field(1, _field(1, piece.encode()) + _field(2, score) + _field(3, int(kind)))


def read_pieces(model: bytes) -> list[tuple[str, float, PieceType]]:
    """Text, score and type of every piece, in order of their ids, of a model that loads."""
    pieces = []
    for number, value in _fields(model):
        if number == 1 and isinstance(value, bytes):
            fields = dict(_fields(value))
            text, score = fields.get(1, b""), fields.get(2, b"\0\0\0\0")
            assert isinstance(text, bytes) and isinstance(score, bytes)
            kind = PieceType(int(fields.get(3, PieceType.NORMAL)))
            pieces.append((text.decode(), struct.unpack("<f", score)[0], kind))
    return pieces


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field; numbers that are not varints as their bytes."""
    place = 0
    while place < len(message):
        key, place = _read_varint(message, place)
        wire = key & 7
        if wire == _VARINT:
            value, place = _read_varint(message, place)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            size, place = _read_varint(message, place)
        else:
            size = {_FLOAT: 4, _DOUBLE: 8}[wire]
        yield key >> 3, message[place : place + size]
        place += size


def _read_varint(message: bytes, place: int) -> tuple[int, int]:
    """The number at a place, and the place behind it."""
    value = shift = 0
    while True:
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7


def append_user_pieces(model: bytes, pieces: Iterable[str]) -> bytes:
    """`model` with USER_DEFINED `pieces` of score 0 after its own, as big_vision appends them.

    Repeated fields of a protocol buffer may continue anywhere, so the end of the file will do.
    """
    return model + b"".join(_piece(piece, 0.0, PieceType.USER_DEFINED) for piece in pieces)


def bpe_model(pieces: Sequence[tuple[str, float, PieceType]]) -> bytes:
    """A BPE model with Gemma's settings; `pieces` are (text, score, type) in order of their ids.

    Pad, eos, bos and unk are the pieces 0 to 3; bytes are the fallback; text is not normalized.
    """
    trainer = [_field(3, _BPE), _field(4, len(pieces)), _field(25, 1), _field(26, 1), _field(35, 1)]
    trainer += [_field(number, id) for number, id in ((40, 3), (41, 2), (42, 1), (43, 0))]
    names = {45: pieces[3], 46: pieces[2], 47: pieces[1], 48: pieces[0]}
    trainer += [_field(number, name.encode()) for number, (name, _, _) in names.items()]
    # No charsmap, no dummy prefix, whitespace kept as it is and escaped to U+2581.
    normalizer = [_field(1, b"identity"), _field(3, 0), _field(4, 0), _field(5, 1)]
    return (
        b"".join(_piece(*piece) for piece in pieces)
        + _field(2, b"".join(trainer))
        + _field(3, b"".join(normalizer))
    )


_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_TAB = "<0x09>"
_IMAGE = "<image>"  # a placeholder of Hugging Face's processor, no piece of PaliGemma's tokenizer


def model_from_tokenizer_json(data: bytes, name: str = "The tokenizer") -> bytes:
    """The SentencePiece model of a tokenizer.json of Gemma's kind; raises CheckpointError.

    The `<image>` placeholder is left out where it is the last piece, as in published checkpoints.
    """
    try:
        settings: dict[str, Any] = json.loads(data)
        model = settings["model"]
        if model["type"] != "BPE" or not model["byte_fallback"]:
            raise ValueError
        added = {token["id"]: token for token in settings["added_tokens"]}
        pieces = {id: piece for piece, id in model["vocab"].items()}
        pieces |= {id: token["content"] for id, token in added.items()}
        ranks = _merge_ranks(model["merges"])
        if pieces[max(pieces)] == _IMAGE:
            del pieces[max(pieces)]
        ordered = [pieces[id] for id in range(len(pieces))]
        if _TAB not in ordered and "\t" in ordered:
            # Hugging Face's converter renames the byte piece; SentencePiece wants all 256 of them.
            ordered[ordered.index("\t")] = _TAB
        kinds = [
            _kind(piece, added.get(id), model["unk_token"]) for id, piece in enumerate(ordered)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(
            f"{name} is JSON, but no tokenizer of Gemma's kind (BPE with byte fallback, ids "
            "without gaps). Copy tokenizer.json or tokenizer.model from the published checkpoint."
        ) from e
    lowest = len(ranks)
    return bpe_model(
        [
            (piece, -float(ranks.get(piece, lowest)) if kind is PieceType.NORMAL else 0.0, kind)
            for piece, kind in zip(ordered, kinds, strict=True)
        ]
    )


def _merge_ranks(merges: list[str | list[str]]) -> dict[str, int]:
    """Piece -> place of the first merge that makes it; SentencePiece merges by score instead."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return ranks


def _kind(piece: str, added: dict[str, Any] | None, unknown: str) -> PieceType:
    if piece == unknown:
        return PieceType.UNKNOWN
    if _BYTE.fullmatch(piece):
        return PieceType.BYTE
    if added is None:
        return PieceType.NORMAL
    return PieceType.CONTROL if added["special"] else PieceType.USER_DEFINED


LOC_PIECES = tuple(f"<loc{i:04d}>" for i in range(1024))
SEG_PIECES = tuple(f"<seg{i:03d}>" for i in range(128))
_REMEDY = "Copy tokenizer.model from the published checkpoint next to the weights."


class Tokenizer:
    """Text <-> ids. Text is not normalized; ids of control pieces never come from text.

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
                    f"{name} has no <loc> and <seg> pieces: it is Gemma's, not PaliGemma's. "
                    f"{_REMEDY}"
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
            raise CheckpointError(f"The tokenizer {path} {kind}. {_REMEDY}")
        try:
            data = path.read_bytes()
        except OSError as e:
            raise CheckpointError(f"The tokenizer {path} cannot be read: {e.strerror}.") from e
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
            raise InvalidPromptError(f"Expected text (str), got {type(text).__name__}.")
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise InvalidPromptError(
                f"Expected valid Unicode, got half a character at position {e.start}: "
                f"{text[e.start]!r}. Clean it with: text.encode('utf-8', 'replace').decode()"
            ) from e
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first eos, pad and bos skipped; InvalidPromptError for an unknown id."""
        kept = []
        for token in map(int, ids):
            if token == self.eos_id:
                break
            self._check_id(token)
            if token not in (self.pad_id, self.bos_id):
                kept.append(token)
        return self._processor.decode(kept)

    def piece(self, token: int) -> str:
        """The piece of one id as SentencePiece spells it, spaces as U+2581."""
        self._check_id(token)
        return self._processor.id_to_piece(int(token))

    @functools.cached_property
    def longest_piece(self) -> int:
        """Characters of the longest piece: no text has fewer than len(text) / longest_piece ids."""
        return max(map(len, self._processor.id_to_piece(list(range(self.vocab_size)))))

    def _check_id(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise InvalidPromptError(
                f"Expected token ids from 0 to {self.vocab_size - 1}, got {token}. Check that the "
                "tokenizer belongs to the model: tokenizer.check_fits(vocab_size)"
            )

    def check_fits(self, vocab_size: int) -> None:
        """Raises CheckpointError unless `vocab_size` embedding rows go with this tokenizer."""
        if self.vocab_size != vocab_size:
            raise CheckpointError(
                f"The tokenizer has {self.vocab_size:,} pieces, <loc> and <seg> included, but the "
                f"model has {vocab_size:,} embedding rows. {_REMEDY}"
            )


def _load(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except (RuntimeError, ValueError) as e:  # ValueError: its own message may be broken text
        raise CheckpointError(f"{name} {_describe(model)}. {_REMEDY}") from e
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
            f"Expected Gemma's special ids {wanted}, got {found} in {name}. {_REMEDY}"
        )


def _block_start(
    processor: sentencepiece.SentencePieceProcessor, pieces: tuple[str, ...], name: str
) -> int:
    """Id of the first of `pieces`; all must be there, in order, and be found whole in text."""
    start = processor.piece_to_id(pieces[0])
    wanted = list(range(start, start + len(pieces)))
    if start == processor.unk_id() or processor.encode("".join(pieces)) != wanted:
        raise CheckpointError(
            f"{name} holds the {len(pieces):,} pieces {pieces[0]} to {pieces[-1]} only in part or "
            f"out of order. {_REMEDY}"
        )
    return start
