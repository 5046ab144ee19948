"""Documents of every source for training, validation and test: disjoint, by number, the same in every run.

Which documents are held out is a formula of the source's name and its number of documents alone. The mixture's seed is
not in it: runs with other seeds can be compared on the same held-out documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from megatron_xalign.data.order_key import order_key

Part = Literal["train", "validation", "test"]

PARTS: tuple[Part, ...] = ("train", "validation", "test")
"""In the order of ``data.split``."""


@dataclass(frozen=True)
class DocumentRange:
    """A part of a source's documents: positions ``begin`` to ``end`` of a permutation of all of them."""

    begin: int
    end: int
    """One past the last."""
    num_documents: int
    """Of the whole source."""
    key: int | None = None
    """Of the permutation; None: documents as they lie in the file."""

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.end <= self.num_documents:
            raise ValueError(f"documents {self.begin}..{self.end} are outside 0..{self.num_documents}.")

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def is_whole(self) -> bool:
        """Whether every document is in it."""
        return len(self) == self.num_documents

    @classmethod
    def whole(cls, num_documents: int) -> DocumentRange:
        """All documents of a source."""
        return cls(0, num_documents, num_documents)


def split_documents(name: str, num_documents: int, shares: Sequence[Fraction]) -> dict[Part, DocumentRange]:
    """Cut the documents of a source into training, validation and test.

    Args:
        name: of the source; with ``num_documents`` it decides which documents each part gets.
        num_documents: D.
        shares: proportions of train, validation and test (``data.split_parts``), of any sum.

    Returns:
        The three parts. Their sizes are D times the proportion, rounded so that they add up to D (largest remainder,
        the earlier part first where two are equal). Where nothing is split off, training has the documents in file
        order; otherwise every part has those that the permutation puts there.

    Raises:
        ValueError: there are not three proportions, one is negative, or all are zero.
    """
    if len(shares) != len(PARTS) or min(shares) < 0 or sum(shares) == 0:
        raise ValueError(f"shares={[str(share) for share in shares]} should be three proportions, not all of them 0.")
    if num_documents < 0:
        raise ValueError(f"num_documents={num_documents} is negative.")
    total = sum(shares, start=Fraction(0))
    exact = [num_documents * Fraction(share) / total for share in shares]
    sizes = [int(amount) for amount in exact]
    by_remainder = sorted(range(len(exact)), key=lambda part: (sizes[part] - exact[part], part))
    for part in by_remainder[: num_documents - sum(sizes)]:
        sizes[part] += 1
    key = None if shares[1] == 0 and shares[2] == 0 else order_key(0, name, "split")
    ranges, begin = {}, 0
    for part_name, size in zip(PARTS, sizes, strict=True):
        ranges[part_name] = DocumentRange(begin, begin + size, num_documents, key)
        begin += size
    return ranges
