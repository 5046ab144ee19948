"""Texts packed from JSON lines: exactly those that Python's json reads, or none at all."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multilingual import ALL_LINES, ODD_TEXTS

from megatron_xalign.data.packed_texts import BLANK, SURROGATE, UNASSIGNED, PackedTexts

SEPARATOR = b"<|end|>"
# What is special to JSON, to UTF-8 or to eight bytes at a time is frequent.
ODD = 'ab"\\/\n\r\t \x00\x1f\x7f\u00a0\u00e9\u3000漢\U0001f600\u0378'
TEXTS = st.text(st.one_of(st.sampled_from(ODD), st.characters()), max_size=40)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(TEXTS, max_size=5), others=st.dictionaries(st.text("kxyz", min_size=1), VALUES, max_size=3),
    is_ascii=st.booleans(), is_first=st.booleans(),
)
def test_lines_that_json_writes_are_packed(
    texts: list[str], others: dict[str, Any], is_ascii: bool, is_first: bool
) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    records = [{"text": text, **others} if is_first else {**others, "text": text} for text in texts]
    try:
        lines = [json.dumps(record, ensure_ascii=is_ascii).encode() for record in records]
    except UnicodeEncodeError:  # half a pair in another field
        return
    packed = PackedTexts.of_json_lines(b"\n".join(lines), "text", SEPARATOR)
    if packed is None:
        with pytest.raises(UnicodeEncodeError):  # half a pair, escaped, in another field
            json.dumps(records, ensure_ascii=False).encode()
        return
    assert list(packed) == texts and packed[:2] == texts[:2]
    assert packed.data == b"".join(text.encode() + SEPARATOR for text in texts)
    assert packed.num_bytes == sum(len(text.encode()) for text in texts)
    again = PackedTexts.of(texts, SEPARATOR)
    assert (again.data, again.ends_N.tolist()) == (packed.data, packed.ends_N.tolist())
    assert again.kinds_N.tolist() == packed.kinds_N.tolist()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_is_packed_of_damaged_lines_json_reads_alike(data: st.DataObject) -> None:
    text = 'é"\\\n\U0001f600 plain text of some length'
    record = {"id": [1.5e-7, {"a": [None, True]}], "text": text, "n": -10, "u": "漢"}
    line = bytearray(json.dumps(record, ensure_ascii=data.draw(st.booleans())).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(line) - 1))
        how = data.draw(st.sampled_from(["put", "replace", "remove"]))
        odd = st.sampled_from(list(b'{}[]",:\\u0189eE.+- \r\n\xc3\xa9\xed\xf0'))
        byte = data.draw(st.one_of(odd, st.integers(0, 255)))
        line[place : place + (how != "put")] = b"" if how == "remove" else bytes([byte])
    packed = PackedTexts.of_json_lines(bytes(line), "text", SEPARATOR)
    if packed is not None:
        assert list(packed) == [json.loads(part)["text"] for part in bytes(line).removesuffix(b"\n").split(b"\n")]


def test_kinds_of_texts() -> None:
    texts = ["plain", "\u0378", "a\ud800", "", " \t\u3000\u00a0\u2028", "\u200b", "\U000e0001\u0378"]
    texts += [*ALL_LINES, *ODD_TEXTS]
    packed = PackedTexts.of(texts, SEPARATOR)
    blank = (packed.kinds_N & BLANK) != 0
    assert blank.tolist() == [not text or text.isspace() for text in texts]
    halves = [any(0xD800 <= ord(character) < 0xE000 for character in text) for text in texts]
    assert ((packed.kinds_N & SURROGATE) != 0).tolist() == halves
    assert (packed.kinds_N[:3] & (UNASSIGNED | SURROGATE)).tolist() == [0, UNASSIGNED, SURROGATE]
    assert list(packed) == texts
    kept = packed.only(~blank)
    assert list(kept) == [text for text in texts if text and not text.isspace()]
    assert kept.kinds_N.tolist() == packed.kinds_N[~blank].tolist()
    assert not len(packed.only(np.zeros(len(texts), dtype=bool)))
    with pytest.raises(IndexError):
        packed[len(texts)]
