"""Event files against TensorBoard's own reader where it is installed, and against a reader written from the format."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from megatron_xalign.formats.event_file import EventFile, crc32c


@pytest.mark.parametrize(
    ("content", "crc"),
    # RFC 3720, appendix B.4, and the usual check value.
    [(b"\0" * 32, 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E), (b"123456789", 0xE3069283)],
)
def test_crc32c_has_the_values_of_its_standard(content: bytes, crc: int) -> None:
    assert crc32c(content) == crc


def varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        number |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return number, at


def fields(data: bytes) -> list[tuple[int, object]]:
    found, at = [], 0
    while at < len(data):
        key, at = varint(data, at)
        if key & 7 == 0:
            value, at = varint(data, at)
        elif key & 7 == 2:
            length, at = varint(data, at)
            value, at = data[at : at + length], at + length
        else:
            kind, size = ("<d", 8) if key & 7 == 1 else ("<f", 4)
            (value,), at = struct.unpack(kind, data[at : at + size]), at + size
        found.append((key >> 3, value))
    return found


def records(path: Path) -> list[dict[int, object]]:
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack("<Q", data[at : at + 8])
        for content, crc_at in ((data[at : at + 8], at + 8), (data[at + 12 : at + 12 + length], at + 12 + length)):
            crc = crc32c(content)
            (stored,) = struct.unpack("<I", data[crc_at : crc_at + 4])
            assert stored == ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF
        found.append(dict(fields(data[at + 12 : at + 12 + length])))
        at += length + 16
    return found


def test_records_hold_what_was_written(tmp_path: Path) -> None:
    events = EventFile(tmp_path, first_step=1)
    events.write(300, {"loss": 2.5, "loss_by_language/fin_Latn": 3.25})
    events.close()
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("events.out.tfevents.")
    version, start, step = records(path)
    assert version[3] == b"brain.Event:2"
    assert (start[2], start[7]) == (1, bytes([1 << 3, 1]))
    assert step[2] == 300
    values = [dict(fields(value)) for number, value in fields(step[5]) if number == 1]
    assert values == [{1: b"loss", 2: 2.5}, {1: b"loss_by_language/fin_Latn", 2: 3.25}]


def test_tensorboard_reads_one_curve_of_a_run_that_was_resumed(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = EventFile(tmp_path, first_step=1)
    for step in (10, 20, 30):
        first.write(step, {"loss": float(step)})
    first.close()
    # Killed after step 30, it goes on from a checkpoint of step 15.
    second = EventFile(tmp_path, first_step=16)
    for step in (20, 30, 40):
        second.write(step, {"loss": step + 0.5})
    second.close()
    read = reader.EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [
        (10, 10.0), (20, 20.5), (30, 30.5), (40, 40.5)
    ]
