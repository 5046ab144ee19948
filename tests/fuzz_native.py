"""Calls everything in the C++ library's binding with arguments of any kind: ``python fuzz_native.py SEED ROUNDS``.

Prints how many calls were answered and refused. Run by ``test_native_arguments`` in a process of its own, so that a
crash is a failed test and not the end of all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_xalign import _native as native
from megatron_xalign.errors import FormatError

random = np.random.default_rng(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
HUGE = [2**31 - 1, 2**31, 2**62, 2**63 - 1, -1, -(2**31), -(2**63)]
DTYPES = ["i1", "u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", ">i4", ">i8", "<f4", "<f8", "?", "O", "S1"]
WRONG: list[Any] = [None, 3, "text", b"bytes", [], [1, 2], {}, object(), np.int64(3), np.zeros(())]


def one_in(many: int) -> bool:
    return bool(random.integers(many) == 0)


def number(sensible: int) -> Any:
    """Mostly near what is sensible; sometimes enormous, negative, or no number."""
    if one_in(8):
        return HUGE[random.integers(len(HUGE))]
    if one_in(20):
        return WRONG[random.integers(len(WRONG))]
    return int(random.integers(-1, sensible + 2))


def array(dtype: str, sensible: int = 8, axes: int = 1, most: int = 12) -> Any:
    """Mostly what is asked for; sometimes of another type, rank, layout, byte order, or no array at all."""
    shape = tuple(int(random.integers(0, most)) for _ in range(axes))
    values = random.integers(0, sensible + 1, shape)
    if one_in(6) and values.size:
        values.flat[int(random.integers(values.size))] = HUGE[random.integers(len(HUGE))]
    with np.errstate(all="ignore"):
        made = values.astype(dtype)
        if one_in(12):
            made = values.astype(DTYPES[random.integers(len(DTYPES))])
    if one_in(15):
        made = np.repeat(made, 2, axis=0)[::2] if made.ndim else made
    if one_in(20):
        made = made[None]
    if one_in(20):
        made.flags.writeable = False
    return WRONG[random.integers(len(WRONG))] if one_in(25) else made


def texts() -> list[str]:
    some = ["", "abc def", "\u00e4\u4e2d", "\U0001f600 x"]
    return [some[random.integers(4)] for _ in range(random.integers(5))]


def maybe(value: Any) -> Any:
    return WRONG[random.integers(len(WRONG))] if one_in(20) else value


counts = {"passed": 0, "refused": 0}


def attempt(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What a call gives; None if it refuses, in one of the ways it may."""
    try:
        made = call(*arguments, **named)
    except (ValueError, TypeError, IndexError, LookupError, OverflowError, RuntimeError, FormatError):
        # MemoryError is no answer: it would depend on the machine.
        counts["refused"] += 1
        return None
    counts["passed"] += 1
    return made


table = np.array([code | 2 << 21 for code in range(0x110000)], dtype=np.uint32)
none = np.zeros(0, np.uint32)
folding = native.Folding(table, none)


def stream() -> Any:
    lengths = random.integers(0, 9, random.integers(1, 40)).astype(np.int32)
    ends = np.cumsum(lengths)
    made: dict[str, Any] = {
        "name": "made",
        "tokens": random.integers(0, 50, int(ends[-1])).astype("<u2"),
        "lengths": lengths,
        "pointers": 2 * (ends - lengths).astype(np.int64),
        "content": "all_but_last",
        "eod": 0,
        "vocab_size": 50,
        "span_ends": None,
        "span_languages": None,
        "run_language": np.array([0], np.int8),
        "seq_length": 5,
        "whole_documents": bool(one_in(2)),
        "split_key": None,
        "part": (0, len(lengths)),
    }
    wrong = {
        "name": maybe("x"),
        "tokens": array("<u2", 60, most=90),
        "lengths": array("<i4"),
        "pointers": array("<i8"),
        "content": ["spans", "all", "not_eod", "nothing"][random.integers(4)],
        "eod": number(9),
        "vocab_size": number(60),
        "span_ends": array("<i8"),
        "span_languages": array("i1"),
        "run_language": array("i1", 2),
        "seq_length": number(9),
        "whole_documents": number(1),
        "split_key": number(9),
        "part": (number(9), number(9)),
    }
    for name in wrong:
        if one_in(12):
            made[name] = wrong[name]
    return attempt(native.SourceStream, **made)


