"""Bytes of plain and compressed files as blocks of whole lines, hashed while they are read, in bounded memory."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from megatron_xalign import _native
from megatron_xalign.data.input_files import Compression, InputFile
from megatron_xalign.data.reading import Reading
from megatron_xalign.errors import CorpusError

_READ_BYTES = 1 << 20
# What one call may give back: a few bytes of an archive can hold gigabytes.
_MOST_INFLATED_BYTES = 1 << 20
# A zstd block of 4 bytes can hold 128 KiB, and a call decompresses all it is given: 1 KiB gives 32 MiB at most.
_ZSTD_STEP_BYTES = 1 << 10
_BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}
_MAGIC = {
    b"\x1f\x8b": "gzip (.gz)", b"\x28\xb5\x2f\xfd": "zstd (.zst)", b"PAR1": "parquet (.parquet)", b"PK\3\4": "zip",
    b"BZh": "bzip2", b"\xfd7zXZ": "xz",
}
UTF8_MARK = b"\xef\xbb\xbf"


class DamagedError(Exception):
    """An archive that cannot be read to its end; ``lines`` whole lines came out of it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lines = 0


class DiskBytes:
    """The bytes of a file from ``begin`` to ``end``, counted and hashed as they are read."""

    def __init__(self, file: InputFile, reading: Reading, begin: int = 0, end: int | None = None) -> None:
        """Open the file.

        Raises:
            CorpusError: it is missing or not the file that was found.
        """
        self._path = file.path
        self._reading = reading
        self.begin, self.end = begin, file.num_bytes if end is None else end
        self._position = self.lines_begin = begin
        self._digest = hashlib.sha256()
        try:
            self._file = file.path.open("rb")
        except FileNotFoundError:
            raise CorpusError(f"{file.path} does not exist.") from None
        facts = os.fstat(self._file.fileno())
        if (facts.st_size, facts.st_mtime_ns) != (file.num_bytes, file.mtime_ns):
            self._file.close()
            raise CorpusError(f"{file.path} has changed since the job was planned; start the job again.")

    def __enter__(self) -> DiskBytes:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def chunks(self) -> Iterator[bytes]:
        """The bytes from ``begin`` to ``end``."""
        self._file.seek(self.begin)
        self._position = self.begin
        while self._position < self.end:
            chunk = self._file.read(min(self.end - self._position, _READ_BYTES))
            if not chunk:
                raise CorpusError(f"{self._path} became shorter while it was read; start the job again.")
            self._position += len(chunk)
            self._digest.update(chunk)
            self._reading.bytes_read += len(chunk)
            yield chunk

    def lines(self, *, past_end: bool = False) -> Iterator[bytes]:
        """The bytes of all lines that begin from ``begin`` to ``end``; the last of them is read to its end.

        Args:
            past_end: go on to the end of the file; for who knows where to stop.
        """
        inside = self.begin == 0 or self._byte_before(self.begin) == b"\n"
        last = b""
        for chunk in self.chunks():
            if not inside:
                cut = chunk.find(b"\n")
                if cut < 0:
                    continue
                inside, self.lines_begin = True, self._position - len(chunk) + cut + 1
                chunk = chunk[cut + 1 :]
            if chunk:
                last = chunk[-1:]
                yield chunk
        if not last or (last == b"\n" and not past_end):
            return
        while chunk := self._file.read(_READ_BYTES):
            cut = -1 if past_end else chunk.find(b"\n")
            if cut >= 0:
                yield chunk[: cut + 1]
                return
            yield chunk

    def begins_inside_paragraph(self) -> bool:
        """Whether the line before the first that begins at ``begin`` or later has more than white space in it."""
        position = self.begin
        if position == 0:
            return False
        if self._byte_before(position) != b"\n":
            # The line that is in progress here ends at the next line break; it is the line before.
            return self._line_in_progress_has_text(position)
        return self._has_text_before(position - 1)

    def _line_in_progress_has_text(self, position: int) -> bool:
        self._file.seek(position)
        start = position
        while chunk := self._file.read(_READ_BYTES):
            cut = chunk.find(b"\n")
            if self._without_mark(chunk if cut < 0 else chunk[:cut], start).strip():
                return True
            start += len(chunk)
            if cut >= 0:
                break
        return self._has_text_before(position)

    def _has_text_before(self, position: int) -> bool:
        """Whether there is more than white space between the line break before ``position`` and ``position``."""
        while position > 0:
            start = max(0, position - 4096)
            self._file.seek(start)
            chunk = self._file.read(position - start)
            cut = chunk.rfind(b"\n")
            if self._without_mark(chunk[cut + 1 :], start + cut + 1).strip():
                return True
            if cut >= 0:
                return False
            position = start
        return False

    def _without_mark(self, chunk: bytes, start: int) -> bytes:
        """Bytes of the file from ``start`` on without what they hold of the mark that begins some UTF-8 files."""
        if start >= len(UTF8_MARK):
            return chunk
        here = self._file.tell()
        self._file.seek(0)
        begins_marked = self._file.read(len(UTF8_MARK)) == UTF8_MARK
        self._file.seek(here)
        return chunk[len(UTF8_MARK) - start :] if begins_marked else chunk

    def _byte_before(self, position: int) -> bytes:
        self._file.seek(position - 1)
        return self._file.read(1)

    def source(self) -> dict[str, Any]:
        """What was read, for the manifest."""
        return {"path": str(self._path), "begin": self.begin, "end": self.end, "sha256": self._digest.hexdigest()}


