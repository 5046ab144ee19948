"""Duplicates among documents: keys made part by part, and one decision over all parts when they are joined.

A document is a *duplicate* if an earlier one has the same text (both texts of a pair, whichever comes first; the
declared languages do not matter) up to white space and canonical form (``folding.exact_folding``). It is a *near
duplicate* if an earlier one, itself kept or not, is found to resemble it: the sets of character 5-grams of their texts
(``folding.loose_folding``: no case, punctuation, width, invisible characters; both sides of a pair in one set) have an
estimated Jaccard similarity of at least ``threshold``.

The estimate is the share of equal bytes, less what chance gives, in two sketches of 128 bytes (csrc/include/xalign/
minhash.h); its standard deviation is sqrt(J (1 - J) / 128), 0.035 at J = 0.8. Which documents are compared at all is
decided by bands: the sketch is cut into bands of r bytes, and two documents with one band in common are compared; r is
16, 8 or 4, the largest that finds documents at the threshold itself with a probability 1 - (1 - J^r)^(128/r) of at
least 0.85. In a band that very many share (boilerplate), a document is compared with the first 1,000 of them.

The answer depends on the documents and their order alone: not on how they lie in parts, nor on memory.
"""

# N documents of a part, B of a block, R bands, P parts, E entries

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_xalign import _native
from megatron_xalign.data.folding import exact_folding, loose_folding
from megatron_xalign.data.key_file import SKETCH_BINS, KeyFileWriter, key_dtype, read_keys
from megatron_xalign.errors import ConfigError, FormatError
from megatron_xalign.progress import progress_bar

__all__ = [
    "DEFAULT_THRESHOLD", "DUPLICATE", "NEAR_DUPLICATE", "Duplicates", "KeyFileWriter", "document_keys", "read_keys",
    "resolve_duplicates",
]  # fmt: skip

DUPLICATE, NEAR_DUPLICATE = "duplicate", "near duplicate"
"""Reasons a document is left out for."""
DEFAULT_THRESHOLD = 0.8
"""Jaccard similarity from which on two documents are near."""

_KEPT, _IS_DUPLICATE, _IS_NEAR = range(3)
_MOST_COMPARED = 1000
_LEAST_RECALL = 0.85
_ENTRY = np.dtype([("key", "<u8"), ("document", "<i8")])
_EXACT_ENTRY = np.dtype([("key", "<u8", (2,)), ("document", "<i8")])
# Upper bounds of what sorting and comparing one entry takes, sketches and temporary arrays included.
_BYTES_PER_EXACT_ENTRY = 100
_BYTES_PER_ENTRY = 100 + 2 * SKETCH_BINS
_LEAST_MEMORY_BYTES = 1 << 20


def document_keys(texts: list[str], others: list[str] | None = None, *, near: bool) -> NDArray[np.void]:
    """What is kept of documents to tell which are duplicates of one another.

    Args:
        texts: N texts; of pairs, the first sides.
        others: the second sides, or None for monolingual documents.
        near: whether near duplicates will be looked for (128 bytes a document more).

    Returns:
        [N] of ``key_file.key_dtype(near)``, for :class:`KeyFileWriter`.
    """
    keys_N = np.empty(len(texts), dtype=key_dtype(near))
    keys_N["exact"] = _native.document_keys(exact_folding(), texts, others)
    if near:
        keys_N["sketch"] = _native.document_sketches(loose_folding(), exact_folding(), texts, others)
    return keys_N