def streams() -> None:
    found = stream()
    if found is None:
        return
    epoch = number(2)
    attempt(found.set_keys, epoch, number(9), number(9))
    attempt(found.set_keys, 0, 1, 2)
    for name in ("has_keys", "has_windows", "num_windows", "window", "document", "build_packing"):
        attempt(getattr(found, name), number(3))
    attempt(found.use_starts, 0, attempt(found.build_starts, 0, number(3)))
    packed = attempt(found.build_packing, 0)
    if packed is not None:
        attempt(found.use_packing, 0, packed[0], packed[1])
    attempt(found.use_starts, number(1), array("<i8", 40))
    attempt(found.use_packing, number(1), array("<i8"), array("<i8"))
    attempt(found.count_epoch, number(1), number(3))
    attempt(found.count_documents, int(random.integers(-2, 9)), int(random.integers(-2, 40)), number(3))
    attempt(found.count_stretches, array("<i8"), array("<i8"), array("<i8"), number(3))
    attempt(found.documents_read, int(random.integers(-2, 9)), number(3))
    attempt(found.totals, number(3))
    attempt(found.window, 0)
    index = attempt(native.ListedSamples, array("<i4", 1), array("<i8", 3))
    if one_in(2):
        index = attempt(native.ListedSamples, np.zeros(3, np.int32), np.arange(3))
    length = maybe(5 if not one_in(9) else int(random.integers(-1, 9)))
    reader = attempt(
        native.BatchReader,
        index=maybe(index),
        streams=[maybe(found)],
        seq_length=length,
        padding_token=number(3),
        reset_position_ids=bool(one_in(2)),
        eod_mask_loss=bool(one_in(2)),
    )
    if reader is None:
        return
    kinds = {
        "tokens": "<i8",
        "labels": "<i8",
        "position_ids": "<i8",
        "loss_mask": "<f4",
        "language_ids": "i1",
        "label_language_ids": "i1",
        "source_ids": "<i2",
        "document_ids": "<i4",
    }
    rows = int(random.integers(0, 4))
    out = {name: np.zeros((rows, 5), kind) for name, kind in kinds.items()}
    if one_in(6):
        out[list(out)[random.integers(len(out))]] = array("<i8", axes=2)
    if one_in(9):
        del out[list(out)[random.integers(len(out))]]
    attempt(reader.read, maybe(random.integers(-1, 4, rows)), out)


def blends() -> None:
    attempt(native.blend_order, array("<i8"), maybe(int(random.integers(-2, 300))))
    order = attempt(native.BlendOrder, array("<i8"))
    if order is not None:
        attempt(order.fill, array(["u1", "<u2", "<i4"][random.integers(3)], most=99))
    steps, batch_size = int(random.integers(-1, 9)), maybe(int(random.integers(-1, 20)))
    attempt(native.batch_positions, number(9), number(9), steps, batch_size)
    attempt(native.rows_per_block, number(9))
    counter = attempt(native.RowCounter, number(4))
    if counter is not None:
        attempt(counter.append, array(["u1", "<u2"][random.integers(2)], 3, most=99))
        lines = np.concatenate([counter.take_lines(), counter.now()[None]])
        ids = random.integers(0, 3, 6).astype("u1")
        rows = attempt(
            native.SampleOrder, ids=array("u1", 3), counts=maybe(lines), batch_size=number(3), batch_key=number(9)
        )
        if rows is not None:
            attempt(rows.origin, number(6))
            attempt(rows.position_of, number(6))
            attempt(rows.origins, array("<i8"))
        borders = np.zeros(int(random.integers(0, 4)), [("row", "<i8"), ("token", "<i4"), ("padding", "<i4")])
        made = attempt(
            native.DocumentOrder,
            ids=ids,
            counts=maybe(lines),
            borders=maybe(borders),
            keeps_whole=[True] * int(random.integers(0, 5)),
            batch_size=number(2),
            batch_key=1,
        )
        if made is not None:
            attempt(made.border, number(4))
            attempt(made.rows_from, number(9), number(9))


