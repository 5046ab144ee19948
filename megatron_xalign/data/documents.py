"""Corpus files to documents, one generator per input format, and the rendering of a translated pair as text."""

from __future__ import annotations

import gzip
import hashlib
import json
import string
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_xalign.errors import ConfigError, CorpusError
from megatron_xalign.formats.token_file import Origin

OnError = Literal["raise", "skip"]
Direction = Literal["forward", "backward", "random"]

DEFAULT_TEMPLATE = "{source}\n{target}"
"""Source text, a line break, target text."""


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


@dataclass
class Reading:
    """How far a reader is and what it left out; readers fill it in while they run."""

    documents: int = 0
    """Documents yielded."""
    bytes_read: int = 0
    """Bytes of the file as it lies on disk (compressed, if it is), over all files so far."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Lines left out, by reason."""


def read_monolingual(
    path: str | Path,
    language: str,
    *,
    text_key: str = "text",
    id_key: str = "id",
    on_error: OnError = "raise",
    reading: Reading | None = None,
) -> Iterator[Document]:
    """Read JSON lines ``{"id": ..., "text": ...}`` of one language, gzipped if the name ends in ``.gz``.

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
    for where, content, state in _read_lines(Path(path), on_error, reading):
        reason = _malformed_text(content, text_key)
        if reason:
            _reject(where, reason, on_error, state)
            continue
        state.documents += 1
        yield Document(_identity(content, id_key, where), "monolingual", {language: content[text_key]})


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
        path: the file, gzipped if its name ends in ``.gz``.
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
    for where, content, state in _read_lines(Path(path), on_error, reading):
        texts: Any = content.get(texts_key)
        if not isinstance(texts, dict):
            reason = f'no "{texts_key}" that maps language codes to text'
        else:
            reason = next(filter(None, (_malformed_text(texts, code) for code in languages)), "")
        if reason:
            _reject(where, reason, on_error, state)
            continue
        state.documents += 1
        yield Document(_identity(content, id_key, where), "parallel", {code: texts[code] for code in languages})


def read_probe(path: str | Path) -> Iterator[Document]:
    """Read held-out translations, JSON lines ``{"id": ..., "texts": {language: text, ...}}``, in any languages.

    Raises:
        CorpusError: the file is missing or damaged, or a line is malformed; file, line and reason are named.
    """
    for where, content, _ in _read_lines(Path(path), "raise", None):
        texts = content.get("texts")
        if not isinstance(texts, dict) or not texts:
            raise CorpusError(f'{where}: no "texts" that maps language codes to text.')
        reason = next(filter(None, (_malformed_text(texts, code) for code in texts)), "")
        if reason:
            raise CorpusError(f"{where}: {reason}.")
        yield Document(_identity(content, "id", where), "parallel", texts)


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
) -> Iterator[tuple[str, dict[str, Any], Reading]]:
    """``FILE:LINE``, the line's object and the reading, for every line that is a JSON object."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r} is neither 'raise' nor 'skip'.")
    state = reading if reading is not None else Reading()
    before = state.bytes_read
    try:
        with path.open("rb") as raw, gzip.open(raw, "rb") if path.suffix == ".gz" else nullcontext(raw) as lines:
            for number, line in enumerate(lines, 1):
                # Of a compressed file this counts what was decompressed so far, give or take a buffer.
                state.bytes_read = before + raw.tell() if path.suffix == ".gz" else state.bytes_read + len(line)
                where = f"{path}:{number}"
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    state.skipped["blank line"] += 1
                    continue
                content, reason = _parse(line)
                if reason:
                    _reject(where, reason, on_error, state)
                else:
                    yield where, content, state
    except FileNotFoundError:
        raise CorpusError(f"{path} does not exist.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{path} is not a whole gzip file: {error}.") from None
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}.") from None


def _parse(line: bytes) -> tuple[dict[str, Any], str]:
    try:
        content = json.loads(line)
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8 at byte {error.start}"
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON: {error}"
    if not isinstance(content, dict):
        return {}, f"not a JSON object but {type(content).__name__}"
    return content, ""


def _malformed_text(content: Mapping[str, Any], key: str) -> str:
    if key not in content:
        return f'no "{key}"'
    if not isinstance(content[key], str):
        return f'"{key}" is {type(content[key]).__name__}, not text'
    try:
        content[key].encode("utf-8")
    except UnicodeEncodeError:
        return f'"{key}" holds half of a surrogate pair, which is no character'
    return ""


def _identity(content: Mapping[str, Any], key: str, where: str) -> str:
    value = content.get(key)
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    return Path(where).name


def _reject(where: str, reason: str, on_error: OnError, reading: Reading) -> None:
    if on_error == "raise":
        raise CorpusError(f"{where}: {reason}. Mend the line, or leave such lines out with on_error=skip.")
    reading.skipped[reason.split(":")[0].split(" at byte")[0]] += 1
