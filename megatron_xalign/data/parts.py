"""One part of a corpus to token files of its own: read, filter, tokenise, write, and say that it is done."""

# N documents of a batch, T tokens

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from megatron_xalign import _native
from megatron_xalign.data.assembly import (
    Documents,
    Frame,
    ended_documents,
    monolingual_documents,
    pair_documents,
    without,
)
from megatron_xalign.data.contamination import CLEAN, IN, NEAR, ProbeSet
from megatron_xalign.data.documents import Direction, parse_template
from megatron_xalign.data.duplicates import KeyFileWriter, document_keys
from megatron_xalign.data.engines import GigatokenEngine, engine_named
from megatron_xalign.data.filters import IN_PROBE, NEAR_PROBE, TOO_MANY_TOKENS, PairFilter, within_token_limit
from megatron_xalign.data.inputs import Reading, TextBatch, read_part
from megatron_xalign.data.job import Job, identity_of
from megatron_xalign.data.packed_texts import BLANK, PackedTexts
from megatron_xalign.data.tokenizer_models import UnencodableTextError
from megatron_xalign.errors import CorpusError
from megatron_xalign.formats.atomic import write_json
from megatron_xalign.formats.token_file import TokenFileWriter

# Large enough to keep the engine busy, small enough that stopping, memory and progress do not notice.
_BATCH_BYTES = 2 << 20
# Languages come from the data; as part of a file's name only what cannot lead elsewhere will do.
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
_LONGEST_NAME = 60


class Progress(NamedTuple):
    """How far a part is."""

    bytes_read: int
    """On disk."""
    text_bytes: int
    """UTF-8 tokenised."""
    documents: int
    """Written."""
    tokens: int
    """Written."""


class PartMaker:
    """Does parts of a job, one after the other, with one engine."""

    def __init__(self, job: Job) -> None:
        """Load tokenizer, engine, probe set and filters.

        Raises:
            ConfigError, CorpusError, FormatError: one of them is not there any more, or has changed.
        """
        settings = job.settings
        self.job = job
        if job.loaded is None:
            self.tokenizer = settings.load_tokenizer()
            self.engine = engine_named(self.tokenizer, job.engine["name"])
        else:
            self.tokenizer, self.engine = job.loaded
            self.tokenizer.model.use_one_thread()
        self.probe = ProbeSet.read(settings.probe) if settings.probe is not None else None
        self.filter: PairFilter | None = None
        self.frame: Frame | None = None
        if settings.is_pairs:
            if settings.filters is not None:
                self.filter = PairFilter(settings.filters, probe=self.probe)
            self.frame = self._frame()
        self.splitters = {language: job.splitter(language) for language in job.sentences}
        self.separator: bytes | None = None
        """What texts may be packed with, if nobody but the engine looks at them."""
        looked_at = self.probe is not None or settings.duplicate_rule != "keep" or job.sentences
        if isinstance(self.engine, GigatokenEngine) and settings.append_eod and not looked_at:
            self.separator = self.engine.separator

    def _frame(self) -> Frame:
        pieces = parse_template(self.job.settings.template)
        ids, lengths = self.engine.encode_flat(pieces)
        ends = np.cumsum(lengths)
        # A special token is around a text, not around a piece of the template that is empty.
        before, between, after = (
            ids[end - length : end] if piece else ids[:0]
            for piece, end, length in zip(pieces, ends, lengths, strict=True)
        )
        return Frame(before, between, after, self.tokenizer.eod if self.job.settings.append_eod else None)

    def make(self, index: int, progress: Callable[[Progress], None] | None = None) -> dict[str, Any]:
        """Do a part, unless it is done; it appears whole or not at all.

        Args:
            index: of the part.
            progress: called now and then.

        Returns:
            Its record: ``hash, part, files, sources, outputs, counts, examples``.

        Raises:
            CorpusError: with file, line and reason.
            FormatError: it cannot be written.
        """
        record = self.job.finished(index)
        if record is not None:
            return record
        self.job.folder.remove_part(index)
        settings = self.job.settings
        with _Part(self, index) as part:
            for batch in read_part(
                self.job.parts[index], settings.fields, on_error=settings.on_error, reading=part.reading,
                batch_bytes=_BATCH_BYTES, separator=self.separator,
            ):
                part.add(batch)
                part.check_skipped()
                if progress is not None:
                    progress(part.progress())
            part.check_skipped()
            return part.finish()


def run_part(job: Job, index: int, progress: Callable[[Progress], None] | None = None) -> dict[str, Any]:
    """Do one part of a job; see :class:`PartMaker`, which does many at less cost."""
    return PartMaker(job).make(index, progress)


