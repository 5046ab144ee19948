"""Which files arguments mean, in which order and format, and what is refused before any work."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_xalign.data.inputs import (
    Fields,
    InputFile,
    LanguageCodes,
    Reading,
    find_inputs,
    languages_of,
    plan_parts,
    read_part,
)
from megatron_xalign.errors import ConfigError, CorpusError

FINNISH = Fields(kind="monolingual", language="fin_Latn")
PAIR = Fields(
    kind="pairs", languages=("eng_Latn", "fin_Latn"), language_map=(("en", "eng_Latn"), ("fi", "fin_Latn"))
)


def make(folder: Path, *names: str) -> None:
    shuffled = list(names)
    random.Random(1).shuffle(shuffled)
    for name in shuffled:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}\n", encoding="utf-8")


def names_of(files: list[InputFile], folder: Path) -> list[str]:
    return [file.path.relative_to(folder).as_posix() for file in files]


def test_folders_are_searched_in_order_of_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "b/2.jsonl", "b/10.jsonl.gz", "a/x.parquet", "a.txt", "c.jsonl.zst", ".hidden.jsonl", ".git/x.jsonl",
         "README.md", "MANIFEST.json", "b/c/d.tsv")
    found = find_inputs([tmp_path], fields=FINNISH)
    expected = ["a/x.parquet", "a.txt", "b/10.jsonl.gz", "b/2.jsonl", "b/c/d.tsv", "c.jsonl.zst"]
    assert names_of(found, tmp_path) == expected
    assert [file.format for file in found] == ["parquet", "text", "jsonl", "jsonl", "tsv", "jsonl"]
    assert [file.compression for file in found] == [None, None, "gz", None, None, "zst"]
    assert "2 files in the folders are left out" in caplog.text and "README.md" in caplog.text


def test_arguments_keep_their_order_and_patterns_are_sorted(tmp_path: Path) -> None:
    make(tmp_path, "z.jsonl", "p/b.jsonl", "p/a.jsonl", "p/q/c.jsonl", "[x].jsonl", "a=b.jsonl", "p/q/README.md")
    found = find_inputs([str(tmp_path / "z.jsonl"), str(tmp_path / "p" / "*.jsonl")], fields=FINNISH)
    assert names_of(found, tmp_path) == ["z.jsonl", "p/a.jsonl", "p/b.jsonl"]
    found = find_inputs([str(tmp_path / "p" / "**" / "*.jsonl"), str(tmp_path / "[x].jsonl")], fields=FINNISH)
    assert names_of(found, tmp_path) == ["p/a.jsonl", "p/b.jsonl", "p/q/c.jsonl", "[x].jsonl"]
    for pattern in ("p/**", "p/*"):
        found = find_inputs([f"{tmp_path}/{pattern}"], fields=FINNISH)
        assert names_of(found, tmp_path) == ["p/a.jsonl", "p/b.jsonl", "p/q/c.jsonl"]
    found = find_inputs([f"{tmp_path}/p/**/*.jsonl"], fields=FINNISH)
    assert names_of(found, tmp_path) == ["p/a.jsonl", "p/b.jsonl", "p/q/c.jsonl"]
    found = find_inputs([f"fi={tmp_path}/p", str(tmp_path / "a=b.jsonl")], fields=FINNISH)
    assert [file.language for file in found] == ["fi"] * 3 + [None]


def test_a_language_before_the_path_wins_over_that_of_all_files(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x\n", encoding="utf-8")
    fields = Fields(kind="monolingual", language="fin_Latn", language_map=(("EN", "eng_Latn"),))
    inputs = find_inputs([f"en_US={tmp_path / 'a.txt'}", tmp_path / "b.txt"], fields=fields)
    (part,) = plan_parts(inputs, fields)
    assert [batch.language for batch in read_part(part, fields)] == ["eng_Latn", "fin_Latn"]
    assert languages_of(inputs, fields) == ("eng_Latn", "fin_Latn")


def test_aligned_files_find_their_partners(tmp_path: Path) -> None:
    make(tmp_path / "s", "Books.en-fi.en", "Books.en-fi.fi", "Books.en-fi.ids", "Wiki.en.gz", "Wiki.fi", "LICENSE")
    found = find_inputs([tmp_path / "s"], fields=PAIR)
    assert names_of(found, tmp_path) == ["s/Books.en-fi.en", "s/Books.en-fi.fi", "s/Wiki.en.gz", "s/Wiki.fi"]
    assert {file.format for file in found} == {"moses"}
    assert [file.aligned_set for file in found] == [0, 0, 1, 1]
    given = [f"fin_Latn={tmp_path}/s/*.fi", f"eng_Latn={tmp_path}/s/*.en*"]
    for chosen in (given, [*reversed(given)]):
        with pytest.raises(CorpusError, match="format"):
            find_inputs(chosen, fields=FINNISH)
    (tmp_path / "s/Books.en-fi.ids").unlink()
    given[1] = f"eng_Latn={tmp_path}/s/*.en"
    (tmp_path / "s/Wiki.en.gz").rename(tmp_path / "s/Wiki.en")
    found = find_inputs(given, fields=PAIR)
    assert names_of(found, tmp_path) == ["s/Books.en-fi.fi", "s/Books.en-fi.en", "s/Wiki.fi", "s/Wiki.en"]
    assert languages_of(found, Fields(kind="pairs")) == ("fin_Latn", "eng_Latn")


@pytest.mark.parametrize(
    ("names", "arguments", "message"),
    [
        ([], [], "no input is named"),
        ([], ["x.jsonl"], "x.jsonl does not exist"),
        ([], ["fi=~/nowhere.jsonl"], "^/.*/nowhere.jsonl does not exist"),
        (["x.jsonl"], [""], "one of the inputs is empty"),
        ([], ["*.jsonl"], "no file has a name like this"),
        ([], ["."], "no file of a known format"),
        (["x.csv"], ["x.csv"], "tells no format"),
        (["x.parquet.gz"], ["x.parquet.gz"], "parquet compresses by itself"),
        (["x.jsonl"], ["x.jsonl", "x.jsonl"], "named twice"),
        (["x.jsonl"], ["x.jsonl", "./x.jsonl"], "named twice"),
        (["x.jsonl"], ["x.jsonl", "*.jsonl"], "named twice"),
        (["c.en"], ["c.en"], "has no partner"),
        (["c.en", "d.fi"], ["c.en", "d.fi"], "has no partner"),
        (["c.en", "c.eng_Latn"], ["c.en", "c.eng_Latn"], "in the same language"),
    ],
)
def test_what_cannot_be_input_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], arguments: list[str], message: str
) -> None:
    make(tmp_path, *names)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match=message):
        find_inputs(arguments, fields=PAIR)


def test_the_same_file_by_another_name_is_refused_too(tmp_path: Path) -> None:
    make(tmp_path, "x.jsonl")
    (tmp_path / "y.jsonl").symlink_to(tmp_path / "x.jsonl")
    with pytest.raises(CorpusError, match=r"y\.jsonl is named twice \(it is .*x\.jsonl\)"):
        find_inputs([tmp_path], fields=FINNISH)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(CorpusError, match="not a regular file"):
        find_inputs([tmp_path / "x.jsonl"], fields=FINNISH)
    (tmp_path / "broken.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(CorpusError, match="cannot be read: No such file"):
        find_inputs([tmp_path / "broken.jsonl"], fields=FINNISH)


@pytest.mark.parametrize(
    ("name", "fields", "language", "message"),
    [
        ("x.jsonl", Fields(kind="monolingual"), None, "which language is it"),
        ("x.txt", Fields(kind="monolingual", language_key="lang"), None, "which language is it"),
        ("x.tmx", FINNISH, None, "read it as pairs"),
        ("x.txt", PAIR, None, "holds no pairs"),
        ("x.jsonl", PAIR, "fi", "in more than one language"),
        ("x.tsv", Fields(kind="pairs"), None, "name the languages of its columns"),
    ],
)
def test_fields_that_do_not_fit_a_file_are_refused(
    tmp_path: Path, name: str, fields: Fields, language: str | None, message: str
) -> None:
    make(tmp_path, name)
    inputs = find_inputs([f"{language}={tmp_path / name}" if language else tmp_path / name], format="auto")
    with pytest.raises(ConfigError, match=message):
        plan_parts(inputs, fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"languages": ("a",)}, "two or more"),
        ({"languages": ("a", "a")}, "names a twice"),
        ({"side_keys": ("x",), "languages": ("a", "b")}, "two or more"),
        ({"side_keys": ("x", "x"), "languages": ("a", "b")}, "used twice"),
        ({"side_keys": ("x", "y")}, "need 2 languages"),
        ({"side_keys": ("x", "y"), "side_language_keys": ("l",)}, "as many as"),
        ({"side_keys": ("x", "y"), "side_language_keys": ("l", "x")}, "used twice"),
        ({"pair_rule": "most"}, "pair_rule='most'"),
        ({"pair_rule": (("a", "c"),), "languages": ("a", "b")}, "c is not among"),
        ({"pair_rule": (("a", "b"), ("b", "a")), "languages": ("a", "b")}, "names a pair of languages twice"),
        ({"language_map": (("en", "x"), ("EN", "y"))}, "says that EN is x and that it is y"),
        ({"text_unit": "page"}, "text_unit='page'"),
        ({"max_line_bytes": 0}, "max_line_bytes=0"),
    ],
)
def test_fields_that_contradict_one_another_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Fields(kind="pairs", **options)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("en", "eng_Latn"), ("EN", "eng_Latn"), ("en-US", "eng_Latn"), ("en_gb", "eng_Latn"), ("eng_Latn", "eng_Latn"),
        ("ENG-latn", "eng_Latn"), ("zh", "zho_Hans"), ("zh-CN", "zho_Hans"), ("zh-TW", "zho_Hant"), ("zh_HK", "zh_HK"),
        ("sr-Latn", "sr-Latn"), ("es-419", "spa_Latn"), ("fi", "fin_Latn"), ("xx", "xx"), ("", ""),
        ("en-x-y", "en-x-y"),
    ],
)
def test_codes_are_mapped_without_regard_to_case_and_region(code: str, found: str) -> None:
    given = {
        "en": "eng_Latn", "zh": "zho_Hans", "zh-tw": "zho_Hant", "sr": "srp_Cyrl", "es": "spa_Latn", "fi": "fin_Latn",
    }
    fields = Fields(kind="pairs", languages=("eng_Latn", "fin_Latn"), language_map=tuple(given.items()))
    assert LanguageCodes(fields)(code) == found


def test_parts_are_even_and_depend_on_inputs_alone(tmp_path: Path) -> None:
    (tmp_path / "big.jsonl").write_text(json.dumps({"text": "x" * 90}) + "\n" * 1000, encoding="utf-8")
    for number in range(30):
        (tmp_path / f"small{number:02}.jsonl.gz").write_bytes(gzip.compress(b'{"text": "y"}\n'))
    inputs = find_inputs([tmp_path], fields=FINNISH)
    parts = plan_parts(inputs, FINNISH, 500)
    assert parts == plan_parts(inputs, FINNISH, 500)
    assert all(piece.num_bytes <= 500 for part in parts for piece in part.pieces)
    assert [piece.files[0].path for part in parts for piece in part.pieces if piece.unit == "file"] == [
        file.path for file in inputs[1:]
    ]
    assert len(parts) < len(inputs)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_aligned_files_of_unequal_length_are_refused_before_work(tmp_path: Path, suffix: str) -> None:
    pack = gzip.compress if suffix else bytes
    (tmp_path / f"c.en{suffix}").write_bytes(pack(b"a\n" * 1000))
    (tmp_path / f"c.fi{suffix}").write_bytes(pack(b"b\n" * 1000 + b"\n"))
    inputs = find_inputs([tmp_path], fields=PAIR)
    with pytest.raises(CorpusError, match=r"unequal numbers of lines: .*c\.en\S* 1,000, .*c\.fi\S* 1,001"):
        plan_parts(inputs, PAIR, 100)


def test_aligned_files_without_a_wanted_pair_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "a", "b")
    inputs = find_inputs([f"de={tmp_path}/a", f"en={tmp_path}/b"], fields=PAIR)
    with pytest.raises(CorpusError, match="no pair that is asked for"):
        plan_parts(inputs, PAIR)


@pytest.mark.parametrize(
    ("content", "name"),
    [("yksi".encode("utf-16"), "UTF-16"), (b"\xfe\xff\0y", "UTF-16"), ('{"text": 1}'.encode("utf-16-le"), "UTF-16"),
     ("yksi".encode("utf-32"), "UTF-32"), (gzip.compress(b"{}", mtime=0), "gzip"), (b"PAR1\0\0\0\0", "parquet")],
)
@pytest.mark.parametrize("packed", [False, True])
def test_files_in_another_encoding_or_format_are_refused_with_the_way_out(
    tmp_path: Path, content: bytes, name: str, packed: bool
) -> None:
    path = tmp_path / ("x.jsonl.gz" if packed else "x.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    inputs = find_inputs([path], fields=FINNISH)
    with pytest.raises(CorpusError, match=rf"{name}.*(iconv -f|rename)"):
        # What is compressed is not opened to plan.
        for part in plan_parts(inputs, FINNISH):
            list(read_part(part, FINNISH, on_error="skip"))
    if not packed:
        with pytest.raises(CorpusError, match=name):
            plan_parts(inputs, FINNISH)


def test_a_file_that_changed_after_it_was_found_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "x.jsonl")
    (part,) = plan_parts(find_inputs([tmp_path], fields=FINNISH), FINNISH)
    (tmp_path / "x.jsonl").write_text('{"text": "more"}\n', encoding="utf-8")
    with pytest.raises(CorpusError, match="has changed since the job was planned"):
        list(read_part(part, FINNISH))
    (tmp_path / "x.jsonl").unlink()
    with pytest.raises(CorpusError, match=r"x\.jsonl does not exist"):
        list(read_part(part, FINNISH, reading=Reading()))
