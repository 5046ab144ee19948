"""Corpus files to batches of text: find the files, cut them into parts, read a part.

The parts depend on the inputs and ``part_bytes`` alone, never on the number of workers, so the documents of all parts
one after the other are those of the files one after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from megatron_xalign.data.batches import Task, TextBatch
from megatron_xalign.data.fields import Fields, LanguageCodes, PairRule
from megatron_xalign.data.input_files import Compression, InputFile, InputFormat, find_inputs
from megatron_xalign.data.input_parts import (
    PART_BYTES,
    Part,
    Piece,
    aligned_rule,
    damaged,
    languages_of,
    path_of,
    plan_parts,
    tsv_columns,
    undamaged,
)
from megatron_xalign.data.json_lines import layout_of, read_json_lines
from megatron_xalign.data.line_blocks import Block, DamagedError, DiskBytes, decompress, line_blocks, text_of
from megatron_xalign.data.parquet import read_row_groups
from megatron_xalign.data.plain_lines import (
    AlignedFile,
    read_aligned,
    read_paragraphs,
    read_text_lines,
    read_tsv,
    read_whole_text,
)
from megatron_xalign.data.reading import OnError, Place, Reading
from megatron_xalign.data.tmx import read_tmx
from megatron_xalign.errors import CorpusError

__all__ = [
    "PART_BYTES", "Compression", "Fields", "InputFile", "InputFormat", "LanguageCodes", "OnError", "PairRule", "Part",
    "Piece", "Place", "Reading", "TextBatch", "find_inputs", "languages_of", "plan_parts", "read_part",
]


def read_part(
    part: Part,
    fields: Fields,
    *,
    on_error: OnError = "raise",
    reading: Reading | None = None,
    batch_bytes: int = 2 << 20,
    separator: bytes | None = None,
) -> Iterator[TextBatch]:
    """Read the documents of a part, in order.

    Args:
        part: of ``plan_parts``.
        fields: how records are read; those the part was planned with.
        on_error: ``raise`` at the first malformed line, or ``skip`` it and count it in ``reading``. A damaged archive,
            an XML error or a file changed since it was found is an error anyway.
        reading: filled in while reading.
        batch_bytes: text in a batch, about; a longer line is a batch of its own size.
        separator: give the texts of monolingual JSON lines, where all is plain, as ``PackedTexts`` with this behind
            each.

    Returns:
        Batches of at least one document.

    Raises:
        CorpusError: with file, line and reason.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r} is neither 'raise' nor 'skip'.")
    if batch_bytes < 1:
        raise ValueError(f"batch_bytes={batch_bytes} must be positive.")
    reading = reading if reading is not None else Reading()
    task = Task(fields, LanguageCodes(fields), reading, on_error, batch_bytes, separator)
    for piece in part.pieces:
        before = reading.documents
        try:
            for batch in _read_piece(piece, task):
                if batch.texts:
                    reading.documents += len(batch.texts)
                    yield batch
        except DamagedError as error:
            documents = f"{reading.documents - before:,} documents"
            reached = f"{error.lines:,} whole lines with {documents}" if error.lines else documents
            raise damaged(piece.files[0], error, f"; {reached} could be read before that") from None
        except OSError as error:
            path = error.filename or path_of(piece)
            raise CorpusError(f"{path} cannot be read: {error.strerror or error}.") from None


def _read_piece(piece: Piece, task: Task) -> Iterator[TextBatch]:
    file = piece.files[0]
    language = file.language or task.fields.language
    if file.format == "moses":
        yield from _read_aligned(piece, task)
        return
    if file.format == "parquet":
        yield from read_row_groups(file, piece.begin, piece.end, language, task)
        return
    with DiskBytes(file, task.reading, piece.begin, piece.end) as disk:
        place = Place(file.path, offset_bytes=piece.begin)
        if file.format == "tmx":
            yield from read_tmx(decompress(disk.chunks(), file.compression), place, task)
        elif file.format == "jsonl":
            blocks = _blocks(disk, piece, place, task)
            yield from read_json_lines(blocks, place, layout_of(task.fields, task, language), task)
        elif file.format == "tsv":
            columns = tsv_columns(file, task.fields)
            if columns is not None:
                blocks = _blocks(disk, piece, place, task)
                yield from read_tsv(blocks, place, columns, language, task, begins_file=piece.begin == 0)
        elif task.fields.text_unit == "line":
            yield from read_text_lines(_blocks(disk, piece, place, task), place, language, task)
        elif task.fields.text_unit == "file":
            chunks = text_of(decompress(disk.chunks(), file.compression), file.path)
            yield from read_whole_text(chunks, Place(file.path, unit="file"), language, task)
        else:
            yield from _read_paragraphs(disk, piece, place, language, task)
        task.reading.sources.append(disk.source())


def _stream(disk: DiskBytes, piece: Piece, *, past_end: bool = False, keep_mark: bool = False) -> Iterator[bytes]:
    """The lines of a piece, decompressed."""
    file = piece.files[0]
    chunks = disk.lines(past_end=past_end) if piece.unit == "bytes" else decompress(disk.chunks(), file.compression)
    if disk.begin:
        return chunks
    return text_of(chunks, file.path, is_json=file.format == "jsonl", keep_mark=keep_mark)


def _blocks(disk: DiskBytes, piece: Piece, place: Place, task: Task) -> Iterator[Block]:
    most = task.fields.max_line_bytes

    def too_long(number: int) -> None:
        task.reject(place, number, f"longer than max_line_bytes={most:,}")

    return line_blocks(_stream(disk, piece), task.batch_bytes, most, too_long)


def _read_paragraphs(
    disk: DiskBytes, piece: Piece, place: Place, language: str | None, task: Task
) -> Iterator[TextBatch]:
    long_lines: deque[int] = deque()
    cut = piece.unit == "bytes"
    begins_inside = cut and disk.begins_inside_paragraph()

    def is_beyond(position: int) -> bool:
        return cut and disk.lines_begin + position >= disk.end

    # The mark counts among the bytes before a line.
    stream = _stream(disk, piece, past_end=True, keep_mark=True)
    blocks = line_blocks(stream, task.batch_bytes, task.fields.max_line_bytes, long_lines.append)
    yield from read_paragraphs(
        blocks, place, language, task, long_lines=long_lines, begins_file=disk.begin == 0, begins_inside=begins_inside,
        is_beyond=is_beyond,
    )


def _read_aligned(piece: Piece, task: Task) -> Iterator[TextBatch]:
    languages = [task.codes(file.language or "") for file in piece.files]
    disks = [
        DiskBytes(file, task.reading, begin, end) for file, (begin, end) in zip(piece.files, piece.ranges, strict=True)
    ]
    try:
        files = []
        for member, disk in zip(piece.files, disks, strict=True):
            long_lines: deque[int] = deque()
            chunks = undamaged(decompress(disk.chunks(), member.compression), member)
            blocks = line_blocks(
                chunks if disk.begin else text_of(chunks, member.path), task.batch_bytes, task.fields.max_line_bytes,
                long_lines.append,
            )
            files.append(AlignedFile(blocks, Place(member.path, first=piece.begin), long_lines))
        yield from read_aligned(files, aligned_rule(languages, task.fields), languages, piece.end - piece.begin, task)
        for file in files:
            file.finish()
        task.reading.sources += [disk.source() for disk in disks]
    finally:
        for disk in disks:
            disk.__exit__()
