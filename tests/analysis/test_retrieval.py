"""Retrieval, MEXA and AUC against loops over every pair."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cosine as scipy_cosine_distance
from sklearn.metrics import roc_auc_score

from megatron_xalign.analysis import retrieval


def related(seed: int, num: int = 40, width: int = 6) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=(num, width))
    return shared + 0.6 * generator.normal(size=(num, width)), shared + 0.6 * generator.normal(size=(num, width)) + 1.0


def all_cosines(acts_a: np.ndarray, acts_b: np.ndarray) -> np.ndarray:
    return np.array([[1 - scipy_cosine_distance(x, y) for y in acts_b] for x in acts_a])


@pytest.mark.parametrize("centred", [False, True])
def test_accuracy_is_that_of_a_search_through_all_pairs(centred: bool) -> None:
    acts_a, acts_b = related(0)
    found = retrieval.bitext_accuracy(acts_a, acts_b, centred=centred)
    if centred:
        acts_a, acts_b = acts_a - acts_a.mean(0), acts_b - acts_b.mean(0)
    cosines = all_cosines(acts_a, acts_b)
    assert found.forward == np.mean(cosines.argmax(axis=1) == np.arange(40))
    assert found.backward == np.mean(cosines.argmax(axis=0) == np.arange(40))
    assert found.mean == (found.forward + found.backward) / 2
    assert 0.1 < found.mean < 0.95  # the example is neither trivial nor hopeless


def test_mexa_is_the_double_loop_of_its_authors() -> None:
    pivot, other = related(1)
    cosines = all_cosines(pivot, other)
    hits = 0
    for i in range(40):
        beats_row = all(cosines[i, i] > cosines[i, j] for j in range(40) if j != i)
        beats_column = all(cosines[i, i] > cosines[j, i] for j in range(40) if j != i)
        hits += beats_row and beats_column
    assert retrieval.mexa(pivot, other) == hits / 40
    assert 0 < hits < 40


def test_csls_penalises_hubs_as_its_formula_says() -> None:
    acts_a, acts_b = related(2)
    cosines = all_cosines(acts_a, acts_b)
    hub_a = np.sort(cosines, axis=1)[:, -10:].mean(axis=1)
    hub_b = np.sort(cosines, axis=0)[-10:].mean(axis=0)
    scores = 2 * cosines - hub_a[:, None] - hub_b[None, :]
    found = retrieval.bitext_accuracy(acts_a, acts_b, csls_neighbours=10)
    assert found.forward == np.mean(scores.argmax(axis=1) == np.arange(40))
    assert found.backward == np.mean(scores.argmax(axis=0) == np.arange(40))
    assert found.forward != retrieval.bitext_accuracy(acts_a, acts_b).forward


def test_auc_is_that_of_scikit_learn_over_every_row_and_column() -> None:
    acts_a, acts_b = related(3)
    acts_b[5] = acts_b[9]  # ties count half
    cosines = all_cosines(acts_a, acts_b).round(12)
    truth = np.eye(40, dtype=int)
    areas = [roc_auc_score(truth[i], cosines[i]) for i in range(40)]
    areas += [roc_auc_score(truth[:, i], cosines[:, i]) for i in range(40)]
    assert retrieval.cosine_auc(acts_a, acts_b) == pytest.approx(np.mean(areas), abs=1e-12)


def test_a_tie_is_a_miss() -> None:
    acts_a, acts_b = np.eye(4), np.eye(4)
    assert retrieval.bitext_accuracy(acts_a, acts_b).mean == 1.0
    acts_b[1] = acts_b[0]
    found = retrieval.bitext_accuracy(acts_a, acts_b)
    assert found.forward_hit_D.tolist() == [False, False, True, True]
    assert found.backward_hit_D.tolist() == [True, False, True, True]
    assert retrieval.mexa(acts_a, acts_b) == 0.5


def test_sentences_that_all_look_alike_retrieve_nothing() -> None:
    collapsed = np.tile(np.random.default_rng(4).normal(size=257), (50, 1))
    assert retrieval.bitext_accuracy(collapsed, collapsed).mean == 0.0
    assert retrieval.bitext_accuracy(np.zeros((50, 3)), collapsed[:, :3]).mean == 0.0
    assert retrieval.mexa(collapsed, collapsed) == 0.0
    assert retrieval.cosine_auc(collapsed, collapsed) == 0.5


def test_block_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    acts_a, acts_b = related(5)
    whole = retrieval.bitext_accuracy(acts_a, acts_b, csls_neighbours=3)
    auc = retrieval.cosine_auc(acts_a, acts_b)
    monkeypatch.setattr(retrieval, "_BLOCK_SIMILARITIES", 40 * 7)
    parts = retrieval.bitext_accuracy(acts_a, acts_b, csls_neighbours=3)
    np.testing.assert_array_equal(parts.forward_hit_D, whole.forward_hit_D)
    np.testing.assert_array_equal(parts.backward_hit_D, whole.backward_hit_D)
    assert retrieval.cosine_auc(acts_a, acts_b) == pytest.approx(auc, abs=1e-14)


def test_bad_input_is_refused() -> None:
    acts_a, acts_b = related(6)
    for measure in (retrieval.bitext_accuracy, retrieval.mexa, retrieval.cosine_auc):
        with pytest.raises(ValueError, match="at least 2 sentence"):
            measure(acts_a[:1], acts_b[:1])
        with pytest.raises(ValueError, match="40 sentences and acts_b_DH 39"):
            measure(acts_a, acts_b[1:])
        with pytest.raises(ValueError, match="6 features and acts_b_DH 5"):
            measure(acts_a, acts_b[:, 1:])
    with pytest.raises(ValueError, match="csls_neighbours=41"):
        retrieval.bitext_accuracy(acts_a, acts_b, csls_neighbours=41)
