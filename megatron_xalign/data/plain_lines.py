"""Plain text, tab-separated values and line-aligned files to batches."""

# R records, C columns

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import cast

from megatron_xalign.data.batches import Task, TextBatch, monolingual_batch, pairs_of_columns, pairs_of_records
from megatron_xalign.data.fields import Fields
from megatron_xalign.data.json_lines import sides_of
from megatron_xalign.data.line_blocks import UTF8_MARK, Block
from megatron_xalign.data.reading import Place
from megatron_xalign.errors import CorpusError

_BLANK = b" \t\r\n\v\f"
_LATIN = "; text in another encoding is converted with `iconv -f ISO-8859-1 -t UTF-8` (or whichever it is)"


def read_text_lines(blocks: Iterable[Block], place: Place, language: str | None, task: Task) -> Iterator[TextBatch]:
    """Every line a document; blank ones are left out."""
    for block in blocks:
        texts, numbers = _lines(block, place, task)
        filled = list(map(str.strip, texts))
        if not all(filled):
            task.reading.leave_out("blank line", filled.count(""))
            numbers, texts = list(compress(numbers, filled)), list(compress(texts, filled))
        if texts:
            yield monolingual_batch(task, place, texts, numbers, language)


def read_paragraphs(
    blocks: Iterable[Block],
    place: Place,
    language: str | None,
    task: Task,
    *,
    long_lines: deque[int],
    begins_file: bool,
    begins_inside: bool,
    is_beyond: Callable[[int], bool],
) -> Iterator[TextBatch]:
    """Every run of lines without a blank one between them a document.

    Args:
        blocks: lines from the first that begins in the stretch, to the end of the file.
        place: of the stretch.
        language: of the file.
        task: of the piece.
        long_lines: numbers of lines that are missing from ``blocks`` for their length.
        begins_file: whether the first line is that of the file.
        begins_inside: whether the first lines go on with a paragraph that began before the stretch.
        is_beyond: whether a paragraph that begins so many bytes after the first line belongs to the next stretch.
    """
    batch = _Paragraphs(task, place)
    skipping = begins_inside
    for block in blocks:
        if long_lines and not skipping:
            if not batch.open and is_beyond(batch.position):
                break
            batch.overflow(long_lines[0])
        long_lines.clear()
        batch.position = block.begin
        for number, line in enumerate(block.data.split(b"\n")[: block.num_lines], block.first):
            content = line.removeprefix(UTF8_MARK) if begins_file and number == 0 else line
            if not content.strip(_BLANK):
                batch.finish()
                skipping = False
                if batch.num_bytes >= task.batch_bytes:
                    yield monolingual_batch(task, place, *batch.take(), language)
            elif not skipping:
                if not batch.open and is_beyond(batch.position):
                    break
                batch.add(number, content)
            batch.position += len(line) + 1
        else:
            continue
        break
    if long_lines and not skipping and (batch.open or not is_beyond(batch.position)):
        batch.overflow(long_lines[0])
    batch.finish()
    if batch.texts:
        yield monolingual_batch(task, place, *batch.take(), language)


class _Paragraphs:
    """Lines to paragraphs."""

    def __init__(self, task: Task, place: Place) -> None:
        self._task, self._place = task, place
        self._most_bytes = task.fields.max_line_bytes
        self.texts: list[str] = []
        self._numbers: list[int] = []
        self._lines: list[bytes] = []
        self._first = self._open_bytes = 0
        self.num_bytes = 0
        """Of the paragraphs that are finished."""
        self.position = 0
        """Of the next line."""

    @property
    def open(self) -> bool:
        """Whether a paragraph is going on."""
        return self._open_bytes > 0

    def add(self, number: int, line: bytes) -> None:
        """Go on with a paragraph, or begin one."""
        if not self.open:
            self._first = number
        self._open_bytes += len(line) + 1
        if self._open_bytes <= self._most_bytes + 1:
            self._lines.append(line.removesuffix(b"\r"))
        else:
            self._lines.clear()

    def overflow(self, number: int) -> None:
        """Go on with a paragraph by a line that is too long."""
        if not self.open:
            self._first = number
        self._open_bytes = self._most_bytes + 2
        self._lines.clear()

    def finish(self) -> None:
        """End a paragraph if one is going on."""
        if self._open_bytes > self._most_bytes + 1:
            self._task.reject(
                self._place, self._first, f"a paragraph of more than max_line_bytes={self._most_bytes:,} bytes"
            )
        elif self.open:
            try:
                self.texts.append(b"\n".join(self._lines).decode())
                self._numbers.append(self._first)
            except UnicodeDecodeError as error:
                self._task.reject(
                    self._place, self._first, "not UTF-8", f" in the paragraph that begins here: {error.reason}{_LATIN}"
                )
        self.num_bytes += self._open_bytes
        self._open_bytes = 0
        self._lines.clear()

    def take(self) -> tuple[list[str], list[int]]:
        """The finished paragraphs and where they begin."""
        taken = self.texts, self._numbers
        self.texts, self._numbers, self.num_bytes = [], [], 0
        return taken