def blenders() -> None:
    def size() -> int:
        return int(random.integers(0, 3))

    target: dict[str, Any] = {
        "seq_length": 8,
        "num_samples": 9,
        "denominator": 10,
        "phases": [(100, 3, 3)],
        "count_all_tokens": False,
        "parallel_fills_languages": True,
        "language_shares": [1, 1],
        "language_rates": ([1, 1], [1, 1]),
        "group_of_source": [0, 1, -1],
        "source_weights": [1, 1, 1],
        "languages_of_source": [[0], [1], [0, 1]],
        "documents": bool(one_in(2)),
        "keep_pairs_whole": bool(one_in(2)),
        "batch_size": 3,
        "batch_key": 5,
    }
    wrong = {
        "seq_length": number(9),
        "num_samples": number(9),
        "denominator": number(9),
        "phases": [(number(9), number(9), number(9))] * size(),
        "language_shares": [number(3)] * size(),
        "language_rates": ([number(3)] * size(), [1] * size()),
        "group_of_source": [number(2)] * size(),
        "source_weights": [number(3)] * size(),
        "languages_of_source": [[number(2)] * size()] * 3,
        "batch_size": int(random.integers(-1, 9)),
        "batch_key": number(9),
        "documents": number(1),
    }
    for name in wrong:
        if one_in(12):
            target[name] = wrong[name]
    made = attempt(native.Blender, **target)
    if made is None:
        return
    for _ in range(12):
        hungry, done = attempt(made.run, int(random.integers(0, 9))) or (None, True)
        if done:
            break
        draws = int(random.integers(1, 5))
        tokens = random.integers(0, 9, draws).astype("<i4")
        of = hungry if hungry is not None and not one_in(9) else number(3)
        columns = 2 if of == 2 else 1
        content = np.repeat(tokens[:, None] // 2, columns, 1).astype("<i4")
        if one_in(9):
            content = array("<i4", axes=2)
        attempt(made.feed, of, content, maybe(tokens), maybe(tokens))
        pieces = made.take_cut_pieces()
        if len(pieces) and one_in(3):
            pieces["source"][0] = [-1, 3, 2**31 - 1][random.integers(3)]
        attempt(made.add_content, maybe(pieces), array("<i4", 1, 2), np.zeros(len(pieces), "<i4"))
        made.take_rows()
        made.take_borders()
        made.tally()


def group_sums() -> None:
    tokens, width, groups = (int(random.integers(0, 6)) for _ in range(3))
    values = random.normal(size=(tokens, 2 * width)).astype("<f4")[:, :width]
    totals: dict[str, Any] = {
        name: np.zeros((groups, width), kind)
        for name, kind in {"sum": "<f8", "sum_of_squares": "<f8", "max": "<f4", "positive": "<i8"}.items()
    }
    for name in list(totals):
        if one_in(12):
            totals[name] = array("<f8", axes=2)
        if one_in(6):
            del totals[name]
    if one_in(4):
        values = array(["<f4", "<u2"][random.integers(2)], axes=2)
    ids = random.integers(-1, max(groups, 1), tokens).astype("<i4")
    attempt(native.add_to_groups, values, array("<i4", 4) if one_in(5) else ids, maybe(groups), **totals)


def others() -> None:
    order = attempt(native.Permutation, number(9), number(3000))
    if order is not None:
        attempt(order.__getitem__, number(9))
        attempt(order.position_of, number(9))
        attempt(order.fill, number(9), maybe(int(random.integers(-1, 99))))
        attempt(order.fill_positions, number(9), maybe(int(random.integers(-1, 99))))
    attempt(native.permutation, number(9), maybe(int(random.integers(-2, 99))))
    lengths = array("<i8")
    small = not isinstance(lengths, np.ndarray) or lengths.dtype.kind not in "iu" or (lengths < 10**6).all()
    attempt(native.sample_index, lengths, number(9) if small else 2**61)
    attempt(native.count_languages, array("i1", 2), array("<i8"), number(3))
    attempt(native.gather, array("<u2"), array("<i8"), array("<i8"))
    attempt(native.document_keys, folding, maybe(texts()), maybe(None))
    attempt(native.document_sketches, maybe(folding), folding, texts(), maybe(texts()))
    attempt(native.near_earlier, array("u1", axes=2), array("<i8"), array("u1", 1), number(3), number(3))
    attempt(native.count_characters, texts(), array("u1"), number(3))
    attempt(native.kinds_in_texts, texts(), array("u1"))
    attempt(native.utf8_lengths, maybe(texts()))
    kinds = np.zeros(0x110000, np.uint8)
    attempt(native.pack_texts, texts(), maybe(b"<|>"), maybe(kinds))
    odd = np.frombuffer(b'{}[]",:\\ntu019e. \r\xc3\xa9\xed\xa0\xf0', np.uint8)
    lines = random.choice(odd, int(random.integers(0, 60)))
    attempt(native.pack_json_lines, maybe(lines.tobytes()), maybe(b"t"), b"<|>", maybe(kinds))
    attempt(native.pack_json_lines, b'{"t": "' + lines.tobytes() + b'"}', b"t", b"<|>", kinds)
    ids = array("<u4")
    attempt(native.cut_at_ends, ids, maybe(3), array("<u4", 2), maybe(2**16), maybe(True))
    attempt(native.cut_at_ends, ids, 3, np.array([[1, 2]], np.uint32), 2**31, False)
    attempt(native.count_line_breaks, maybe(lines.tobytes()))
    attempt(native.Folding, array("<u4"), array("<u4"))
    index = attempt(native.ProbeIndex, folding, maybe(["abc def"]), maybe(0.7), number(9))
    if index is not None:
        attempt(index.touch, maybe(texts()))


if __name__ == "__main__":
    for _ in range(int(sys.argv[2]) if len(sys.argv) > 2 else 100):
        for part in (streams, blends, blenders, group_sums, others):
            part()
    print(counts["passed"], counts["refused"])
