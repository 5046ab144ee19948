"""Which neurons tell languages apart: average precision (AP) and activation-probability entropy (LAPE)."""

# D documents, N neurons, K languages, L layers, F ffn width



from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_xalign import _native

AP_THRESHOLDS = (0.5, 0.75, 0.9, 0.95, 0.99)
"""A neuron is counted as specific to a language at each of these; the study reports them."""

_CONVERTED_SCORES = 1 << 22
"""Scores of other types than float32 and float64 are converted so many at a time."""


def average_precision(scores_DN: np.ndarray, in_language_D: np.ndarray, num_threads: int | None = None) -> np.ndarray:
    """Score how well each neuron alone ranks one language's documents above all others.

    1.0 is a perfect detector; a neuron blind to language scores near the language's share of the documents, and a
    constant one exactly that share. AP of the other languages is not one minus it.

    Args:
        scores_DN: float [D, N]. Mean post-activation over each document's tokens.
        in_language_D: bool [D]. True for documents of the language in question.
        num_threads: OMP_NUM_THREADS, or as many as this process may use, up to 16, if left out.

    Returns:
        float64 [N], each in (0, 1]. Tied scores share one threshold, as in scikit-learn; 0.0 and -0.0 tie.

    Raises:
        ValueError: lengths differ, a score is not finite, or one of the two groups is empty.

    Source: Kojima et al. 2024, arXiv:2404.02431; sum over distinct scores of (R_k - R_{k-1}) P_k.
    """
    scores = _scores(scores_DN)
    return _ranked(scores, _labels(in_language_D, len(scores))[None], num_threads=num_threads)[0]


def average_precision_by_language(
    scores_DN: np.ndarray, language_D: np.ndarray, num_languages: int, num_threads: int | None = None
) -> np.ndarray:
    """``average_precision`` of every language against the rest, from one sort of each neuron: float64 [K, N].

    Args:
        scores_DN: float [D, N].
        language_D: integers [D]. Number of each document's language, from 0 up.
        num_languages: K.
        num_threads: as in ``average_precision``.

    Raises:
        ValueError: as ``average_precision``, or a number is outside [0, K).
    """
    scores, language = _scores(scores_DN), np.asarray(language_D)
    if language.size and (language.min() < 0 or language.max() >= num_languages):
        raise ValueError(f"language_D holds numbers outside [0, {num_languages}).")
    labels_KD = np.stack([_labels(language == number, len(scores)) for number in range(num_languages)])
    return _ranked(scores, labels_KD, num_threads=num_threads)


@dataclass(frozen=True)
class SignedAveragePrecision:
    """Average precision of a neuron and of its negative: SwiGLU neurons may speak up below zero."""

    high_N: np.ndarray
    """float64 [N]: how well high activations tell the language."""
    low_N: np.ndarray
    """float64 [N]: how well low (strongly negative) ones do."""

    @property
    def best_N(self) -> np.ndarray:
        """float64 [N]: the better of the two. Its chance level is above the language's share."""
        return np.maximum(self.high_N, self.low_N)

    @property
    def sign_N(self) -> np.ndarray:
        """int8 [N]: 1 where high activations tell the language, -1 where low ones tell it better."""
        return np.where(self.low_N > self.high_N, -1, 1).astype(np.int8)


def signed_average_precision(
    scores_DN: np.ndarray, in_language_D: np.ndarray, num_threads: int | None = None
) -> SignedAveragePrecision:
    """``average_precision`` of the scores and of the negated scores; the original method keeps neurons of both ends.

    Raises:
        ValueError: as ``average_precision``.
    """
    scores = _scores(scores_DN)
    labels = _labels(in_language_D, len(scores))[None]
    return SignedAveragePrecision(
        _ranked(scores, labels, num_threads=num_threads)[0],
        _ranked(scores, labels, lowest_first=True, num_threads=num_threads)[0],
    )


def chance_corrected(average_precision_N: np.ndarray, prevalence: float) -> np.ndarray:
    """(AP - prevalence) / (1 - prevalence): 0 at chance and 1 for a perfect detector, whatever the language's share.

    Raises:
        ValueError: ``prevalence``, the share of the documents that are in the language, is not in (0, 1).
    """
    if not 0.0 < prevalence < 1.0:
        raise ValueError(f"prevalence={prevalence} is outside (0, 1).")
    return (np.asarray(average_precision_N, np.float64) - prevalence) / (1.0 - prevalence)


def _scores(scores_DN: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores_DN)
    if scores.ndim != 2 or scores.dtype.kind not in "fiub":
        raise ValueError(f"scores_DN is {scores.dtype} of shape {scores.shape}; real numbers [D, N] are needed.")
    return scores


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


