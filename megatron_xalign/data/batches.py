"""Documents column by column, and how the sides of records become pairs."""

# N documents, R records

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress, islice
from pathlib import Path
from typing import Any, cast

from megatron_xalign.data.fields import Fields, pairs_among
from megatron_xalign.data.packed_texts import PackedTexts
from megatron_xalign.data.reading import OnError, Place, Reading

_OTHER_LANGUAGE = "a language not asked for"


@dataclass
class TextBatch:
    """Consecutive documents, column by column; N of them."""

    texts: list[str] | PackedTexts
    """Monolingual: the texts; pairs: the first sides. [N]; may be empty strings. Packed only if that was asked for."""
    others: list[str] | None = None
    """Pairs: the second sides. [N]"""
    language: str | None = None
    """Language of all ``texts`` if it is one; None where ``languages`` says."""
    other_language: str | None = None
    """Language of all ``others`` if it is one."""
    languages: list[str] | None = None
    """Language of each of ``texts``. [N]; None where ``language`` says."""
    other_languages: list[str] | None = None
    """Language of each of ``others``. [N]"""
    ids: list[str] | None = None
    """Pairs: the id of each: that of its record or, where that has none, its two texts; so it does not depend on how
    files are named, compressed or cut into parts. [N]"""
    place: Place = field(default_factory=lambda: Place(Path("?")), repr=False)
    """The stretch of a file that the documents come from."""
    numbers: Sequence[int] = field(default=(), repr=False)
    """Number of each document's record in ``place``. [N]"""

    def where(self, index: int) -> str:
        """``FILE:LINE`` of a document (for parquet ``FILE: row N``)."""
        return self.place.where(self.numbers[index])


@dataclass(frozen=True)
class Task:
    """What every reader of a piece is given."""

    fields: Fields
    codes: Callable[[str], str]
    """Codes of the data to those of the token file."""
    reading: Reading
    on_error: OnError
    batch_bytes: int
    separator: bytes | None = None
    """What parts packed texts, if they are wanted where a format has them."""

    def reject(self, place: Place, number: int, reason: str, detail: str = "") -> None:
        """Count a malformed record, or raise; see ``Reading.reject``."""
        self.reading.reject(place, number, reason, detail, on_error=self.on_error)


def monolingual_batch(
    task: Task,
    place: Place,
    texts: list[str] | PackedTexts,
    numbers: Sequence[int],
    language: str | None,
    named: list[str] | None = None,
) -> TextBatch:
    """A batch of monolingual documents.

    Args:
        task: of the piece.
        place: of the piece.
        texts: [R].
        numbers: of the records. [R]
        language: of all of them, as the data has it; or
        named: of each, as its record has it. [R]
    """
    if named is None:
        return TextBatch(texts, language=task.codes(language or ""), place=place, numbers=numbers)
    if "" in named:
        for number, code in zip(numbers, named, strict=True):
            if not code:
                task.reject(place, number, "no language")
        texts, numbers, named = list(compress(texts, named)), list(compress(numbers, named)), list(filter(None, named))
    languages = list(map(task.codes, named))
    wanted = task.fields.languages
    if wanted and not set(languages) <= set(wanted):
        keep = [code in wanted for code in languages]
        for code, kept in zip(languages, keep, strict=True):
            if not kept:
                task.reading.leave_out(f"{_OTHER_LANGUAGE} ({code})")
        texts, languages = list(compress(texts, keep)), list(compress(languages, keep))
        numbers = list(compress(numbers, keep))
    return TextBatch(texts, languages=languages, place=place, numbers=numbers)


def pairs_of_columns(
    task: Task,
    place: Place,
    rule: Sequence[tuple[str, str]],
    languages: Sequence[str],
    columns: Sequence[Sequence[str | None]],
    ids: Sequence[Any] | None,
    numbers: Sequence[int],
) -> TextBatch:
    """Pairs of records whose sides are columns, each in one language.

    Args:
        task: of the piece.
        place: of the piece.
        rule: the pairs of ``languages`` to take.
        languages: codes of the columns.
        columns: for each language its texts, None where a record has none. [R] each
        ids: of the records, if they have any. [R]
        numbers: of the records. [R]
    """
    index = {code: position for position, code in enumerate(languages)}
    if len(rule) == 1:
        (first, second), = rule
        texts, others = columns[index[first]], columns[index[second]]
        if None in texts or None in others:
            keep = []
            for row, (text, other) in enumerate(zip(texts, others, strict=True)):
                if text is None or other is None:
                    task.reject(place, numbers[row], f'no "{first if text is None else second}"')
                else:
                    keep.append(row)
            texts, others = [texts[row] for row in keep], [others[row] for row in keep]
            numbers = [numbers[row] for row in keep]
            ids = [ids[row] for row in keep] if ids is not None else None
        return TextBatch(
            cast(list[str], texts), cast(list[str], others), language=first, other_language=second,
            ids=_ids(texts, others, ids), place=place, numbers=numbers,
        )

    def pairs_of(row: int) -> list[tuple[str, str, str, str]]:
        sides = [(a, b, columns[index[a]][row], columns[index[b]][row]) for a, b in rule]
        return [(a, b, text, other) for a, b, text, other in sides if text is not None and other is not None]

    return _flat(task, place, map(pairs_of, range(len(numbers))), ids, numbers)


