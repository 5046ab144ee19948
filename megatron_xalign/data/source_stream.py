"""One source as a stream of tokens: documents in a seeded order, cut into windows, windows in a seeded order.

The order is a function of (seed, name of the source, epoch) alone. Nothing about the run, its length, its mixture or
its layout is in it, so every run of a series reads the same samples of a source in the same order, some further than
others. Both orders are formulas (``csrc/include/xalign/permutation.h``): what is kept of an epoch is where every 32nd
document begins, or which documents a window of whole documents holds.
"""

# D documents, W windows of an epoch, S sequence, K languages of the run, F languages of the file

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from megatron_xalign import _native
from megatron_xalign.data.index_cache import IndexCache, file_identity
from megatron_xalign.data.order_key import order_key
from megatron_xalign.data.splits import DocumentRange
from megatron_xalign.errors import FormatError
from megatron_xalign.formats.token_file import TokenFile

# Below this many documents an index is made in less time than a kept one is found.
_FEW_DOCUMENTS = 1 << 14
# The counts of one epoch are kept for the next call; more epochs are in use only where one ends and the next begins.
_EPOCHS_IN_MEMORY = 2


@dataclass(frozen=True)
class RowCounts:
    """Counts of windows or documents, in the order they are drawn."""

    content_NK: np.ndarray
    """int32 [N, K]: content tokens of each language of the run."""
    tokens_N: np.ndarray
    """int32 [N]: tokens read, padding not counted; S in every window of a cut stream."""
    loss_N: np.ndarray
    """int32 [N]: tokens whose label bears loss."""


@dataclass(frozen=True)
class _EpochCounts:
    """As the index keeps them: memory-mapped, in a narrow type, by language of the file."""

    content_WF: np.ndarray
    tokens_W: np.ndarray
    eod_W: np.ndarray
    """End-of-document tokens whose next token is a label."""

    def part(self, begin: int, end: int) -> _EpochCounts:
        return _EpochCounts(self.content_WF[begin:end], self.tokens_W[begin:end], self.eod_W[begin:end])


@dataclass(frozen=True)
class LeftOut:
    """What of an epoch is in no window."""

    tokens: int
    documents: int
    """Whole documents: longer than a window of whole documents. The end of a cut stream counts as tokens only."""