def _ranked(
    scores_DN: np.ndarray, labels_MD: np.ndarray, lowest_first: bool = False, num_threads: int | None = None
) -> np.ndarray:
    """AP of every neuron for each of M groups of documents: float64 [M, N]."""
    threads, labels_MD = num_threads or _num_threads(), np.ascontiguousarray(labels_MD, np.uint8)
    if _is_native(scores_DN):
        return _native.average_precision(scores_DN, labels_MD, lowest_first, threads)
    # float16 and short integers are exact in float32; the kernel is faster there.
    kind = np.promote_types(scores_DN.dtype, np.float16 if scores_DN.dtype.kind == "b" else np.float32)
    wide = np.float32 if kind == np.float32 else np.float64
    precision_MN = np.empty((len(labels_MD), scores_DN.shape[1]))
    block = max(1, _CONVERTED_SCORES // len(scores_DN))
    for start in range(0, scores_DN.shape[1], block):
        chunk_DN = np.ascontiguousarray(scores_DN[:, start : start + block], wide)
        try:
            precision_MN[:, start : start + block] = _native.average_precision(
                chunk_DN, labels_MD, lowest_first, threads
            )
        except ValueError:
            not_finite = np.argwhere(~np.isfinite(chunk_DN))
            if not not_finite.size:
                raise
            document, neuron = not_finite[np.lexsort(not_finite.T)[0]]
            raise ValueError(
                f"scores_DN[{document}, {start + neuron}] is {chunk_DN[document, neuron]}; an empty document or a "
                "diverged model gives such scores."
            ) from None
    return precision_MN


def _is_native(scores_DN: np.ndarray) -> bool:
    return (
        scores_DN.dtype in (np.dtype(np.float32), np.dtype(np.float64))
        and scores_DN.flags.aligned
        and all(stride % scores_DN.itemsize == 0 for stride in scores_DN.strides)
    )


def _num_threads() -> int:
    stated = os.environ.get("OMP_NUM_THREADS", "")
    return int(stated) if stated.isdecimal() and int(stated) > 0 else min(len(os.sched_getaffinity(0)), 16)


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
    scores = _scores(scores_DN)
    labels = _labels(in_language_D, len(scores))
    return _ranked(scores, np.stack([generator.permutation(labels) for _ in range(num_permutations)]))


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


def middle_neurons(scores_N: np.ndarray, count: int) -> np.ndarray:
    """Ids of the ``count`` neurons around the median score, lowest first: the study's neurons of no language.

    Equal scores are in descending order of id, as ``top_neurons`` reversed, so that the two never overlap by chance.

    Raises:
        ValueError: as ``top_neurons``.
    """
    ascending = top_neurons(scores_N, np.asarray(scores_N).size)[::-1]
    if not 0 <= count <= ascending.size:
        raise ValueError(f"count={count} is outside [0, {ascending.size}], the number of neurons.")
    first = min(max(ascending.size // 2 - count // 2, 0), ascending.size - count)
    return ascending[first : first + count]


def jaccard(neurons_a: np.ndarray, neurons_b: np.ndarray) -> float:
    """Size of the intersection of two sets of neuron ids over that of their union; 1.0 for two empty sets."""
    a, b = np.unique(neurons_a), np.unique(neurons_b)
    both = np.intersect1d(a, b, assume_unique=True).size
    union = a.size + b.size - both
    return both / union if union else 1.0


def jaccard_matrix(sets: Sequence[np.ndarray]) -> np.ndarray:
    """``jaccard`` of every pair of sets, of languages, checkpoints or runs: float64 [S, S], symmetric, ones inside."""
    matrix = np.ones((len(sets), len(sets)))
    for one in range(len(sets)):
        for other in range(one):
            matrix[one, other] = matrix[other, one] = jaccard(sets[one], sets[other])
    return matrix


def chance_jaccard(size_a: int, size_b: int, num_neurons: int) -> float:
    """What ``jaccard`` is about for two sets of these sizes drawn at random: that of their mean overlap.

    Raises:
        ValueError: a size is negative or above ``num_neurons``.
    """
    if not (0 <= size_a <= num_neurons and 0 <= size_b <= num_neurons):
        raise ValueError(f"sizes {size_a} and {size_b} of {num_neurons} neurons.")
    both = size_a * size_b / num_neurons if num_neurons else 0.0
    union = size_a + size_b - both
    return both / union if union else 1.0


def split_half_jaccard(
    scores_DN: np.ndarray, in_language_D: np.ndarray, count: int, unit_D: np.ndarray | None = None, seed: int = 0
) -> float:
    """``jaccard`` of the ``count`` best neurons found on two halves of the documents: how sure the set is.

    Args:
        scores_DN: float [D, N].
        in_language_D: bool [D].
        count: size of the two sets.
        unit_D: what documents belong together, such as the pair a sentence is of; a unit is in one half. Each document
            by itself if left out.
        seed: of the cut.

    Raises:
        ValueError: as ``average_precision`` and ``top_neurons``; a half may be without the language.
    """
    scores = _scores(scores_DN)
    labels = _labels(in_language_D, len(scores))
    unit = np.arange(len(scores)) if unit_D is None else np.unique(np.asarray(unit_D), return_inverse=True)[1]
    if unit.shape != (len(scores),):
        raise ValueError(f"unit_D has shape {unit.shape}; scores_DN has {len(scores)} documents.")
    order = np.random.default_rng(seed).permutation(int(unit.max()) + 1)
    in_first_D = (order < (len(order) + 1) // 2)[unit]
    halves = [
        top_neurons(average_precision(scores[half_D], labels[half_D]), count) for half_D in (in_first_D, ~in_first_D)
    ]
    return jaccard(*halves)


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