def pairs_of_records(
    task: Task,
    place: Place,
    records: Iterable[Sequence[tuple[str, str]]],
    ids: Sequence[Any] | None,
    numbers: Sequence[int],
) -> TextBatch:
    """Pairs of records that name their languages; one without a wanted pair is left out and counted.

    Args:
        task: of the piece; its pair rule says which pairs are taken.
        place: of the piece.
        records: for each, (code as the data has it, text) of its sides in order. Of two sides in one language the
            first counts. [R]
        ids: of the records, if they have any. [R]
        numbers: of the records. [R]
    """
    rule = task.fields.pairs() if task.fields.languages or not isinstance(task.fields.pair_rule, str) else ()
    codes = task.codes

    def pairs_of(sides: Sequence[tuple[str, str]]) -> list[tuple[str, str, str, str]]:
        texts: dict[str, str] = {}
        for code, text in sides:
            if code:
                texts.setdefault(codes(code), text)
        if len(texts) < len(sides):
            task.reading.leave_out("a second text in the same language in its record", len(sides) - len(texts))
        found = rule or (pairs_among(texts, task.fields.pair_rule) if len(texts) > 1 else ())
        taken = [(a, b, texts[a], texts[b]) for a, b in found if a in texts and b in texts]
        if not taken:
            task.reading.leave_out(_no_pair(texts))
        return taken

    return _flat(task, place, map(pairs_of, records), ids, numbers, counted=True)


def pairs_of_two_named_sides(
    task: Task,
    place: Place,
    codes: tuple[Sequence[str], Sequence[str]],
    sides: tuple[list[str], list[str]],
    ids: Sequence[Any] | None,
    numbers: Sequence[int],
) -> TextBatch:
    """What ``pairs_of_records`` gives for records of just two sides, deciding once for all with the same two languages.

    Args:
        task: of the piece.
        place: of the piece.
        codes: of the first and of the second sides, as the data has them. [R] each
        sides: texts. [R] each
        ids: of the records, if they have any. [R]
        numbers: of the records. [R]
    """
    kinds = list(zip(*codes, strict=True))
    decided = {kind: _pair_of_two(task, *kind) for kind in set(kinds)}
    taken = {pair for pair in decided.values() if pair is not None}
    if None in decided.values():
        for kind, count in Counter(kinds).items():
            if decided[kind] is None:
                task.reading.leave_out(_no_pair(map(task.codes, kind)), count)
        keep = [decided[kind] is not None for kind in kinds]
        kinds, numbers = list(compress(kinds, keep)), list(compress(numbers, keep))
        sides = list(compress(sides[0], keep)), list(compress(sides[1], keep))
        ids = list(compress(ids, keep)) if ids is not None else None
    texts, others = sides
    swapped = {kind: pair is not None and pair[0] != task.codes(kind[0]) for kind, pair in decided.items()}
    if any(swapped.values()):
        swaps = [swapped[kind] for kind in kinds]
        texts = [other if swap else text for text, other, swap in zip(*sides, swaps, strict=True)]
        others = [text if swap else other for text, other, swap in zip(*sides, swaps, strict=True)]
    batch = TextBatch(texts, others, ids=_ids(texts, others, ids), place=place, numbers=numbers)
    if len(taken) == 1:
        ((batch.language, batch.other_language),) = taken
    else:
        languages = {kind: pair for kind, pair in decided.items() if pair is not None}
        batch.languages = [languages[kind][0] for kind in kinds]
        batch.other_languages = [languages[kind][1] for kind in kinds]
    return batch


def _pair_of_two(task: Task, code: str, other_code: str) -> tuple[str, str] | None:
    """The pair that is taken of two sides in these languages, in its order."""
    first, second = task.codes(code), task.codes(other_code)
    if first == second or not first or not second:
        return None
    fields = task.fields
    if fields.languages or not isinstance(fields.pair_rule, str):
        return next((pair for pair in fields.pairs() if set(pair) == {first, second}), None)
    return first, second


def _no_pair(languages: Iterable[str]) -> str:
    return f"no pair in the languages asked for ({', '.join(islice(dict.fromkeys(languages), 4))})"


def _flat(
    task: Task,
    place: Place,
    rows: Iterable[list[tuple[str, str, str, str]]],
    ids: Sequence[Any] | None,
    numbers: Sequence[int],
    *,
    counted: bool = False,
) -> TextBatch:
    """(language, other language, text, other) of each pair of each record, as columns."""
    pairs: list[tuple[str, str, str, str]] = []
    names: list[Any] = []
    places: list[int] = []
    for row, taken in enumerate(rows):
        if not taken:
            if not counted:
                task.reading.leave_out("no pair in the languages asked for")
            continue
        pairs += taken
        places += [numbers[row]] * len(taken)
        name = _name(ids[row]) if ids is not None else None
        # Each pair of a record is dealt by itself.
        alone = name is None or len(taken) == 1
        names += [name if alone else f"{name}#{first}-{second}" for first, second, _, _ in taken]
    languages, other_languages, texts, others = map(list, zip(*pairs, strict=True)) if pairs else ([], [], [], [])
    return TextBatch(
        texts, others, languages=languages, other_languages=other_languages, ids=_ids(texts, others, names),
        place=place, numbers=places,
    )


def _name(value: Any) -> str | None:
    """An id that is text or a whole number."""
    if type(value) is str:
        return value
    return str(value) if type(value) is int else None


def _ids(texts: Sequence[Any], others: Sequence[Any], ids: Sequence[Any] | None) -> list[str]:
    names = [None] * len(texts) if ids is None else list(map(_name, ids))
    if None not in names:
        return names  # type: ignore[return-value]
    return [
        f"{text}\0{other}" if name is None else name for name, text, other in zip(names, texts, others, strict=True)
    ]
