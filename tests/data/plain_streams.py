"""Streams, windows and samples from lists and loops, as an oracle for the C++ library."""

# S sequence, K languages of the run

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MASK = (1 << 64) - 1


def split_mix(seed: int) -> Iterator[int]:
    """SplitMix64."""
    state = seed
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def fisher_yates(seed: int, size: int) -> list[int]:
    """SplitMix64, xoshiro256**, Lemire's bounded numbers, Fisher-Yates from the back."""
    words = split_mix(seed)
    s = [next(words) for _ in range(4)]

    def rotate(x: int, by: int) -> int:
        return ((x << by) | (x >> (64 - by))) & MASK

    def draw() -> int:
        result = (rotate((s[1] * 5) & MASK, 7) * 9) & MASK
        t = (s[1] << 17) & MASK
        s[2] ^= s[0]
        s[3] ^= s[1]
        s[1] ^= s[2]
        s[0] ^= s[3]
        s[2] ^= t
        s[3] = rotate(s[3], 45)
        return result

    order = list(range(size))
    for left in range(size, 1, -1):
        product = draw() * left
        while (product & MASK) < (1 << 64) % left:
            product = draw() * left
        at = product >> 64
        order[left - 1], order[at] = order[at], order[left - 1]
    return order


def feistel(key: int, size: int, position: int) -> int:
    """Eight rounds over the next power of two, again while the number is not below ``size``."""
    bits = max((size - 1).bit_length(), 9)
    low_bits = bits // 2
    high_bits = bits - low_bits
    words = split_mix(key)
    keys = [next(words) >> 32 for _ in range(8)]
    number = position
    while True:
        high, low = number >> low_bits, number & ((1 << low_bits) - 1)
        for index, round_key in enumerate(keys):
            x = ((high if index % 2 else low) ^ round_key) * 0x9E3779B1 & 0xFFFFFFFF
            x = (x ^ (x >> 15)) * 0x85EBCA77 & 0xFFFFFFFF
            if index % 2:
                low ^= x >> (32 - low_bits)
            else:
                high ^= x >> (32 - high_bits)
        number = (high << low_bits) | low
        if number < size:
            return number


@functools.lru_cache(maxsize=256)
def plain_order(key: int, size: int) -> tuple[int, ...]:
    """What ``_native.Permutation(key, size)`` is to be."""
    if size <= 256:
        return tuple(fisher_yates(key, size))
    return tuple(feistel(key, size, position) for position in range(size))


@dataclass(frozen=True)
class Token:
    """A token of a stream with all that is known of it."""

    id: int
    language: int
    document: int
    is_eod: bool


def best_fit(lengths: Sequence[tuple[int, int]], room: int, most_open: int = 64) -> tuple[list[list[int]], list[int]]:
    """Windows of whole documents by bounded best fit, and documents left out.

    Args:
        lengths: (document, tokens) in order.
        room: tokens of a window.
        most_open: windows that may be open at a time.
    """
    open_windows: list[tuple[list[int], int]] = []
    closed, left_out = [], []
    for document, length in lengths:
        if length > room:
            left_out.append(document)
        if not 0 < length <= room:
            continue
        fitting = [window for window in open_windows if window[1] >= length]
        if fitting:
            best = min(fitting, key=lambda window: window[1])
        else:
            if len(open_windows) == most_open:
                fullest = min(open_windows, key=lambda window: window[1])
                open_windows.remove(fullest)
                closed.append(fullest[0])
            best = ([], room)
            open_windows.append(best)
        at = next(index for index, window in enumerate(open_windows) if window is best)
        open_windows[at] = ([*best[0], document], best[1] - length)
        if open_windows[at][1] == 0:
            closed.append(open_windows.pop(at)[0])
    closed += [window for window, _ in sorted(open_windows, key=lambda window: window[1])]
    return closed, left_out


