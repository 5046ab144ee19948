"""Every format read in parts of any size gives what a plain Python reader gives, in the same order."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_xalign.data import reading as reading_module
from megatron_xalign.data.inputs import Fields, Part, Reading, TextBatch, find_inputs, plan_parts, read_part
from megatron_xalign.errors import CorpusError

FINNISH = Fields(kind="monolingual", language="fin_Latn")
SHORT = (("en", "eng_Latn"), ("fi", "fin_Latn"))
PAIR = Fields(kind="pairs", languages=("eng_Latn", "fin_Latn"))
# Line separators of Unicode, a form feed, NUL, right-to-left, no spaces, beyond the 16-bit plane.
AWKWARD = [
    "yksi kaksi", "", " ", "\u2028\x0c\x85", "a\0b", "\u0645\u0631\u062d\u0628\u0627", "漢字かな", "😀\U0010ffff",
    '{"text": 1}', "tab\tline\nbreak\r",
]
TEXT = st.one_of(st.sampled_from(AWKWARD), st.text(max_size=30))
FOLDER_KEPT = [HealthCheck.function_scoped_fixture]
FOLDER_PER_EXAMPLE = settings(max_examples=120, suppress_health_check=FOLDER_KEPT, deadline=None)


def compressed(content: bytes, suffix: str) -> bytes:
    """As one archive of several members."""
    half = len(content) // 2
    if suffix == ".gz":
        return gzip.compress(content[:half]) + gzip.compress(content[half:])
    if suffix == ".zst":
        compress = zstandard.ZstdCompressor().compress
        return compress(content[:half]) + b"\x50\x2a\x4d\x18\x03\0\0\0abc" + compress(content[half:])
    return content


def read_all(
    paths: Sequence[Any], fields: Fields, *, part_bytes: int = 64 << 20, batch_bytes: int = 2 << 20, **options: Any
) -> tuple[list[TextBatch], Reading]:
    reading = Reading()
    inputs = find_inputs([str(path) for path in paths], fields=fields, **options)
    parts = plan_parts(inputs, fields, part_bytes)
    assert [part.index for part in parts] == list(range(len(parts)))
    batches = [batch for part in parts for batch in read_part(part, fields, reading=reading, batch_bytes=batch_bytes)]
    assert all(batch.texts for batch in batches)
    assert reading.documents == sum(len(batch.texts) for batch in batches)
    return batches, reading


def texts_of(batches: Sequence[TextBatch]) -> list[str]:
    return [text for batch in batches for text in batch.texts]


def pairs_of(batches: Sequence[TextBatch]) -> list[tuple[str, str, str, str]]:
    """(language, other language, text, other) of each pair."""
    found = []
    for batch in batches:
        assert batch.others is not None and batch.ids is not None and len(batch.ids) == len(batch.texts)
        for row, (text, other) in enumerate(zip(batch.texts, batch.others, strict=True)):
            first = batch.languages[row] if batch.languages is not None else batch.language
            second = batch.other_languages[row] if batch.other_languages is not None else batch.other_language
            found.append((str(first), str(second), text, other))
    return found


def wheres_of(batches: Sequence[TextBatch]) -> list[str]:
    return [batch.where(row) for batch in batches for row in range(len(batch.texts))]


RECORD = st.fixed_dictionaries(
    {"text": TEXT},
    optional={
        "id": st.integers() | TEXT, "score": st.floats(), "nested": st.lists(st.dictionaries(TEXT, TEXT, max_size=2)),
    },
)


@given(
    records=st.lists(st.one_of(st.none(), RECORD), max_size=30),
    line_end=st.sampled_from(["\n", "\r\n"]),
    ends_in_line_break=st.booleans(),
    mark=st.booleans(),
    is_ascii=st.booleans(),
    suffix=st.sampled_from(["", ".gz", ".zst"]),
    part_bytes=st.integers(1, 400),
    batch_bytes=st.integers(1, 400),
)
@FOLDER_PER_EXAMPLE
def test_json_lines_in_parts_of_any_size_are_those_of_a_plain_reader(
    tmp_path: Path, records: list[dict[str, Any] | None], line_end: str, ends_in_line_break: bool, mark: bool,
    is_ascii: bool, suffix: str, part_bytes: int, batch_bytes: int,
) -> None:
    lines = ["" if record is None else json.dumps(record, ensure_ascii=is_ascii) for record in records]
    content = (line_end.join(lines) + (line_end if ends_in_line_break else "")).encode()
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(compressed((b"\xef\xbb\xbf" if mark else b"") + content, suffix))

    expected, numbers = [], []
    for number, line in enumerate(io.BytesIO(content), 1):
        if line.strip():
            expected.append(json.loads(line)["text"])
            numbers.append(number)
    batches, reading = read_all([path], FINNISH, part_bytes=part_bytes, batch_bytes=batch_bytes)
    assert texts_of(batches) == expected
    assert wheres_of(batches) == [f"{path}:{number}" for number in numbers]
    assert {batch.language for batch in batches} <= {"fin_Latn"}
    assert reading.bytes_read == path.stat().st_size and reading.malformed == 0
    assert reading.skipped.total() == len(list(io.BytesIO(content))) - len(expected)
    # Every byte on disk is in one hashed stretch.
    raw = path.read_bytes()
    assert b"".join(raw[source["begin"] : source["end"]] for source in reading.sources) == raw
    for source in reading.sources:
        assert source["sha256"] == hashlib.sha256(raw[source["begin"] : source["end"]]).hexdigest()


PLAIN_LINE = st.one_of(
    st.sampled_from([b"", b" ", b"\t", b"yksi", "漢字\u2028\x0c".encode(), b"a\0b", b"\xc2\x85", b'"quoted', b"\r"]),
    st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=12).map(str.encode),
)


@given(
    lines=st.lists(PLAIN_LINE, max_size=30), ends_in_line_break=st.booleans(), mark=st.booleans(),
    suffix=st.sampled_from(["", ".gz", ".zst"]), part_bytes=st.integers(1, 100), batch_bytes=st.integers(1, 100),
)
@FOLDER_PER_EXAMPLE
def test_lines_of_plain_text_are_documents_and_blank_ones_are_counted(
    tmp_path: Path, lines: list[bytes], ends_in_line_break: bool, mark: bool, suffix: str, part_bytes: int,
    batch_bytes: int,
) -> None:
    content = b"\n".join(lines) + (b"\n" if ends_in_line_break else b"")
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(compressed((b"\xef\xbb\xbf" if mark else b"") + content, suffix))
    plain = [line.decode().removesuffix("\n").removesuffix("\r") for line in io.BytesIO(content)]
    expected = [(number, line) for number, line in enumerate(plain, 1) if line.strip()]
    batches, reading = read_all([path], FINNISH, part_bytes=part_bytes, batch_bytes=batch_bytes)
    assert texts_of(batches) == [line for _, line in expected]
    assert wheres_of(batches) == [f"{path}:{number}" for number, _ in expected]
    assert reading.skipped.total() == reading.skipped["blank line"] == len(plain) - len(expected)


@given(
    lines=st.lists(PLAIN_LINE, max_size=40), line_end=st.sampled_from([b"\n", b"\r\n"]), mark=st.booleans(),
    suffix=st.sampled_from(["", ".gz"]), part_bytes=st.integers(1, 60), batch_bytes=st.integers(1, 60),
)
@example(lines=[b"", b"yksi"], line_end=b"\n", mark=True, suffix="", part_bytes=1, batch_bytes=1)  # the mark is no text
@example(lines=[b"a", b"yksi"], line_end=b"\n", mark=True, suffix="", part_bytes=2, batch_bytes=1)
@FOLDER_PER_EXAMPLE
def test_paragraphs_end_at_blank_lines_wherever_the_file_is_cut(
    tmp_path: Path, lines: list[bytes], line_end: bytes, mark: bool, suffix: str, part_bytes: int, batch_bytes: int
) -> None:
    content = line_end.join(lines)
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(compressed((b"\xef\xbb\xbf" if mark else b"") + content, suffix))
    plain = [line.removesuffix(b"\r") for line in content.split(b"\n")]
    joined = b"\n".join(line if line.strip() else b"" for line in plain)
    expected = [paragraph.decode() for paragraph in re.split(rb"\n\n+", joined.strip(b"\n")) if paragraph]
    fields = Fields(kind="monolingual", language="fin_Latn", text_unit="paragraph")
    batches, _ = read_all([path], fields, part_bytes=part_bytes, batch_bytes=batch_bytes)
    assert texts_of(batches) == expected
    for batch in batches:
        for row, text in enumerate(batch.texts):
            number = int(batch.where(row).rsplit(":", 1)[1])
            assert plain[number - 1].decode() == text.split("\n")[0]


def test_a_file_can_be_one_document_and_small_ones_share_a_part(tmp_path: Path) -> None:
    texts = [f"otsikko {number}\r\n\r\nleipä" for number in range(50)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number:03}.txt").write_bytes(text.encode())
    (tmp_path / "900.txt").write_bytes(b" \n")
    fields = Fields(kind="monolingual", language="fin_Latn", text_unit="file")
    inputs = find_inputs([tmp_path], fields=fields)
    assert len(plan_parts(inputs, fields)) == 1
    batches, reading = read_all([tmp_path], fields, part_bytes=100)
    assert texts_of(batches) == [text.replace("\r\n", "\n") for text in texts]
    assert wheres_of(batches)[7] == str(tmp_path / "007.txt")
    assert reading.skipped == {"blank file": 1}


CELL = st.text(st.characters(exclude_characters="\t\n\r", exclude_categories=["Cs"]), max_size=8)


@given(
    rows=st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=20), suffix=st.sampled_from(["", ".gz", ".zst"]),
    part_bytes=st.integers(1, 100), batch_bytes=st.integers(1, 100),
)
@FOLDER_PER_EXAMPLE
def test_columns_of_a_tsv_are_those_of_the_csv_module(
    tmp_path: Path, rows: list[tuple[str, str, str]], suffix: str, part_bytes: int, batch_bytes: int
) -> None:
    table = [("source", "score", "target"), *rows]
    content = "".join("\t".join(row) + "\n" for row in table)
    path = tmp_path / f"x.tsv{suffix}"
    path.write_bytes(compressed(content.encode(), suffix))
    oracle = list(csv.DictReader(io.StringIO(content, newline="\n"), delimiter="\t", quoting=csv.QUOTE_NONE))
    expected = [("eng_Latn", "fin_Latn", row["target"], row["source"]) for row in oracle]
    for keys in (("target", "source"), ("3", "1")):
        fields = Fields(kind="pairs", languages=("eng_Latn", "fin_Latn"), side_keys=keys, tsv_header=True)
        batches, _ = read_all([path], fields, part_bytes=part_bytes, batch_bytes=batch_bytes)
        assert pairs_of(batches) == expected
        assert wheres_of(batches) == [f"{path}:{number}" for number in range(2, len(table) + 1)]


def test_a_tsv_without_a_header_is_read_by_number(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text('http://a\tb "quoted\tc\nhttp://d\te\tf\r\n', encoding="utf-8")
    fields = Fields(kind="pairs", languages=("eng_Latn", "fin_Latn"), side_keys=("2", "3"))
    batches, _ = read_all([path], fields)
    assert [pair[2:] for pair in pairs_of(batches)] == [('b "quoted', "c"), ("e", "f")]
    batches, _ = read_all([path], Fields(kind="pairs", languages=("eng_Latn", "fin_Latn")))
    assert [pair[2:] for pair in pairs_of(batches)] == [("http://a", 'b "quoted'), ("http://d", "e")]
    batches, _ = read_all([path], Fields(kind="monolingual", language="eng_Latn", text_key="2"))
    assert texts_of(batches) == ['b "quoted', "e"]


@given(
    rows=st.lists(st.tuples(CELL, CELL), max_size=40), ends_in_line_break=st.booleans(),
    suffixes=st.tuples(st.sampled_from(["", ".gz"]), st.sampled_from(["", ".zst"])),
    part_bytes=st.integers(1, 100), batch_bytes=st.integers(1, 60),
)
@FOLDER_PER_EXAMPLE
def test_aligned_files_are_read_line_by_line_together(
    tmp_path: Path, rows: list[tuple[str, str]], ends_in_line_break: bool, suffixes: tuple[str, str], part_bytes: int,
    batch_bytes: int,
) -> None:
    paths = []
    sides = list(zip(*rows, strict=True)) if rows else [(), ()]
    for language, side, suffix in zip(("en", "fi"), sides, suffixes, strict=True):
        content = "\n".join(side) + ("\n" if rows and ends_in_line_break else "")
        path = tmp_path / f"c.{language}{suffix}"
        path.write_bytes(compressed(content.encode(), suffix))
        paths.append(path)
    if rows and not ends_in_line_break:
        # Without a line break at the end an empty last line is no line.
        count = {side[-1] == "" for side in sides}
        if count == {True, False}:
            return
        rows = rows[:-1] if count == {True} else rows
    fields = Fields(kind="pairs", languages=("fin_Latn", "eng_Latn"), language_map=SHORT)
    batches, reading = read_all(paths, fields, part_bytes=part_bytes, batch_bytes=batch_bytes)
    assert pairs_of(batches) == [("fin_Latn", "eng_Latn", finnish, english) for english, finnish in rows]
    assert wheres_of(batches) == [f"{paths[0]}:{number}" for number in range(1, len(rows) + 1)]
    for path in paths:
        sources = [source for source in reading.sources if source["path"] == str(path)]
        assert b"".join(path.read_bytes()[source["begin"] : source["end"]] for source in sources) == path.read_bytes()


@pytest.mark.parametrize("row_group_size", [1, 3, 1000])
def test_parquet_columns_are_read_by_row_groups(tmp_path: Path, row_group_size: int) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = [text or "x" for text in AWKWARD] * 3
    codes = [["fi", "en"][row % 2] for row in range(len(texts))]
    table = pa.table({"content": texts, "lang": codes, "n": range(len(texts))})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=row_group_size)
    fields = Fields(kind="monolingual", text_key="content", language_key="lang", language_map=SHORT)
    batches, reading = read_all([tmp_path / "x.parquet"], fields, part_bytes=50, batch_bytes=40)
    assert texts_of(batches) == texts
    assert [code for batch in batches for code in batch.languages or []] == ["fin_Latn", "eng_Latn"] * 15
    assert wheres_of(batches) == [f"{tmp_path / 'x.parquet'}: row {row + 1}" for row in range(len(texts))]
    raw = (tmp_path / "x.parquet").read_bytes()
    assert len(reading.sources) == -(-len(texts) // row_group_size)
    for source in reading.sources:
        assert source["sha256"] == hashlib.sha256(raw[source["begin"] : source["end"]]).hexdigest()


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "texts": ({"id": "p", "texts": {"fi": "kissa", "en": "cat"}}, {}),
    "translation": ({"id": "p", "translation": {"en-GB": "cat", "FI": "kissa"}}, {"texts_key": "translation"}),
    "sides": ({"id": "p", "a": "cat", "b": "kissa"}, {"side_keys": ("a", "b")}),
    "named sides": (
        {"id": "p", "src_lang": "fi", "tgt_lang": "en", "src": "kissa", "tgt": "cat"},
        {"side_keys": ("src", "tgt"), "side_language_keys": ("src_lang", "tgt_lang")},
    ),
}


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_pairs_gives_the_first_language_first(tmp_path: Path, layout: str, format: str) -> None:
    record, options = LAYOUTS[layout]
    path = tmp_path / f"x.{format}"
    if format == "jsonl":
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([record]), path)
    fields = Fields(kind="pairs", languages=("eng_Latn", "fin_Latn"), language_map=SHORT, **options)
    batches, _ = read_all([path], fields)
    assert pairs_of(batches) == [("eng_Latn", "fin_Latn", "cat", "kissa")]
    assert batches[0].ids == ["p"]


def test_a_parquet_map_of_texts_is_read_like_a_struct(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = [[("en", "cat"), ("fi", "kissa")], [("fi", "koira"), ("en", "dog")]]
    column = pa.array(texts, pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"texts": column}), tmp_path / "x.parquet")
    batches, _ = read_all([tmp_path / "x.parquet"], Fields(kind="pairs", languages=("fi", "en")))
    assert pairs_of(batches) == [("fi", "en", "kissa", "cat"), ("fi", "en", "koira", "dog")]


MANY: list[dict[str, Any]] = [
    {"id": 1, "texts": {"en": "one", "fi": "yksi", "de": "eins"}}, {"id": 2, "texts": {"fi": "kaksi", "de": "zwei"}},
    {"id": 3, "texts": {"en": "three"}},
]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("pivot", [("en", "fi", "1#en-fi"), ("en", "de", "1#en-de")]),
        ("all", [("en", "fi", "1#en-fi"), ("en", "de", "1#en-de"), ("fi", "de", "1#fi-de"), ("fi", "de", "2")]),
        ((("de", "fi"), ("de", "en")), [("de", "fi", "1#de-fi"), ("de", "en", "1#de-en"), ("de", "fi", "2")]),
    ],
)
def test_a_rule_says_which_pairs_of_a_record_in_many_languages_are_taken(
    tmp_path: Path, rule: Any, expected: list[tuple[str, str, str]]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in MANY), encoding="utf-8")
    batches, reading = read_all([path], Fields(kind="pairs", languages=("en", "fi", "de"), pair_rule=rule))
    ids = [name for batch in batches for name in batch.ids or []]
    assert [(*pair[:2], name) for pair, name in zip(pairs_of(batches), ids, strict=True)] == expected
    texts: dict[int, Any] = {record["id"]: record["texts"] for record in MANY}
    for (first, second, text, other), name in zip(pairs_of(batches), ids, strict=True):
        assert (text, other) == tuple(texts[int(name.split("#")[0])][code] for code in (first, second))
    used = {int(name.split("#")[0]) for name in ids}
    assert reading.skipped.total() == len(MANY) - len(used) and reading.malformed == 0


CODE = st.sampled_from(["en", "EN-us", "fi", "de", "sv"])


@pytest.mark.parametrize("languages", [(), ("eng_Latn", "fin_Latn"), ("fin_Latn", "eng_Latn", "de")])
@given(records=st.lists(st.tuples(CODE, CODE, st.integers(0, 99)), max_size=30))
@FOLDER_PER_EXAMPLE
def test_records_that_name_the_languages_of_their_sides_are_put_in_order(
    tmp_path: Path, languages: tuple[str, ...], records: list[tuple[str, str, int]]
) -> None:
    path = tmp_path / "x.jsonl"
    lines = [
        json.dumps({"src_lang": code, "tgt_lang": other, "src": f"{number}-{code}", "tgt": f"{number}-{other}"}) + "\n"
        for code, other, number in records
    ]
    path.write_text("".join(lines), encoding="utf-8")
    mapping = {"en": "eng_Latn", "EN-us": "eng_Latn", "fi": "fin_Latn"}
    wanted = [(languages[0], other) for other in languages[1:]]
    expected, numbers = [], []
    for row, (code, other, number) in enumerate(records, 1):
        sides = [(mapping.get(side, side), f"{number}-{side}") for side in (code, other)]
        if (sides[1][0], sides[0][0]) in wanted:
            sides.reverse()
        if sides[0][0] != sides[1][0] and (not languages or (sides[0][0], sides[1][0]) in wanted):
            expected.append((sides[0][0], sides[1][0], sides[0][1], sides[1][1]))
            numbers.append(row)
    fields = Fields(
        kind="pairs", languages=languages, language_map=SHORT, side_keys=("src", "tgt"),
        side_language_keys=("src_lang", "tgt_lang"),
    )
    batches, reading = read_all([path], fields, batch_bytes=200)
    assert pairs_of(batches) == expected
    assert wheres_of(batches) == [f"{path}:{number}" for number in numbers]
    assert reading.skipped.total() == len(records) - len(expected) and reading.malformed == 0


def test_three_aligned_files_give_the_pairs_of_the_rule(tmp_path: Path) -> None:
    for language in ("en", "fi", "de"):
        lines = [f"{language} {number}\n" for number in range(20)]
        (tmp_path / f"c.{language}").write_text("".join(lines), encoding="utf-8")
    fields = Fields(kind="pairs", languages=("en", "de", "fi"))
    batches, _ = read_all([tmp_path / "c.*"], fields, part_bytes=60, batch_bytes=20)
    expected = [("en", other, f"en {number}", f"{other} {number}") for number in range(20) for other in ("de", "fi")]
    assert pairs_of(batches) == expected


def test_the_id_of_a_pair_without_one_does_not_depend_on_where_it_lies(tmp_path: Path) -> None:
    lines = [json.dumps({"src": f"cat {number}", "tgt": f"kissa {number}"}) + "\n" for number in range(40)]
    fields = Fields(kind="pairs", languages=("eng_Latn", "fin_Latn"), side_keys=("src", "tgt"))
    seen = set()
    for name, chosen, part_bytes in (("a.jsonl", lines, 100), ("b.jsonl.gz", ["\n", *lines], 1 << 20)):
        (tmp_path / name).write_bytes(compressed("".join(chosen).encode(), Path(name).suffix.replace(".jsonl", "")))
        batches, _ = read_all([tmp_path / name], fields, part_bytes=part_bytes)
        seen.add(tuple(name for batch in batches for name in batch.ids or []))
    assert len(seen) == 1 and len(set(seen.pop())) == 40


def test_records_in_other_languages_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    records: list[Any] = [{"lang": ["fin_Latn", "eng_Latn"][row % 2], "text": str(row)} for row in range(6)]
    records.append({"lang": ["de"], "text": "9"})
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    fields = Fields(
        kind="monolingual", language_key="lang", languages=("fin_Latn", "deu_Latn"), language_map=(("de", "deu_Latn"),)
    )
    batches, reading = read_all([path], fields)
    assert texts_of(batches) == ["0", "2", "4", "9"]
    assert batches[0].languages == ["fin_Latn", "fin_Latn", "fin_Latn", "deu_Latn"]
    assert wheres_of(batches) == [f"{path}:{number}" for number in (1, 3, 5, 7)]
    assert reading.skipped == {"a language not asked for (eng_Latn)": 3} and reading.malformed == 0


def test_a_record_without_a_language_is_malformed(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("en\tone\n\ttwo\nfi\tkolme\n", encoding="utf-8")
    fields = Fields(kind="monolingual", text_key="2", language_key="1")
    (part,) = plan_parts(find_inputs([path]), fields)
    with pytest.raises(CorpusError, match=r"x\.tsv:2: no language"):
        list(read_part(part, fields))
    reading = Reading()
    (batch,) = read_part(part, fields, on_error="skip", reading=reading)
    assert (batch.texts, batch.languages, reading.skipped) == (["one", "kolme"], ["en", "fi"], {"no language": 1})
    assert [batch.where(row) for row in range(2)] == [f"{path}:1", f"{path}:3"]


@given(
    lines=st.lists(
        st.sampled_from(
            [b'{"text":"a"}', b'{"text":"b"}{"text":"c"}', b'{"text":', b'"d"}', b'{"x":', b'{"y":1},"text":"e"}', b"",
             b"[", b' {"text":"f"}', b'{"text":"g"} ', b'{"text":"h"}\r', b'{"text":"\xff"}',
             b'{"x":"\xff","text":"i"}',
             b'{"text":"j","x":NaN}', b'{"text":"\\ud800"}', b'{"text":"k","x":"\\ud800"}', b'{"text":"l","x":[{}]}',
             b"}", b"{"]
        ),
        max_size=12,
    ),
    part_bytes=st.integers(1, 80), batch_bytes=st.integers(1, 80),
)
@settings(max_examples=400, suppress_health_check=FOLDER_KEPT, deadline=None)
def test_what_is_malformed_does_not_depend_on_how_a_file_is_cut(
    tmp_path: Path, lines: list[bytes], part_bytes: int, batch_bytes: int
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines))
    good = {
        b'{"text":"a"}': "a", b' {"text":"f"}': "f", b'{"text":"g"} ': "g", b'{"text":"h"}\r': "h",
        b'{"x":"\xff","text":"i"}': "i", b'{"text":"j","x":NaN}': "j", b'{"text":"k","x":"\\ud800"}': "k",
        b'{"text":"l","x":[{}]}': "l",
    }
    reading = Reading()
    parts = plan_parts(find_inputs([path], fields=FINNISH), FINNISH, part_bytes)
    batches = [
        batch for part in parts
        for batch in read_part(part, FINNISH, on_error="skip", reading=reading, batch_bytes=batch_bytes)
    ]
    assert texts_of(batches) == [good[line] for line in lines if line in good]
    malformed = [number for number, line in enumerate(lines, 1) if line and line not in good]
    assert reading.malformed == len(malformed)
    assert [example.split(": ")[0] for example in reading.examples] == [f"{path}:{number}" for number in malformed[:10]]


def test_far_into_a_file_an_example_names_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 100 + b"{\n" * 2)
    monkeypatch.setattr(reading_module, "_FARTHEST_COUNTED", 500)
    reading = Reading()
    parts = plan_parts(find_inputs([path]), FINNISH, 500)
    for part in parts:
        list(read_part(part, FINNISH, on_error="skip", reading=reading))
    begin = parts[-1].pieces[0].begin
    # The first line that begins there is the one after that of the byte before.
    number = 100 - -(-begin // 14) + 1
    found = [example.split(": not JSON")[0] for example in reading.examples]
    assert found == [f"{path}: line {row} from byte {begin}" for row in (number, number + 1)]


def test_parts_and_fields_survive_json(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text("yksi kaksi\n" * 300, encoding="utf-8")
    inputs = find_inputs([f"eng_Latn={tmp_path / 'a'}", f"fin_Latn={tmp_path / 'b'}"], format="text")
    fields = Fields(kind="monolingual", pair_rule=(("a", "b"),), language_map=(("en", "eng_Latn"),))
    parts = plan_parts(inputs, fields, 1000)
    assert len(parts) > 4 and len({*parts}) == len(parts)
    for part in parts:
        assert Part.from_tree(json.loads(json.dumps(part.to_tree()))) == part
    assert Fields.from_tree(json.loads(json.dumps(fields.to_tree()))) == fields
    assert sum(part.num_bytes for part in parts) == sum(file.num_bytes for file in inputs)
