"""The order of a run: which source gives each window or document, chosen by counting what was drawn, and kept.

What is chosen is written as it is made and found again by what it was made from (``IndexCache``), so that a run of a
billion samples starts without making or reading it.
"""

# N samples, R rows (windows or documents), J sources, K languages of the run, F languages of a file

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_xalign import _native
from megatron_xalign.data.index_cache import IndexCache
from megatron_xalign.data.mixture import PARALLEL, MixturePlan, PlannedSource, too_little_text
from megatron_xalign.data.order_key import order_key
from megatron_xalign.data.source_stream import RowCounts, SourceStream
from megatron_xalign.data.tally import Tally
from megatron_xalign.errors import FormatError

log = logging.getLogger(__name__)

ORDER_VERSION = 1
"""Of what is kept; raise it when anything that decides an order changes."""
BORDER = np.dtype([("row", "<i8"), ("token", "<i4"), ("padding", "<i4")])
"""Where a sample of documents begins: row, token of its document; and the positions at its end that hold nothing."""

# Below this an order is made in less time than a kept one is found.
_FEW_SAMPLES = 1 << 14
_ROWS_AT_A_TIME = 1 << 20
# Counts that are fed and not drawn yet, over all sources: half a gigabyte with thousands of sources, where each feed
# costs more than what it feeds; a quarter of that with 64.
_COUNTS_IN_MEMORY = 1 << 26
_LARGEST_FEED = 1 << 16
_SMALLEST_FEED = 64


@dataclass(frozen=True)
class Order:
    """What was chosen, and its sums."""

    ids_R: np.ndarray
    """uint8 or uint16 [R]: the source of every row."""
    counts: np.ndarray
    """int64 [blocks + 1, J]: how often each source comes before every block of rows."""
    borders_N: np.ndarray | None
    """``BORDER`` [N]; only of mixed documents."""
    tally: Tally
    folder: Path | None
    """Where it is kept."""

    @property
    def drawn_J(self) -> np.ndarray:
        """int64 [J]: rows each source gives."""
        return self.counts[-1]


def batch_key(seed: int) -> int:
    """Key of the shuffle inside global batches."""
    return order_key(seed, "batch")


