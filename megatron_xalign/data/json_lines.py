"""JSON lines to batches: a block of lines is decoded in one call; a block with anything odd in it, line by line.

A line counts as well-formed if msgspec can decode it or, failing that, if Python's ``json`` can (it also reads ``NaN``
and, in fields nobody asks for, half surrogate pairs). How the file is cut into blocks and parts decides nothing.
"""

# R records

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Protocol

import msgspec
import numpy as np

from megatron_xalign.data.batches import (
    Task,
    TextBatch,
    monolingual_batch,
    pairs_of_columns,
    pairs_of_records,
    pairs_of_two_named_sides,
)
from megatron_xalign.data.fields import Fields
from megatron_xalign.data.line_blocks import Block
from megatron_xalign.data.packed_texts import PackedTexts
from megatron_xalign.data.reading import Place

_JSON_SPACE = b" \t\r\n"
_LINE_BREAK, _CARRIAGE_RETURN, _OPENS, _CLOSES = b"\n\r{}"


class MalformedError(Exception):
    """A record that cannot be used: the reason in words many share, and what is wrong with this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason + detail)
        self.reason = reason
        self.detail = detail


class Layout(Protocol):
    """Which fields of a record are wanted, and what becomes of them."""

    decoder: msgspec.json.Decoder[Any]
    """Of one record to a struct."""

    def pack(self, place: Place, block: Block) -> TextBatch | None:
        """The documents of a block in which all is plain, packed; None if it has to be decoded."""

    def from_content(self, content: Mapping[str, Any]) -> Any:
        """The struct of a record in Python's types.

        Raises:
            MalformedError: a field is missing or of the wrong type.
        """

    def batch(self, place: Place, records: list[Any], numbers: Sequence[int]) -> TextBatch:
        """The documents of records. [R], [R]"""


def read_json_lines(blocks: Iterable[Block], place: Place, layout: Layout, task: Task) -> Iterator[TextBatch]:
    """The documents of lines, a batch a block."""
    for block in blocks:
        packed = layout.pack(place, block)
        if packed is not None:
            yield packed
            continue
        records, numbers = _decode(block, place, layout, task)
        if records:
            yield layout.batch(place, records, numbers)


def _decode(block: Block, place: Place, layout: Layout, task: Task) -> tuple[list[Any], Sequence[int]]:
    try:
        records = layout.decoder.decode_lines(block.data)
        if len(records) == block.num_lines and _is_one_object_a_line(block):
            return records, range(block.first, block.first + block.num_lines)
    except (ValueError, RecursionError):
        pass  # Found again, and named, below.
    records, numbers = [], []
    for number, line in enumerate(block.data.split(b"\n")[: block.num_lines], block.first):
        stripped = line.strip(_JSON_SPACE)
        if not stripped:
            task.reading.leave_out("blank line")
            continue
        try:
            records.append(_decode_line(stripped, layout))
            numbers.append(number)
        except MalformedError as error:
            task.reject(place, number, error.reason, error.detail)
    return records, numbers


def _is_one_object_a_line(block: Block) -> bool:
    """Whether no object goes over a line's end; the decoder takes a line break for any white space.

    In JSON no ``{`` follows a ``}`` without a comma. So where every line ends in the one and every next begins with the
    other, each line holds whole objects; and as many objects as lines are one a line.
    """
    data = block.data
    if not data.startswith(b"{") or not data.endswith((b"}", b"}\n", b"}\r\n")):
        return False
    characters = np.frombuffer(data, np.uint8)
    breaks = np.flatnonzero(characters == _LINE_BREAK)
    if data.endswith(b"\n"):
        breaks = breaks[:-1]
    before = characters[breaks - 1]
    before = np.where(before == _CARRIAGE_RETURN, characters[breaks - 2], before)
    return bool(np.all(before == _CLOSES) and np.all(characters[breaks + 1] == _OPENS))


def _decode_line(line: bytes, layout: Layout) -> Any:
    try:
        return layout.decoder.decode(line)
    except (ValueError, RecursionError):
        pass
    return layout.from_content(object_in(line))


def object_in(line: bytes) -> dict[str, Any]:
    """The JSON object on a line, as Python's ``json`` reads it.

    Raises:
        MalformedError: it is something else.
    """
    try:
        # Decoded here since json guesses at encodings, and lets halves of surrogate pairs pass.
        content = json.loads(line.decode())
    except UnicodeDecodeError as error:
        found = f" at byte {error.start} of the line (0x{line[error.start]:02X})"
        raise MalformedError("not UTF-8", f"{found}{_LATIN}") from None
    except (ValueError, RecursionError) as error:
        raise MalformedError("not JSON", f": {error}{_hint(line)}") from None
    if not isinstance(content, dict):
        raise MalformedError("not a JSON object", f" but {_type_name(content)}{_hint(line)}")
    return content


def _hint(line: bytes) -> str:
    """What to do with JSON that is not in lines."""
    if line.strip() == b"[" or line.startswith((b"[{", b"[ {")):
        return "; a record a line is wanted, and this begins a list: `jq -c '.[]' FILE` makes lines of it"
    if line.strip() == b"{":
        return "; a record a line is wanted, and this goes over several: `jq -c . FILE` makes lines of it"
    return ""


_LATIN = "; text in another encoding is converted with `iconv -f ISO-8859-1 -t UTF-8` (or whichever it is)"


def layout_of(fields: Fields, task: Task, language: str | None) -> Layout:
    """The layout that fields ask for.

    Args:
        fields: of the job.
        task: of the piece.
        language: of the file's texts, as the data has it, if no key of the records tells.
    """
    if fields.kind == "monolingual":
        return _Monolingual(task, language)
    if fields.side_keys:
        return _Sides(task)
    return _Texts(task)


def _struct(keys: Mapping[str, tuple[str, Any]], optional: Iterable[str] = ()) -> type[Any]:
    """A struct whose field ``name`` is found under ``key`` and has ``type``: {name: (key, type)}."""
    fields: list[Any] = [
        (name, type_, None) if name in optional else (name, type_) for name, (_, type_) in keys.items()
    ]
    # Fields with defaults come last.
    fields.sort(key=len)
    return msgspec.defstruct("Record", fields, rename={name: key for name, (key, _) in keys.items()}, gc=False)


class _Monolingual:
    def __init__(self, task: Task, language: str | None) -> None:
        fields = task.fields
        self._task, self._language = task, language
        self._text_key, self._language_key = fields.text_key, fields.language_key
        keys: dict[str, tuple[str, Any]] = {"text": (fields.text_key, str)}
        if fields.language_key is not None:
            keys["language"] = (fields.language_key, str | Annotated[list[str], msgspec.Meta(min_length=1)])
        self._record = _struct(keys)
        self.decoder = msgspec.json.Decoder(self._record)

    def pack(self, place: Place, block: Block) -> TextBatch | None:
        if self._task.separator is None or self._language_key is not None:
            return None
        texts = PackedTexts.of_json_lines(block.data, self._text_key, self._task.separator)
        if texts is None:
            return None
        numbers = range(block.first, block.first + block.num_lines)
        return monolingual_batch(self._task, place, texts, numbers, self._language)

    def from_content(self, content: Mapping[str, Any]) -> Any:
        text = text_in(content, self._text_key)
        if self._language_key is None:
            return self._record(text=text)
        named = content.get(self._language_key)
        if isinstance(named, list) and named:
            content = {**content, self._language_key: named[0]}
        return self._record(text=text, language=text_in(content, self._language_key))

    def batch(self, place: Place, records: list[Any], numbers: Sequence[int]) -> TextBatch:
        texts = [record.text for record in records]
        named = None
        if self._language_key is not None:
            found = (record.language for record in records)
            named = [value if type(value) is str else value[0] for value in found]
        return monolingual_batch(self._task, place, texts, numbers, self._language, named)


class _Sides:
    """``{"src": ..., "tgt": ...}``, with or without keys for their languages."""

    def __init__(self, task: Task) -> None:
        self._task = task
        fields = task.fields
        self._sides, self._codes = fields.side_keys, fields.side_language_keys
        # Of two sides both are needed; of more, some may be missing.
        self._may_miss = len(self._sides) > 2
        keys: dict[str, tuple[str, Any]] = {}
        for number, key in enumerate(self._sides):
            keys[f"side{number}"] = (key, str | None if self._may_miss else str)
        for number, key in enumerate(self._codes):
            keys[f"language{number}"] = (key, str | None if self._may_miss else str)
        keys["id"] = (fields.id_key, Any)
        self._keys = keys
        self._record = _struct(keys, list(keys) if self._may_miss else ["id"])
        self.decoder = msgspec.json.Decoder(self._record)

    def pack(self, place: Place, block: Block) -> TextBatch | None:
        return None

    def from_content(self, content: Mapping[str, Any]) -> Any:
        values: dict[str, Any] = {}
        for name, (key, _) in self._keys.items():
            if name == "id":
                values[name] = content.get(key)
            elif self._may_miss and content.get(key) is None:
                values[name] = None
            else:
                values[name] = text_in(content, key)
        return self._record(**values)

    def batch(self, place: Place, records: list[Any], numbers: Sequence[int]) -> TextBatch:
        fields = self._task.fields
        ids = [record.id for record in records]
        columns = [[getattr(record, f"side{number}") for record in records] for number in range(len(self._sides))]
        if not self._codes:
            return pairs_of_columns(self._task, place, fields.pairs(), fields.languages, columns, ids, numbers)
        codes = [[getattr(record, f"language{number}") for record in records] for number in range(len(self._sides))]
        if not self._may_miss:
            return pairs_of_two_named_sides(
                self._task, place, (codes[0], codes[1]), (columns[0], columns[1]), ids, numbers
            )
        return pairs_of_records(self._task, place, sides_of(codes, columns), ids, numbers)


def sides_of(
    codes: Sequence[Sequence[str | None]], columns: Sequence[Sequence[str | None]]
) -> list[list[tuple[str, str]]]:
    """(code, text) of each record's sides that have both, from columns. [R]"""
    sides = (zip(these, texts, strict=True) for these, texts in zip(codes, columns, strict=True))
    return [
        [(code, text) for code, text in record if code is not None and text is not None]
        for record in zip(*sides, strict=True)
    ]