def read_whole_text(chunks: Iterable[bytes], place: Place, language: str | None, task: Task) -> Iterator[TextBatch]:
    """A file that is one document."""
    held: list[bytes] = []
    held_bytes = 0
    for chunk in chunks:
        held_bytes += len(chunk)
        if held_bytes <= task.fields.max_line_bytes:
            held.append(chunk)
    if held_bytes > task.fields.max_line_bytes:
        task.reject(place, 0, f"a document of more than max_line_bytes={task.fields.max_line_bytes:,} bytes")
        return
    try:
        text = b"".join(held).decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        task.reject(place, 0, "not UTF-8", f" at byte {error.start}{_LATIN}")
        return
    if text.strip():
        yield monolingual_batch(task, place, [text], [0], language)
    else:
        task.reading.leave_out("blank file")


class TsvColumns:
    """Which columns of a TSV hold what, from its first line."""

    def __init__(self, fields: Fields, first_line: bytes, place: Place) -> None:
        """Look for the columns that fields name.

        Raises:
            CorpusError: one is not there.
        """
        header = first_line.rstrip(b"\r\n").decode(errors="replace").split("\t")
        self.num_columns = len(header)
        texts: tuple[str, ...]
        codes: tuple[str, ...]
        if fields.kind == "monolingual":
            texts = (fields.text_key,)
            codes = (fields.language_key,) if fields.language_key is not None else ()
        else:
            texts = fields.side_keys or tuple(str(number + 1) for number in range(max(2, len(fields.languages))))
            codes = fields.side_language_keys
        self.has_header = fields.tsv_header or not all(key.isdecimal() for key in (*texts, *codes))
        self._header = header if self.has_header else []
        self._place = place
        self.texts = [self._index(key) for key in texts]
        self.codes = [self._index(key) for key in codes]
        has_id = fields.kind == "pairs" and (fields.id_key in self._header or fields.id_key.isdecimal())
        self.id = self._index(fields.id_key) if has_id else None

    def _index(self, key: str) -> int:
        if key in self._header:
            return self._header.index(key)
        if key.isdecimal() and 1 <= int(key) <= self.num_columns:
            return int(key) - 1
        named = f", named {', '.join(self._header[:20])}" if self._header else ""
        raise CorpusError(
            f"{self._place.where(0)}: there is no column {key}; the file has {self.num_columns} columns{named}. "
            "Columns are separated by tabs, and told by their name in the first line or their number from 1."
        )


def read_tsv(
    blocks: Iterable[Block], place: Place, columns: TsvColumns, language: str | None, task: Task, *, begins_file: bool
) -> Iterator[TextBatch]:
    """Every line a record, of as many columns as the first line; a quotation mark is a character like another.

    Args:
        blocks: lines.
        place: of the stretch.
        columns: of the file.
        language: of the file, for monolingual text.
        task: of the piece.
        begins_file: whether the first of the lines is that of the file.
    """
    for block in blocks:
        lines, numbers = _lines(block, place, task)
        rows: list[list[str]] = []
        kept: list[int] = []
        for number, line in zip(numbers, lines, strict=True):
            if number == 0 and begins_file and columns.has_header:
                continue
            row = line.split("\t")
            if len(row) == columns.num_columns:
                rows.append(row)
                kept.append(number)
            elif not line.strip():
                task.reading.leave_out("blank line")
            else:
                detail = f": {len(row)}, not {columns.num_columns}"
                task.reject(place, number, "not as many columns as in the first line", detail)
        if not rows:
            continue
        texts = [[row[index] for row in rows] for index in columns.texts]
        codes = [[row[index] for row in rows] for index in columns.codes]
        ids = [row[columns.id] for row in rows] if columns.id is not None else None
        if task.fields.kind == "monolingual":
            yield monolingual_batch(task, place, texts[0], kept, language, codes[0] if codes else None)
        elif codes:
            yield pairs_of_records(task, place, sides_of(codes, texts), ids, kept)
        else:
            fields = task.fields
            yield pairs_of_columns(task, place, fields.pairs(), fields.languages, texts, ids, kept)


