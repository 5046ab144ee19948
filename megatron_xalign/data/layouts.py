"""Tell from the first record of a corpus of pairs where its texts are, so that common layouts need no options."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_xalign.data.fields import Fields, LanguageCodes
from megatron_xalign.data.input_files import InputFile
from megatron_xalign.data.input_parts import first_line_of
from megatron_xalign.data.json_lines import MalformedError, object_in
from megatron_xalign.data.parquet import ParquetFile

_LOG = logging.getLogger(__name__)
_DEFAULT_KEY = "texts"
_MAPPINGS = (_DEFAULT_KEY, "translation", "translations")
_SIDES = (("src", "tgt"), ("source", "target"), ("src_text", "tgt_text"), ("source_text", "target_text"))
_LANGUAGES = (("src_lang", "tgt_lang"), ("source_lang", "target_lang"), ("source_language", "target_language"))


def with_layout_found(inputs: Sequence[InputFile], fields: Fields) -> Fields:
    """Fields with the layout of the first jsonl, parquet or TSV file of pairs, where none was asked for.

    Known are texts by language under one key, sides with keys for their languages, and keys (or TSV columns) that are
    the languages themselves. Sides whose languages nothing tells are not guessed.

    Args:
        inputs: of ``find_inputs``.
        fields: of the job; returned as they are if they are not for pairs, or name a layout.
    """
    if fields.kind != "pairs" or fields.side_keys or fields.texts_key != _DEFAULT_KEY:
        return fields
    for file in inputs:
        if file.format in ("jsonl", "parquet", "tsv"):
            found = _layout(_keys(file, fields), fields, is_tsv=file.format == "tsv")
            if found:
                _LOG.info("%s: pairs are read with %s.", file.path, ", ".join(f"{k}={v}" for k, v in found.items()))
            return replace(fields, **found)
    return fields


def _layout(keys: Iterable[str], fields: Fields, *, is_tsv: bool) -> Mapping[str, Any]:
    names = list(keys)
    if not is_tsv:
        for key in _MAPPINGS:
            if key in names:
                return {"texts_key": key} if key != _DEFAULT_KEY else {}
    for languages in _LANGUAGES:
        for sides in _SIDES:
            if {*languages, *sides} <= {*names}:
                return {"side_keys": sides, "side_language_keys": languages}
    codes = LanguageCodes(fields)
    by_language = {codes(name): name for name in reversed(names)}
    if fields.languages and all(code in by_language for code in fields.languages):
        return {"side_keys": tuple(by_language[code] for code in fields.languages)}
    return {}


def _keys(file: InputFile, fields: Fields) -> list[str]:
    """The keys of the first record, or the names of columns."""
    if file.format == "parquet":
        with ParquetFile(file) as parquet:
            return list(parquet.file.schema_arrow.names)
    line = first_line_of(file, fields)
    if line is None:
        return []
    if file.format == "tsv":
        return line.decode(errors="replace").rstrip("\r").split("\t")
    try:
        return list(object_in(line))
    except MalformedError:
        # The job names the line, or leaves it out.
        return []
