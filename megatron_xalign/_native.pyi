# Types of the C++ extension. What each function promises stands in csrc/include/xalign/*.h.

import numpy as np
from numpy.typing import NDArray

def blend_order(weights: NDArray[np.int64], num_samples: int | None = None) -> NDArray[np.int32]: ...
def blend_windows(
    window_counts: list[NDArray[np.int32]],
    num_samples: int,
    *,
    seq_length: int,
    parallel_fraction: tuple[int, int],
    count_all_tokens: bool,
    parallel_fills_languages: bool,
    language_shares: list[int],
    language_rates: list[int],
    language_of_source: list[int],
    source_weights: list[int],
) -> tuple[NDArray[np.int32], int | None]: ...
def permutation(seed: int, size: int) -> NDArray[np.int64]: ...
def sample_index(document_lengths: NDArray[np.int32] | NDArray[np.int64], seq_length: int) -> NDArray[np.int64]: ...
def count_languages(
    language_ids: NDArray[np.int8], positions: NDArray[np.int64], num_languages: int
) -> NDArray[np.int64]: ...
def gather(
    tokens: NDArray[np.integer], starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> NDArray[np.int64]: ...
def count_characters(texts: list[str], kinds: NDArray[np.uint8], num_kinds: int) -> NDArray[np.int64]: ...
def document_keys(folding: Folding, texts: list[str], others: list[str] | None = None) -> NDArray[np.uint64]: ...
def document_sketches(
    folding: Folding, exact: Folding, texts: list[str], others: list[str] | None = None
) -> NDArray[np.uint8]: ...
def near_earlier(
    sketches: NDArray[np.uint8],
    group_starts: NDArray[np.int64],
    asked: NDArray[np.uint8],
    min_agreeing: int,
    max_earlier: int,
) -> NDArray[np.uint8]: ...

class Folding:
    def __init__(self, table: NDArray[np.uint32], expansions: NDArray[np.uint32]) -> None: ...
    def fold(self, texts: list[str]) -> list[str]: ...

class ProbeIndex:
    def __init__(self, folding: Folding, sentences: list[str], near: float, min_contained: int) -> None: ...
    def touch(self, texts: list[str]) -> NDArray[np.uint8]: ...
