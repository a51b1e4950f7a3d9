"""SentencePiece model files: the few fields of its protocol buffer that are needed.

Field numbers: google/sentencepiece, src/sentencepiece_model.proto. The protobuf package is not
needed for them. Reading text is left to the sentencepiece library, which does not tell the types of
pieces; hence `read_pieces`.
"""

import enum
import struct
from collections.abc import Iterable, Iterator, Sequence

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

    Pad, eos, bos and unk are the pieces 0 to 3; bytes are the fallback; text is not normalised.
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
