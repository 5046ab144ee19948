"""The closed loop in C++ against the same rules in plain Python, and what it promises at every prefix."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from blend_oracle import PARALLEL, Draw, Outcome, Target, blend
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xalign import _native


def blender_of(target: Target, supply: list[list[Draw]], num_samples: int, batch_size: int = 1) -> _native.Blender:
    return _native.Blender(
        seq_length=target.seq_length,
        num_samples=num_samples,
        denominator=target.denominator,
        phases=[
            (until, int(begin * target.denominator), int(end * target.denominator))
            for until, begin, end in target.phases
        ],
        count_all_tokens=target.count_all,
        parallel_fills_languages=target.fills,
        language_shares=target.shares,
        language_rates=target.rates,
        group_of_source=target.group,
        source_weights=target.weight,
        languages_of_source=[sorted(draws[0].content) for draws in supply],
        documents=target.documents,
        keep_pairs_whole=target.whole,
        batch_size=batch_size,
        batch_key=7,
    )


def feed(blender: _native.Blender, source: int, draws: list[Draw]) -> None:
    content = np.array([[draw.content[k] for k in sorted(draw.content)] for draw in draws], dtype=np.int32)
    tokens = np.array([draw.tokens for draw in draws], dtype=np.int32)
    blender.feed(source, content, tokens, np.array([draw.loss for draw in draws], dtype=np.int32))


def run_in_pieces(
    blender: _native.Blender, supply: list[list[Draw]], pieces: list[int], max_rows: int
) -> tuple[list[int], list[tuple[int, int, int]], list[np.ndarray], bool]:
    """Feed as it gets hungry, so many draws at a time; (rows, borders, cut pieces, whether it ended)."""
    fed = [0] * len(supply)
    rows: list[int] = []
    borders: list[tuple[int, int, int]] = []
    cut: list[np.ndarray] = []
    size = itertools.cycle(pieces)
    while True:
        hungry, done = blender.run(max_rows)
        rows += blender.take_rows().tolist()
        borders += blender.take_borders().tolist()
        cut.append(blender.take_cut_pieces())
        if done:
            return rows, borders, cut, True
        if hungry is not None:
            count = next(size)
            draws = supply[hungry][fed[hungry] : fed[hungry] + count]
            if not draws:
                return rows, borders, cut, False
            feed(blender, hungry, draws)
            fed[hungry] += len(draws)


LANGUAGES = 3


def languages_of_tokens(draw: Draw) -> list[int]:
    """A document token by token: those of each language, then those of none."""
    known = [language for language, count in sorted(draw.content.items()) for _ in range(count)]
    return known + [-1] * (draw.tokens - len(known))


def tokens_without_loss(draw: Draw) -> list[int]:
    return [0] * draw.loss + [1] * (draw.tokens - draw.loss)


class Supply(list[list[Draw]]):
    """Draws of every source; too many to be shown."""

    def __repr__(self) -> str:
        return f"<draws of {len(self)} sources>"


@st.composite
def targets(draw: st.DrawFn, documents: bool) -> tuple[Target, list[list[Draw]]]:
    seq_length = draw(st.sampled_from([8, 20, 33]))
    longest = draw(st.sampled_from([5, 12, 30, 70])) if documents else seq_length
    denominator = draw(st.sampled_from([20, 97, 10**12]))
    numerators = (0, denominator // 20, denominator // 3, denominator)
    fraction = st.sampled_from([Fraction(numerator, denominator) for numerator in numerators])
    phases: list[tuple[int, Fraction, Fraction]] = []
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(fraction)
        end = draw(st.one_of(st.just(begin), fraction))
        until = (phases[-1][0] if phases else 0) + draw(st.integers(1, 500))
        phases.append((until, begin, end))
    group = [0, 1, PARALLEL, *draw(st.lists(st.sampled_from([0, 1, PARALLEL]), max_size=4))]
    weights = [1 + draw(st.integers(0, 40)) if j < 3 else draw(st.integers(0, 40)) for j in range(len(group))]
    target = Target(
        seq_length=seq_length,
        phases=phases,
        denominator=denominator,
        # The last language is in parallel text only and held to nothing.
        shares=[draw(st.integers(1, 9)), draw(st.integers(1, 9)), 0],
        rates=([draw(st.integers(-50, 1000)) for _ in range(3)], [draw(st.integers(-50, 1000)) for _ in range(3)]),
        group=group,
        weight=weights,
        count_all=draw(st.booleans()),
        fills=draw(st.booleans()),
        documents=documents,
        whole=documents and draw(st.booleans()),
    )
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    supply = Supply()
    for g in group:
        draws = []
        languages = [g] if g != PARALLEL else sorted(random.choice(LANGUAGES, random.integers(1, 4), replace=False))
        for _ in range(400):
            tokens = int(random.integers(0, longest + 1)) if documents else seq_length
            content = random.multinomial(random.integers(0, tokens + 1), [1 / len(languages)] * len(languages))
            loss = tokens - int(documents and tokens > 0 and random.random() < 0.5)
            by_language = {int(k): int(count) for k, count in zip(languages, content, strict=True)}
            draws.append(Draw(by_language, tokens, loss))
        supply.append(draws)
    return target, supply


@settings(max_examples=150, deadline=None)
@given(
    case=st.booleans().flatmap(lambda documents: targets(documents)),
    pieces=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    max_rows=st.integers(1, 100),
    num_samples=st.integers(0, 60),
)
def test_rows_are_those_of_the_rules_in_plain_python(
    case: tuple[Target, list[list[Draw]]], pieces: list[int], max_rows: int, num_samples: int
) -> None:
    target, supply = case
    rows, borders, cut, ended = run_in_pieces(blender_of(target, supply, num_samples), supply, pieces, max_rows)
    try:
        expected = blend(target, supply, num_samples)
    except IndexError:
        assert not ended
        return
    # The plain one looks a draw ahead only where it chooses; the other may have asked for one more.
    if ended:
        assert rows == expected.rows
        assert borders[:num_samples] == expected.borders[:num_samples]
        assert_tally(target, supply, num_samples, expected, pieces, cut)


def assert_tally(
    target: Target,
    supply: list[list[Draw]],
    num_samples: int,
    expected: Outcome,
    pieces: list[int],
    cut: list[np.ndarray],
) -> None:
    """Tokens, loss, rows and padding of sources as counting the samples one by one gives them."""
    blender = blender_of(target, supply, num_samples)
    _, _, cut, _ = run_in_pieces(blender, supply, pieces, 1000)
    for piece in np.concatenate(cut):
        source, draw_number, begin, end, *_ = piece.tolist()
        masked = tokens_without_loss(supply[source][draw_number])[begin:end]
        content_of = languages_of_tokens(supply[source][draw_number])[begin:end]
        counts = np.array([[content_of.count(k) for k in sorted(supply[source][0].content)]], dtype=np.int32)
        blender.add_content(np.array([piece]), counts, np.array([sum(masked)], dtype=np.int32))
    tally = blender.tally()
    counts = tally["source_counts"].tolist()
    drawn = Counter[int]()
    draw_of_row = []
    for source in expected.rows:
        draw_of_row.append(drawn[source])
        drawn[source] += 1
    tokens, loss, begun, padding = Counter[int](), Counter[int](), Counter[int](), 0
    content, asked = Counter[tuple[int, int]](), Fraction(0)
    begun_in: dict[int, int] = {}
    if target.documents:
        for sample, parts in enumerate(expected.tokens_of_samples[:num_samples]):
            padding += expected.borders[sample][2]
            for at, (row, begin, end) in enumerate(parts):
                source, draw = expected.rows[row], supply[expected.rows[row]][draw_of_row[row]]
                begun_in.setdefault(row, sample)
                tokens[source] += end - begin
                begun[source] += begin == 0
                bears = end - begin - sum(tokens_without_loss(draw)[begin:end])
                before_padding = at == len(parts) - 1 and expected.borders[sample][2] > 0
                loss[source] += bears - (before_padding and draw.loss == draw.tokens)
                held = [language for language in languages_of_tokens(draw)[begin:end] if language >= 0]
                content.update((source, language) for language in held)
                asked += target.fraction(begun_in[row]) * (end - begin if target.count_all else len(held))
    else:
        for row in range(num_samples):
            draw = supply[expected.rows[row]][draw_of_row[row]]
            tokens[expected.rows[row]] += draw.tokens
            content.update({(expected.rows[row], k): count for k, count in draw.content.items()})
            asked += target.fraction(row) * (draw.tokens if target.count_all else draw.size)
            loss[expected.rows[row]] += draw.loss
            begun[expected.rows[row]] += 1
    for source, (rows, all_tokens, bearing, *_) in enumerate(counts):
        assert (rows, all_tokens, bearing) == (begun[source], tokens[source], loss[source])
        languages = sorted(supply[source][0].content)
        assert tally["source_content"][source].tolist() == [content[source, k] for k in languages]
    assert tally["padding_of_slots"].sum() == padding
    for sums in (tally["phases"], tally["slots"]):
        assert sums["tokens"].sum() == sum(tokens.values())
        assert sums["loss"].sum() == sum(loss.values())
        for origin, language in itertools.product((0, 1), range(LANGUAGES)):
            held_of = [n for (j, k), n in content.items() if k == language and (target.group[j] == PARALLEL) == origin]
            assert sums["content"][:, origin, language].sum() == sum(held_of)
    assert sum(tally["asked"]) == asked * target.denominator
    is_parallel = [group == PARALLEL for group in target.group]
    assert tally["phases"]["tokens"][:, 1].sum() == sum(n for j, n in tokens.items() if is_parallel[j])


@settings(max_examples=100, deadline=None)
@given(case=st.booleans().flatmap(lambda documents: targets(documents)), num_samples=st.integers(1, 60))
def test_the_parallel_share_holds_at_every_row(case: tuple[Target, list[list[Draw]]], num_samples: int) -> None:
    target, supply = case
    try:
        outcome = blend(target, supply, num_samples)
    except IndexError:
        return
    limit = max(draw.tokens if target.count_all else draw.size for draws in supply for draw in draws)
    # Half the largest row; a whole one where a pair may have to wait for the next sample.
    bound = limit if target.whole else Fraction(limit, 2)
    assert max(map(abs, outcome.surplus), default=0) <= bound


@settings(max_examples=60, deadline=None)
@given(
    case=st.booleans().flatmap(lambda documents: targets(documents)),
    longer=st.integers(1, 60), shorter=st.integers(1, 60),
)  # fmt: skip
def test_a_shorter_run_begins_a_longer_one(
    case: tuple[Target, list[list[Draw]]], longer: int, shorter: int
) -> None:
    target, supply = case
    shorter, longer = sorted((shorter, longer))
    rows, borders, _, ended = run_in_pieces(blender_of(target, supply, longer), supply, [50], 1000)
    few, few_borders, _, few_ended = run_in_pieces(blender_of(target, supply, shorter), supply, [7], 13)
    assert few_ended or not ended
    if ended:
        assert rows[: len(few)] == few
        assert borders[:shorter] == few_borders[:shorter]


@settings(max_examples=60, deadline=None)
@given(case=targets(documents=True), num_samples=st.integers(1, 60))
def test_whole_pairs_are_never_cut(case: tuple[Target, list[list[Draw]]], num_samples: int) -> None:
    target, supply = case
    rows, borders, _, ended = run_in_pieces(blender_of(target, supply, num_samples), supply, [50], 1000)
    if not ended or not target.whole:
        return
    drawn = Counter[int]()
    lengths = []
    for source in rows:
        tokens = supply[source][drawn[source]].tokens
        placed = not (target.group[source] == PARALLEL and tokens > target.seq_length)
        lengths.append(tokens if placed else 0)
        drawn[source] += 1
    for row, token, _ in borders[:num_samples]:
        assert token == 0 or target.group[rows[row]] != PARALLEL
    # Each sample is filled by what lies between its border and the next, and its padding.
    for (row, token, padding), (next_row, next_token, _) in itertools.pairwise(borders[:num_samples]):
        between = sum(lengths[row:next_row]) - token + next_token
        assert between + padding == target.seq_length


def plain(**changes: Any) -> dict[str, Any]:
    return {
        "seq_length": 10, "num_samples": 5, "denominator": 10, "phases": [(1, 1, 1)], "count_all_tokens": False,
        "parallel_fills_languages": True, "language_shares": [1], "language_rates": ([1], [1]),
        "group_of_source": [0, -1], "source_weights": [1, 1], "languages_of_source": [[0], [0]], "documents": False,
        "keep_pairs_whole": False, "batch_size": 5, "batch_key": 1, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seq_length": 0}, "seq_length=0"),
        ({"num_samples": -1}, "num_samples=-1"),
        ({"denominator": 0}, "denominator"),
        ({"phases": []}, "no phase"),
        ({"phases": [(5, 1, 1), (5, 2, 2)]}, "does not come after"),
        ({"phases": [(5, 1, 11)]}, "outside"),
        ({"language_shares": [-1]}, "negative"),
        ({"language_shares": [1 << 60, 1 << 60], "language_rates": ([1, 1], [1, 1])}, "2\\^60"),
        ({"language_rates": ([1], [])}, "language_rates"),
        ({"language_rates": ([1 << 40], [1])}, "2\\^31"),
        ({"group_of_source": [0, 1]}, "no language"),
        ({"group_of_source": [0, 0]}, "no parallel source"),
        ({"group_of_source": [-1, -1]}, "no source with weight"),
        ({"source_weights": [1]}, "source_weights"),
        ({"source_weights": [1, -1]}, "negative"),
        ({"languages_of_source": [[0], [1]]}, "language 1"),
        ({"languages_of_source": [[0]]}, "languages_of_source"),
        ({"batch_size": 0}, "batch_size"),
        ({"group_of_source": [], "source_weights": [], "languages_of_source": []}, "no source"),
    ],
)
def test_contradictions_are_value_errors(changes: dict[str, Any], words: str) -> None:
    _native.Blender(**plain())
    with pytest.raises(ValueError, match=words):
        _native.Blender(**plain(**changes))


def test_counts_that_cannot_be_are_value_errors() -> None:
    blender = _native.Blender(**plain())
    one = np.ones(1, dtype=np.int32)
    for content, tokens, loss, words in (
        (-1, 10, 10, "negative"), (11, 10, 10, "more content"), (5, 11, 11, "too many tokens"), (5, 10, 11, "loss"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            blender.feed(0, one[:, None] * content, one * tokens, one * loss)
    with pytest.raises(ValueError, match="no source 7"):
        blender.feed(7, one[:, None], one, one)
    with pytest.raises(ValueError, match="column"):
        blender.feed(0, np.ones((1, 2), np.int32), one, one)
    with pytest.raises(ValueError, match="rows"):
        blender.feed(0, one[:, None], np.ones(2, np.int32), one)
