"""Corpus files to documents, one generator per input format, and the rendering of a translated pair as text."""

from __future__ import annotations

import hashlib
import os
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_xalign.data.input_files import input_file
from megatron_xalign.data.input_parts import undamaged
from megatron_xalign.data.json_lines import MalformedError, object_in, text_in, texts_in
from megatron_xalign.data.line_blocks import DiskBytes, decompress, line_blocks, text_of
from megatron_xalign.data.reading import OnError, Place, Reading
from megatron_xalign.errors import ConfigError, CorpusError
from megatron_xalign.formats.token_file import Origin

__all__ = [
    "DEFAULT_TEMPLATE", "Direction", "Document", "OnError", "Reading", "hash_fraction", "pair_order", "parse_template",
    "read_monolingual", "read_pairs", "read_probe", "render_pair",
]

Direction = Literal["forward", "backward", "random"]

DEFAULT_TEMPLATE = "{source}\n{target}"
"""Source text, a line break, target text."""

_BLOCK_BYTES = 1 << 20
_MOST_LINE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Document:
    """One unit of text: a monolingual document, or a pair of translations."""

    id: str
    """Name within its corpus; decides how a pair is dealt and which way round it is rendered."""
    origin: Origin
    """``monolingual`` or ``parallel``."""
    texts: Mapping[str, str]
    """Text by language code: one of a monolingual document, two of a pair."""

    @property
    def language(self) -> str | None:
        """The language of a monolingual document; None of a pair."""
        return next(iter(self.texts)) if len(self.texts) == 1 else None


def read_monolingual(
    path: str | Path,
    language: str,
    *,
    text_key: str = "text",
    id_key: str = "id",
    on_error: OnError = "raise",
    reading: Reading | None = None,
) -> Iterator[Document]:
    """Read JSON lines ``{"id": ..., "text": ...}`` of one language, compressed if the name ends in ``.gz`` or ``.zst``.

    Args:
        path: the file.
        language: code of its language.
        text_key: key of the text.
        id_key: key of the id (text or integer); a line without one is named ``FILE:LINE``.
        on_error: ``raise`` at the first malformed line, or ``skip`` it and count it in ``reading``.
        reading: filled in while reading.

    Raises:
        CorpusError: the file is missing or damaged, or a line is malformed; file, line and reason are named.
    """
    for place, number, content, state in _read_lines(Path(path), on_error, reading):
        try:
            text = text_in(content, text_key)
        except MalformedError as error:
            state.reject(place, number, error.reason, error.detail, on_error=on_error)
            continue
        state.documents += 1
        yield Document(_identity(content, id_key, place, number), "monolingual", {language: text})


def read_pairs(
    path: str | Path,
    languages: Sequence[str],
    *,
    texts_key: str = "texts",
    id_key: str = "id",
    on_error: OnError = "raise",
    reading: Reading | None = None,
) -> Iterator[Document]:
    """Read JSON lines ``{"id": ..., "texts": {language: text, ...}}``; of several languages two are taken.

    Args:
        path: the file, compressed if its name ends in ``.gz`` or ``.zst``.
        languages: the two codes, in the order the document's texts get.
        texts_key: key of the texts.
        id_key: key of the id; a line without one is named ``FILE:LINE``.
        on_error: ``raise`` at the first malformed line, or ``skip`` it and count it in ``reading``.
        reading: filled in while reading.

    Raises:
        CorpusError: the file is missing or damaged, or a line is malformed or lacks a language.
    """
    if len(languages) != 2 or languages[0] == languages[1]:
        raise ValueError(f"languages={list(languages)} must be two different codes.")
    for place, number, content, state in _read_lines(Path(path), on_error, reading):
        try:
            texts = texts_in(content, texts_key)
            sides = {code: text_in(texts, code) for code in languages}
        except MalformedError as error:
            state.reject(place, number, error.reason, error.detail, on_error=on_error)
            continue
        state.documents += 1
        yield Document(_identity(content, id_key, place, number), "parallel", sides)


def read_probe(path: str | Path) -> Iterator[Document]:
    """Read held-out translations, JSON lines ``{"id": ..., "texts": {language: text, ...}}``, in any languages.

    Args:
        path: the file, compressed if its name ends in ``.gz`` or ``.zst``.

    Raises:
        CorpusError: the file is missing or damaged, or a line is malformed; file, line and reason are named.
    """
    for place, number, content, _ in _read_lines(Path(path), "raise", None):
        try:
            texts = texts_in(content, "texts")
            if not texts:
                raise MalformedError('"texts" holds no text')
            sides = {code: text_in(texts, code) for code in texts}
        except MalformedError as error:
            raise CorpusError(f"{place.where(number)}: {error.reason}{error.detail}.") from None
        yield Document(_identity(content, "id", place, number), "parallel", sides)