def build_order(plan: MixturePlan, streams: Sequence[SourceStream], cache: IndexCache) -> Order:
    """Choose every row of a run, or open what was chosen for the same run before.

    Args:
        plan: what it has to hold to.
        streams: the sources of the plan.
        cache: where orders are kept.

    Raises:
        ConfigError: a source would be read more often than allowed.
        FormatError: a token file is damaged.
    """
    if plan.num_samples <= _FEW_SAMPLES:
        order = _Builder(plan, streams).build(None)
    else:
        made_from = _made_from(plan, streams)

        def build(folder: Path) -> None:
            _Builder(plan, streams).build(folder)

        folder = cache.folder_of("order", made_from, build)
        try:
            order = _open(folder, plan)
        except (OSError, ValueError, KeyError) as error:
            log.warning("%s is damaged (%s); built again.", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
            order = _open(cache.folder_of("order", made_from, build), plan)
    allowances = _allowances(plan, streams)
    for source, drawn, allowance in zip(plan.sources, order.drawn_J.tolist(), allowances, strict=True):
        if source.weight and drawn > allowance.at_least(drawn):
            raise too_little_text(plan, source, float(drawn))
    return order


def sample_index(plan: MixturePlan, order: Order) -> _native.SampleIndex:
    """An order as the batch reader takes it."""
    batch_size, key = plan.global_batch_size, batch_key(plan.mixture.seed)
    if order.borders_N is None:
        return _native.SampleOrder(ids=order.ids_R, counts=order.counts, batch_size=batch_size, batch_key=key)
    return _native.DocumentOrder(
        ids=order.ids_R,
        counts=order.counts,
        borders=order.borders_N,
        keeps_whole=[plan.mixture.keep_pairs_whole and item.group == PARALLEL for item in plan.sources],
        batch_size=batch_size,
        batch_key=key,
    )


def _made_from(plan: MixturePlan, streams: Sequence[SourceStream]) -> dict[str, Any]:
    """Everything that decides an order and its sums. Of a source that gives nothing only that it is there."""
    sources = [
        [stream.identity, stream.eod_mask_loss] if item.weight else None
        for item, stream in zip(plan.sources, streams, strict=True)
    ]
    text = json.dumps([_settings(plan), sources], sort_keys=True, separators=(",", ":"))
    return {"version": ORDER_VERSION, "sha256": hashlib.sha256(text.encode("ascii")).hexdigest()}


def _settings(plan: MixturePlan) -> dict[str, Any]:
    """What the C++ library is told."""
    most = max(Fraction(1), *(abs(rate) for rate in (*plan.rates_without, *plan.rates_with)))
    columns = {code: index for index, code in enumerate(plan.languages)}
    return {
        "seq_length": plan.seq_length,
        "num_samples": plan.num_samples,
        "denominator": plan.schedule.denominator,
        "phases": plan.schedule.numerators(plan.num_samples),
        "count_all_tokens": plan.mixture.fraction_of == "all",
        "parallel_fills_languages": plan.mixture.budget_rule == "replace",
        "language_shares": [int(share * plan.share_scale) for share in plan.shares],
        "language_rates": tuple(
            [math.floor(rate / most * (1 << 30)) for rate in rates] for rates in (plan.rates_without, plan.rates_with)
        ),
        "group_of_source": [item.group for item in plan.sources],
        "source_weights": [item.weight for item in plan.sources],
        "languages_of_source": [[columns[code] for code in item.text.languages] for item in plan.sources],
        "documents": plan.mixes_documents,
        "keep_pairs_whole": plan.mixture.keep_pairs_whole,
        "batch_size": plan.global_batch_size,
        "batch_key": batch_key(plan.mixture.seed),
    }


class _Builder:
    """Feeds the C++ library with counts of what comes next and writes what it chooses."""

    def __init__(self, plan: MixturePlan, streams: Sequence[SourceStream]) -> None:
        self._plan = plan
        self._streams = streams
        self._settings = _settings(plan)
        self._blender = _native.Blender(**self._settings)
        self._feeders = [
            _Feeder(stream, _feed_size(plan, item), documents=plan.mixes_documents)
            for item, stream in zip(plan.sources, streams, strict=True)
        ]
        self._allowances = _allowances(plan, streams)

    def build(self, folder: Path | None) -> Order:
        """Choose all rows; into files where a folder is given."""
        num_sources = len(self._streams)
        dtype = np.dtype(np.uint8 if num_sources <= 256 else np.uint16)
        counter = _native.RowCounter(num_sources)
        ids, borders, begun = _Growing(folder, "ids", dtype), _Growing(folder, "borders", BORDER), 0
        lines = _Growing(folder, "counts", np.dtype(np.int64))
        with ids, borders, lines:
            for rows in self._chosen():
                narrow = rows.astype(dtype)
                counter.append(narrow)
                lines.append(counter.take_lines().reshape(-1))
                ids.append(narrow)
                # The last border may be of a sample after the run, which only its first token is part of.
                whole = self._blender.take_borders()[: self._plan.num_samples - begun]
                begun += len(whole)
                borders.append(whole.view(BORDER))
            lines.append(counter.now())
            ids_R, borders_N = ids.finish(), borders.finish()
            counts = lines.finish().reshape(-1, num_sources)
        tally = Tally.of(self._blender.tally(), self._settings["languages_of_source"], *self._begun_and_cut(counts[-1]))
        if folder is not None:
            tally.write(folder)
        return Order(ids_R, counts, borders_N if self._plan.mixes_documents else None, tally, folder)

    def _chosen(self) -> Iterator[np.ndarray]:
        """Rows as they are chosen, uint16."""
        while True:
            hungry, done = self._blender.run(_ROWS_AT_A_TIME)
            self._look_into(self._blender.take_cut_pieces())
            yield self._blender.take_rows()
            if done:
                return
            if hungry is not None:
                self._feed(hungry)

    def _feed(self, source: int) -> None:
        feeder, allowance = self._feeders[source], self._allowances[source]
        # A choice looks one draw ahead in every source, so one more than may be drawn is at hand.
        left = allowance.at_least(feeder.fed + feeder.size) + 1 - feeder.fed
        if left <= 0:
            # All that is allowed was drawn and one more: how much the whole run asks for is known in proportion.
            share = self._plan.num_samples / max(self._blender.num_samples, 1)
            raise too_little_text(self._plan, self._plan.sources[source], feeder.fed * share)
        counts = feeder.next(left)
        columns = self._settings["languages_of_source"][source]
        content_NF = np.ascontiguousarray(counts.content_NK[:, columns])
        self._blender.feed(source, content_NF, counts.tokens_N, counts.loss_N)

    def _look_into(self, pieces: np.ndarray) -> None:
        """Tell what is on each side of a border inside a document."""
        for source in np.unique(pieces["source"]).tolist():
            own = pieces[pieces["source"] == source]
            counts = self._streams[source].stretches(own["draw"], own["begin"], own["end"])
            columns = self._settings["languages_of_source"][source]
            content_NF = np.ascontiguousarray(counts.content_NK[:, columns])
            masked = (own["end"] - own["begin"]).astype(np.int32) - counts.loss_N
            self._blender.add_content(own, content_NF, np.ascontiguousarray(masked))

    def _begun_and_cut(self, drawn_J: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [J] each: documents that begin in a sample, and documents that a border cuts."""
        counts = self._blender.tally()["source_counts"]
        if self._plan.mixes_documents:
            return counts[:, 0], counts[:, 3]
        pairs = [
            stream.begun_and_cut(int(drawn)) if drawn else (0, 0)
            for stream, drawn in zip(self._streams, drawn_J, strict=True)
        ]
        begun, cut = zip(*pairs, strict=True)
        return np.array(begun, dtype=np.int64), np.array(cut, dtype=np.int64)


class _Feeder:
    """Counts of a source's draws, some at a time."""

    def __init__(self, stream: SourceStream, size: int, *, documents: bool) -> None:
        self.fed = 0
        self.size = size
        self._stream = stream
        self._documents = documents
        self._epoch, self._epoch_end = -1, 0

    def next(self, most: int) -> RowCounts:
        """The next draws; of windows never of two epochs, so that no epoch is built before it is needed."""
        begin, end = self.fed, self.fed + min(self.size, most)
        if self._documents:
            counts = self._stream.documents(begin, end)
        else:
            while self._epoch_end <= begin:
                self._epoch += 1
                self._epoch_end += self._stream.num_windows(self._epoch)
            end = min(end, self._epoch_end)
            counts = self._stream.windows(begin, end)
        self.fed = end
        return counts


class _Allowance:
    """How many draws of a source ``max_repeats`` allows."""

    def __init__(self, source: PlannedSource, stream: SourceStream, plan: MixturePlan) -> None:
        text = source.text
        self._stream = stream
        self._repeats = Fraction(repr(float(text.max_repeats)))
        # Windows of whole documents are not as many in every epoch.
        self._varies = stream.whole_documents and not plan.mixes_documents
        self._fixed = text.max_documents if plan.mixes_documents else text.max_windows(plan.seq_length)

    def at_least(self, wanted: int) -> int:
        """The draws allowed; where that is more than ``wanted``, maybe fewer than there are."""
        if not self._varies:
            return self._fixed
        allowed, epoch = 0, 0
        while allowed <= wanted and epoch < self._repeats:
            part = min(self._repeats - epoch, Fraction(1))
            allowed += math.floor(part * self._stream.num_windows(epoch))
            epoch += 1
        return allowed


def _allowances(plan: MixturePlan, streams: Sequence[SourceStream]) -> list[_Allowance]:
    return [_Allowance(item, stream, plan) for item, stream in zip(plan.sources, streams, strict=True)]


def _feed_size(plan: MixturePlan, source: PlannedSource) -> int:
    expected = source.expected_documents(plan.seq_length) if plan.mixes_documents else source.expected_samples
    most = min(_LARGEST_FEED, _COUNTS_IN_MEMORY // (len(plan.sources) * (2 + len(source.text.languages))))
    return max(min(math.ceil(expected / 16), most), _SMALLEST_FEED)


class _Growing:
    """An array that grows, in memory or in a file."""

    def __init__(self, folder: Path | None, name: str, dtype: np.dtype[Any]) -> None:
        self._path = None if folder is None else folder / f"{name}.bin"
        self._dtype = dtype
        self._parts: list[np.ndarray] = []
        self._file: IO[bytes] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> _Growing:
        if self._path is not None:
            self._file = self._stack.enter_context(self._path.open("wb"))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def append(self, items: np.ndarray) -> None:
        if self._file is None:
            self._parts.append(items)
        else:
            self._file.write(np.ascontiguousarray(items).view(np.uint8).data)

    def finish(self) -> np.ndarray:
        if self._path is None:
            return np.concatenate([np.zeros(0, dtype=self._dtype), *self._parts])
        self._stack.close()
        return _mapped(self._path, self._dtype)


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    items, rest = divmod(path.stat().st_size, dtype.itemsize)
    if rest:
        raise ValueError(f"{path.name} has {rest} bytes too many")
    if items == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(items,)).view(np.ndarray)


def _open(folder: Path, plan: MixturePlan) -> Order:
    num_sources = len(plan.sources)
    ids_R = _mapped(folder / "ids.bin", np.dtype(np.uint8 if num_sources <= 256 else np.uint16))
    borders_N = _mapped(folder / "borders.bin", BORDER) if plan.mixes_documents else None
    counts = _mapped(folder / "counts.bin", np.dtype(np.int64)).reshape(-1, num_sources)
    blocks = -(-len(ids_R) // _native.rows_per_block(num_sources))
    if counts.shape != (blocks + 1, num_sources) or int(counts[-1].sum()) != len(ids_R):
        raise ValueError(f"counts of {counts.shape} for {len(ids_R):,} rows")
    if plan.num_samples != (len(ids_R) if borders_N is None else len(borders_N)):
        raise ValueError("samples are missing")
    order = Order(ids_R, counts, borders_N, Tally.read(folder), folder)
    if borders_N is None and not np.array_equal(order.drawn_J, order.tally.rows_J):
        raise ValueError("the order and its sums disagree")
    return order


def reopen(folder: Path, plan: MixturePlan) -> Order:
    """Open an order that this run built or opened before, in another process.

    Raises:
        FormatError: it is not there any more.
    """
    try:
        return _open(folder, plan)
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(
            f"{folder}, the order of this run, cannot be opened any more ({error}); start the job again."
        ) from None