class PlainStream:
    """A source as lists: documents are lists of tokens."""

    def __init__(
        self,
        documents: Sequence[Sequence[Token]],
        *,
        seq_length: int,
        keys: Sequence[tuple[int, int]],
        split_key: int | None = None,
        part: tuple[int, int] | None = None,
        whole_documents: bool = False,
    ) -> None:
        begin, end = part or (0, len(documents))
        split = list(range(len(documents))) if split_key is None else plain_order(split_key, len(documents))
        self.documents = documents
        self.part = [split[position] for position in range(begin, end)]
        self.seq_length = seq_length
        self.keys = keys
        self.whole_documents = whole_documents

    @functools.cache  # noqa: B019
    def order(self, epoch: int) -> list[int]:
        """Documents of an epoch."""
        return [self.part[at] for at in plain_order(self.keys[epoch][0], len(self.part))]

    @functools.cache  # noqa: B019
    def windows_in_stream(self, epoch: int) -> list[list[Token]]:
        """Windows of an epoch in the order of the stream, the label behind the last input included."""
        if self.whole_documents:
            lengths = [(document, len(self.documents[document])) for document in self.order(epoch)]
            packed, _ = best_fit(lengths, self.seq_length)
            return [[token for document in window for token in self.documents[document]] for window in packed]
        stream = [token for document in self.order(epoch) for token in self.documents[document]]
        size = self.seq_length
        return [stream[at : at + size + 1] for at in range(0, len(stream) - size, size)]

    @functools.cache  # noqa: B019
    def windows(self, epoch: int) -> list[list[Token]]:
        """Windows of an epoch in the order they are drawn."""
        windows = self.windows_in_stream(epoch)
        return [windows[at] for at in plain_order(self.keys[epoch][1], len(windows))]

    def draws(self, num_epochs: int) -> list[list[Token]]:
        """All windows of some epochs."""
        return [window for epoch in range(num_epochs) for window in self.windows(epoch)]

    def begun_and_cut(self, num_windows: int, num_epochs: int) -> tuple[int, int]:
        """By a loop over borders of drawn windows."""
        begun = cut = 0
        for epoch in range(num_epochs):
            in_epoch = len(self.windows(epoch))
            drawn = [plain_order(self.keys[epoch][1], in_epoch)[at] for at in range(min(num_windows, in_epoch))]
            num_windows -= len(drawn)
            if self.whole_documents:
                windows = self.windows_in_stream(epoch)
                begun += sum(len({token.document for token in windows[window]}) for window in drawn)
                continue
            owners = [document for document in self.order(epoch) for _ in self.documents[document]]
            firsts = [at for at in range(len(owners)) if at == 0 or owners[at] != owners[at - 1]]
            begun += sum(first // self.seq_length in drawn for first in firsts)
            borders = {(window + side) * self.seq_length for window in drawn for side in (0, 1)}
            cut += len({owners[border] for border in borders if border > 0 and owners[border] == owners[border - 1]})
        return begun, cut


def plain_sample(
    window: Sequence[Token],
    source: int,
    *,
    seq_length: int,
    padding_token: int,
    reset_position_ids: bool = False,
    eod_mask_loss: bool = False,
) -> dict[str, Any]:
    """A sample as the batch reader is to give it, by a loop over positions."""
    sample: dict[str, list[Any]] = {
        name: []
        for name in ("tokens", "labels", "position_ids", "loss_mask", "language_ids", "label_language_ids",
                     "source_ids", "document_ids")
    }  # fmt: skip
    document = position = -1
    for at in range(seq_length):
        token = window[at] if at < len(window) else None
        label = window[at + 1] if at + 1 < len(window) else None
        starts = token is not None and (at == 0 or window[at - 1].document != token.document)
        document += starts
        begins_again = starts or (token is None and at == len(window))
        position = 0 if at == 0 or (reset_position_ids and begins_again) else position + 1
        sample["tokens"].append(token.id if token else padding_token)
        sample["labels"].append(label.id if label else padding_token)
        sample["position_ids"].append(position)
        masked = label is None or (eod_mask_loss and token is not None and token.is_eod)
        sample["loss_mask"].append(0.0 if masked else 1.0)
        sample["language_ids"].append(token.language if token else -1)
        sample["label_language_ids"].append(label.language if label else -1)
        sample["source_ids"].append(source if token else -1)
        sample["document_ids"].append(document if token else -1)
    return {name: np.array(values) for name, values in sample.items()}
