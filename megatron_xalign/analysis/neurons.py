"""Which neurons tell languages apart: average precision (AP) and activation-probability entropy (LAPE)."""

# D documents, N neurons, K languages, L layers, F ffn width



from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

AP_THRESHOLDS = (0.5, 0.75, 0.9, 0.95, 0.99)
"""A neuron is counted as specific to a language at each of these; the study reports them."""

# Small enough for the passes over one block to stay in the processor's cache.
_BLOCK_SCORES = 1 << 16


def average_precision(scores_DN: np.ndarray, in_language_D: np.ndarray) -> np.ndarray:
    """Score how well each neuron alone ranks one language's documents above all others.

    1.0 is a perfect detector; a neuron blind to language scores near the language's share of the documents, and a
    constant one exactly that share. AP of the other languages is not one minus it.

    Args:
        scores_DN: float [D, N]. Mean post-activation over each document's tokens.
        in_language_D: bool [D]. True for documents of the language in question.

    Returns:
        float64 [N], each in (0, 1]. Tied scores share one threshold, as in scikit-learn; 0.0 and -0.0 tie.

    Raises:
        ValueError: lengths differ, a score is not finite, or one of the two groups is empty.

    Source: Kojima et al. 2024, arXiv:2404.02431; sum over distinct scores of (R_k - R_{k-1}) P_k.
    """
    scores = np.asarray(scores_DN)
    if scores.ndim != 2 or scores.dtype.kind not in "fiub":
        raise ValueError(f"scores_DN is {scores.dtype} of shape {scores.shape}; real numbers [D, N] are needed.")
    labels = _labels(in_language_D, len(scores))
    precision_N = np.empty(scores.shape[1])
    block = max(1, _BLOCK_SCORES // len(scores))
    for start in range(0, scores.shape[1], block):
        chunk_DN = scores[:, start : start + block]
        finite_DN = np.isfinite(chunk_DN)
        if not finite_DN.all():
            document, neuron = np.argwhere(~finite_DN)[0]
            raise ValueError(
                f"scores_DN[{document}, {start + neuron}] is {chunk_DN[document, neuron]}; an empty document or a "
                "diverged model gives such scores."
            )
        precision_N[start : start + block] = _average_precision_of_block(chunk_DN, labels)
    return precision_N


def _labels(in_language_D: np.ndarray, num_documents: int) -> np.ndarray:
    labels = np.asarray(in_language_D)
    if labels.shape != (num_documents,):
        raise ValueError(f"in_language_D has shape {labels.shape}; scores_DN has {num_documents} documents.")
    if labels.dtype != np.bool_:
        if not np.isin(labels, (0, 1)).all():
            raise ValueError("in_language_D must be boolean (or 0 and 1).")
        labels = labels.astype(np.bool_)
    positives = int(np.count_nonzero(labels))
    if positives in (0, num_documents):
        raise ValueError(
            f"{positives} of {num_documents} documents are in the language; both groups need at least one."
        )
    return labels


def _average_precision_of_block(scores_DN: np.ndarray, labels_D: np.ndarray) -> np.ndarray:
    """AP of the neurons of one block whose arrays all fit in memory."""
    num_documents, num_neurons = scores_DN.shape
    hit_ND, last_of_tie_ND = _ranked(np.ascontiguousarray(scores_DN.T), labels_D)
    # Running over the flattened block, hits and ranks of a neuron start where those of the one before ended.
    hits = np.cumsum(hit_ND.reshape(-1), dtype=np.int64)
    ends = np.flatnonzero(last_of_tie_ND.reshape(-1))
    hits = hits[ends]
    new_hits = np.diff(hits, prepend=0)
    with_hits = np.flatnonzero(new_hits)
    ends, hits, new_hits = ends[with_hits], hits[with_hits], new_hits[with_hits]
    neuron = ends // num_documents
    num_positives = int(np.count_nonzero(labels_D))
    precision = (hits - neuron * num_positives) / (ends - neuron * num_documents + 1)
    return np.bincount(neuron, weights=precision * new_hits, minlength=num_neurons) / num_positives


def _ranked(scores_ND: np.ndarray, labels_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per neuron, labels in descending order of score, and where each run of tied scores ends (bool [N, D])."""
    last_ND = np.ones(scores_ND.shape, np.bool_)
    if scores_ND.dtype.kind == "f" and scores_ND.dtype.itemsize <= 4:
        # Score and label in one integer: sorting integers is several times faster than sorting indices.
        # Adding 0.0 turns -0.0 into 0.0, so that they tie.
        bits = (scores_ND.astype(np.float32, copy=False) + np.float32(0.0)).view(np.uint32)
        descending = np.where(bits >> 31 == 1, bits, ~(bits | np.uint32(0x80000000)))
        packed = descending.astype(np.uint64) << np.uint64(1) | labels_D.astype(np.uint64)
        packed.sort(axis=1)
        key = packed >> np.uint64(1)
        np.not_equal(key[:, 1:], key[:, :-1], out=last_ND[:, :-1])
        return (packed & np.uint64(1)).astype(np.bool_), last_ND
    scores_ND = scores_ND.astype(np.float64, copy=False)
    order_ND = np.argsort(-scores_ND, axis=1)
    ordered_ND = np.take_along_axis(scores_ND, order_ND, axis=1)
    np.not_equal(ordered_ND[:, 1:], ordered_ND[:, :-1], out=last_ND[:, :-1])
    return labels_D[order_ND], last_ND


def count_at_least(scores: np.ndarray, thresholds: Sequence[float] = AP_THRESHOLDS) -> np.ndarray:
    """How many scores reach each threshold (``>=``): int64 [len(thresholds)]."""
    return np.array([np.count_nonzero(np.asarray(scores) >= threshold) for threshold in thresholds], np.int64)


def permuted_average_precision(
    scores_DN: np.ndarray, in_language_D: np.ndarray, num_permutations: int = 1, seed: int = 0
) -> np.ndarray:
    """AP of every neuron under shuffled labels: what no relation to language looks like.

    Returns:
        float64 [num_permutations, N]. ``count_at_least`` of it is the count to expect by chance.

    Raises:
        ValueError: as ``average_precision``, or ``num_permutations`` is below 1.
    """
    if num_permutations < 1:
        raise ValueError(f"num_permutations={num_permutations} must be positive.")
    generator = np.random.default_rng(seed)
    labels = np.asarray(in_language_D)
    return np.stack([average_precision(scores_DN, generator.permutation(labels)) for _ in range(num_permutations)])


def top_neurons(scores_N: np.ndarray, count: int) -> np.ndarray:
    """Ids of the ``count`` highest scores, best first; equal scores in order of id, so the cut is not arbitrary.

    Raises:
        ValueError: ``count`` is negative or more than there are, or a score is NaN.
    """
    scores = np.asarray(scores_N).reshape(-1)
    if not 0 <= count <= scores.size:
        raise ValueError(f"count={count} is outside [0, {scores.size}], the number of neurons.")
    if np.isnan(scores).any():
        raise ValueError("a score is NaN.")
    return np.argsort(-scores.astype(np.float64), kind="stable")[:count]


def jaccard(neurons_a: np.ndarray, neurons_b: np.ndarray) -> float:
    """Size of the intersection of two sets of neuron ids over that of their union; 1.0 for two empty sets."""
    a, b = np.unique(neurons_a), np.unique(neurons_b)
    both = np.intersect1d(a, b, assume_unique=True).size
    union = a.size + b.size - both
    return both / union if union else 1.0


@dataclass(frozen=True)
class Lape:
    """Language-specific neurons by entropy of activation probability."""

    entropy_LF: np.ndarray
    """float64 [L, F], in nats; infinite for neurons that no language activates often."""
    selected_LF: np.ndarray
    """bool [L, F]: the neurons of lowest entropy."""
    languages_of: np.ndarray
    """bool [K, L, F]: which selected neuron belongs to which language; one may belong to several."""
    probability_KLF: np.ndarray
    """float64 [K, L, F]: share of a language's tokens at which the neuron is on."""
    bar: float
    """Probability a language must exceed for a selected neuron to be its own."""


def lape(
    positive_count_KLF: np.ndarray,
    token_count_K: np.ndarray,
    top_rate: float = 0.01,
    filter_rate: float = 0.95,
    bar_rate: float = 0.95,
) -> Lape:
    """Find neurons that few languages activate: language activation probability entropy.

    P = count / tokens. Q = P over its sum over languages (0/0 is 0). Entropy H = -sum Q ln Q. With tau the
    ``round(filter_rate * K * L * F)``-th smallest P (1-based, halves to even), a neuron without any P > tau is filtered
    out. The ``round(top_rate * L * F)`` of lowest H are selected; of equal H the lower (layer, index) comes first. A
    selected neuron belongs to every language whose P exceeds the ``bar_rate`` value of P, found like tau.

    Args:
        positive_count_KLF: integers [K, L, F]. Tokens of each language at which the gate's pre-activation is positive.
        token_count_K: integers [K]. Tokens of each language.
        top_rate: share of the neurons to select.
        filter_rate: quantile of P a neuron must exceed for one language at least.
        bar_rate: quantile of P that makes a selected neuron a language's own.

    Raises:
        ValueError: shapes do not fit, a language has no tokens, a count is negative, not finite or above its number of
            tokens, or a rate is outside (0, 1].

    Source: Tang et al. 2024, arXiv:2402.16438, and its code (RUCAIBox/Language-Specific-Neurons). Unlike there, a
    filtered-out neuron is never selected, also where fewer are left than ``top_rate`` asks for.
    """
    count, tokens = np.asarray(positive_count_KLF), np.asarray(token_count_K)
    if count.ndim != 3 or count.size == 0 or tokens.shape != count.shape[:1]:
        raise ValueError(
            f"positive_count_KLF has shape {count.shape} and token_count_K {tokens.shape}; [K, L, F] and [K] needed."
        )
    for name, rate in (("top_rate", top_rate), ("filter_rate", filter_rate), ("bar_rate", bar_rate)):
        if not 0.0 < rate <= 1.0:
            raise ValueError(f"{name}={rate} is outside (0, 1].")
    if not (np.isfinite(count).all() and np.isfinite(tokens).all()):
        raise ValueError("a count is not finite.")
    for language, (own_LF, total) in enumerate(zip(count, tokens, strict=True)):
        if total <= 0:
            raise ValueError(f"token_count_K[{language}]={total}: LAPE needs tokens of every language.")
        if own_LF.min() < 0 or own_LF.max() > total:
            raise ValueError(
                f"positive_count_KLF[{language}] lies in [{own_LF.min()}, {own_LF.max()}]; the language has {total} "
                "tokens, so it should lie between 0 and that."
            )

    probability_KLF = count / tokens[:, None, None].astype(np.float64)
    total_LF = probability_KLF.sum(axis=0)
    share_KLF = np.divide(probability_KLF, total_LF, out=np.zeros_like(probability_KLF), where=total_LF > 0)
    log_KLF = np.log(share_KLF, out=np.zeros_like(share_KLF), where=share_KLF > 0)
    # Adding 0.0 turns the -0.0 of a neuron with one language into 0.0.
    entropy_LF = -(share_KLF * log_KLF).sum(axis=0) + 0.0
    entropy_LF[~(probability_KLF > _kth_smallest(probability_KLF, filter_rate, "filter_rate")).any(axis=0)] = np.inf

    order = np.argsort(entropy_LF, axis=None, kind="stable")[: round(entropy_LF.size * top_rate)]
    selected = np.zeros(entropy_LF.size, np.bool_)
    selected[order] = True
    selected_LF = selected.reshape(entropy_LF.shape) & np.isfinite(entropy_LF)
    bar = _kth_smallest(probability_KLF, bar_rate, "bar_rate")
    return Lape(entropy_LF, selected_LF, selected_LF & (probability_KLF > bar), probability_KLF, bar)


def _kth_smallest(values: np.ndarray, rate: float, name: str) -> float:
    # Python's round, as in the reference: halves go to the even number.
    rank = round(values.size * rate)
    if rank < 1:
        raise ValueError(f"{name}={rate} of {values.size} activation probabilities is less than one of them.")
    return float(np.partition(values, rank - 1, axis=None)[rank - 1])