class _Output(NamedTuple):
    writer: TokenFileWriter
    keys: KeyFileWriter | None


class _Part:
    """A part while it is made."""

    def __init__(self, maker: PartMaker, index: int) -> None:
        self.maker = maker
        self.job = maker.job
        self.index = index
        self.reading = Reading()
        self.filtered: Counter[str] = Counter()
        self.empty = 0
        self.text_bytes = 0
        self._unchecked_before = Counter(maker.filter.not_checked) if maker.filter else Counter()
        self._outputs: dict[str, _Output] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    # --- documents ----------------------------------------------------------------------------------------------------

    def add(self, batch: TextBatch) -> None:
        """Write the documents of a batch that are to be kept."""
        try:
            if batch.others is not None:
                self._add_pairs(batch, batch.others)
            elif isinstance(batch.texts, PackedTexts):
                self._add_packed(batch.texts, batch.language or "")
            elif batch.languages is None:
                self._add_monolingual(batch, batch.texts, batch.language or "", None)
            elif self.job.settings.split_by_language or self.job.sentences:
                # Sentences are split, and files written, language by language.
                self._add_by_language(batch, batch.languages)
            else:
                self._add_monolingual(batch, batch.texts, None, batch.languages)
        except Exception as error:
            error.add_note(f"while tokenising {batch.where(0)} to {batch.where(len(batch.texts) - 1)}")
            raise

    def _add_by_language(self, batch: TextBatch, languages: list[str]) -> None:
        if not self.job.settings.split_by_language:
            # The order of documents is to stay: stretches of one language.
            begin = 0
            for end in range(1, len(languages) + 1):
                if end == len(languages) or languages[end] != languages[begin]:
                    self._add_monolingual(batch, batch.texts[begin:end], languages[begin], None, range(begin, end))
                    begin = end
            return
        for language in dict.fromkeys(languages):
            places = [place for place, code in enumerate(languages) if code == language]
            self._add_monolingual(batch, [batch.texts[place] for place in places], language, None, places)

    def _add_monolingual(
        self,
        batch: TextBatch,
        texts: list[str],
        language: str | None,
        languages: list[str] | None,
        places: Sequence[int] | None = None,
    ) -> None:
        """Write texts in one language, or each in its own."""
        places = places if places is not None else range(len(texts))
        blank = self.job.settings.keep_blank
        keep = np.fromiter(map(bool, texts), dtype=bool, count=len(texts))
        if not blank:
            keep &= ~np.fromiter(map(str.isspace, texts), dtype=bool, count=len(texts))
        self.empty += int(np.count_nonzero(~keep))
        if self.maker.probe is not None:
            kept = np.flatnonzero(keep)
            keep[kept] = self._untouched(self.maker.probe.touch([texts[place] for place in kept]))
        if not keep.all():
            texts, places = _chosen(texts, keep), _chosen(places, keep)
            languages = _chosen(languages, keep) if languages is not None else None
        if not texts:
            return
        sentences = None
        if self.job.sentences:
            split = [self.maker.splitters[language or ""].split(text) for text in texts]
            counts = np.fromiter(map(len, split), dtype=np.int64, count=len(split))
            ids, sentence_lengths = self._encode([piece for pieces in split for piece in pieces], batch, places, counts)
            lengths = _sums(sentence_lengths, counts)
            counts = _sums((sentence_lengths > 0).astype(np.int64), counts)
            sentences = sentence_lengths[sentence_lengths > 0], counts[lengths > 0]
        else:
            ids, lengths = self._encode(texts, batch, places)
        keep = lengths > 0
        if not keep.all():
            # The tokenizer makes nothing of them.
            self.empty += int(np.count_nonzero(~keep))
            texts, lengths = _chosen(texts, keep), lengths[keep]
            languages = _chosen(languages, keep) if languages is not None else None
        if not texts:
            return
        is_split = self.job.settings.split_by_language
        output = self._output(_file_name(language or "") if is_split else "", language)
        known = {code: output.writer.language_index(code) for code in dict.fromkeys(languages or [language or ""])}
        index = (
            known[language or ""] if languages is None
            else np.fromiter(map(known.__getitem__, languages), dtype=np.int64, count=len(texts))
        )
        eod = self.maker.tokenizer.eod if self.job.settings.append_eod else None
        self._write(output, monolingual_documents(ids, lengths, index, eod, sentences), texts, None)

    def _add_packed(self, texts: PackedTexts, language: str) -> None:
        """Write texts in one language that only the engine looks at."""
        engine = self.maker.engine
        assert isinstance(engine, GigatokenEngine)
        if not self.job.settings.keep_blank:
            is_blank = (texts.kinds_N & BLANK) != 0
            if is_blank.any():
                self.empty += int(np.count_nonzero(is_blank))
                texts = texts.only(~is_blank)
        if not texts:
            return
        tokens, lengths = engine.encode_ended(texts)
        self.text_bytes += texts.num_bytes
        keep = lengths > 1
        if not keep.all():
            self.empty += int(np.count_nonzero(~keep))
            tokens, lengths = without(tokens, lengths, keep)
        if not lengths.size:
            return
        is_split = self.job.settings.split_by_language
        output = self._output(_file_name(language) if is_split else "", language)
        output.writer.add_documents(*ended_documents(tokens, lengths, output.writer.language_index(language)))

    def _add_pairs(self, batch: TextBatch, others: list[str]) -> None:
        texts, ids = list(batch.texts), batch.ids or []
        sides = batch.language or batch.languages, batch.other_language or batch.other_languages
        keep = np.fromiter(
            (bool(a) and bool(b) and not a.isspace() and not b.isspace() for a, b in zip(texts, others, strict=True)),
            dtype=bool, count=len(texts),
        )
        self.empty += int(np.count_nonzero(~keep))
        places: Sequence[int] = range(len(texts))

        def leave_out() -> None:
            nonlocal texts, others, ids, places, sides
            if not keep.all():
                texts, others, places = (_chosen(column, keep) for column in (texts, others, places))
                ids = _chosen(ids, keep) if ids else ids
                first, second = (_chosen(side, keep) if isinstance(side, list) else side for side in sides)
                sides = first, second

        leave_out()
        if texts and self.maker.filter is not None:
            keep, reasons = self.maker.filter.apply(texts, others, *sides)
            self.filtered += reasons
            leave_out()
        elif texts and self.maker.probe is not None:
            keep = self._untouched(np.maximum(self.maker.probe.touch(texts), self.maker.probe.touch(others)))
            leave_out()
        if not texts:
            return
        tokens, lengths = self._encode([*texts, *others], batch, [*places, *places])
        num = len(texts)
        keep = (lengths[:num] > 0) & (lengths[num:] > 0)
        self.empty += int(np.count_nonzero(~keep))
        filters = self.job.settings.filters
        if filters is not None and filters.max_tokens is not None:
            short = within_token_limit(lengths[:num], lengths[num:], filters.max_tokens)
            self._count(TOO_MANY_TOKENS, int(np.count_nonzero(keep & ~short)))
            keep &= short
        if not keep.all():
            tokens, lengths = without(tokens, lengths, np.concatenate([keep, keep]))
            leave_out()
        if not texts:
            return
        output = self._output("", None)
        languages = np.concatenate([_language_indices(output.writer, side, len(texts)) for side in sides])
        swapped = are_swapped(ids, self.job.settings.direction, self.job.settings.seed, len(texts))
        assert self.maker.frame is not None
        self._write(output, pair_documents(tokens, lengths, languages, swapped, self.maker.frame), texts, others)

    def _encode(
        self, texts: list[str], batch: TextBatch, places: Sequence[int], counts: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """Tokens and lengths of texts; ``places`` says where in the batch they come from (``counts`` of them each)."""
        try:
            encoded = self.maker.engine.encode_flat(texts)
        except UnencodableTextError as error:
            index = error.index
            if counts is not None:
                index = int(np.searchsorted(np.cumsum(counts), index, side="right"))
            raise CorpusError(f"{batch.where(places[index])}: {error}") from None
        self.text_bytes += int(_native.utf8_lengths(texts).sum())
        return encoded

    def _untouched(self, touched_N: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which texts tell nothing of the probe; the others are counted."""
        self._count(IN_PROBE, int(np.count_nonzero(touched_N == IN)))
        self._count(NEAR_PROBE, int(np.count_nonzero(touched_N == NEAR)))
        return touched_N == CLEAN

    def _count(self, reason: str, number: int) -> None:
        if number:
            self.filtered[reason] += number

    # --- files --------------------------------------------------------------------------------------------------------

    def _output(self, name: str, language: str | None) -> _Output:
        """The token file of this name; opened when the first document goes there."""
        if name not in self._outputs:
            prefix = self.job.folder.part_prefix(self.index, name)
            languages = [language] if name and language else list(self.job.languages or ())
            writer = TokenFileWriter(
                prefix, tokenizer=self.maker.tokenizer, origin=self.job.settings.origin, languages=languages
            )
            keys = None
            if self.job.settings.duplicate_rule != "keep":
                keys = self._stack.enter_context(
                    KeyFileWriter(Path(f"{prefix}.keys"), near=self.job.settings.duplicate_rule == "near")
                )
            self._outputs[name] = _Output(self._stack.enter_context(writer), keys)
        return self._outputs[name]

    def _write(self, output: _Output, documents: Documents, texts: list[str], others: list[str] | None) -> None:
        output.writer.add_documents(*documents)
        if output.keys is not None:
            output.keys.append(document_keys(texts, others, near=self.job.settings.duplicate_rule == "near"))

    def check_skipped(self) -> None:
        """Stop a part that leaves out more malformed lines than the whole job may."""
        check_skipped(self.reading.malformed, self.reading.examples, self.job.settings.max_skipped)

    def progress(self) -> Progress:
        """How far it is."""
        writers = [output.writer for output in self._outputs.values()]
        return Progress(
            self.reading.bytes_read, self.text_bytes, sum(writer.documents for writer in writers),
            sum(writer.tokens for writer in writers),
        )

    def finish(self) -> dict[str, Any]:
        """Let the part's files appear, its record last."""
        if not self.job.settings.split_by_language:
            self._output("", None)
        outputs = {}
        for name, output in sorted(self._outputs.items()):
            manifest = output.writer.finish(allow_empty=True, append_eod=self.job.settings.append_eod)
            outputs[name] = {"documents": manifest["documents"], "tokens": manifest["tokens"]}
        # Closing the key files lets them appear.
        self._stack.close()
        unchecked = self.maker.filter.not_checked - self._unchecked_before if self.maker.filter else Counter[str]()
        record = {
            "hash": self.job.part_hash(self.index), "part": self.index,
            "files": [identity_of(file) for file in self.job.parts[self.index].files],
            "sources": self.reading.sources, "outputs": outputs,
            "counts": {
                "read": self.reading.documents, "empty": self.empty, "filtered": dict(sorted(self.filtered.items())),
                "skipped": dict(sorted(self.reading.skipped.items())), "malformed": self.reading.malformed,
                "not_checked": dict(sorted(unchecked.items())), "text_bytes": self.text_bytes,
            },
            "examples": self.reading.examples,
        }
        write_json(self.job.folder.record_path(self.index), record)
        return record


def check_skipped(malformed: int, examples: Sequence[str], most: int | None) -> None:
    """CorpusError if more malformed lines were left out than the job allows."""
    if most is not None and malformed > most:
        raise CorpusError(
            f"{malformed:,} malformed lines are more than --max-skipped {most} allows, such as "
            + "; ".join(examples[:3]) + ". Mend them, or allow more."
        )


def are_swapped(ids: Sequence[str], direction: Direction, seed: int, num: int) -> NDArray[np.bool_]:
    """Whether the second side of each pair is the source; as ``documents.pair_order`` decides it, for many at once."""
    if direction != "random":
        return np.full(num, direction == "backward")
    # A fraction below one half is a first bit of 0; blake2b and its first byte are all there is to do for each.
    start = hashlib.blake2b(f"direction\0{seed}\0".encode(), digest_size=8)
    firsts = bytearray(num)
    for index, name in enumerate(ids):
        digest = start.copy()
        digest.update(name.encode())
        firsts[index] = digest.digest()[0]
    swapped: NDArray[np.bool_] = np.frombuffer(firsts, dtype=np.uint8) >= 128
    return swapped


def _language_indices(writer: TokenFileWriter, side: str | list[str] | None, num: int) -> NDArray[np.int64]:
    if side is None or isinstance(side, str):
        return np.full(num, writer.language_index(side or ""), dtype=np.int64)
    known = {code: writer.language_index(code) for code in dict.fromkeys(side)}
    return np.fromiter(map(known.__getitem__, side), dtype=np.int64, count=num)


def _file_name(language: str) -> str:
    """A language as part of a file's name.

    Raises:
        CorpusError: it could lead to another folder, or is no code at all.
    """
    if not language or len(language) > _LONGEST_NAME or not _NAME_CHARACTERS.issuperset(language):
        raise CorpusError(
            f"{language[:100]!r} cannot be part of a file's name; language codes are letters, digits, - and _. Map it "
            "with a language map, or do not split by language."
        )
    return language


def _chosen(column: Sequence[Any], keep_N: NDArray[np.bool_]) -> list[Any]:
    return [column[place] for place in np.flatnonzero(keep_N).tolist()]


def _sums(values: NDArray[np.int64], counts_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum of the first ``counts[0]`` values, of the next ``counts[1]``, and so on; none is 0."""
    sums = np.concatenate([[0], np.cumsum(values)])
    ends = np.cumsum(counts_N)
    result: NDArray[np.int64] = sums[ends] - sums[ends - counts_N]
    return result
