"""Damaged archives, hostile lines and wrong types: named with file, line and reason, counted or fatal, never silent."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_xalign.data.documents import read_probe
from megatron_xalign.data.inputs import Fields, OnError, Reading, TextBatch, find_inputs, plan_parts, read_part
from megatron_xalign.errors import CorpusError

FINNISH = Fields(kind="monolingual", language="fin_Latn")
PAIR = Fields(kind="pairs", languages=("en", "fi"))
SIDES = Fields(kind="pairs", languages=("en", "fi"), side_keys=("a", "b"))
NAMED = Fields(kind="pairs", languages=("en", "fi"), side_keys=("a", "b"), side_language_keys=("la", "lb"))


def pack(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    return zstandard.ZstdCompressor(write_checksum=True).compress(content) if suffix == ".zst" else content


def read(
    path: Path, fields: Fields, on_error: OnError = "raise", *, part_bytes: int = 1 << 20, batch_bytes: int = 1 << 16
) -> tuple[list[TextBatch], Reading]:
    reading = Reading()
    parts = plan_parts(find_inputs([path], fields=fields), fields, part_bytes)
    batches = [
        batch for part in parts
        for batch in read_part(part, fields, on_error=on_error, reading=reading, batch_bytes=batch_bytes)
    ]
    return batches, reading


def texts_of(batches: list[TextBatch]) -> list[str]:
    return [text for batch in batches for text in batch.texts]


@pytest.mark.parametrize(
    ("fields", "line", "reason"),
    [
        (FINNISH, "{", "not JSON"),
        (FINNISH, "[1]", "not a JSON object but list"),
        (FINNISH, "[", "not JSON: .*`jq -c '.\\[\\]' FILE` makes lines of it"),
        (FINNISH, '[{"text": "a"},', "not JSON: .*this begins a list"),
        (FINNISH, "{", "not JSON: .*this goes over several"),
        (FINNISH, "null", "not a JSON object but null"),
        (FINNISH, '"text"', "not a JSON object but str"),
        (FINNISH, "{}", 'no "text"'),
        (FINNISH, {"id": "1"}, r'no "text" \(its keys are id\)'),
        (FINNISH, {"text": None}, '"text" is null, not text'),
        (FINNISH, {"text": 3}, '"text" is int, not text'),
        (FINNISH, {"text": ["a"]}, '"text" is list, not text'),
        (FINNISH, '{"text": "\\ud800"}', "half of a surrogate pair"),
        (FINNISH, '{"text": "a"} {"text": "b"}', "not JSON"),
        (FINNISH, '{"text": "a\0b"}', "not JSON"),
        (FINNISH, "[" * 100_000, "not JSON"),
        (FINNISH, '{"text": "a", "x": ' + "[" * 100_000 + "}", "not JSON"),
        (FINNISH, b'{"text": "\xe4iti"}', "not UTF-8 at byte 10 of the line .0xE4.; .*iconv"),
        (FINNISH, b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
        (FINNISH, b'{"text": "\xc0\x80"}', "not UTF-8"),
        (FINNISH, '{"text": "a"}'.encode("utf-16-le"), "not JSON"),
        (Fields(kind="monolingual", language_key="l"), {"text": "a"}, 'no "l"'),
        (Fields(kind="monolingual", language_key="l"), {"text": "a", "l": []}, '"l" is list'),
        (Fields(kind="monolingual", language_key="l"), {"text": "a", "l": 1}, '"l" is int'),
        (PAIR, {"en": "a", "fi": "b"}, 'no "texts" that maps language codes to text .its keys are en, fi'),
        (PAIR, {"texts": ["a", "b"]}, 'no "texts" that maps'),
        (PAIR, {"texts": {"en": "a"}}, 'no "fi"'),
        (PAIR, {"texts": {"en": "a", "fi": None}}, 'no "fi"'),
        (PAIR, {"texts": {"en": "a", "fi": 1}}, '"fi" is int, not text'),
        (SIDES, {"a": "a"}, 'no "b"'),
        (SIDES, {"a": "a", "b": None}, '"b" is null'),
        (NAMED, {"a": "a", "b": "b", "la": "en"}, 'no "lb"'),
        (NAMED, {"a": "a", "b": "b", "la": "en", "lb": 1}, '"lb" is int'),
    ],
)
def test_a_malformed_line_is_fatal_or_counted(tmp_path: Path, fields: Fields, line: Any, reason: str) -> None:
    texts = {"en": "good", "fi": "hyvä"}
    good = {"text": "good", "texts": texts, "a": "good", "b": "hyvä", "la": "en", "lb": "fi", "l": "fi"}
    encoded = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([json.dumps(good).encode(), b"", encoded, json.dumps(good).encode()]))
    with pytest.raises(CorpusError, match=rf"x\.jsonl:3: .*{reason}.*on-error skip"):
        read(path, fields)
    for part_bytes in (1 << 20, 30):
        batches, reading = read(path, fields, "skip", part_bytes=part_bytes)
        assert texts_of(batches) == ["good", "good"]
        assert reading.malformed == 1 and reading.skipped.total() == 2 and reading.skipped["blank line"] == 1
        (example,) = reading.examples
        assert example.startswith(f"{path}:3: ")


def test_odd_but_well_formed_lines_are_read(tmp_path: Path) -> None:
    lines = [
        b'{"text": "a\\u0000b"}', b'{"text": "first", "text": "last"}', b'{"te\\u0078t": "escaped key"}',
        b'{"text": "nan", "score": NaN}', b'{"text": "long number", "n": ' + b"9" * 400 + b"}",
        b'{"text": "\\ud83d\\ude00"}', b'\t{"text": "space"} ', '{"text": "\u2028"}'.encode(),
    ]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\r\n".join(lines))
    batches, reading = read(path, FINNISH)
    assert texts_of(batches) == ["a\0b", "last", "escaped key", "nan", "long number", "😀", "space", "\u2028"]
    assert not reading.skipped


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_an_archive_cut_anywhere_is_an_error_that_names_what_was_reached(
    tmp_path: Path, suffix: str, on_error: OnError
) -> None:
    lines = [json.dumps({"text": f"{number * 7919 % 1009} rivi {number}"}) + "\n" for number in range(30_000)]
    whole = pack("".join(lines).encode(), suffix)
    path = tmp_path / f"x.jsonl{suffix}"
    reached = []
    for cut in [0, 1, 3, 10, 17, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 4, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        reading = Reading()
        (part,) = plan_parts(find_inputs([path], fields=FINNISH), FINNISH)
        with pytest.raises(CorpusError, match=r"x\.jsonl\S* is not a whole .* file") as caught:
            for batch in read_part(part, FINNISH, on_error=on_error, reading=reading, batch_bytes=10_000):
                assert batch.texts == [json.loads(lines[number])["text"] for number in batch.numbers]
        # Half a line at the cut is not taken for a malformed one.
        assert not reading.skipped and not reading.sources
        assert f"{reading.documents:,} documents" in str(caught.value)
        reached.append(reading.documents)
    assert reached == sorted(reached) and reached[5] > 0 and reached[-1] == 30_000


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_an_archive_with_a_flipped_bit_or_rubbish_at_its_end_is_an_error(tmp_path: Path, suffix: str) -> None:
    whole = pack(b"".join(b'{"text": "%d"}\n' % (number * 7919) for number in range(2000)), suffix)
    path = tmp_path / f"x.jsonl{suffix}"
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :]
    for content in (flipped, whole + b"rubbish", b"plain text", whole[::-1]):
        path.write_bytes(content)
        with pytest.raises(CorpusError, match="is not a whole"):
            read(path, FINNISH, "skip")


def test_zeros_after_a_gzip_file_are_padding(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    first, second = gzip.compress(b'{"text": "a"}\n'), gzip.compress(b'{"text": "b"}\n')
    path.write_bytes(first + bytes(100) + second + bytes(3_000_000))
    assert texts_of(read(path, FINNISH)[0]) == ["a", "b"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_line_longer_than_the_limit_is_named_wherever_it_is(tmp_path: Path, suffix: str) -> None:
    fields = Fields(kind="monolingual", language="fin_Latn", max_line_bytes=1000)
    exact = json.dumps({"text": "x" * 988})
    assert len(exact) == 1000
    long = json.dumps({"text": "y" * 5000})
    path = tmp_path / f"x.jsonl{suffix}"
    for lines in ([exact, long, exact], [long, exact], [exact, long], [long], [long, long, exact, long, "", exact]):
        for end in ("\n", ""):
            path.write_bytes(pack(("\n".join(lines) + end).encode(), suffix))
            for part_bytes, batch_bytes in ((1 << 20, 100), (1 << 20, 1 << 20), (700, 2000)):
                batches, reading = read(path, fields, "skip", part_bytes=part_bytes, batch_bytes=batch_bytes)
                assert len(texts_of(batches)) == lines.count(exact)
                assert reading.skipped["longer than max_line_bytes=1,000"] == reading.malformed == lines.count(long)
                wheres = [batch.where(row) for batch in batches for row in range(len(batch.texts))]
                assert wheres == [f"{path}:{number}" for number, line in enumerate(lines, 1) if line == exact]
                with pytest.raises(CorpusError, match=rf":{lines.index(long) + 1}: longer than max_line_bytes=1,000"):
                    read(path, fields, part_bytes=part_bytes, batch_bytes=batch_bytes)


def test_a_long_line_of_an_aligned_file_drops_its_record_only(tmp_path: Path) -> None:
    for number in range(6):
        english = [f"line {row}" for row in range(6)]
        english[number] = "x" * 500
        (tmp_path / "c.en").write_text("\n".join(english), encoding="utf-8")
        (tmp_path / "c.fi").write_text("".join(f"rivi {row}\n" for row in range(6)), encoding="utf-8")
        fields = Fields(kind="pairs", languages=("en", "fi"), max_line_bytes=100)
        for batch_bytes in (1, 10, 1000):
            batches, reading = read(tmp_path, fields, "skip", batch_bytes=batch_bytes)
            pairs = [pair for batch in batches for pair in zip(batch.texts, batch.others or [], strict=True)]
            assert pairs == [(f"line {row}", f"rivi {row}") for row in range(6) if row != number]
            assert reading.skipped == {"longer than max_line_bytes": 1}
            assert reading.examples == [f"{tmp_path / 'c.en'}:{number + 1}: longer than max_line_bytes"]


@pytest.mark.parametrize("part_bytes", [1 << 20, 40, 7])
def test_a_paragraph_longer_than_the_limit_is_left_out_whole(tmp_path: Path, part_bytes: int) -> None:
    path = tmp_path / "x.txt"
    fields = Fields(kind="monolingual", language="fin_Latn", text_unit="paragraph", max_line_bytes=20)
    paragraphs = ["a\nb", f"c\n{'y' * 50}\nd", "x" * 30, f"{'z' * 9}\n{'z' * 10}", "e", "w" * 21]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    for batch_bytes in (1, 30, 1000):
        batches, reading = read(path, fields, "skip", part_bytes=part_bytes, batch_bytes=batch_bytes)
        assert texts_of(batches) == [paragraphs[0], paragraphs[3], paragraphs[4]]
        assert [example.split(": ")[0].rsplit(":", 1)[1] for example in reading.examples] == ["4", "8", "15"]


def test_lines_in_another_encoding_are_named_in_every_format(tmp_path: Path) -> None:
    latin = "äiti\tmother\n".encode("latin-1")
    good = "isä\tfather\n".encode()
    (tmp_path / "x.tsv").write_bytes(good + latin + good)
    (tmp_path / "x.txt").write_bytes(good + latin + good)
    (tmp_path / "c.fi").write_bytes("isä\n".encode() + "äiti\n".encode("latin-1") + "isä\n".encode())
    (tmp_path / "c.en").write_bytes(b"father\nmother\nfather\n")
    for name, fields, count in (("x.tsv", PAIR, 2), ("x.txt", FINNISH, 2), ("c.*", PAIR, 2)):
        path = tmp_path / name
        with pytest.raises(CorpusError, match=r"\.(tsv|txt|fi):2: not UTF-8.*iconv"):
            read(path, fields)
        batches, reading = read(path, fields, "skip")
        assert len(texts_of(batches)) == count and reading.skipped == {"not UTF-8": 1}
    paragraph = Fields(kind="monolingual", language="fi", text_unit="paragraph")
    (tmp_path / "y.txt").write_bytes(good + b"\n" + good + latin + b"\n" + good)
    batches, reading = read(tmp_path / "y.txt", paragraph, "skip")
    assert len(texts_of(batches)) == 2 and reading.examples[0].startswith(f"{tmp_path / 'y.txt'}:3: not UTF-8")
    whole = Fields(kind="monolingual", language="fi", text_unit="file")
    with pytest.raises(CorpusError, match=r"y\.txt: not UTF-8"):
        read(tmp_path / "y.txt", whole)


def test_rows_of_a_tsv_with_other_columns_than_the_first_are_malformed(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_bytes(b"a\tb\n\nc\nd\te\tf\n\t\ng\0\th\n")
    with pytest.raises(CorpusError, match=r"x\.tsv:3: not as many columns as in the first line: 1, not 2"):
        read(path, PAIR)
    for part_bytes in (1 << 20, 3):
        batches, reading = read(path, PAIR, "skip", part_bytes=part_bytes)
        assert texts_of(batches) == ["a", "", "g\0"]
        assert reading.malformed == 2 and reading.skipped["blank line"] == 1
    with pytest.raises(CorpusError, match=r"there is no column 4; the file has 2 columns"):
        read(path, Fields(kind="pairs", languages=("en", "fi"), side_keys=("1", "4")))
    with pytest.raises(CorpusError, match=r"there is no column src; the file has 2 columns, named a, b"):
        read(path, Fields(kind="pairs", languages=("en", "fi"), side_keys=("src", "tgt")))
    path.write_bytes(b"\na\tb\n")
    with pytest.raises(CorpusError, match="there is no column 2; the file has 1 columns"):
        read(path, PAIR)


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", "x.tsv", "x.jsonl.gz", "x.tsv.zst", "x.txt.zst"])
def test_an_empty_file_has_no_documents(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(pack(b"", path.suffix))
    batches, reading = read(path, FINNISH)
    assert not batches and not reading.skipped and len(reading.sources) == 1
    path.write_bytes(pack(b"\xef\xbb\xbf", path.suffix))
    if ".tsv" not in name:
        assert not read(path, FINNISH)[0]


def test_no_aligned_files_have_no_documents(tmp_path: Path) -> None:
    (tmp_path / "c.en").touch()
    (tmp_path / "c.fi").touch()
    assert not read(tmp_path, PAIR)[0]


def test_reasons_and_examples_stay_few_whatever_a_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(
        "".join(json.dumps({"text": "a", "lang": f"l{number}"}) + "\n{\n" for number in range(5000)), encoding="utf-8"
    )
    _, reading = read(path, Fields(kind="monolingual", language_key="lang", languages=("fi",)), "skip")
    assert reading.skipped.total() == 10_000 and reading.malformed == 5000
    assert len(reading.skipped) <= 201 and len(reading.examples) == 10


def test_parquet_that_is_damaged_or_of_other_columns_is_named(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [str(row) * 50 for row in range(3000)]}), path, row_group_size=500)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-1], whole[:-6] + b"\xff\xff\xff\x7f" + whole[-4:], b"PAR1" * 10):
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=r"x\.parquet is not a whole parquet file"):
            read(path, FINNISH, "skip")
    path.write_bytes(whole[:5000] + bytes(200) + whole[5200:])
    with pytest.raises(CorpusError, match=r"x\.parquet is damaged after row \d+"):
        read(path, FINNISH, "skip")
    pq.write_table(pa.table({"n": [1, 2], "text": [1, 2]}), path)
    with pytest.raises(CorpusError, match="column 'text' is int64, not text"):
        read(path, FINNISH)
    with pytest.raises(CorpusError, match=r"there is no column named 'body'; its columns are n \(int64\), text"):
        read(path, Fields(kind="monolingual", language="fi", text_key="body"))
    with pytest.raises(CorpusError, match="'text' is int64, not a struct or map"):
        read(path, Fields(kind="pairs", languages=("en", "fi"), texts_key="text"))


def test_null_and_ill_encoded_values_of_parquet_are_malformed(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    raw = pa.array([b"a", None, b"\xff", b"d"], pa.binary())
    texts = pa.StringArray.from_buffers(4, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    pq.write_table(pa.table({"text": texts}), path)
    with pytest.raises(CorpusError, match=r"x\.parquet: row 2: \"text\" is null"):
        read(path, FINNISH, batch_bytes=1)
    for batch_bytes in (1, 1000):
        batches, reading = read(path, FINNISH, "skip", batch_bytes=batch_bytes)
        assert texts_of(batches) == ["a", "d"]
        assert reading.skipped == {'"text" is null, not text': 1, "not UTF-8": 1}
        assert [batch.where(row) for batch in batches for row in range(len(batch.texts))] == [
            f"{path}: row 1", f"{path}: row 4"
        ]
    struct = pa.array([{"en": "a", "fi": "b"}, {"en": "c", "fi": None}, None, {"en": "e", "fi": "f"}])
    pq.write_table(pa.table({"texts": struct}), path)
    batches, reading = read(path, PAIR, "skip")
    assert texts_of(batches) == ["a", "e"] and batches[0].others == ["b", "f"]
    assert reading.skipped == {'no "fi"': 1, 'no "en"': 1}


MEMORY = """
import resource, sys
from megatron_xalign.data.inputs import Fields, find_inputs, plan_parts, read_part
fields = Fields(kind="monolingual", language="fi", max_line_bytes=int(sys.argv[2]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
parts = plan_parts(find_inputs([sys.argv[1]], fields=fields), fields)
print(sum(len(text) for part in parts for batch in read_part(part, fields, on_error="skip") for text in batch.texts))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def measured(path: Path, max_line_bytes: int = 1 << 30) -> tuple[int, int]:
    """Characters read, and MiB of memory it took, in a process of its own."""
    command = [sys.executable, "-c", MEMORY, str(path), str(max_line_bytes)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    characters, megabytes = run.stdout.split()
    return int(characters), int(megabytes)


def test_a_line_of_50_megabytes_takes_a_few_times_its_size_in_memory(tmp_path: Path) -> None:
    long = b'{"text": "' + b"abcdefghi " * 5_000_000 + b'"}\n'
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + long + b'{"text": "b"}\n')
    characters, megabytes = measured(path)
    assert characters == 50_000_002
    assert megabytes < 350
    # Over the limit it is not held at all.
    characters, megabytes = measured(path, 10_000_000)
    assert characters == 2 and megabytes < 60


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_an_archive_of_a_gigabyte_of_nothing_does_not_fill_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.jsonl{suffix}"
    block = b" " * (1 << 20)
    with (gzip.open(path, "wb", 1) if suffix == ".gz" else zstandard.open(path, "wb")) as file:
        for _ in range(1024):
            file.write(block)
    characters, megabytes = measured(path, 10_000_000)
    assert characters == 0 and megabytes < 150


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_probe_may_be_compressed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"probe.jsonl{suffix}"
    lines: list[dict[str, Any]] = [
        {"id": 1, "texts": {"en": "a", "fi": "b"}}, {"texts": {"en": "c", "fi": "d", "de": "e"}}
    ]
    path.write_bytes(pack("".join(json.dumps(line) + "\n" for line in lines).encode(), suffix))
    assert [(pair.id, dict(pair.texts)) for pair in read_probe(path)] == [
        ("1", lines[0]["texts"]), (f"{path.name}:2", lines[1]["texts"])
    ]
    path.write_bytes(pack(b'{"texts": {}}\n', suffix))
    with pytest.raises(CorpusError, match=':1: "texts" holds no text'):
        list(read_probe(path))
