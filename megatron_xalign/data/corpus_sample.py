"""Some text from all over a corpus, the same however it is cut into parts: to prove engines and to train on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from megatron_xalign.data.inputs import Fields, InputFile, Part, Piece, Reading, read_part
from megatron_xalign.data.reading import OnError

SAMPLE_CHARACTERS = 2_000_000
_MOST_STRETCHES = 16
_BATCH_BYTES = 1 << 17
# Of a document that is a book, its beginning.
_LONGEST_CHARACTERS = 100_000


def sample_texts(
    parts: Sequence[Part], fields: Fields, most_characters: int = SAMPLE_CHARACTERS, language: str | None = None
) -> Iterator[tuple[str, str]]:
    """Texts of a corpus with their languages: from the beginnings of files, and plain files also from further inside.

    Args:
        parts: all of the corpus; which texts there are does not depend on how it is cut.
        fields: how records are read.
        most_characters: about so many in all.
        language: only texts in this one, looked for in all of the corpus if need be; texts may come twice then.

    Yields:
        (language, text); of a pair, each side.

    Raises:
        CorpusError: a file is damaged. Malformed lines are passed over.
    """
    stretches = _stretches(parts)
    share = -(-most_characters // max(len(stretches), 1))
    total = 0
    for pieces in stretches:
        taken = 0
        for code, text in texts_of(pieces, fields):
            if taken >= share:
                break
            if language in (None, code):
                taken += min(len(text), _LONGEST_CHARACTERS)
                yield code, text[:_LONGEST_CHARACTERS]
        total += taken
    if language is None or total >= most_characters:
        return
    total = 0
    for code, text in texts_of([piece for part in parts for piece in part.pieces], fields):
        if code == language:
            yield code, text[:_LONGEST_CHARACTERS]
            total += min(len(text), _LONGEST_CHARACTERS)
        if total >= most_characters:
            return


def _stretches(parts: Sequence[Part]) -> list[list[Piece]]:
    """Where to read from: each stretch is pieces in order, of which the beginning is read."""
    by_file: dict[InputFile, list[Piece]] = {}
    for part in parts:
        for piece in part.pieces:
            by_file.setdefault(piece.files[0], []).append(piece)
    files = list(by_file)
    num_files = min(len(files), _MOST_STRETCHES)
    stretches: list[list[Piece]] = []
    for number in range(num_files):
        file = files[len(files) * number // num_files]
        pieces = by_file[file]
        if pieces[0].unit != "bytes":
            stretches.append(pieces)
            continue
        num_cuts = _MOST_STRETCHES // num_files
        cuts = [file.num_bytes * cut // num_cuts for cut in range(num_cuts + 1)]
        stretches += [
            [Piece((file,), begin, end, "bytes", end - begin)] for begin, end in itertools.pairwise(cuts) if end > begin
        ]
    return stretches


def texts_of(
    pieces: Sequence[Piece], fields: Fields, *, on_error: OnError = "skip", reading: Reading | None = None
) -> Iterator[tuple[str, str]]:
    """All texts of pieces in order with their languages.

    Args:
        pieces: what to read.
        fields: how records are read.
        on_error: whether a malformed line is passed over.
        reading: counts what was passed over.
    """
    reading = Reading() if reading is None else reading
    part = Part(0, tuple(pieces))
    for batch in read_part(part, fields, on_error=on_error, reading=reading, batch_bytes=_BATCH_BYTES):
        for index, text in enumerate(batch.texts):
            yield batch.languages[index] if batch.languages is not None else batch.language or "", text
            if batch.others is not None:
                code = batch.other_languages[index] if batch.other_languages is not None else batch.other_language
                yield code or "", batch.others[index]
