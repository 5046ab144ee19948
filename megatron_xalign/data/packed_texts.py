"""Texts in one stretch of UTF-8, as an engine reads them: no string of Python's is made of any but those looked at."""

# N texts

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from megatron_xalign import _native
from megatron_xalign.data.engine_proof import assigned_characters

UNASSIGNED, SURROGATE, BLANK = 1, 2, 0x80
"""Bits of ``PackedTexts.kinds_N``: holds a character unassigned in this Python's Unicode, holds half of a UTF-16 pair,
holds nothing but white space."""


class PackedTexts(Sequence[str]):
    """N texts, a separator behind each."""

    def __init__(
        self, data: bytes, ends_N: NDArray[np.int64], kinds_N: NDArray[np.uint8], separator: bytes
    ) -> None:
        """Take what the C++ library made.

        Args:
            data: the texts, a separator behind each, in UTF-8.
            ends_N: where each ends, its separator not counted.
            kinds_N: what it holds, in bits.
            separator: what stands behind each.
        """
        self.data, self.ends_N, self.kinds_N, self.separator = data, ends_N, kinds_N, separator

    @classmethod
    def of(cls, texts: Sequence[str], separator: bytes) -> PackedTexts:
        """Pack texts. Half of a UTF-16 pair becomes bytes that are no UTF-8; ``kinds_N`` tells."""
        return cls(*_native.pack_texts(list(texts), separator, character_kinds()), separator)

    @classmethod
    def of_json_lines(cls, lines: bytes, key: str, separator: bytes) -> PackedTexts | None:
        """The texts under a key, one of each line; None if a line is not plainly such an object, and who reads it
        otherwise has to say what it is."""
        packed = _native.pack_json_lines(lines, key.encode(), separator, character_kinds())
        return None if packed is None else cls(*packed, separator)

    def __len__(self) -> int:
        return self.ends_N.size

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        begin = int(self.ends_N[place - 1]) + len(self.separator) if place else 0
        return self.data[begin : int(self.ends_N[place])].decode("utf-8", "surrogatepass")

    @property
    def num_bytes(self) -> int:
        """Bytes of all texts, without what parts them."""
        return len(self.data) - len(self) * len(self.separator)

    def only(self, keep_N: NDArray[np.bool_]) -> PackedTexts:
        """Some of them."""
        stops_N = self.ends_N + len(self.separator)
        starts_N = np.concatenate([[0], stops_N[:-1]])
        view = memoryview(self.data)
        stretches = zip(starts_N[keep_N].tolist(), stops_N[keep_N].tolist(), strict=True)
        data = b"".join(view[start:stop] for start, stop in stretches)
        ends_M = np.cumsum((stops_N - starts_N)[keep_N]) - len(self.separator)
        return PackedTexts(data, ends_M, self.kinds_N[keep_N], self.separator)


@functools.cache
def character_kinds() -> NDArray[np.uint8]:
    """uint8 [0x110000]: the bits of every code point; none of an ordinary one."""
    kinds = np.full(0x110000, UNASSIGNED, dtype=np.uint8)
    kinds[assigned_characters()[0]] = 0
    kinds[0x100000:0x10FFFE] = 0  # private use
    kinds[0xD800:0xE000] = SURROGATE
    kinds[[code for code in range(0x3001) if chr(code).isspace()]] |= BLANK
    return kinds
