"""Control vectors and norm-preserving steps, against the formula in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_xalign.analysis import steering


def test_the_vector_is_the_mean_difference_from_a_to_b() -> None:
    generator = np.random.default_rng(0)
    acts_a, acts_b = generator.normal(size=(2, 10, 4)).astype(np.float16)
    expected = sum(b.astype(float) - a.astype(float) for a, b in zip(acts_a, acts_b, strict=True)) / 10
    found = steering.control_vector(acts_a, acts_b)
    np.testing.assert_allclose(found, expected, atol=1e-14)
    np.testing.assert_allclose(steering.control_vector(acts_b, acts_a), -expected, atol=1e-14)
    assert found.dtype == np.float64
    with pytest.raises(ValueError, match="10 sentences and acts_b_DH 9"):
        steering.control_vector(acts_a, acts_b[1:])


@pytest.mark.parametrize("strength", [-2.0, 0.0, 0.5, 30.0])
def test_steering_turns_a_state_and_keeps_its_norm(strength: float) -> None:
    generator = np.random.default_rng(1)
    hidden, vector = generator.normal(size=(2, 3, 5)), generator.normal(size=5)
    moved = torch.tensor(hidden) + strength * torch.tensor(vector)
    expected = moved * torch.tensor(hidden).norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)
    found = steering.steer(hidden, vector, strength)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-13)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), np.linalg.norm(hidden, axis=-1), rtol=1e-12)
    if strength == 0:
        np.testing.assert_allclose(found, hidden, rtol=1e-15)


def test_states_without_a_direction_stay_and_the_float_type_is_kept() -> None:
    hidden = np.array([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]], np.float32)
    found = steering.steer(hidden, np.array([-1.0, -2.0]), 1.0)
    assert found.dtype == np.float32 and np.isfinite(found).all()
    np.testing.assert_array_equal(found[:2], hidden[:2])  # a zero state, and one the step takes to zero
    assert steering.steer(np.array([1, 2]), np.array([1.0, 0.0]), 1.0).dtype == np.float64


def test_widths_that_differ_and_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="last axes must agree"):
        steering.steer(np.ones((2, 3)), np.ones(4), 1.0)
    for hidden, vector, strength in (([np.nan], [1.0], 1.0), ([1.0], [np.inf], 1.0), ([1.0], [1.0], np.nan)):
        with pytest.raises(ValueError, match="not finite"):
            steering.steer(np.array(hidden), np.array(vector), strength)
