"""Parquet files to batches, by row groups and columns."""

# R records

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_xalign.data.batches import Task, TextBatch, monolingual_batch, pairs_of_columns, pairs_of_records
from megatron_xalign.data.fields import Fields
from megatron_xalign.data.input_files import InputFile
from megatron_xalign.data.json_lines import pairs_of_mappings, sides_of, wanted_languages
from megatron_xalign.data.line_blocks import DiskBytes
from megatron_xalign.data.reading import Place
from megatron_xalign.errors import ConfigError, CorpusError

_BUFFER_BYTES = 1 << 20
_MOST_ROWS = 1 << 16


class ParquetFile:
    """A parquet file and what its footer says of it."""

    def __init__(self, file: InputFile) -> None:
        """Open it.

        Raises:
            ConfigError: pyarrow is not installed.
            CorpusError: the file is missing, empty, cut or no parquet.
        """
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise ConfigError(
                f"{file.path} is parquet, which needs pyarrow: pip install 'megatron-xalign[parquet]'"
            ) from None
        self.path = file.path
        self.errors: tuple[type[Exception], ...] = (pyarrow.ArrowException, OSError, ValueError)
        try:
            # Read through a small buffer: a row group may be larger than memory.
            self.file = pyarrow.parquet.ParquetFile(
                file.path, memory_map=False, pre_buffer=False, buffer_size=_BUFFER_BYTES
            )
        except FileNotFoundError:
            raise CorpusError(f"{file.path} does not exist.") from None
        except self.errors as error:
            raise CorpusError(f"{file.path} is not a whole parquet file: {_first_line(error)}.") from None
        self.groups = [self.file.metadata.row_group(number) for number in range(self.file.metadata.num_row_groups)]

    def __enter__(self) -> ParquetFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def first_rows(self) -> list[int]:
        """Number of the first row of each row group, and the number of all rows."""
        rows = [0]
        for group in self.groups:
            rows.append(rows[-1] + group.num_rows)
        return rows

    def bytes_of(self, number: int, file: InputFile) -> tuple[int, int]:
        """Where a row group lies in the file.

        Raises:
            CorpusError: outside of it.
        """
        group = self.groups[number]
        spans = []
        for index in range(group.num_columns):
            column = group.column(index)
            begin = column.data_page_offset
            if column.dictionary_page_offset:
                begin = min(begin, column.dictionary_page_offset)
            spans.append((begin, begin + column.total_compressed_size))
        begin, end = min((b for b, _ in spans), default=0), max((e for _, e in spans), default=0)
        if not 0 <= begin <= end <= file.num_bytes:
            raise CorpusError(f"{self.path} is damaged: its footer says row group {number} lies outside of the file.")
        return begin, end

    def check_columns(self, fields: Fields) -> None:
        """Refuse a file that has not the columns asked for, or has them in another type.

        Raises:
            CorpusError: with the columns it has.
        """
        import pyarrow.types as types

        schema = self.file.schema_arrow
        for name in columns_of(fields):
            if schema.get_field_index(name) < 0:
                twice = schema.names.count(name) > 1
                raise CorpusError(
                    f"{self.path}: {'two columns are' if twice else 'there is no column'} named {name!r}; its columns "
                    f"are {', '.join(f'{field.name} ({field.type})' for field in list(schema)[:20])}."
                )
            kind = schema.field(name).type
            if name == fields.id_key and fields.kind == "pairs":
                continue
            if types.is_dictionary(kind):
                kind = kind.value_type
            wanted = "text"
            if fields.kind == "pairs" and not fields.side_keys:
                is_texts = types.is_map(kind) and _is_text(kind.key_type) and _is_text(kind.item_type)
                good = types.is_struct(kind) or is_texts
                wanted = "a struct or map of texts by language"
            elif name in (fields.language_key, *fields.side_language_keys):
                good = _is_text(kind) or (types.is_list(kind) and _is_text(kind.value_type))
            else:
                good = _is_text(kind)
            if not good:
                raise CorpusError(f"{self.path}: column {name!r} is {kind}, not {wanted}.")


def columns_of(fields: Fields) -> list[str]:
    """The columns that must be there."""
    if fields.kind == "monolingual":
        return [fields.text_key, *([fields.language_key] if fields.language_key is not None else [])]
    return [*fields.side_keys, *fields.side_language_keys] if fields.side_keys else [fields.texts_key]


