"""What a SentencePiece ``.model`` says about itself that its library does not tell: which pieces are user-defined.

The file is one protocol-buffer message; only the fields wanted are read, so neither protobuf nor a generated module is
needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_xalign.errors import FormatError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Field numbers of sentencepiece_model.proto.
_PIECES, _PIECE_TEXT, _PIECE_TYPE = 1, 1, 3
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True)
class PieceTypes:
    """Text and type of every piece, by id."""

    texts: list[str]
    types_V: np.ndarray
    """uint8 [V]: ``NORMAL``, ``UNKNOWN``, ``CONTROL``, ``USER_DEFINED``, ``UNUSED`` or ``BYTE``."""


def read_piece_types(data: bytes) -> PieceTypes:
    """Read the pieces of a ``.model``.

    Raises:
        FormatError: the bytes are not such a message.
    """
    texts: list[str] = []
    types: list[int] = []
    for number, value in _fields(data):
        if number != _PIECES or not isinstance(value, bytes):
            continue
        fields = dict(_fields(value))
        text, kind = fields.get(_PIECE_TEXT, b""), fields.get(_PIECE_TYPE, NORMAL)
        if not isinstance(text, bytes) or not isinstance(kind, int) or not NORMAL <= kind <= BYTE:
            raise FormatError(f"piece {len(texts)} of the SentencePiece model is malformed.")
        texts.append(text.decode("utf-8", "replace"))
        types.append(kind)
    if not texts:
        raise FormatError("the SentencePiece model holds no piece.")
    return PieceTypes(texts, np.array(types, dtype=np.uint8))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message; fixed-width numbers come as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            integer, at = _varint(data, at)
            yield number, integer
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise FormatError(f"the SentencePiece model has a field of wire type {wire}.")
        if at + size > len(data):
            raise FormatError("the SentencePiece model ends in the middle of a field.")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise FormatError("the SentencePiece model has a malformed number.")