def decompress(chunks: Iterator[bytes], compression: Compression | None) -> Iterator[bytes]:
    """The bytes inside an archive of any number of members, each checked to its end.

    Raises:
        DamagedError: it is no such archive, is cut, or fails its checksum.
    """
    if compression == "gz":
        return _gunzip(chunks)
    return _unzstd(chunks) if compression == "zst" else chunks


def _gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    member, num_members, position = None, 0, 0
    for chunk in chunks:
        position += len(chunk)
        data = b""
        while chunk or len(data) == _MOST_INFLATED_BYTES:
            if member is None:
                # Tapes and block devices pad archives with zeros.
                chunk = chunk.lstrip(b"\0") if num_members else chunk
                if not chunk:
                    break
                member = zlib.decompressobj(wbits=31)
            try:
                data = member.decompress(chunk, _MOST_INFLATED_BYTES)
            except zlib.error as error:
                raise DamagedError(f"is not a whole gzip file: {error}, before its byte {position}") from None
            if data:
                yield data
            if member.eof:
                chunk, data = member.unused_data, b""
                member, num_members = None, num_members + 1
            else:
                chunk = member.unconsumed_tail
    if member is not None or not num_members:
        raise DamagedError(f"is not a whole gzip file: it ends in the middle, at its byte {position}")


def _unzstd(chunks: Iterator[bytes]) -> Iterator[bytes]:
    frame, num_frames, position = None, 0, 0
    for chunk in chunks:
        begin = 0
        while begin < len(chunk):
            step = chunk[begin : begin + _ZSTD_STEP_BYTES]
            begin += len(step)
            if frame is None:
                frame = zstandard.ZstdDecompressor().decompressobj()
            try:
                data = frame.decompress(step)
            except zstandard.ZstdError as error:
                if "too much memory" in str(error):
                    raise DamagedError(
                        "takes more than 128 MiB to decompress, since it was made with a long window (--long): "
                        "recompress it with `zstd -d --long=31 --stdout FILE | zstd > NEW`"
                    ) from None
                raise DamagedError(f"is not a whole zstd file: {error}, near its byte {position + begin}") from None
            if data:
                yield data
            if frame.eof:
                begin -= len(frame.unused_data)
                frame, num_frames = None, num_frames + 1
        position += len(chunk)
    if frame is not None or not num_frames:
        raise DamagedError(f"is not a whole zstd file: it ends in the middle, at its byte {position}")


def check_start(start: bytes, path: Path, *, is_json: bool = False) -> None:
    """Refuse what is plainly no UTF-8 text, from its first bytes.

    Raises:
        CorpusError: with the encoding or format it is in, and the way out.
    """
    name = next((name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), "")
    if name or (is_json and start[:2] in (b"{\0", b"\0{")):
        name = name or "UTF-16"
        raise CorpusError(
            f"{path} is in {name} (it begins with {start[:4].hex(' ').upper()}), not UTF-8. Convert it: "
            f"iconv -f {name} -t UTF-8 {path.name} > utf8-{path.name}"
        )
    for magic, name in _MAGIC.items():
        if start.startswith(magic) and not (magic.isalnum() and _is_text(start)):
            raise CorpusError(
                f"{path} begins as {name} files do, which its name does not say; rename it, or unpack it first."
            )


def _is_text(start: bytes) -> bool:
    """Whether what follows letters that are also a magic number reads like text."""
    return not any(byte < 9 or 13 < byte < 32 for byte in start)


def text_of(
    chunks: Iterable[bytes], path: Path, *, is_json: bool = False, keep_mark: bool = False
) -> Iterator[bytes]:
    """A stream from the beginning of a file: checked to be no UTF-16, without the mark that begins some UTF-8 files."""
    start = b""
    begun = False

    def checked() -> bytes:
        check_start(start[:8], path, is_json=is_json)
        return start if keep_mark else start.removeprefix(UTF8_MARK)

    for chunk in chunks:
        if begun:
            yield chunk
            continue
        start += chunk
        if len(start) >= 8:
            begun = True
            yield checked()
    if not begun and (rest := checked()):
        yield rest


