"""Cut the files of a corpus into parts, by the files alone: the order of documents must not depend on workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_xalign.data.fields import Fields, LanguageCodes, pairs_among
from megatron_xalign.data.input_files import InputFile
from megatron_xalign.data.line_blocks import DamagedError, DiskBytes, check_start, decompressed, first_line, text_of
from megatron_xalign.data.parquet import ParquetFile
from megatron_xalign.data.plain_lines import TsvColumns
from megatron_xalign.data.reading import Place, Reading
from megatron_xalign.errors import ConfigError, CorpusError

PART_BYTES = 64 << 20
# Text is about this many times as large as what it is compressed to.
_COMPRESSION = 4
_COUNTED_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class Piece:
    """A stretch of one file, or the same lines of several aligned ones."""

    files: tuple[InputFile, ...]
    begin: int
    end: int
    unit: Literal["bytes", "lines", "row groups", "file"]
    """What ``begin`` and ``end`` count. A line belongs to the piece in whose bytes it begins; a ``file`` is whole."""
    num_bytes: int
    """On disk, about."""
    ranges: tuple[tuple[int, int], ...] = ()
    """Aligned files: in each, where the bytes of the lines begin and end."""


@dataclass(frozen=True)
class Part:
    """What one worker reads at a time: consecutive pieces of the input, ``part_bytes`` of text or so; hashable."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk, about; what ``Reading.bytes_read`` comes to."""
        return sum(piece.num_bytes for piece in self.pieces)

    @property
    def files(self) -> tuple[InputFile, ...]:
        """The files it reads from."""
        return tuple(dict.fromkeys(file for piece in self.pieces for file in piece.files))

    def to_tree(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "index": self.index,
            "pieces": [{**asdict(piece), "files": [file.to_tree() for file in piece.files]} for piece in self.pieces],
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Part:
        """From JSON."""
        return cls(tree["index"], tuple(
            Piece(**{
                **piece,
                "files": tuple(InputFile.from_tree(file) for file in piece["files"]),
                "ranges": tuple((begin, end) for begin, end in piece["ranges"]),
            })
            for piece in tree["pieces"]
        ))


def plan_parts(inputs: Sequence[InputFile], fields: Fields, part_bytes: int = PART_BYTES) -> list[Part]:
    """Cut inputs into parts, in document order; by inputs, fields and ``part_bytes`` alone.

    Plain jsonl, text and TSV are cut by bytes without being read, parquet by row groups, aligned plain files by lines
    after counting them; compressed files, TMX and texts that are a file each stay whole. Small neighbours share a part.

    Args:
        inputs: of ``find_inputs``.
        fields: of the job.
        part_bytes: text in a part, about.

    Raises:
        ConfigError: fields and formats do not fit together, or no language is given.
        CorpusError: aligned files differ in lines; a file is damaged, in UTF-16, or has not the columns asked for.
    """
    if part_bytes < 1:
        raise ValueError(f"part_bytes={part_bytes} must be positive.")
    codes = LanguageCodes(fields)
    for file in inputs:
        _check(file, fields)
    parts: list[Part] = []
    pieces: list[Piece] = []
    filled = 0
    for group in _groups(inputs):
        for piece, weight_bytes in _pieces(group, fields, codes, part_bytes):
            if pieces and filled + weight_bytes > part_bytes:
                parts.append(Part(len(parts), tuple(pieces)))
                pieces, filled = [], 0
            pieces.append(piece)
            filled += weight_bytes
    if pieces:
        parts.append(Part(len(parts), tuple(pieces)))
    return parts


def languages_of(inputs: Sequence[InputFile], fields: Fields) -> tuple[str, ...] | None:
    """The languages that documents may have, in a fixed order; None if only the records tell."""
    codes = LanguageCodes(fields)
    if fields.kind == "monolingual":
        if fields.language_key is not None and any(_names_languages(file, fields) for file in inputs):
            others = [_fixed_language(file, fields, codes) for file in inputs if not _names_languages(file, fields)]
            return tuple(dict.fromkeys([*fields.languages, *others])) if fields.languages else None
        return tuple(dict.fromkeys(_fixed_language(file, fields, codes) for file in inputs))
    if fields.languages or not isinstance(fields.pair_rule, str):
        named = [code for pair in fields.pairs() for code in pair]
        order = {code: position for position, code in enumerate(fields.languages)}
        return tuple(sorted(dict.fromkeys(named), key=lambda code: order.get(code, 0)))
    if all(file.format == "moses" for file in inputs):
        return tuple(dict.fromkeys(codes(file.language or "") for file in inputs))
    return None


def aligned_rule(languages: Sequence[str], fields: Fields) -> tuple[tuple[str, str], ...]:
    """The pairs to take of aligned files in these languages."""
    if not fields.languages and isinstance(fields.pair_rule, str):
        return pairs_among(languages, fields.pair_rule)
    return tuple((first, second) for first, second in fields.pairs() if first in languages and second in languages)


def _fixed_language(file: InputFile, fields: Fields, codes: LanguageCodes) -> str:
    return codes(file.language or fields.language or "")


def _names_languages(file: InputFile, fields: Fields) -> bool:
    """Whether the records of a file say which language they are in."""
    return fields.language_key is not None and file.format in ("jsonl", "parquet", "tsv")


def _check(file: InputFile, fields: Fields) -> None:
    """Refuse what the fields cannot mean for a file."""
    if fields.kind == "monolingual":
        if file.format in ("moses", "tmx"):
            raise ConfigError(f"{file.path} is {file.format}, which holds translations; read it as pairs.")
        if not _names_languages(file, fields) and not (file.language or fields.language):
            raise ConfigError(
                f"{file.path}: which language is it? Give LANGUAGE={file.path}, one language for all files, or the key "
                "under which its records say it."
            )
        return
    if file.format == "text":
        raise ConfigError(
            f"{file.path} is plain text, which holds no pairs. Files aligned line by line are given as "
            f"LANGUAGE={file.path} LANGUAGE=..., or with the format moses."
        )
    if file.format != "moses" and file.language:
        raise ConfigError(
            f"{file.language}={file.path}: a file of pairs is in more than one language; name them with languages, and "
            "give the path alone."
        )
    if file.format == "tsv" and not fields.side_language_keys and len(fields.languages) < 2:
        raise ConfigError(f"{file.path}: name the languages of its columns, in order, or the columns that say them.")


def _groups(inputs: Iterable[InputFile]) -> Iterator[list[InputFile]]:
    """Single files, and sets of aligned ones."""
    group: list[InputFile] = []
    for file in inputs:
        if group and (file.aligned_set is None or file.aligned_set != group[0].aligned_set):
            yield group
            group = []
        group.append(file)
    if group:
        yield group


def _pieces(
    files: list[InputFile], fields: Fields, codes: LanguageCodes, part_bytes: int
) -> Iterator[tuple[Piece, int]]:
    """Pieces and how much text is in each, about."""
    file = files[0]
    if file.format == "moses":
        languages = [codes(member.language or "") for member in files]
        if len(files) < 2:
            raise ValueError(f"{file.path} is one aligned file without its partner; find_inputs makes sets of them.")
        if not aligned_rule(languages, fields):
            raise CorpusError(
                f"{' and '.join(str(member.path) for member in files)} are in {', '.join(languages)}; no pair that is "
                f"asked for ({', '.join('-'.join(pair) for pair in fields.pairs())}) is among them. Codes of the data "
                f"are mapped with a language map such as {file.language}=eng_Latn."
            )
        yield from _aligned_pieces(files, fields, part_bytes)
    elif file.format == "parquet":
        yield from _row_group_pieces(file, fields, part_bytes)
    elif file.compression or file.format == "tmx" or (file.format == "text" and fields.text_unit == "file"):
        if file.format == "tsv":
            tsv_columns(file, fields)
        weight_bytes = file.num_bytes * (_COMPRESSION if file.compression else 1)
        yield Piece((file,), 0, file.num_bytes, "file", file.num_bytes), weight_bytes
    else:
        with file.path.open("rb") as content:
            check_start(content.read(8), file.path, is_json=file.format == "jsonl")
        if file.format == "tsv":
            tsv_columns(file, fields)
        num_pieces = max(1, -(-file.num_bytes // part_bytes))
        cuts = [file.num_bytes * number // num_pieces for number in range(num_pieces + 1)]
        for begin, end in pairwise(cuts):
            yield Piece((file,), begin, end, "bytes", end - begin), end - begin


def tsv_columns(file: InputFile, fields: Fields) -> TsvColumns | None:
    """Which columns of a TSV hold what; None for an empty file."""
    line = first_line_of(file, fields)
    return TsvColumns(fields, line, Place(file.path)) if line is not None else None


def first_line_of(file: InputFile, fields: Fields) -> bytes | None:
    """The first line of a file; None if it is empty.

    Raises:
        CorpusError: it is in another encoding, or damaged before the line's end.
    """
    with DiskBytes(file, Reading()) as disk:
        try:
            return first_line(text_of(decompressed(disk, file), file.path), fields.max_line_bytes)
        except DamagedError as error:
            raise damaged(file, error) from None


def damaged(file: InputFile, error: DamagedError, read: str = "") -> CorpusError:
    """What to say of an archive that cannot be read to its end."""
    return CorpusError(f"{file.path} {error.reason}{read}. Fetch or make the file again.")


def _row_group_pieces(file: InputFile, fields: Fields, part_bytes: int) -> Iterator[tuple[Piece, int]]:
    with ParquetFile(file) as parquet:
        parquet.check_columns(fields)
        groups = parquet.groups
        sizes = [(max(0, group.total_byte_size), parquet.bytes_of(number, file)) for number, group in enumerate(groups)]
    begin = weight_bytes = num_bytes = 0
    for number, (text_bytes, (first, last)) in enumerate(sizes):
        if number > begin and weight_bytes + text_bytes > part_bytes:
            yield Piece((file,), begin, number, "row groups", num_bytes), weight_bytes
            begin, weight_bytes, num_bytes = number, 0, 0
        weight_bytes, num_bytes = weight_bytes + text_bytes, num_bytes + last - first
    yield Piece((file,), begin, len(sizes), "row groups", num_bytes), weight_bytes


def _aligned_pieces(files: list[InputFile], fields: Fields, part_bytes: int) -> Iterator[tuple[Piece, int]]:
    num_bytes = sum(file.num_bytes for file in files)
    first = files[0]
    whole = any(file.compression for file in files)
    share = part_bytes * first.num_bytes // max(num_bytes, 1)
    # Where the lines of the first file are cut decides for the others.
    targets = [] if whole else list(range(max(share, 1), first.num_bytes, max(share, 1)))
    cuts, count = _cut_at_bytes(first, targets)
    lines = [line for line, _ in cuts]
    offsets, counts = [[offset for _, offset in cuts]], [count]
    for file in files[1:]:
        found, count = _cut_at_lines(file, lines)
        offsets.append(found)
        counts.append(count)
    if len(set(counts)) > 1:
        raise CorpusError(
            "aligned files have unequal numbers of lines: "
            + ", ".join(f"{file.path} {count:,}" for file, count in zip(files, counts, strict=True))
            + ". Line k of each must be the same text; look for a line break inside a sentence, or a blank last line."
        )
    edges = [0, *lines, counts[0]]
    places = [[0, *found, file.num_bytes] for file, found in zip(files, offsets, strict=True)]
    for number, (begin, end) in enumerate(pairwise(edges)):
        ranges = tuple((place[number], place[number + 1]) for place in places)
        here = sum(last - first for first, last in ranges)
        yield Piece(tuple(files), begin, end, "lines", here, ranges), here * (_COMPRESSION if whole else 1)


def undamaged(chunks: Iterable[bytes], file: InputFile) -> Iterator[bytes]:
    """Chunks, with damage as the error a person sees."""
    try:
        yield from chunks
    except DamagedError as error:
        raise damaged(file, error) from None


def _chunks(file: InputFile) -> Iterator[bytes]:
    with DiskBytes(file, Reading()) as disk:
        yield from undamaged(text_of(decompressed(disk, file), file.path, keep_mark=True), file)


def _cut_at_bytes(file: InputFile, targets: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
    """(lines before, byte) of the first line that begins at each target or later, each once; and how many lines."""
    cuts: list[tuple[int, int]] = []
    waiting = iter(targets)
    target = next(waiting, None)
    lines = position = 0
    last = b"\n"
    for chunk in _chunks(file):
        while target is not None and target <= position + len(chunk):
            index = chunk.find(b"\n", max(0, target - 1 - position))
            if index < 0:
                break
            cut = lines + chunk.count(b"\n", 0, index + 1), position + index + 1
            if not cuts or cut > cuts[-1]:
                cuts.append(cut)
            target = next(waiting, None)
        lines += chunk.count(b"\n")
        position += len(chunk)
        last = chunk[-1:]
    return [cut for cut in cuts if cut[1] < position], lines + (last != b"\n")


def _cut_at_lines(file: InputFile, wanted: Sequence[int]) -> tuple[list[int], int]:
    """The bytes at which these lines begin, and how many lines there are."""
    offsets: list[int] = []
    lines = position = 0
    last = b"\n"
    for chunk in _chunks(file):
        here = chunk.count(b"\n")
        if len(offsets) < len(wanted) and wanted[len(offsets)] <= lines + here:
            breaks = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
            while len(offsets) < len(wanted) and wanted[len(offsets)] <= lines + here:
                offsets.append(position + int(breaks[wanted[len(offsets)] - lines - 1]) + 1)
        lines += here
        position += len(chunk)
        last = chunk[-1:]
    return offsets, lines + (last != b"\n")


def path_of(piece: Piece) -> Path:
    """The file a piece is of; of aligned ones the first."""
    return piece.files[0].path
