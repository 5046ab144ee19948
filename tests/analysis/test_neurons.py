"""Average precision against scikit-learn; LAPE against the reference's steps written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score

from megatron_xalign.analysis import neurons


def sklearn_ap(scores_DN: np.ndarray, labels_D: np.ndarray) -> np.ndarray:
    return np.array([average_precision_score(labels_D, column) for column in np.asarray(scores_DN, np.float64).T])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("decimals", [0, 1, 12])
def test_average_precision_is_that_of_scikit_learn(dtype: type, decimals: int) -> None:
    generator = np.random.default_rng(decimals)
    labels = generator.random(211) < 0.3
    scores = (generator.normal(size=(211, 40)) + labels[:, None] * generator.normal(size=40)).round(decimals)
    scores = scores.astype(dtype)
    np.testing.assert_allclose(
        neurons.average_precision(scores, labels), sklearn_ap(scores, labels), rtol=0, atol=1e-12
    )


# Few distinct values make many ties; the odd ones are the ends of what float32 can tell apart.
TIE_PRONE = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.0000001, 0.5, -0.5, 3.4e38, -3.4e38])


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    dtype=st.sampled_from([np.float32, np.float64]),
    num_documents=st.integers(2, 14),
)
def test_tied_scores_share_one_threshold(data: st.DataObject, dtype: type, num_documents: int) -> None:
    values = TIE_PRONE.map(dtype)
    scores = data.draw(hnp.arrays(dtype, (num_documents, 3), elements=values))
    labels = data.draw(hnp.arrays(np.bool_, num_documents).filter(lambda array: 0 < array.sum() < len(array)))
    # scikit-learn before 1.3 and after agree on what -0.0 is only if it is made 0.0 for it.
    expected = sklearn_ap(scores.astype(np.float64) + 0.0, labels)
    np.testing.assert_allclose(neurons.average_precision(scores, labels), expected, rtol=0, atol=1e-12)


def test_zero_and_minus_zero_tie_and_neighbouring_floats_do_not() -> None:
    labels = np.array([True, False])
    for dtype in (np.float16, np.float32, np.float64):
        zeros = np.array([[-0.0, 0.0], [0.0, -0.0]], dtype)
        np.testing.assert_array_equal(neurons.average_precision(zeros, labels), [0.5, 0.5])
        one = np.ones(1, dtype)
        apart = np.stack([np.nextafter(one, dtype(2)), one])
        np.testing.assert_array_equal(neurons.average_precision(apart, labels), [1.0])
        np.testing.assert_array_equal(neurons.average_precision(apart[::-1], labels), [0.5])


def test_a_constant_neuron_scores_the_share_of_the_language() -> None:
    labels = np.arange(10) < 3
    np.testing.assert_allclose(neurons.average_precision(np.full((10, 2), 7.5, np.float32), labels), 0.3, atol=1e-15)


def test_memory_layout_and_block_borders_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    scores = generator.normal(size=(60, 37)).round(1).astype(np.float32)
    labels = generator.permutation(np.arange(60) < 20)
    expected = sklearn_ap(scores, labels)
    monkeypatch.setattr(neurons, "_CONVERTED_SCORES", 60 * 4)
    spread = np.zeros((120, 74), np.float32)[::2, ::2]
    spread[:] = scores
    # Odd strides, as a field of a record array has them, cannot be read in place.
    unaligned = np.zeros((60, 37), np.dtype([("pad", np.int8), ("score", np.float32)]))["score"]
    unaligned[:] = scores
    for layout in (scores, np.asfortranarray(scores), spread, scores[::-1][::-1], unaligned):
        np.testing.assert_allclose(neurons.average_precision(layout, labels), expected, atol=1e-12)
        np.testing.assert_allclose(neurons.average_precision(layout, labels, num_threads=3), expected, atol=1e-12)
    np.testing.assert_allclose(neurons.average_precision(scores, labels.astype(int)), expected, atol=1e-12)
    assert neurons.average_precision(scores[:, :0], labels).shape == (0,)


def test_one_sort_serves_every_language() -> None:
    generator = np.random.default_rng(5)
    language = generator.integers(0, 6, 150)
    scores = generator.normal(size=(150, 90)).round(1)
    found = neurons.average_precision_by_language(scores, language, 6)
    for number in range(6):
        np.testing.assert_allclose(found[number], sklearn_ap(scores, language == number), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="0 of 150 documents"):
        neurons.average_precision_by_language(scores, language, 7)
    with pytest.raises(ValueError, match=r"outside \[0, 5\)"):
        neurons.average_precision_by_language(scores, language, 5)


def test_scores_of_very_different_size_are_ranked_as_by_scikit_learn() -> None:
    generator = np.random.default_rng(6)
    scores = (10.0 ** generator.uniform(-30, 30, (300, 8)) * generator.choice([-1, 1], (300, 8))).astype(np.float32)
    scores[:, 3] = np.repeat(scores[:60, 3], 5)
    labels = generator.random(300) < 0.5
    for dtype in (np.float32, np.float64):
        np.testing.assert_allclose(
            neurons.average_precision(scores.astype(dtype), labels), sklearn_ap(scores, labels), rtol=0, atol=1e-12
        )


def test_a_neuron_that_is_low_on_the_language_is_found_by_the_signed_variant() -> None:
    generator = np.random.default_rng(7)
    labels = np.arange(80) < 30
    scores = generator.normal(size=(80, 5)).round(1)
    scores[:, 2] = np.where(labels, -4, 1)
    found = neurons.signed_average_precision(scores, labels)
    np.testing.assert_allclose(found.high_N, sklearn_ap(scores, labels), atol=1e-12)
    np.testing.assert_allclose(found.low_N, sklearn_ap(-scores, labels), atol=1e-12)
    assert found.best_N[2] == 1.0 and found.sign_N[2] == -1 and found.high_N[2] < 0.5


def test_chance_correction_puts_the_prevalence_at_zero_and_a_perfect_neuron_at_one() -> None:
    np.testing.assert_allclose(neurons.chance_corrected(np.array([0.25, 1.0, 0.625]), 0.25), [0, 1, 0.5])
    with pytest.raises(ValueError, match="prevalence"):
        neurons.chance_corrected(np.ones(1), 1.0)


def test_bad_scores_and_labels_are_refused_with_their_place() -> None:
    scores = np.zeros((4, 3), np.float32)
    labels = np.array([True, True, False, False])
    for bad in (np.nan, np.inf, -np.inf):
        broken = scores.copy()
        broken[2, 1] = bad
        for dtype in (np.float16, np.float32, np.float64):
            with pytest.raises(ValueError, match=r"scores_DN\[2, 1\] is -?(nan|inf)"):
                neurons.average_precision(broken.astype(dtype), labels)
    with pytest.raises(ValueError, match="both groups"):
        neurons.average_precision(scores, np.ones(4, bool))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        neurons.average_precision(scores, labels[:3])
    with pytest.raises(ValueError, match="boolean"):
        neurons.average_precision(scores, np.arange(4))
    with pytest.raises(ValueError, match=r"\[D, N\]"):
        neurons.average_precision(scores[0], labels)


def test_shuffled_labels_give_a_perfect_neuron_about_the_prevalence() -> None:
    labels = np.arange(400) < 200
    scores = np.repeat(labels[:, None].astype(np.float32), 3, axis=1) + np.arange(400)[:, None] * 1e-4
    assert neurons.average_precision(scores, labels).min() == 1.0
    null = neurons.permuted_average_precision(scores, labels, num_permutations=20, seed=5)
    assert null.shape == (20, 3)
    assert abs(null.mean() - 0.5) < 0.03
    np.testing.assert_array_equal(null, neurons.permuted_average_precision(scores, labels, 20, seed=5))
    assert not np.array_equal(null, neurons.permuted_average_precision(scores, labels, 20, seed=6))


def test_counts_include_the_threshold() -> None:
    assert neurons.count_at_least(np.array([0.5, 0.75, 0.9, 0.8999]), [0.5, 0.9]).tolist() == [4, 1]


def test_top_neurons_break_ties_by_id() -> None:
    scores = np.array([[0.5, 0.9], [0.9, 0.1]])
    assert neurons.top_neurons(scores, 3).tolist() == [1, 2, 0]
    assert neurons.top_neurons(scores, 0).tolist() == []
    with pytest.raises(ValueError, match="outside"):
        neurons.top_neurons(scores, 5)


def test_jaccard_is_that_of_python_sets() -> None:
    a, b = np.array([5, 1, 9, 1]), np.array([9, 2, 5, 7, 7])
    assert neurons.jaccard(a, b) == len(set(a) & set(b)) / len(set(a) | set(b)) == 2 / 5
    assert neurons.jaccard(a[:0], a[:0]) == 1.0
    assert neurons.jaccard(a, a[:0]) == 0.0


def test_middle_neurons_are_the_slice_around_the_median_of_the_study() -> None:
    scores = np.random.default_rng(8).random(4001)
    np.testing.assert_array_equal(neurons.middle_neurons(scores, 1000), np.argsort(scores)[2000 - 500 : 2000 + 500])
    assert neurons.middle_neurons(np.zeros(6), 2).tolist() == [3, 2]
    assert sorted(neurons.middle_neurons(scores[:5], 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="outside"):
        neurons.middle_neurons(scores, 4002)


def test_overlaps_of_sets_are_symmetric_and_random_sets_overlap_as_chance_says() -> None:
    generator = np.random.default_rng(9)
    sets = [generator.choice(1000, size, replace=False) for size in (300, 200, 0)]
    matrix = neurons.jaccard_matrix(sets)
    np.testing.assert_array_equal(matrix, matrix.T)
    assert matrix[0, 1] == neurons.jaccard(sets[0], sets[1]) and matrix[2, 2] == 1.0 and matrix[0, 2] == 0.0
    draws = [
        neurons.jaccard(generator.choice(1000, 300, replace=False), generator.choice(1000, 200, replace=False))
        for _ in range(200)
    ]
    assert np.mean(draws) == pytest.approx(neurons.chance_jaccard(300, 200, 1000), abs=0.003)


def test_halves_agree_on_neurons_that_tell_the_language_and_not_on_noise() -> None:
    generator = np.random.default_rng(10)
    pair = np.tile(np.arange(60), 2)
    labels = np.arange(120) < 60
    scores = generator.normal(size=(120, 400))
    assert neurons.split_half_jaccard(scores, labels, 20, pair) < 0.3
    scores[:60, 100:120] += 6
    assert neurons.split_half_jaccard(scores, labels, 20, pair) == 1.0
    with pytest.raises(ValueError, match="unit_D"):
        neurons.split_half_jaccard(scores, labels, 20, pair[1:])


def lape_by_hand(
    count_KLF: np.ndarray, tokens_K: np.ndarray, top: float, keep: float, bar: float
) -> tuple[np.ndarray, list[set[tuple[int, int]]]]:
    """The steps of the reference (torch there) as loops; entropy and one set of neurons per language."""
    num_languages, num_layers, width = count_KLF.shape
    probability = {
        (k, layer, j): int(count_KLF[k, layer, j]) / int(tokens_K[k])
        for k in range(num_languages) for layer in range(num_layers) for j in range(width)
    }
    ordered = sorted(probability.values())
    tau = ordered[round(len(ordered) * keep) - 1]
    entropy = np.empty((num_layers, width))
    for layer in range(num_layers):
        for j in range(width):
            own = [probability[k, layer, j] for k in range(num_languages)]
            shares = [p / sum(own) if sum(own) else 0.0 for p in own]
            value = -sum(q * math.log(q) for q in shares if q > 0)
            entropy[layer, j] = value if max(own) > tau else math.inf
    ranked = sorted((entropy[layer, j], layer, j) for layer in range(num_layers) for j in range(width))
    chosen = [place for place in ranked[: round(len(ranked) * top)] if place[0] < math.inf]
    limit = ordered[round(len(ordered) * bar) - 1]
    sets = [
        {(layer, j) for _, layer, j in chosen if probability[k, layer, j] > limit} for k in range(num_languages)
    ]
    return entropy, sets


@pytest.mark.parametrize(("seed", "languages"), [(0, 2), (1, 3), (2, 7)])
@pytest.mark.parametrize(("top", "keep", "bar"), [(0.01, 0.95, 0.95), (0.1, 0.8, 0.6), (0.05, 0.95, 0.99)])
def test_lape_selects_what_the_reference_selects(
    seed: int, languages: int, top: float, keep: float, bar: float
) -> None:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(500, 2000, languages)
    rate = generator.beta(0.4, 2.0, (languages, 3, 50))
    count = generator.binomial(tokens[:, None, None], rate)
    count[:, 1, 7] = 0  # a dead neuron
    entropy, sets = lape_by_hand(count, tokens, top, keep, bar)
    found = neurons.lape(count, tokens, top, keep, bar)
    np.testing.assert_allclose(found.entropy_LF, entropy, atol=1e-12)
    for k in range(languages):
        assert {tuple(place) for place in np.argwhere(found.languages_of[k]).tolist()} == sets[k]
    assert found.selected_LF.sum() == round(150 * top)
    assert found.languages_of.shape == count.shape


def test_a_dead_neuron_is_never_selected_though_its_entropy_would_be_lowest() -> None:
    count = np.array([[[0, 90, 50, 50]], [[0, 1, 50, 49]]])
    found = neurons.lape(count, np.array([100, 100]), top_rate=0.5, filter_rate=0.5, bar_rate=0.5)
    assert found.entropy_LF[0, 0] == np.inf
    # Two are selected; with the dead one in, the last would have to go.
    assert found.selected_LF.tolist() == [[False, True, False, True]]


def test_a_neuron_of_one_language_has_entropy_zero_and_counts_above_int32_do_not_overflow() -> None:
    tokens = np.array([6_000_000_000, 5_000_000_000])
    count = np.array([[[4_000_000_000, 10, 10, 10]], [[0, 10, 10, 10]]])
    found = neurons.lape(count, tokens, top_rate=0.25, filter_rate=0.75, bar_rate=0.75)
    assert found.entropy_LF[0, 0] == 0.0 and not np.signbit(found.entropy_LF[0, 0])
    assert np.argwhere(found.languages_of).tolist() == [[0, 0, 0]]
    assert found.probability_KLF[0, 0, 0] == 4 / 6


def test_adding_batches_first_or_scaling_the_tokens_of_a_language_changes_nothing() -> None:
    generator = np.random.default_rng(9)
    tokens = np.array([1000, 1000, 1000])
    count = generator.binomial(1000, generator.beta(0.4, 2.0, (3, 2, 100)))
    once = neurons.lape(count, tokens)
    scaled = neurons.lape(count * np.array([1, 5, 3])[:, None, None], tokens * [1, 5, 3])
    np.testing.assert_array_equal(once.languages_of, scaled.languages_of)


def test_lape_refuses_what_cannot_be_counts() -> None:
    count, tokens = np.ones((2, 1, 100), np.int64), np.array([5, 5])
    with pytest.raises(ValueError, match=r"token_count_K\[1\]=0"):
        neurons.lape(count, np.array([5, 0]))
    with pytest.raises(ValueError, match="has 5 tokens"):
        neurons.lape(count * 6, tokens)
    with pytest.raises(ValueError, match="between 0"):
        neurons.lape(-count, tokens)
    with pytest.raises(ValueError, match="top_rate=0"):
        neurons.lape(count, tokens, top_rate=0.0)
    with pytest.raises(ValueError, match="filter_rate=1e-05"):
        neurons.lape(count, tokens, filter_rate=1e-5)
    with pytest.raises(ValueError, match=r"\[K, L, F\]"):
        neurons.lape(count[0], tokens)
