"""One source as a stream of samples: documents in a seeded order, cut into windows, windows in a seeded order.

The order is a function of (seed, name of the source, epoch) alone. Nothing about the run, its length, its mixture or
its layout is in it, so every run of a series reads the same samples of a source in the same order, some further than
others.
"""

# D documents, W windows of an epoch, S sequence, K languages of the run

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_xalign import _native
from megatron_xalign.data.order_key import order_key as order_key
from megatron_xalign.formats.token_file import TokenFile

# Language ids are expanded and counted in pieces of this many tokens.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Epoch:
    """One reading of a source."""

    documents: np.ndarray
    """int64 [D]: documents in the order they are read."""
    starts: np.ndarray
    """int64 [D + 1]: where each of them begins in the stream."""
    borders: np.ndarray
    """int64 [W + 1, 2]: (position in ``documents``, token of it) where each window of the stream begins."""
    order: np.ndarray
    """int64 [W]: windows in the order they are drawn."""
    content: np.ndarray
    """int32 [W, K]: content tokens by language of each window, in the order they are drawn."""


class SourceWindows:
    """Draws the samples of one source; epochs are built when first drawn from."""

    def __init__(
        self, name: str, file: TokenFile, languages: Sequence[str], *, seq_length: int, seed: int
    ) -> None:
        """Nothing large is read yet.

        Args:
            name: identity of the source in every order. A name and not a hash of the content: a moved folder or one
                corrected document must not redraw the order of a whole series, and two sources of equal content must
                not be read in step.
            file: its tokens.
            languages: codes of the run; those of the file are among them.
            seq_length: S, tokens of a window.
            seed: ``data.mixture.seed``.
        """
        self.name = name
        self.file = file
        self.seq_length = seq_length
        self.seed = seed
        self.lengths = file.sequence_lengths
        self.per_epoch = max(int(file.offsets[-1]) - 1, 0) // seq_length
        """Windows of one reading; the last S tokens or fewer are left out, others in each epoch."""
        self._num_languages = len(languages)
        # One more entry, so that -1 (no language) maps to itself.
        self._run_language = np.array([*(languages.index(code) for code in file.languages), -1], dtype=np.int8)
        self._epochs: dict[int, Epoch] = {}
        self._counts_at_documents: np.ndarray | None = None

    def epoch(self, number: int) -> Epoch:
        """The order and content of one reading, ``number`` counting from 0."""
        if number not in self._epochs:
            self._epochs[number] = self._build(number)
        return self._epochs[number]

    def content(self, num_windows: int) -> np.ndarray:
        """int32 [num_windows, K]: content tokens by language of the first windows drawn, over as many epochs."""
        if num_windows == 0 or self.per_epoch == 0:
            return np.zeros((0, self._num_languages), dtype=np.int32)
        epochs = -(-num_windows // self.per_epoch)
        return np.ascontiguousarray(
            np.concatenate([self.epoch(number).content for number in range(epochs)])[:num_windows]
        )

    def read(self, draw: int) -> tuple[np.ndarray, np.ndarray]:
        """Read one sample.

        Args:
            draw: which sample of the source, counting from 0 over all epochs.

        Returns:
            int64 [S + 1] tokens (the last is only a label) and int8 [S + 1], the language of each.
        """
        epoch = self.epoch(draw // self.per_epoch)
        window = int(epoch.order[draw % self.per_epoch])
        (first, begin), (last, end) = epoch.borders[window : window + 2]
        documents = epoch.documents[first : last + 1]
        starts = self.file.offsets[documents]
        stops = self.file.offsets[documents + 1]
        stops[-1] = starts[-1] + end + 1
        starts[0] += begin
        tokens = _native.gather(self.file.tokens, starts, stops)
        languages = [self.file.language_ids_flat(int(a), int(b)) for a, b in zip(starts, stops, strict=True)]
        return tokens, self._run_language[np.concatenate(languages)]

    def documents_read(self, num_windows: int) -> tuple[int, int]:
        """How the first windows drawn fall on documents.

        Args:
            num_windows: windows drawn.

        Returns:
            Documents whose first token is in one of them, and documents cut by a border of one of them, a document
            counted once per epoch.
        """
        begun = cut = 0
        for number in range(-(-num_windows // self.per_epoch) if num_windows else 0):
            epoch = self.epoch(number)
            drawn = epoch.order[: num_windows - number * self.per_epoch]
            at = np.arange(self.per_epoch + 1) * self.seq_length
            # Documents of no tokens begin where the next one begins; they are not read.
            real_starts = epoch.starts[:-1][np.diff(epoch.starts) > 0]
            before = np.searchsorted(real_starts, at, side="left")
            begun += int((before[drawn + 1] - before[drawn]).sum())
            # Flags and not np.unique: a border serves two windows, a long document has many borders.
            is_border = np.zeros(len(epoch.borders), dtype=bool)
            is_border[drawn] = is_border[drawn + 1] = True
            is_cut = np.zeros(len(epoch.documents), dtype=bool)
            is_cut[epoch.borders[is_border & (epoch.borders[:, 1] > 0), 0]] = True
            cut += int(is_cut.sum())
        return begun, cut

    def _build(self, number: int) -> Epoch:
        documents = _native.permutation(order_key(self.seed, self.name, "documents", number), len(self.lengths))
        lengths = self.lengths[documents]
        starts = np.zeros(len(documents) + 1, dtype=np.int64)
        np.cumsum(lengths, out=starts[1:])
        borders = _native.sample_index(lengths, self.seq_length)
        order = _native.permutation(order_key(self.seed, self.name, "windows", number), self.per_epoch)
        counts_WK = np.diff(self._content_before(documents, borders), axis=0).astype(np.int32)
        return Epoch(documents, starts, borders, order, np.ascontiguousarray(counts_WK[order]))

    def _content_before(self, documents: np.ndarray, borders: np.ndarray) -> np.ndarray:
        """int64 [W + 1, K]: content tokens of the stream before each border."""
        if self._counts_at_documents is None:
            self._counts_at_documents = self._count_before(self.file.offsets)
        in_file = self._counts_at_documents
        in_stream = np.zeros_like(in_file)
        np.cumsum(in_file[documents + 1] - in_file[documents], axis=0, out=in_stream[1:])
        cut_documents = documents[borders[:, 0]]
        in_cut_document = self._count_before(self.file.offsets[cut_documents] + borders[:, 1]) - in_file[cut_documents]
        counts = in_stream[borders[:, 0]] + in_cut_document
        of_run = np.zeros((len(borders), self._num_languages), dtype=np.int64)
        of_run[:, self._run_language[:-1]] = counts
        return of_run

    def _count_before(self, positions: np.ndarray) -> np.ndarray:
        """int64 [len(positions), languages of the file]: content tokens of the file before each position."""
        num_languages = len(self.file.languages)
        ascending = np.argsort(positions, kind="stable")
        wanted = positions[ascending]
        counts = np.zeros((len(positions), num_languages), dtype=np.int64)
        so_far = np.zeros(num_languages, dtype=np.int64)
        done = 0
        for begin in range(0, int(self.file.offsets[-1]), _CHUNK):
            end = min(begin + _CHUNK, int(self.file.offsets[-1]))
            # Positions up to `end` belong to this piece; the last, `end` itself, asks for the sum of the whole piece.
            until = int(np.searchsorted(wanted, end, side="left"))
            asked = np.append(wanted[done:until] - begin, end - begin)
            found = _native.count_languages(self.file.language_ids_flat(begin, end), asked, num_languages)
            counts[ascending[done:until]] = so_far + found[:-1]
            so_far = so_far + found[-1]
            done = until
        counts[ascending[done:]] = so_far
        return counts
