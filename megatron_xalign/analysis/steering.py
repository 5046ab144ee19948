"""Pushing a model's hidden states towards another language."""

# B batch, S sequence, H features, D sentences

from __future__ import annotations

import numpy as np

from megatron_xalign.analysis.representations import as_pair


def control_vector(acts_a_DH: np.ndarray, acts_b_DH: np.ndarray) -> np.ndarray:
    """Direction from language a to language b at one layer: the mean of b - a over translations.

    Args:
        acts_a_DH: float [D, H]. Residual stream of the sentences in language a, mean over tokens.
        acts_b_DH: float [D, H]. The same sentences in language b.

    Returns:
        float64 [H].

    Raises:
        ValueError: shapes differ, there is no sentence, or a value is not finite.

    Source: Leino & Tiedemann 2026, arXiv:2603.29026; their "fineng" vector is ``control_vector(finnish, english)``.
    """
    acts_a, acts_b = as_pair(acts_a_DH, acts_b_DH, min_sentences=1)
    return (acts_b - acts_a).mean(axis=0)


def steer(hidden_BSH: np.ndarray, vector_H: np.ndarray, strength: float) -> np.ndarray:
    """Add ``strength * vector_H`` to every hidden state and give it its old norm back.

    h' = (h + u) |h| / |h + u| with u = strength * vector. Where h + u is zero it has no direction and h stays.

    Args:
        hidden_BSH: float [..., H]. Hidden states, any number of leading axes.
        vector_H: float [H]. As ``control_vector`` gives it.
        strength: how far; a negative one pushes towards language a.

    Returns:
        Array of the shape and float type of ``hidden_BSH``; computed in float64.

    Raises:
        ValueError: widths differ, or a value is not finite.
    """
    hidden, vector = np.asarray(hidden_BSH), np.asarray(vector_H, np.float64)
    if hidden.ndim < 1 or vector.ndim != 1 or hidden.shape[-1] != len(vector):
        raise ValueError(f"hidden_BSH has shape {hidden.shape} and vector_H {vector.shape}; the last axes must agree.")
    if not (np.isfinite(hidden).all() and np.isfinite(vector).all() and np.isfinite(strength)):
        raise ValueError("hidden_BSH, vector_H or strength is not finite.")
    wide = hidden.astype(np.float64)
    moved = wide + strength * vector
    old_norm = np.linalg.norm(wide, axis=-1, keepdims=True)
    new_norm = np.linalg.norm(moved, axis=-1, keepdims=True)
    scale = np.divide(old_norm, new_norm, out=np.zeros_like(new_norm), where=new_norm > 0)
    steered = np.where(new_norm > 0, moved * scale, wide)
    return steered.astype(hidden.dtype if hidden.dtype.kind == "f" else np.float64)