class Duplicates:
    """Which documents to leave out, part by part."""

    def __init__(self, verdicts: NDArray[np.uint8], starts: Sequence[int]) -> None:
        """Made by :func:`resolve_duplicates`."""
        self._verdicts = verdicts
        self._starts = starts

    def drop(self, part: int) -> NDArray[np.bool_]:
        """bool [documents of the part]: True where one is a duplicate or a near duplicate of an earlier one."""
        return self._of(part) != _KEPT

    def reasons(self, part: int) -> Counter[str]:
        """How many of a part's documents are left out, by reason."""
        verdicts_N = self._of(part)
        counts = {
            DUPLICATE: int(np.count_nonzero(verdicts_N == _IS_DUPLICATE)),
            NEAR_DUPLICATE: int(np.count_nonzero(verdicts_N == _IS_NEAR)),
        }
        return Counter({reason: count for reason, count in counts.items() if count})

    @property
    def total(self) -> Counter[str]:
        """How many documents of all parts are left out, by reason."""
        return sum((self.reasons(part) for part in range(len(self._starts) - 1)), Counter())

    def _of(self, part: int) -> NDArray[np.uint8]:
        if not 0 <= part < len(self._starts) - 1:
            raise ValueError(f"part={part} is outside 0..{len(self._starts) - 2}.")
        return np.asarray(self._verdicts[self._starts[part] : self._starts[part + 1]])


