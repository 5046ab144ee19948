"""TMX files: what ``xml.dom`` finds in them, without ever following what hostile ones refer to."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.dom import minidom
from xml.sax.saxutils import escape, quoteattr

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_xalign.data.inputs import Fields, OnError, Reading, TextBatch, find_inputs, plan_parts, read_part
from megatron_xalign.errors import CorpusError

PAIR = Fields(
    kind="pairs", languages=("eng_Latn", "fin_Latn"), language_map=(("en", "eng_Latn"), ("fi", "fin_Latn"))
)
HEADER = '<header srclang="en" datatype="plaintext" segtype="sentence" adminlang="en" o-tmf="x" creationtool="x"/>'


def tmx(body: str, *, declaration: str = '<?xml version="1.0" encoding="UTF-8"?>', doctype: str = "") -> str:
    return f"{declaration}\n{doctype}<tmx version=\"1.4\">{HEADER}<body>\n{body}\n</body></tmx>\n"


def unit(english: str, finnish: str, attributes: str = "") -> str:
    """Of segments that are markup already."""
    first = f'<tuv xml:lang="en"><seg>{english}</seg></tuv>'
    return f'<tu {attributes}>{first}<tuv xml:lang="fi"><seg>{finnish}</seg></tuv></tu>'


def read(
    path: Path, content: str | bytes, fields: Fields = PAIR, on_error: OnError = "raise", batch_bytes: int = 1 << 20
) -> tuple[list[tuple[str, str]], list[TextBatch], Reading]:
    encoded = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(encoded) if path.suffix == ".gz" else encoded)
    reading = Reading()
    (part,) = plan_parts(find_inputs([path], fields=fields), fields)
    batches = list(read_part(part, fields, on_error=on_error, reading=reading, batch_bytes=batch_bytes))
    pairs = [pair for batch in batches for pair in zip(batch.texts, batch.others or [], strict=True)]
    return pairs, batches, reading


def character_data(node: Any) -> str:
    return "".join(child.data if child.nodeType in (3, 4) else character_data(child) for child in node.childNodes)


def by_dom(content: str) -> Iterator[tuple[str, str]]:
    """The oracle: segments of a whole tree, codes taken out of it."""
    document = minidom.parseString(content.encode())
    for name in ("bpt", "ept", "it", "ph", "ut"):
        for code in list(document.getElementsByTagName(name)):
            if code.parentNode is not None:
                code.parentNode.removeChild(code)
    for element in document.getElementsByTagName("tu"):
        texts = {
            variant.getAttribute("xml:lang"): character_data(variant.getElementsByTagName("seg")[0])
            for variant in element.getElementsByTagName("tuv")
        }
        yield texts["en"], texts["fi"]


CHARACTER = st.characters(min_codepoint=32, exclude_categories=["Cs"], exclude_characters="\ufffe\uffff")
TEXT = st.text(st.one_of(st.sampled_from("<>&\"' \t\näö漢😀"), CHARACTER), max_size=15).map(escape)
INLINE = st.tuples(
    st.sampled_from(["<bpt i='1'>{}</bpt>", "<ept i='1'>{}</ept>", "<ph>{}<sub>note</sub></ph>",
                     "<it pos='begin'>{}</it>", "<hi>{}</hi>", "<hi>a<bpt i='2'>{}</bpt>b</hi>", "<!-- {} -->", "{}"]),
    TEXT,
).map(lambda made: made[0].format(made[1].replace("--", "").removesuffix("-")))
SEGMENT = st.lists(st.one_of(TEXT, INLINE), max_size=4).map("".join)


@given(units=st.lists(st.tuples(SEGMENT, SEGMENT), max_size=8), batch_bytes=st.integers(1, 50), packed=st.booleans())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_segments_are_those_a_whole_tree_has_without_their_codes(
    tmp_path: Path, units: list[tuple[str, str]], batch_bytes: int, packed: bool
) -> None:
    content = tmx("\n".join(unit(*sides) for sides in units))
    path = tmp_path / ("x.tmx.gz" if packed else "x.tmx")
    pairs, batches, reading = read(path, content, batch_bytes=batch_bytes)
    assert pairs == list(by_dom(content))
    lines = [content[: content.index("<tu ")].count("\n") + 1] if units else []
    for sides in units[:-1]:
        lines.append(lines[-1] + unit(*sides).count("\n") + 1)
    wheres = [batch.where(row) for batch in batches for row in range(len(batch.texts))]
    assert wheres == [f"{path}:{line}" for line in lines]
    assert reading.bytes_read == path.stat().st_size


def test_codes_of_languages_are_mapped_and_variants_count_once(tmp_path: Path) -> None:
    body = (
        '<tu tuid="7"><tuv lang="FI-fi"><seg>kissa</seg></tuv><tuv xml:lang="en-US"><seg>cat</seg></tuv>'
        '<tuv xml:lang="en-GB"><seg>moggy</seg></tuv></tu>'
        '<tu><tuv xml:lang="de"><seg>Katze</seg></tuv><tuv xml:lang="fi"><seg>kissa</seg></tuv></tu>'
        '<tu><tuv xml:lang="en"><prop type="x">y</prop><seg/></tuv><tuv xml:lang="fi"><seg></seg></tuv></tu>'
        '<tu><tuv xml:lang="en"><seg>alone</seg></tuv></tu>'
    )
    pairs, batches, reading = read(tmp_path / "x.tmx", tmx(body))
    assert pairs == [("cat", "kissa"), ("", "")]
    assert batches[0].ids is not None and batches[0].ids[0] == "7"
    assert batches[0].languages == ["eng_Latn"] * 2 and batches[0].other_languages == ["fin_Latn"] * 2
    assert reading.skipped == {
        "a second text in the same language in its record": 1, "no pair in the languages asked for (de, fin_Latn)": 1,
        "no pair in the languages asked for (eng_Latn)": 1,
    }
    assert reading.malformed == 0


def test_without_languages_every_pair_of_the_file_is_taken(tmp_path: Path) -> None:
    body = "".join(
        "<tu>" + "".join(f'<tuv xml:lang="{code}"><seg>{code}</seg></tuv>' for code in codes) + "</tu>"
        for codes in (("en", "fi", "de"), ("sv", "fi"))
    )
    pairs, _, _ = read(tmp_path / "x.tmx", tmx(body), Fields(kind="pairs"))
    assert pairs == [("en", "fi"), ("en", "de"), ("sv", "fi")]
    pairs, _, _ = read(tmp_path / "x.tmx", tmx(body), Fields(kind="pairs", pair_rule="all"))
    assert pairs == [("en", "fi"), ("en", "de"), ("fi", "de"), ("sv", "fi")]


@pytest.mark.parametrize("encoding", ["utf-16", "iso-8859-1", "windows-1252", "utf-8-sig"])
def test_any_encoding_that_the_file_declares_is_read(tmp_path: Path, encoding: str) -> None:
    declared = encoding.removesuffix("-sig")
    content = tmx(unit("mother", "äiti"), declaration=f'<?xml version="1.0" encoding="{declared}"?>')
    assert read(tmp_path / "x.tmx", content.encode(encoding))[0] == [("mother", "äiti")]


@pytest.mark.parametrize(
    "doctype",
    [
        '<!DOCTYPE tmx [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>',
        '<!DOCTYPE tmx [<!ENTITY a SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE tmx [<!ENTITY % a SYSTEM "file:///etc/passwd"> %a;]>',
        '<!DOCTYPE tmx [<!ENTITY % p "<!ENTITY a \'x\'>"> %p;]>',
    ],
)
def test_entities_are_never_declared_or_followed(tmp_path: Path, doctype: str) -> None:
    with pytest.raises(CorpusError, match=r"x\.tmx:2: the document declares the entity"):
        read(tmp_path / "x.tmx", tmx(unit("&a;", "x"), doctype=doctype), on_error="skip")


def test_a_document_type_outside_of_the_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "tmx14.dtd").write_text('<!ENTITY a "from outside">', encoding="utf-8")
    for name in ("tmx14.dtd", str(tmp_path / "tmx14.dtd")):
        doctype = f"<!DOCTYPE tmx SYSTEM {quoteattr(name)}>"
        assert read(tmp_path / "x.tmx", tmx(unit("a &amp; b", "x"), doctype=doctype))[0] == [("a & b", "x")]
        # What only that file could tell is not left out in silence.
        with pytest.raises(CorpusError, match="entity &a; is not declared in the document"):
            read(tmp_path / "x.tmx", tmx(unit("x &a; y", "x"), doctype=doctype))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no element found"),
        ("not xml", "x.tmx:1: not well-formed XML"),
        (tmx(unit("a", "b"))[:-15], "not well-formed XML: .*after 1 units"),
        (tmx(unit("a", "b") + "<tu><tuv"), "after 1 units"),
        (tmx(unit("a", "b") + unit("&nbsp;", "b")), "undefined entity"),
        (tmx(unit("a", "&#xD800;")), "reference to invalid character"),
        (tmx(unit("a", "&#0;")), "reference to invalid character"),
        (tmx(unit("a", "b")) + "<tmx/>", "junk after document element"),
        (tmx(unit("a", "\x01")), "invalid token"),
        (tmx(unit("mother", "äiti")).encode("latin-1"), "if the encoding in its first line is not"),
        ("<html/>", "is XML but no TMX: its root is <html>"),
        (tmx(unit("a", "b"), declaration='<?xml version="1.0" encoding="klingon"?>'), "unknown encoding: klingon"),
        (tmx(unit("a", "b"), declaration='<?xml version="1.0" encoding="shift_jis"?>'), "encoding that is not known"),
    ],
)
def test_what_is_no_tmx_is_fatal_whatever_the_policy(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        read(tmp_path / "x.tmx", content, on_error="skip")


def test_a_unit_that_names_no_language_or_is_too_long_is_malformed(tmp_path: Path) -> None:
    nameless = "<tu><tuv><seg>a</seg></tuv><tuv xml:lang='fi'><seg>b</seg></tuv></tu>"
    content = tmx("\n".join([unit("a", "b"), nameless, unit("x" * 101, "y"), unit("c", "d")]))
    fields = Fields(kind="pairs", languages=("en", "fi"), max_line_bytes=100)
    with pytest.raises(CorpusError, match=r"x\.tmx:4: a <tuv> without xml:lang"):
        read(tmp_path / "x.tmx", content, fields)
    pairs, _, reading = read(tmp_path / "x.tmx", content, fields, "skip")
    assert pairs == [("a", "b"), ("c", "d")]
    assert reading.skipped == {"a <tuv> without xml:lang": 1, "longer than max_line_bytes": 1}
    assert reading.malformed == 2


def test_a_cut_archive_of_a_tmx_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tmx.gz"
    path.write_bytes(gzip.compress(tmx(unit("a", "b")).encode())[:-9])
    (part,) = plan_parts(find_inputs([path], fields=PAIR), PAIR)
    with pytest.raises(CorpusError, match=r"x\.tmx\.gz is not a whole gzip file"):
        list(read_part(part, PAIR))