class Block(NamedTuple):
    """Whole lines, each with its line break; the last of a file may have none."""

    data: bytes
    first: int
    """Number of its first line within the stream, from 0."""
    num_lines: int
    begin: int
    """Bytes of the stream before it."""


def line_blocks(
    chunks: Iterable[bytes], block_bytes: int, max_line_bytes: int, too_long: Callable[[int], None]
) -> Iterator[Block]:
    """Whole lines in blocks of about ``block_bytes``; a longer line is in a block of its own size or little more.

    Args:
        chunks: bytes of a stream, cut anywhere.
        block_bytes: at least so much is in a block, if there is so much.
        max_line_bytes: a longer line (line break not counted) is left out.
        too_long: called with the number of a line left out for its length.

    Raises:
        DamagedError: from ``chunks``; the whole lines before the damage have been given then.
    """
    held: list[bytes] = []
    held_bytes, wanted_bytes, line, position, too_long_bytes = 0, block_bytes, 0, 0, 0
    damage: DamagedError | None = None

    def blocks(data: bytes) -> Iterator[Block]:
        nonlocal line, position
        num_lines = _native.count_line_breaks(data) + (not data.endswith(b"\n"))
        block = Block(data, line, num_lines, position)
        line, position = line + block.num_lines, position + len(data)
        if len(data) > max_line_bytes:
            yield from _without_long_lines(block, max_line_bytes, too_long)
        else:
            yield block

    stream = iter(chunks)
    while True:
        try:
            chunk = next(stream, None)
        except DamagedError as error:
            chunk, damage = None, error
        if chunk is None:
            break
        if too_long_bytes:
            cut = chunk.find(b"\n")
            if cut < 0:
                too_long_bytes += len(chunk)
                continue
            too_long(line)
            line, position, chunk = line + 1, position + too_long_bytes + cut + 1, chunk[cut + 1 :]
            too_long_bytes = 0
        held.append(chunk)
        held_bytes += len(chunk)
        if held_bytes < wanted_bytes:
            continue
        cut = chunk.rfind(b"\n") + 1
        if cut:
            # Nearly always the block ends in the last chunk, and its bytes are copied once.
            data, rest = b"".join([*held[:-1], memoryview(chunk)[:cut]]), chunk[cut:]
        else:
            data = b"".join(held)
            cut = data.rfind(b"\n") + 1
            data, rest = data[:cut], data[cut:]
        if data:
            yield from blocks(data)
            wanted_bytes = block_bytes
        elif held_bytes > max_line_bytes:
            rest, too_long_bytes, wanted_bytes = b"", held_bytes, block_bytes
        else:
            # One line longer than a block: look again when there is twice as much, so that the work stays linear.
            wanted_bytes = min(2 * held_bytes, max_line_bytes + 1)
        held, held_bytes = [rest] if rest else [], len(rest)
    data = b"".join(held)
    if damage is not None:
        data = data[: data.rfind(b"\n") + 1]
    if too_long_bytes and damage is None:
        too_long(line)
        line += 1
    if data:
        yield from blocks(data)
    if damage is not None:
        damage.lines = line
        raise damage


def _without_long_lines(block: Block, max_line_bytes: int, too_long: Callable[[int], None]) -> Iterator[Block]:
    data, first, _, offset = block
    begin = position = 0
    number = first
    while position < len(data):
        cut = data.find(b"\n", position)
        end = len(data) if cut < 0 else cut
        if end - position > max_line_bytes:
            if begin < position:
                yield Block(data[begin:position], first, number - first, offset + begin)
            too_long(number)
            begin, first = end + 1, number + 1
        position, number = end + 1, number + 1
    if begin < len(data):
        yield Block(data[begin:], first, number - first, offset + begin)


def first_line(chunks: Iterable[bytes], max_line_bytes: int) -> bytes | None:
    """The first line of a stream without its line break, no more than ``max_line_bytes``; None if there is none."""
    line = b""
    chunk = b""
    for chunk in chunks:
        cut = chunk.find(b"\n")
        line += chunk if cut < 0 else chunk[:cut]
        if cut >= 0 or len(line) > max_line_bytes:
            break
    return line[:max_line_bytes] if chunk else None


def decompressed(disk: DiskBytes, file: InputFile) -> Iterator[bytes]:
    """What a whole file holds, from its beginning."""
    return decompress(disk.chunks(), file.compression)