class SourceStream:
    """Draws the windows or documents of one source; what an epoch needs is built when it is first drawn from."""

    def __init__(
        self,
        name: str,
        file: TokenFile,
        languages: Sequence[str],
        *,
        seq_length: int,
        seed: int,
        part: DocumentRange | None = None,
        whole_documents: bool = False,
        eod_mask_loss: bool = False,
        cache: IndexCache | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Nothing large is read yet.

        Args:
            name: identity of the source in every order. A name and not a hash of the content: a moved folder or one
                corrected document must not redraw the order of a whole series, and two sources of equal content must
                not be read in step.
            file: its tokens, best opened with ``check="sizes"``: what is used of it is checked here.
            languages: codes of the run; those of the file are among them.
            seq_length: S, tokens of a window.
            seed: ``data.mixture.seed``.
            part: which documents; all of them if left out.
            whole_documents: windows hold whole documents, S tokens or fewer, and not stretches of S.
            eod_mask_loss: no loss where an end-of-document token is read.
            cache: where indices are kept.
            num_threads: of building; as many as this process may use, up to 16, if left out.

        Raises:
            ValueError: a language of the file is not one of the run, or the part is of another file.
        """
        missing = [code for code in file.languages if code not in languages]
        if missing:
            raise ValueError(f"{name} holds {', '.join(missing)}, which the run {list(languages)} does not have.")
        self.name = name
        self.file = file
        self.languages = tuple(languages)
        self.seq_length = seq_length
        self.seed = seed
        self.part = DocumentRange.whole(len(file)) if part is None else part
        self.whole_documents = whole_documents
        self.eod_mask_loss = eod_mask_loss
        self.num_threads = num_threads or min(len(os.sched_getaffinity(0)), 16)
        self._cache = cache or IndexCache(None)
        if self.part.num_documents != len(file):
            raise ValueError(f"the part is of {self.part.num_documents} documents; {name} has {len(file)}.")
        self._run_language_F = np.array([languages.index(code) for code in file.languages], dtype=np.int8)
        self._counts: dict[int, _EpochCounts] = {}
        self._left_out: dict[int, LeftOut] = {}
        self.native = _native.SourceStream(
            name=str(file.prefix),
            tokens=file.tokens,
            lengths=file.lengths_D,
            pointers=file.pointers_D,
            content=self._content_rule,
            eod=-1 if file.eod is None else file.eod,
            vocab_size=file.manifest["tokenizer"]["vocab_size"] if file.manifest else 0,
            span_ends=file.span_ends if self._content_rule == "spans" else None,
            span_languages=file.span_languages if self._content_rule == "spans" else None,
            run_language=self._run_language_F,
            seq_length=seq_length,
            whole_documents=whole_documents,
            split_key=self.part.key,
            part=(self.part.begin, self.part.end),
        )
        """What the batch reader takes."""

    def __len__(self) -> int:
        """Documents of the part."""
        return len(self.part)

    def __repr__(self) -> str:
        return f"SourceStream({self.name!r}, {len(self):,} documents, windows of {self.seq_length:,})"

    def __getstate__(self) -> dict[str, Any]:
        kept = ("name", "file", "languages", "seq_length", "seed", "part", "whole_documents", "eod_mask_loss")
        return {name: getattr(self, name) for name in kept} | {
            "cache": self._cache,
            "num_threads": self.num_threads,
            "file_identity": self._file_identity,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        expected = state.pop("file_identity")
        self.__init__(state.pop("name"), state.pop("file"), state.pop("languages"), **state)  # type: ignore[misc]
        if self._file_identity != expected:
            raise FormatError(
                f"{self.file.prefix} was made again since this process was sent its name; start the job again."
            )

    @property
    def num_documents(self) -> int:
        """Documents of the part."""
        return len(self.part)

    @cached_property
    def tokens(self) -> int:
        """Tokens of one reading of the part."""
        if self.part.is_whole:
            return self.file.num_tokens
        return int(self._totals[0])

    @cached_property
    def content_tokens_K(self) -> np.ndarray:
        """int64 [K]: content tokens of one reading of the part, by language of the run."""
        content_K = np.zeros(len(self.languages), dtype=np.int64)
        if self.part.is_whole and self.file.manifest:
            by_language = self.file.manifest["tokens_by_language"]
            content_K[self._run_language_F] = [by_language[code] for code in self.file.languages]
        else:
            content_K[self._run_language_F] = self._totals[1:]
        return content_K

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides which tokens its windows and documents hold, JSON-able."""
        return {
            "file": self._file_identity,
            "name": self.name,
            "seed": self.seed,
            "part": self._part_identity,
            "seq_length": self.seq_length,
            "whole_documents": self.whole_documents,
            "content": [self._content_rule, self.file.eod],
            "languages": [self.file.languages, self._run_language_F.tolist()],
        }

    def num_windows(self, epoch: int = 0) -> int:
        """Windows of one reading; the same in every epoch, unless of whole documents."""
        if self.whole_documents:
            self.load_epoch(epoch)
            return self.native.num_windows(epoch)
        # The last S tokens or fewer are left out, others in each epoch.
        return max(self.tokens - 1, 0) // self.seq_length

    def left_out(self, epoch: int = 0) -> LeftOut:
        """What of an epoch is in no window."""
        if self.whole_documents:
            self.load_epoch(epoch)
            return self._left_out[epoch]
        return LeftOut(tokens=self.tokens - self.num_windows(epoch) * self.seq_length, documents=0)

    def windows(self, begin: int, end: int) -> RowCounts:
        """Count windows.

        Args:
            begin: first draw; draws count over epochs.
            end: one past the last.

        Returns:
            Counts of each.

        Raises:
            ValueError: there are no such draws.
            FormatError: the token file is damaged.
        """
        if not 0 <= begin <= end:
            raise ValueError(f"windows {begin}..{end} are no draws.")
        pieces, epoch, first = [], 0, 0
        if not self.whole_documents and self.num_windows():
            epoch, first = begin // self.num_windows(), begin // self.num_windows() * self.num_windows()
        while begin < end:
            num_windows = self.num_windows(epoch)
            if num_windows == 0:
                raise ValueError(f"{self.name} has no window of {self.seq_length} tokens; {end} were asked for.")
            last = min(end - first, num_windows)
            if begin - first < last:
                pieces.append(self._epoch_counts(epoch).part(begin - first, last))
                begin = first + last
            epoch, first = epoch + 1, first + num_windows
        # The last token of a window of whole documents has no label.
        return self._rows(pieces, unlabelled=1 if self.whole_documents else 0)

    def documents(self, begin: int, end: int) -> RowCounts:
        """Count documents by draw, as :meth:`windows`."""
        if not 0 <= begin <= end or (end > begin and self.num_documents == 0):
            raise ValueError(f"documents {begin}..{end} are no draws of {self.name}.")
        for epoch in range(begin // max(self.num_documents, 1), -(-end // max(self.num_documents, 1))):
            self.load_keys(epoch)
        return self._rows([_EpochCounts(*self.native.count_documents(begin, end, self.num_threads))])

    def stretches(self, draws_N: np.ndarray, begins_N: np.ndarray, ends_N: np.ndarray) -> RowCounts:
        """Count stretches of documents.

        Args:
            draws_N: int64 [N]: documents by draw.
            begins_N: int64 [N]: the first token of each that counts.
            ends_N: int64 [N]: one past the last.

        Returns:
            Counts of each stretch, every token of which has a label.

        Raises:
            ValueError: there are no such draws or tokens.
            FormatError: the token file is damaged.
        """
        draws_N, begins_N, ends_N = (np.ascontiguousarray(item, dtype=np.int64) for item in (draws_N, begins_N, ends_N))
        if len(draws_N) and (draws_N.min() < 0 or self.num_documents == 0):
            raise ValueError(f"{self.name} has no document with draw {draws_N.min()}.")
        for epoch in np.unique(draws_N // max(self.num_documents, 1)).tolist():
            self.load_keys(epoch)
        return self._rows([_EpochCounts(*self.native.count_stretches(draws_N, begins_N, ends_N, self.num_threads))])

    def document_of(self, draw: int) -> int:
        """Number in the file of a document by draw."""
        if draw < 0 or self.num_documents == 0:
            raise ValueError(f"{self.name} has no document with draw {draw}.")
        self.load_keys(draw // self.num_documents)
        return self.native.document(draw)[0]

    def begun_and_cut(self, num_windows: int) -> tuple[int, int]:
        """How the first windows drawn fall on documents.

        Args:
            num_windows: windows drawn.

        Returns:
            Documents whose first token is in one of them, and documents cut by a border of one of them, a document
            counted once per epoch.
        """
        self.prepare(num_windows)
        return self.native.documents_read(num_windows, self.num_threads)

    def prepare(self, num_windows: int) -> None:
        """Build, or open, the indices that so many windows need; reading does it by itself when it comes to them."""
        epoch = 0
        while num_windows > 0:
            in_epoch = self.num_windows(epoch)
            if in_epoch == 0:
                raise ValueError(f"{self.name} has no window of {self.seq_length} tokens.")
            self.load_epoch(epoch)
            num_windows -= in_epoch
            epoch += 1

    def load_keys(self, epoch: int) -> None:
        """Tell an epoch its order."""
        if not self.native.has_keys(epoch):
            self.native.set_keys(epoch, self._key("documents", epoch), self._key("windows", epoch))

    def load_epoch(self, epoch: int) -> None:
        """Build the index of an epoch, or open the one that is kept.

        Raises:
            FormatError: the token file is damaged.
        """
        self.load_keys(epoch)
        if self.native.has_windows(epoch) and (epoch in self._left_out or not self.whole_documents):
            return
        made_from = {
            "file": self._file_identity, "part": self._part_identity, "documents": self._key("documents", epoch)
        }  # fmt: skip
        if self.whole_documents:
            kept = self._kept(
                "packing", {**made_from, "seq_length": self.seq_length}, lambda: self._build_packing(epoch)
            )
            self._left_out[epoch] = LeftOut(*kept["left_out"].tolist())
            self.native.use_packing(epoch, kept["documents"], kept["window_starts"])
        else:
            kept = self._kept(
                "starts", made_from, lambda: {"starts": self.native.build_starts(epoch, self.num_threads)}
            )
            self.native.use_starts(epoch, kept["starts"])

    @cached_property
    def _file_identity(self) -> dict[str, Any]:
        return file_identity(self.file)

    @property
    def _part_identity(self) -> list[int | None]:
        return [self.part.begin, self.part.end, self.part.num_documents, self.part.key]

    @property
    def _content_rule(self) -> Literal["all", "all_but_last", "spans", "not_eod"]:
        if self.file.content_is_regular:
            return "all_but_last"
        if self.file.span_ends is not None:
            return "spans"
        return "all" if self.file.eod is None else "not_eod"

    @cached_property
    def _totals(self) -> np.ndarray:
        """int64 [1 + F]: tokens of one reading, content tokens of each language of the file."""

        def build() -> dict[str, np.ndarray]:
            tokens, content_F = self.native.totals(self.num_threads)
            return {"totals": np.concatenate([[tokens], content_F])}

        made_from = {
            "file": self._file_identity, "part": self._part_identity, "content": [self._content_rule, self.file.eod]
        }  # fmt: skip
        return self._kept("totals", made_from, build)["totals"]

    def _key(self, of: Literal["documents", "windows"], epoch: int) -> int:
        return order_key(self.seed, self.name, of, epoch)

    def _kept(self, kind: str, made_from: dict[str, Any], build: Any) -> dict[str, np.ndarray]:
        return build() if self.num_documents <= _FEW_DOCUMENTS else self._cache.arrays(kind, made_from, build)

    def _build_packing(self, epoch: int) -> dict[str, np.ndarray]:
        documents, window_starts, left_out_documents, left_out_tokens = self.native.build_packing(epoch)
        left_out = np.array([left_out_tokens, left_out_documents])
        return {"documents": documents, "window_starts": window_starts, "left_out": left_out}

    def _epoch_counts(self, epoch: int) -> _EpochCounts:
        if epoch not in self._counts:
            self.load_epoch(epoch)

            def build() -> dict[str, np.ndarray]:
                content_WF, tokens_W, eod_W = self.native.count_epoch(epoch, self.num_threads)
                counts = {"content": content_WF, "eod": eod_W}
                return {**counts, "tokens": tokens_W} if self.whole_documents else counts

            made_from = {key: value for key, value in self.identity.items() if key != "languages"}
            kept = self._kept("counts", {**made_from, "epoch": epoch}, build)
            tokens_W = kept.get("tokens", np.broadcast_to(np.int32(self.seq_length), (len(kept["eod"]),)))
            while len(self._counts) >= _EPOCHS_IN_MEMORY:
                del self._counts[min(self._counts)]
            self._counts[epoch] = _EpochCounts(kept["content"], tokens_W, kept["eod"])
        return self._counts[epoch]

    def _rows(self, pieces: Sequence[_EpochCounts], unlabelled: int = 0) -> RowCounts:
        """Rows of several epochs as one; ``unlabelled`` tokens of each row have no label."""
        num_rows = sum(len(piece.tokens_W) for piece in pieces)
        content_NK = np.zeros((num_rows, len(self.languages)), dtype=np.int32)
        tokens_N, loss_N = np.empty(num_rows, dtype=np.int32), np.empty(num_rows, dtype=np.int32)
        done = 0
        for piece in pieces:
            rows = slice(done, done + len(piece.tokens_W))
            for column, language in enumerate(self._run_language_F.tolist()):
                content_NK[rows, language] = piece.content_WF[:, column]
            tokens_N[rows] = piece.tokens_W
            loss_N[rows] = tokens_N[rows] - unlabelled
            if self.eod_mask_loss:
                loss_N[rows] -= piece.eod_W
            done = rows.stop
        return RowCounts(content_NK, tokens_N, loss_N)