def read_row_groups(
    file: InputFile, begin: int, end: int, language: str | None, task: Task
) -> Iterator[TextBatch]:
    """The documents of row groups ``begin`` to ``end``.

    Raises:
        CorpusError: the file is damaged, or its columns are not those asked for.
    """
    fields = task.fields
    with ParquetFile(file) as parquet:
        parquet.check_columns(fields)
        columns = columns_of(fields)
        if fields.kind == "pairs" and fields.id_key in parquet.file.schema_arrow.names:
            columns.append(fields.id_key)
        rows = parquet.first_rows()
        for number in range(begin, end):
            first, last = parquet.bytes_of(number, file)
            with DiskBytes(file, task.reading, first, last) as disk:
                for _ in disk.chunks():
                    pass
            place = Place(file.path, first=rows[number], unit="row")
            group = parquet.groups[number]
            text_bytes = sum(
                group.column(index).total_uncompressed_size for index in range(group.num_columns)
                if group.column(index).path_in_schema.split(".")[0] in columns
            )
            batch_rows = max(1, min(_MOST_ROWS, group.num_rows * task.batch_bytes // max(text_bytes, 1)))
            done = 0
            try:
                for batch in parquet.file.iter_batches(
                    batch_size=batch_rows, row_groups=[number], columns=columns, use_threads=False
                ):
                    yield from _batches(batch, place, done, language, task)
                    done += batch.num_rows
            except parquet.errors as error:
                if isinstance(error, UnicodeError):
                    raise
                raise CorpusError(
                    f"{file.path} is damaged after row {rows[number] + done}: {_first_line(error)}."
                ) from None
            task.reading.sources.append(disk.source())


def _batches(batch: Any, place: Place, done: int, language: str | None, task: Task) -> Iterator[TextBatch]:
    fields = task.fields
    rows = _Rows(batch, place, done, task)
    if fields.kind == "monolingual":
        (texts,) = rows.texts((fields.text_key,))
        named = rows.codes((fields.language_key,))[0] if fields.language_key is not None else None
        keep = rows.complete({fields.text_key: texts, **({} if named is None else {str(fields.language_key): named})})
        if keep:
            named = [named[row] for row in keep] if named is not None else None
            yield monolingual_batch(task, place, [texts[row] for row in keep], rows.numbers(keep), language, named)
        return
    ids = batch.column(fields.id_key).to_pylist() if fields.id_key in batch.schema.names else None
    if fields.side_keys:
        sides, codes = rows.texts(fields.side_keys), rows.codes(fields.side_language_keys)
        keep = rows.complete(
            dict(zip((*fields.side_keys, *fields.side_language_keys), (*sides, *codes), strict=True))
            if len(sides) == 2 else {}
        )
        sides, codes = ([[column[row] for row in keep] for column in columns] for columns in (sides, codes))
        ids = [ids[row] for row in keep] if ids is not None else None
        if codes:
            yield pairs_of_records(task, place, sides_of(codes, sides), ids, rows.numbers(keep))
        else:
            yield pairs_of_columns(task, place, fields.pairs(), fields.languages, sides, ids, rows.numbers(keep))
        return
    mappings = rows.mappings(fields.texts_key)
    keep = rows.complete({})
    ids = [ids[row] for row in keep] if ids is not None else None
    yield pairs_of_mappings(task, place, [mappings[row] for row in keep], ids, rows.numbers(keep))


class _Rows:
    """Columns of a record batch as Python's strings; rows with a text that is not UTF-8 are malformed."""

    def __init__(self, batch: Any, place: Place, done: int, task: Task) -> None:
        self._batch, self._place, self._done, self._task = batch, place, done, task
        self._bad: set[int] = set()

    def texts(self, names: Sequence[str]) -> list[list[Any]]:
        """The texts of columns, None where there is none. [R] each"""
        return [self._strings(self._batch.column(name)) for name in names]

    def codes(self, names: Sequence[str]) -> list[list[Any]]:
        """The language codes of columns; of a list the first. [R] each"""
        return [
            [(code[0] if code else None) if type(code) is list else code for code in column]
            for column in self.texts(names)
        ]

    def mappings(self, name: str) -> list[dict[str, str]]:
        """The texts by language of a struct or map column; without those that are null. [R]"""
        import pyarrow.types as types

        column = self._batch.column(name)
        wanted = set(wanted_languages(self._task.fields))

        def takes(code: str) -> bool:
            return not wanted or self._task.codes(code) in wanted

        if types.is_struct(column.type):
            children = {
                field.name: self._strings(child)
                for field, child in zip(column.type, column.flatten(), strict=True)
                if _is_text(field.type) and takes(field.name)
            }
            if not children:
                return [{} for _ in range(self._batch.num_rows)]
            return [
                {code: text for code, text in zip(children, texts, strict=True) if text is not None}
                for texts in zip(*children.values(), strict=True)
            ]
        return [
            {code: text for code, text in items or () if text is not None and takes(code)}
            for items in self._strings(column)
        ]

    def _strings(self, array: Any) -> list[Any]:
        try:
            return list(array.to_pylist())
        except UnicodeDecodeError:
            return [self._value(value, row) for row, value in enumerate(array)]

    def _value(self, value: Any, row: int) -> Any:
        try:
            return value.as_py()
        except UnicodeDecodeError as error:
            if row not in self._bad:
                self._bad.add(row)
                self._task.reject(self._place, self._done + row, "not UTF-8", f" at byte {error.start} of the text")
            return None

    def complete(self, columns: dict[str, list[Any]]) -> list[int]:
        """The rows that are well-formed and have a value in all of these columns; others are malformed."""
        most = self._task.fields.max_line_bytes
        for name, values in columns.items():
            if None in values:
                for row, value in enumerate(values):
                    if value is None and row not in self._bad:
                        self._bad.add(row)
                        self._task.reject(self._place, self._done + row, f'"{name}" is null, not text')
        if self._batch.nbytes > most:
            for values in columns.values():
                for row, value in enumerate(values):
                    if value is not None and row not in self._bad and len(value.encode()) > most:
                        self._bad.add(row)
                        self._task.reject(self._place, self._done + row, "longer than max_line_bytes")
        return [row for row in range(self._batch.num_rows) if row not in self._bad]

    def numbers(self, keep: Sequence[int]) -> list[int]:
        """Numbers of rows within their row group."""
        return [self._done + row for row in keep]


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
