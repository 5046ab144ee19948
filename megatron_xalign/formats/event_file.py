"""Write scalars as TensorBoard reads them, without TensorBoard, TensorFlow or a protobuf library.

An event file is a TFRecord file: for each record its length (uint64, little endian), the masked CRC-32C of the length,
the record, and the record's masked CRC-32C. A record is an ``Event`` in protobuf's wire format, of which four fields
are needed: ``wall_time`` (1, double), ``step`` (2, varint), ``file_version`` (3, text) or ``summary`` (5) or
``session_log`` (7). A file is appended to and never rewritten; a reader that finds the start of a session at a step
drops what earlier files of the folder say of that step and later ones, so a resumed run shows one curve.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc_table()


def crc32c(content: bytes) -> int:
    """Castagnoli's CRC-32 of some bytes."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


class EventFile:
    """A new event file in a folder.

    Args:
        folder: made if it is not there; one of several files of a run may lie there already.
        first_step: step at which this session begins.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Readers take files in the order of their names: the time comes first, and to the microsecond.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file: IO[bytes] = (folder / name).open("xb")
        self._record(0, _text(3, b"brain.Event:2"))
        # SessionLog.status = START.
        self._record(first_step, _text(7, _varint_field(1, 1)))
        self._file.flush()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add the scalars of one step and hand them to the operating system."""
        values = b"".join(
            _text(1, _text(1, tag.encode("utf-8")) + _key(2, 5) + struct.pack("<f", value))
            for tag, value in scalars.items()
        )
        self._record(step, _text(5, values))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _record(self, step: int, what: bytes) -> None:
        event = _key(1, 1) + struct.pack("<d", time.time()) + _varint_field(2, step) + what
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked(length) + event + _masked(event))


def _masked(content: bytes) -> bytes:
    crc = crc32c(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _key(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def _varint_field(field: int, number: int) -> bytes:
    return _key(field, 0) + _varint(number)


def _text(field: int, content: bytes) -> bytes:
    return _key(field, 2) + _varint(len(content)) + content