def parse_template(template: str) -> tuple[str, str, str]:
    """The literal text before, between and after the two sides of a pair template.

    Args:
        template: text with ``{source}`` and, after it, ``{target}``; literal braces are doubled.

    Raises:
        ConfigError: the template has other fields, or not these two in this order.
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"template={template!r} is malformed: {error}; a literal brace is doubled.") from None
    literals, fields = [""], []
    for literal, name, format_spec, conversion in pieces:
        literals[-1] += literal
        if name is not None:
            fields.append(name + (f":{format_spec}" if format_spec else "") + (f"!{conversion}" if conversion else ""))
            literals.append("")
    if fields != ["source", "target"]:
        raise ConfigError(
            f"template={template!r} has the fields {fields}; it needs {{source}} and then {{target}}, each once. "
            "Which language is the source is set by direction."
        )
    return literals[0], literals[1], literals[2]


def pair_order(document_id: str, direction: Direction, seed: int) -> tuple[int, int]:
    """Which side of a pair comes first: (0, 1) or (1, 0).

    ``random`` is a hash of seed and id alone, so it does not depend on the order or number of pairs.
    """
    if direction == "forward":
        return 0, 1
    if direction == "backward":
        return 1, 0
    if direction != "random":
        raise ValueError(f"direction={direction!r} is not one of forward, backward, random.")
    return (0, 1) if hash_fraction(document_id, seed, "direction") < 0.5 else (1, 0)


def hash_fraction(document_id: str, seed: int, purpose: str) -> float:
    """A number in [0, 1) that depends on these three alone; the same on every machine."""
    digest = hashlib.blake2b(f"{purpose}\0{seed}\0{document_id}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def render_pair(
    document: Document, template: str = DEFAULT_TEMPLATE, direction: Direction = "forward", seed: int = 0
) -> list[tuple[str, str | None]]:
    """Render a pair as pieces of text in order.

    Args:
        document: a parallel document.
        template: text with ``{source}`` and ``{target}``.
        direction: ``forward`` makes the document's first language the source, ``backward`` its second, ``random`` one
            of the two by a hash of seed and id.
        seed: of ``random``.

    Returns:
        (text, language code or None for text of the template) for each piece that is not empty.
    """
    if len(document.texts) != 2:
        raise ValueError(f"document {document.id} has {len(document.texts)} texts; a pair has two.")
    before, between, after = parse_template(template)
    sides = list(document.texts.items())
    first, second = pair_order(document.id, direction, seed)
    pieces = [
        (before, None), (sides[first][1], sides[first][0]), (between, None), (sides[second][1], sides[second][0]),
        (after, None),
    ]
    return [(text, language) for text, language in pieces if text]


def _read_lines(
    path: Path, on_error: OnError, reading: Reading | None
) -> Iterator[tuple[Place, int, dict[str, Any], Reading]]:
    """Where it is, the line's object and the reading, for every line that is a JSON object."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r} is neither 'raise' nor 'skip'.")
    state = reading if reading is not None else Reading()
    if not os.path.lexists(path):
        raise CorpusError(f"{path} does not exist.")
    file = input_file(path, "jsonl")
    place = Place(path)

    def too_long(number: int) -> None:
        state.reject(place, number, f"longer than {_MOST_LINE_BYTES:,} bytes", on_error=on_error)

    with DiskBytes(file, state) as disk:
        chunks = text_of(undamaged(decompress(disk.chunks(), file.compression), file), path, is_json=True)
        for block in line_blocks(chunks, _BLOCK_BYTES, _MOST_LINE_BYTES, too_long):
            for number, line in enumerate(block.data.split(b"\n")[: block.num_lines], block.first):
                if not line.strip():
                    state.leave_out("blank line")
                    continue
                try:
                    content = object_in(line)
                except MalformedError as error:
                    state.reject(place, number, error.reason, error.detail, on_error=on_error)
                else:
                    yield place, number, content, state


def _identity(content: Mapping[str, Any], key: str, place: Place, number: int) -> str:
    value = content.get(key)
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    return Path(place.where(number)).name
