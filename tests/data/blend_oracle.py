"""The closed loop of a blend in plain Python: fractions, lists, every member looked at for every choice."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

PARALLEL = -1


@dataclass
class Draw:
    """A window or a document: content tokens by language of the run, all tokens, tokens that bear loss."""

    content: dict[int, int]
    tokens: int
    loss: int

    @property
    def size(self) -> int:
        return sum(self.content.values())


@dataclass
class Target:
    seq_length: int
    phases: list[tuple[int, Fraction, Fraction]]  # until tokens, at the beginning, at the end
    denominator: int
    shares: list[int]
    rates: tuple[list[int], list[int]]
    group: list[int]
    weight: list[int]
    count_all: bool = False
    fills: bool = True
    documents: bool = False
    whole: bool = False

    def fraction(self, sample: int) -> Fraction:
        begin_tokens, at = 0, sample * self.seq_length
        for until, begin, end in self.phases:
            if at < until:
                exact = begin + (end - begin) * Fraction(at - begin_tokens, until - begin_tokens)
                whole = exact * self.denominator
                return Fraction(whole.numerator // whole.denominator, self.denominator)
            begin_tokens = until
        return self.phases[-1][2]


@dataclass
class Outcome:
    rows: list[int] = field(default_factory=list)
    borders: list[tuple[int, int, int]] = field(default_factory=list)
    tokens_of_samples: list[list[tuple[int, int, int]]] = field(default_factory=list)
    """Per sample, (row, first token, end) of the documents in it."""
    surplus: list[Fraction] = field(default_factory=list)
    """After every row that takes a place: parallel tokens minus those asked for."""


def blend(target: Target, supply: list[list[Draw]], num_samples: int) -> Outcome:
    """Choose rows until all samples are there; IndexError if a source runs out."""
    out = Outcome()
    shares_total = sum(target.shares)
    drawn = [0] * len(supply)
    given = [0] * len(supply)  # content tokens
    language_given = [0] * len(target.shares)
    surplus = Fraction(0)
    sample, filled = 0, 0
    pieces: list[tuple[int, int, int]] = []

    def head(source: int) -> Draw:
        return supply[source][drawn[source]]

    def counted(draw: Draw) -> int:
        return draw.tokens if target.count_all else draw.size

    def skip_placeless(source: int) -> None:
        while target.documents:
            draw = head(source)
            too_long = target.whole and target.group[source] == PARALLEL and draw.tokens > target.seq_length
            if draw.tokens > 0 and not too_long:
                return
            out.rows.append(source)
            drawn[source] += 1

    def best_of(group: int) -> int | None:
        members = [j for j, g in enumerate(target.group) if g == group and target.weight[j]]
        if not members:
            return None
        total_weight, total = sum(target.weight[j] for j in members), sum(given[j] for j in members)
        ranked = []
        for j in members:
            size = head(j).size
            window = size if target.documents else target.seq_length
            # Ahead of its quota after this piece, by a window or more?
            quota_after = Fraction(target.weight[j] * (total + size), total_weight)
            allowed = given[j] + size - quota_after < window or (target.documents and size == 0)
            deadline = Fraction((given[j] + window) * total_weight, target.weight[j])
            ranked.append((not allowed, deadline, j))
        assert not min(ranked)[0], "somebody may always come"
        return min(ranked)[2]

    def best_language(fraction: Fraction) -> int:
        candidates = []
        for k, share in enumerate(target.shares):
            source = best_of(k)
            if share == 0 or source is None:
                continue
            size = head(source).size
            window = size if target.documents else target.seq_length
            total = sum(count for count, held in zip(language_given, target.shares, strict=True) if held)
            owed = Fraction(share * total, shares_total) - language_given[k]
            allowed = size - Fraction(share * size, shares_total) - owed < window
            mean = target.rates[0][k] * (1 - fraction) + target.rates[1][k] * fraction
            # Towards zero, as C++ divides.
            rate = max(int(mean), 1)
            candidates.append((not allowed, (window - owed) / rate, k))
        return min(candidates)[2]

    def end_sample(padding: int) -> None:
        nonlocal sample, filled, pieces
        if target.documents:
            row, begin, _ = pieces[0]
            out.borders.append((row, begin, padding))
            out.tokens_of_samples.append(pieces)
        sample, filled, pieces = sample + 1, 0, []

    def take(source: int, fraction: Fraction) -> None:
        nonlocal surplus, filled
        draw = head(source)
        parallel = target.group[source] == PARALLEL
        surplus += (1 - fraction) * counted(draw) if parallel else -fraction * counted(draw)
        out.surplus.append(surplus)
        if not parallel or target.fills:
            for k, count in draw.content.items():
                if target.shares[k]:
                    language_given[k] += count
        if target.documents:
            at = 0
            while at < draw.tokens:
                piece = min(draw.tokens - at, target.seq_length - filled)
                pieces.append((len(out.rows), at, at + piece))
                at, filled = at + piece, filled + piece
                if filled == target.seq_length:
                    end_sample(0)
        else:
            end_sample(0)
        given[source] += draw.size
        out.rows.append(source)
        drawn[source] += 1
        return

    def finished() -> bool:
        if sample < num_samples or not target.documents:
            return sample >= num_samples
        return sample > num_samples or bool(pieces) or num_samples == 0 or out.borders[-1][2] > 0

    active = [j for j, weight in enumerate(target.weight) if weight]
    to_look = sorted(active, key=lambda j: (target.group[j] == PARALLEL, target.group[j], j))
    while not finished():
        for source in to_look:
            skip_placeless(source)
        fraction = target.fraction(sample)
        text = best_of(best_language(fraction)) if fraction < 1 else None
        pair = best_of(PARALLEL) if fraction > 0 else None
        waits = (
            pair is not None and target.documents and target.whole
            and head(pair).tokens > target.seq_length - filled
        )  # fmt: skip
        source: int | None
        if text is None or pair is None:
            source = pair if text is None else text
            if text is None and waits:
                source = None
        else:
            after_pair = abs(surplus + (1 - fraction) * counted(head(pair)))
            after_text = abs(surplus - fraction * counted(head(text)))
            if after_pair >= after_text:
                source = text
            elif not waits:
                source = pair
            elif after_text <= max(counted(head(pair)), counted(head(text))):
                source = text
            else:
                source = None
        if source is None:
            end_sample(target.seq_length - filled)
            to_look = []
            continue
        take(source, fraction)
        to_look = [source]
    return out