class _Texts:
    """``{"texts": {language: text, ...}}``."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._key, self._id_key = task.fields.texts_key, task.fields.id_key
        self._record = _struct({"texts": (self._key, dict[str, str]), "id": (self._id_key, Any)}, ["id"])
        self.decoder = msgspec.json.Decoder(self._record)
        self._wanted = set(wanted_languages(task.fields))

    def pack(self, place: Place, block: Block) -> TextBatch | None:
        return None

    def from_content(self, content: Mapping[str, Any]) -> Any:
        texts = texts_in(content, self._key)
        kept = {
            code: text_in(texts, code) for code in texts
            if texts[code] is not None and (not self._wanted or self._task.codes(code) in self._wanted)
        }
        return self._record(texts=kept, id=content.get(self._id_key))

    def batch(self, place: Place, records: list[Any], numbers: Sequence[int]) -> TextBatch:
        return pairs_of_mappings(
            self._task, place, [record.texts for record in records], [record.id for record in records], numbers
        )


def wanted_languages(fields: Fields) -> tuple[str, ...]:
    """The languages that pairs are taken in; empty if the records decide."""
    if not fields.languages and isinstance(fields.pair_rule, str):
        return ()
    return tuple(dict.fromkeys(code for pair in fields.pairs() for code in pair))


def pairs_of_mappings(
    task: Task, place: Place, mappings: list[dict[str, str]], ids: Sequence[Any] | None, numbers: Sequence[int]
) -> TextBatch:
    """Pairs of records that are texts by language. [R]"""
    wanted = wanted_languages(task.fields)
    if not wanted:
        return pairs_of_records(task, place, (list(texts.items()) for texts in mappings), ids, numbers)
    found = sorted(set().union(*mappings))
    columns = []
    for code in wanted:
        names = [name for name in found if task.codes(name) == code]
        # The code itself first, where a record has variants of it too.
        names.sort(key=lambda name: name != code)
        if len(names) == 1:
            columns.append([texts.get(names[0]) for texts in mappings])
        else:
            columns.append([next((texts[name] for name in names if name in texts), None) for texts in mappings])
    return pairs_of_columns(task, place, task.fields.pairs(), wanted, columns, ids, numbers)


def texts_in(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object under a key, whose keys are language codes.

    Raises:
        MalformedError: there is none.
    """
    texts = content.get(key)
    if not isinstance(texts, dict):
        raise MalformedError(
            f'no "{key}" that maps language codes to text', f" (its keys are {', '.join(list(content)[:8]) or 'none'})"
        )
    return texts


def text_in(content: Mapping[str, Any], key: str) -> str:
    """The text under a key.

    Raises:
        MalformedError: there is none, or something else.
    """
    if key not in content:
        raise MalformedError(f'no "{key}"', f" (its keys are {', '.join(list(content)[:8])})" if content else "")
    value = content[key]
    if not isinstance(value, str):
        raise MalformedError(f'"{key}" is {_type_name(value)}, not text')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise MalformedError(f'"{key}" holds half of a surrogate pair, which is no character') from None
    return value


def _type_name(value: Any) -> str:
    return "null" if value is None else type(value).__name__
