"""TMX (Translation Memory eXchange) to batches: a streaming parser that follows no reference out of the file.

The text of a ``<seg>`` is its character data and that of ``<hi>`` and of elements that are not of TMX; the content of
``<bpt> <ept> <it> <ph> <ut>`` is code of the format the text was taken from, and left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from xml.parsers import expat

from megatron_xalign.data.batches import Task, TextBatch, pairs_of_records
from megatron_xalign.data.reading import Place
from megatron_xalign.errors import CorpusError

_CODE = frozenset(("bpt", "ept", "it", "ph", "ut"))


def read_tmx(chunks: Iterable[bytes], place: Place, task: Task) -> Iterator[TextBatch]:
    """The pairs of a TMX file; any encoding its XML declaration names.

    Raises:
        CorpusError: it is not well-formed XML, no TMX, or declares entities.
    """
    units = _Units(place, task)
    for chunk in chunks:
        units.feed(chunk)
        if units.num_characters >= task.batch_bytes:
            yield units.take()
    units.close()
    if units.records:
        yield units.take()


class _Units:
    """The ``<tu>`` elements of a document, as its parser comes by them."""

    def __init__(self, place: Place, task: Task) -> None:
        self._place, self._task = place, task
        self.records: list[list[tuple[str, str]]] = []
        self._ids: list[str | None] = []
        self._numbers: list[int] = []
        self.num_characters = 0
        self._done = 0

        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.SetParamEntityParsing(expat.XML_PARAM_ENTITY_PARSING_NEVER)
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._characters
        self._parser.EntityDeclHandler = self._entity
        self._parser.SkippedEntityHandler = self._skipped

        self._has_root = False
        self._unit: list[tuple[str, str]] | None = None
        self._id: str | None = None
        self._number = 0
        self._language: str | None = None
        self._is_malformed = ""
        self._pieces: list[str] | None = None
        self._unit_characters = 0
        self._code_depth = 0

    def feed(self, chunk: bytes) -> None:
        """Parse some more of the file."""
        self._parse(chunk, False)

    def close(self) -> None:
        """Parse the end of the file."""
        self._parse(b"", True)

    def _parse(self, chunk: bytes, is_last: bool) -> None:
        try:
            self._parser.Parse(chunk, is_last)
        except expat.ExpatError as error:
            raise self._not_xml(error) from None
        except (LookupError, ValueError) as error:
            raise CorpusError(
                f"{self._place.path}: its first line says an encoding that is not known here ({error}); convert the "
                "file to UTF-8 and say so there."
            ) from None

    def take(self) -> TextBatch:
        """The pairs of the units that ended so far."""
        batch = pairs_of_records(self._task, self._place, self.records, self._ids, self._numbers)
        self._done += len(self.records)
        self.records, self._ids, self._numbers, self.num_characters = [], [], [], 0
        return batch

    def _not_xml(self, error: expat.ExpatError) -> CorpusError:
        # ``FILE:LINE`` counts from 1, as the parser does.
        return CorpusError(
            f"{self._place.where(error.lineno - 1)}: not well-formed XML: {expat.ErrorString(error.code)}, at column "
            f"{error.offset + 1}, after {self._done + len(self.records):,} units. Mend the file, or fetch it again if "
            "it was cut; if the encoding in its first line is not the one it is in, correct that."
        )

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if not self._has_root:
            self._has_root = True
            if name != "tmx":
                raise CorpusError(f"{self._place.path} is XML but no TMX: its root is <{name}>, not <tmx>.")
        if self._pieces is not None:
            if self._code_depth or name in _CODE:
                self._code_depth += 1
        elif name == "tu":
            self._unit, self._id = [], attributes.get("tuid")
            self._number = self._parser.CurrentLineNumber - 1
            self._is_malformed, self._language, self._unit_characters = "", None, 0
        elif self._unit is not None and name == "tuv":
            self._language = attributes.get("xml:lang") or attributes.get("lang")
            if not self._language:
                self._is_malformed = "a <tuv> without xml:lang"
        elif self._unit is not None and name == "seg" and self._language:
            self._pieces = []

    def _end(self, name: str) -> None:
        if self._pieces is not None:
            if self._code_depth:
                self._code_depth -= 1
            elif name == "seg":
                assert self._unit is not None and self._language
                self._unit.append((self._language, "".join(self._pieces)))
                # Of a second <seg> in the same <tuv> nothing is taken.
                self._pieces, self._language = None, None
        elif name == "tu" and self._unit is not None:
            if self._is_malformed:
                self._task.reject(self._place, self._number, self._is_malformed)
            else:
                self.records.append(self._unit)
                self._ids.append(self._id)
                self._numbers.append(self._number)
                self.num_characters += self._unit_characters
            self._unit = None

    def _characters(self, text: str) -> None:
        if self._pieces is None or self._code_depth:
            return
        self._unit_characters += len(text)
        if self._unit_characters <= self._task.fields.max_line_bytes:
            self._pieces.append(text)
        else:
            self._pieces.clear()
            self._is_malformed = "longer than max_line_bytes"

    def _entity(self, name: str, *_: Any) -> None:
        raise CorpusError(
            f"{self._where()}: the document declares the entity {name!r}. Entities can fill memory or read other "
            "files, so a file with them is not read; replace them by their text."
        )

    def _skipped(self, name: str, *_: Any) -> None:
        raise CorpusError(
            f"{self._where()}: the entity &{name}; is not declared in the document; replace it by its text."
        )

    def _where(self) -> str:
        return self._place.where(self._parser.CurrentLineNumber - 1)