def resolve_duplicates(
    key_files: Sequence[str | Path],
    *,
    near: bool,
    work_folder: str | Path,
    threshold: float = DEFAULT_THRESHOLD,
    memory_bytes: int = 512 << 20,
) -> Duplicates:
    """Find the documents that repeat an earlier one, over all parts; the first in document order stays.

    Args:
        key_files: one per part, in document order.
        near: look for near duplicates too.
        work_folder: where buckets (with ``near`` up to 256 bytes a document, then deleted) and the verdicts
            (one byte a document, needed as long as the answer is) are written.
        threshold: Jaccard similarity from which on two documents are near, in [0.5, 1].
        memory_bytes: about as much is used at most, at least a megabyte; more is faster.

    Raises:
        ConfigError: ``threshold`` is outside its range.
        FormatError: a key file is missing, damaged, or without sketches where ``near`` needs them.
        ValueError: ``memory_bytes`` is below a megabyte.
    """
    check_threshold(threshold)
    if memory_bytes < _LEAST_MEMORY_BYTES:
        raise ValueError(f"memory_bytes={memory_bytes} is below {_LEAST_MEMORY_BYTES}.")
    folder = Path(work_folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = _Parts(key_files, near)
    verdicts = parts.verdicts(folder / "duplicates.verdicts")
    with progress_bar(parts.documents * (2 if near else 1), "find duplicates", " docs") as bar:
        _mark_exact(parts, verdicts, folder / "buckets", memory_bytes)
        bar.update(parts.documents)
        if near:
            _mark_near(parts, verdicts, folder / "buckets", memory_bytes, threshold, bar)
    return Duplicates(verdicts, parts.starts)


def check_threshold(threshold: float) -> None:
    """ConfigError unless near duplicates can be found at this Jaccard similarity."""
    if not 0.5 <= threshold <= 1.0:
        raise ConfigError(
            f"near-duplicate threshold={threshold} is outside [0.5, 1]; it is a Jaccard similarity of sets of "
            "character 5-grams, 0.8 for texts that differ in a word or two."
        )


def rows_per_band(threshold: float) -> int:
    """Bytes of a sketch that two documents must share in one place to be compared."""
    recall = {rows: 1 - (1 - threshold**rows) ** (SKETCH_BINS // rows) for rows in (16, 8, 4)}
    return next((rows for rows, share in recall.items() if share >= _LEAST_RECALL), 4)


def _mark_exact(parts: _Parts, verdicts: NDArray[np.uint8], folder: Path, memory_bytes: int) -> None:
    """Mark all but the first of each set of documents with one exact key."""
    # Half of the memory for the keys already seen, half for the next ones. Keys spread evenly, so those of a bucket fit
    # however often each is repeated.
    capacity = max(1, memory_bytes // (2 * _BYTES_PER_EXACT_ENTRY))
    with _Buckets(folder, _EXACT_ENTRY, math.ceil(parts.documents / capacity)) as buckets:
        for begin, records_B in parts.blocks(capacity):
            entries_E = np.empty(len(records_B), dtype=_EXACT_ENTRY)
            entries_E["key"] = records_B["exact"]
            entries_E["document"] = np.arange(begin, begin + len(records_B))
            buckets.add(entries_E, entries_E["key"][:, 0])
        for bucket in buckets:
            seen_E = np.empty(0, dtype=_EXACT_ENTRY)
            for chunk_E in bucket(capacity):
                entries_E = np.concatenate([seen_E, chunk_E])
                # Stable, so that of equal keys the earliest document comes first.
                order_E = np.lexsort((entries_E["key"][:, 1], entries_E["key"][:, 0]))
                entries_E = entries_E[order_E]
                first_E = np.ones(len(entries_E), dtype=bool)
                first_E[1:] = (entries_E["key"][1:] != entries_E["key"][:-1]).any(axis=1)
                verdicts[entries_E["document"][~first_E]] = _IS_DUPLICATE
                seen_E = entries_E[first_E]


def _mark_near(
    parts: _Parts, verdicts: NDArray[np.uint8], folder: Path, memory_bytes: int, threshold: float, bar: tqdm
) -> None:
    """Mark documents whose sketch agrees with that of an earlier one that shares a band."""
    rows = rows_per_band(threshold)
    # Bytes of unrelated grams are equal one time in 256.
    min_agreeing = math.ceil(SKETCH_BINS * (threshold + (1 - threshold) / 256) - 1e-9)
    num_bands = SKETCH_BINS // rows
    capacity = max(1, memory_bytes // (2 * _BYTES_PER_ENTRY))
    with _Buckets(folder, _ENTRY, math.ceil(parts.documents * num_bands / capacity)) as buckets:
        for begin, records_B in parts.blocks(max(1, memory_bytes // (_BYTES_PER_ENTRY * num_bands))):
            # A duplicate resembles what its first one resembles, which comes before it.
            kept_B = np.flatnonzero(verdicts[begin : begin + len(records_B)] == _KEPT)
            keys_BR = _band_keys(records_B["sketch"][kept_B], rows)
            entries_E = np.empty(keys_BR.size, dtype=_ENTRY)
            entries_E["key"] = keys_BR.ravel()
            entries_E["document"] = np.repeat(kept_B + begin, num_bands)
            buckets.add(entries_E, entries_E["key"])
            bar.update(len(records_B) / 2)
        for bucket in buckets:
            seen_E = np.empty(0, dtype=_ENTRY)
            for chunk_E in bucket(capacity):
                seen_E = _compare(parts, verdicts, seen_E, chunk_E, min_agreeing)
                bar.update(len(chunk_E) / num_bands / 2)


def _band_keys(sketches_B: NDArray[np.uint8], rows: int) -> NDArray[np.uint64]:
    """uint64 [B, R]: a key for each band's bytes; keys of different bands are never equal."""
    words: NDArray[np.uint64] = np.ascontiguousarray(sketches_B).view(f"<u{min(rows, 8)}").astype(np.uint64)
    if rows == 16:
        words = _mix(words[:, 0::2]) + words[:, 1::2]
    num_bands = np.uint64(words.shape[1])
    bands_R = np.arange(num_bands, dtype=np.uint64)
    mixed = _mix(words + bands_R * np.uint64(0x9E3779B97F4A7C15))
    # The lowest bits name the band; the highest choose the bucket.
    return mixed - mixed % num_bands + bands_R


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea and Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _compare(
    parts: _Parts, verdicts: NDArray[np.uint8], seen_E: NDArray[np.void], chunk_E: NDArray[np.void], min_agreeing: int
) -> NDArray[np.void]:
    """Mark the near duplicates among the entries of a chunk; return what later chunks are to be compared with."""
    entries_E = np.concatenate([seen_E, chunk_E])
    order_E = np.argsort(entries_E["key"], kind="stable")
    entries_E = entries_E[order_E]
    new_E = order_E >= len(seen_E)
    begins_E = np.ones(len(entries_E), dtype=bool)
    begins_E[1:] = entries_E["key"][1:] != entries_E["key"][:-1]
    starts = np.flatnonzero(begins_E)
    sizes = np.diff(np.append(starts, len(entries_E)))
    asked_E = new_E & ~begins_E
    asked_E &= verdicts[entries_E["document"]] == _KEPT
    groups = np.flatnonzero(np.add.reduceat(asked_E, starts, dtype=np.int64)) if len(starts) else starts
    if len(groups):
        inside_E = np.zeros(len(sizes), dtype=bool)
        inside_E[groups] = True
        inside_E = np.repeat(inside_E, sizes)
        documents = entries_E["document"][inside_E]
        near = _native.near_earlier(
            parts.sketches(documents),
            np.concatenate([[0], np.cumsum(sizes[groups])]).astype(np.int64),
            asked_E[inside_E].view(np.uint8),
            min_agreeing,
            _MOST_COMPARED,
        )
        verdicts[documents[near.view(bool)]] = _IS_NEAR
    place_E = np.arange(len(entries_E)) - np.repeat(starts, sizes)
    return entries_E[place_E < _MOST_COMPARED]


class _Parts:
    """The keys of all parts as one sequence of documents."""

    def __init__(self, key_files: Sequence[str | Path], near: bool) -> None:
        self._keys = [read_keys(path) for path in key_files]
        for path, keys_N in zip(key_files, self._keys, strict=True):
            if near and "sketch" not in (keys_N.dtype.names or ()):
                raise FormatError(
                    f"{path} has no sketches, which near duplicates are found by. Delete it and run the same command "
                    "again: its part is made anew."
                )
        self.starts = [0, *accumulate(len(keys_N) for keys_N in self._keys)]
        self.documents = self.starts[-1]

    def verdicts(self, path: Path) -> NDArray[np.uint8]:
        """One zero per document, on disk."""
        if not self.documents:
            return np.zeros(0, dtype=np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="w+", shape=(self.documents,))

    def blocks(self, most: int) -> Iterator[tuple[int, NDArray[np.void]]]:
        """First document and records of consecutive pieces of at most so many documents."""
        for begin, keys_N in zip(self.starts, self._keys, strict=False):
            for at in range(0, len(keys_N), most):
                yield begin + at, keys_N[at : at + most]

    def sketches(self, documents_E: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 [E, SKETCH_BINS]."""
        sketches_E = np.empty((len(documents_E), SKETCH_BINS), dtype=np.uint8)
        # In the order they lie on disk.
        order_E = np.argsort(documents_E, kind="stable")
        bounds = np.searchsorted(documents_E[order_E], self.starts)
        for part, keys_N in enumerate(self._keys):
            places = order_E[bounds[part] : bounds[part + 1]]
            if len(places):
                sketches_E[places] = keys_N["sketch"][documents_E[places] - self.starts[part]]
        return sketches_E


class _Buckets:
    """Entries dealt to files by their key, so that equal keys meet in one file and each file is small."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], num_buckets: int) -> None:
        self._folder = folder
        self._dtype = dtype
        self._num = max(1, num_buckets)

    def __enter__(self) -> Self:
        # A killed job may have left some.
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, entries_E: NDArray[np.void], keys_E: NDArray[np.uint64]) -> None:
        """Append entries to the files their keys choose; within a file they stay in order."""
        bucket_E = (keys_E >> np.uint64(32)) * np.uint64(self._num) >> np.uint64(32)
        order_E = np.argsort(bucket_E, kind="stable")
        ends = np.cumsum(np.bincount(bucket_E.astype(np.int64), minlength=self._num))
        for bucket in range(self._num):
            mine = order_E[ends[bucket - 1] if bucket else 0 : ends[bucket]]
            if len(mine):
                with self._path(bucket).open("ab") as file:
                    entries_E[mine].tofile(file)

    def __iter__(self) -> Iterator[Callable[[int], Iterator[NDArray[np.void]]]]:
        """For each bucket a function from a number of entries to the bucket in pieces of that many."""
        for bucket in range(self._num):
            yield partial(self._pieces, self._path(bucket))

    def _pieces(self, path: Path, most: int) -> Iterator[NDArray[np.void]]:
        if not path.exists():
            return
        with path.open("rb") as file:
            while len(piece := np.fromfile(file, dtype=self._dtype, count=most)):
                yield piece
        path.unlink()

    def _path(self, bucket: int) -> Path:
        return self._folder / f"{bucket:06d}"
