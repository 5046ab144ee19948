"""Keys of permutations: what is ordered decides its order, nothing else does."""

from __future__ import annotations

import hashlib
import json


def order_key(seed: int, *parts: str | int) -> int:
    """A 64-bit key for one permutation: what it orders decides it, nothing else does.

    The first eight bytes, little-endian, of the SHA-256 of ``[seed, *parts]`` as JSON without spaces, ASCII only. Part
    of the meaning of a run: it must never change.

    Args:
        seed: ``data.mixture.seed``.
        parts: names and numbers of what is ordered.

    Returns:
        A number in [0, 2**64).
    """
    text = json.dumps([seed, *parts], separators=(",", ":"), ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(text.encode("ascii")).digest()[:8], "little")
