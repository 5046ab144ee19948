"""Common layouts of pairs are told from the first record; what nothing tells is not guessed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_xalign.data.fields import Fields
from megatron_xalign.data.input_files import find_inputs
from megatron_xalign.data.layouts import with_layout_found

SHORT = (("en", "eng_Latn"), ("fi", "fin_Latn"))
PAIR = Fields(kind="pairs", languages=("eng_Latn", "fin_Latn"), language_map=SHORT)

RECORDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"texts": {"en": "cat", "fi": "kissa"}}, {}),
    ({"translation": {"en": "cat", "fi": "kissa"}}, {"texts_key": "translation"}),
    (
        {"src_lang": "en", "tgt_lang": "fi", "src": "cat", "tgt": "kissa"},
        {"side_keys": ("src", "tgt"), "side_language_keys": ("src_lang", "tgt_lang")},
    ),
    ({"fi": "kissa", "en": "cat", "score": 1.0}, {"side_keys": ("en", "fi")}),
    ({"src": "cat", "tgt": "kissa"}, {}),
    ({"en": "cat"}, {}),
]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize(("record", "found"), RECORDS)
def test_a_layout_is_told_from_the_first_record(
    tmp_path: Path, record: dict[str, Any], found: dict[str, Any], format: str
) -> None:
    if format == "jsonl":
        (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\nnothing\n", encoding="utf-8")
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([record]), tmp_path / "x.parquet")
    expected = Fields(kind="pairs", languages=PAIR.languages, language_map=SHORT, **found)
    assert with_layout_found(find_inputs([tmp_path], fields=PAIR), PAIR) == expected


def test_columns_of_a_tsv_named_like_languages_are_the_sides(tmp_path: Path) -> None:
    (tmp_path / "x.tsv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbffi\tid\tEN\r\nkissa\t1\tcat\r\n"))
    assert with_layout_found(find_inputs([tmp_path], fields=PAIR), PAIR).side_keys == ("EN", "fi")


@pytest.mark.parametrize("content", [b"", b"\n", b"{", b"\xff\n"])
def test_what_is_asked_for_stays_and_a_bad_first_line_tells_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    assert with_layout_found(find_inputs([tmp_path], fields=PAIR), PAIR) == PAIR
    (tmp_path / "x.jsonl").write_text('{"translation": {}}\n', encoding="utf-8")
    for fields in (
        Fields(kind="monolingual"), Fields(kind="pairs", texts_key="x"),
        Fields(kind="pairs", languages=("a", "b"), side_keys=("x", "y")),
    ):
        assert with_layout_found(find_inputs([tmp_path], fields=fields), fields) == fields