class AlignedFile:
    """The lines of one of several aligned files, from a stretch of it."""

    def __init__(self, blocks: Iterator[Block], place: Place, long_lines: deque[int]) -> None:
        """Args: lines; where they come from; numbers of lines that are missing from them for their length."""
        self._blocks, self.place, self._long = blocks, place, long_lines
        self._next = 0
        self.lines: list[str | _Bad] = []
        """Without their ends."""

    def fill(self) -> None:
        """Have at least one line.

        Raises:
            CorpusError: the file has become shorter.
        """
        if self.lines:
            return
        block = next(self._blocks, None)
        long = [_TOO_LONG] * len(self._long)
        self._long.clear()
        if block is None:
            self.lines = [*long]
        else:
            self.lines = [*long, *_aligned_lines(block)]
        if not self.lines:
            raise CorpusError(f"{self.place.path} has fewer lines than when they were counted; start the job again.")

    def finish(self) -> None:
        """Read to the end, where the checksum of an archive is.

        Raises:
            CorpusError: there are more lines.
        """
        if self.lines or next(self._blocks, None) is not None or self._long:
            raise CorpusError(f"{self.place.path} has more lines than when they were counted; start the job again.")


def read_aligned(
    files_C: Sequence[AlignedFile],
    rule: Sequence[tuple[str, str]],
    languages_C: Sequence[str],
    num_lines: int,
    task: Task,
) -> Iterator[TextBatch]:
    """Line k of each of several files is one record.

    Args:
        files_C: from the same line on.
        rule: the pairs of languages to take.
        languages_C: of the files, codes of the token file.
        num_lines: lines to read from each.
        task: of the piece.
    """
    done = 0
    while done < num_lines:
        for file in files_C:
            file.fill()
        count = min(num_lines - done, *(len(file.lines) for file in files_C))
        columns: list[list[str]] = []
        bad: dict[int, tuple[AlignedFile, _Bad]] = {}
        for file in files_C:
            lines, file.lines = file.lines[:count], file.lines[count:]
            for row, line in enumerate(lines):
                if type(line) is not str:
                    bad.setdefault(row, (file, cast(_Bad, line)))
            columns.append(cast(list[str], lines))
        for row, (file, what) in sorted(bad.items()):
            task.reject(file.place, done + row, what.reason, what.detail)
        numbers: Sequence[int] = range(done, done + count)
        done += count
        if bad:
            keep = [row for row in range(count) if row not in bad]
            columns = [[column[row] for row in keep] for column in columns]
            numbers = [numbers[row] for row in keep]
        if numbers:
            yield pairs_of_columns(task, files_C[0].place, rule, languages_C, columns, None, numbers)


@dataclass(frozen=True)
class _Bad:
    """In place of a line that cannot be used."""

    reason: str
    detail: str = ""


_NOT_UTF8 = _Bad("not UTF-8", _LATIN)
_TOO_LONG = _Bad("longer than max_line_bytes")


def _aligned_lines(block: Block) -> list[str | _Bad]:
    try:
        return list(_split(block.data.decode(), block.num_lines))
    except UnicodeDecodeError:
        return [_decoded(line.removesuffix(b"\r")) for line in block.data.split(b"\n")[: block.num_lines]]


def _decoded(line: bytes) -> str | _Bad:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return _NOT_UTF8


def _lines(block: Block, place: Place, task: Task) -> tuple[list[str], Sequence[int]]:
    """Lines without their ends, and their numbers; those that are not UTF-8 are malformed."""
    try:
        return _split(block.data.decode(), block.num_lines), range(block.first, block.first + block.num_lines)
    except UnicodeDecodeError:
        pass
    texts, numbers = [], []
    for number, line in enumerate(block.data.split(b"\n")[: block.num_lines], block.first):
        try:
            texts.append(line.removesuffix(b"\r").decode())
            numbers.append(number)
        except UnicodeDecodeError as error:
            task.reject(
                place, number, "not UTF-8", f" at byte {error.start} of the line (0x{line[error.start]:02X}){_LATIN}"
            )
    return texts, numbers


def _split(text: str, num_lines: int) -> list[str]:
    # Not str.splitlines, for which a form feed or U+2028 ends a line too.
    lines = text.split("\n")[:num_lines]
    return [line.removesuffix("\r") for line in lines] if "\r" in text else lines
