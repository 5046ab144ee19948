"""Checks every measure makes on the arrays it is given, and the two things most of them do first.

A representation is one vector per sentence. Inputs may be of any float or integer type and any memory layout; all
arithmetic is in float64.
"""

# D sentences (documents), H features

from __future__ import annotations

import numpy as np

COSINE_EPSILON = 1e-8
"""Norms below it count as it, so a zero vector has cosine 0 with everything, as in torch."""


def as_representations(acts_DH: np.ndarray, name: str = "acts_DH", min_sentences: int = 1) -> np.ndarray:
    """The input as float64 [D, H].

    Raises:
        ValueError: it is not two-dimensional and real, holds NaN or infinity, or has fewer than ``min_sentences`` rows
            or no columns.
    """
    acts = np.asarray(acts_DH)
    if acts.ndim != 2 or acts.dtype.kind not in "fiub":
        raise ValueError(f"{name} is {acts.dtype} of shape {acts.shape}; real numbers [sentences, features] needed.")
    if acts.shape[0] < min_sentences or acts.shape[1] < 1:
        raise ValueError(
            f"{name} has shape {acts.shape}; at least {min_sentences} sentence(s) of one feature are needed."
        )
    acts = acts.astype(np.float64)
    finite_D = np.isfinite(acts).all(axis=1)
    if not finite_D.all():
        raise ValueError(
            f"{name} holds NaN or infinity in {np.count_nonzero(~finite_D)} of {len(acts)} sentences, the first is "
            f"number {int(np.argmin(finite_D))} (an empty sentence or a diverged model gives such values)."
        )
    return acts


def as_pair(
    acts_a_DH: np.ndarray, acts_b_DH: np.ndarray, min_sentences: int = 2, same_width: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Two aligned representations as float64; row i of both is the same sentence.

    Raises:
        ValueError: as ``as_representations``, or the numbers of sentences (or, with ``same_width``, features) differ.
    """
    acts_a = as_representations(acts_a_DH, "acts_a_DH", min_sentences)
    acts_b = as_representations(acts_b_DH, "acts_b_DH", min_sentences)
    if len(acts_a) != len(acts_b):
        raise ValueError(
            f"acts_a_DH has {len(acts_a)} sentences and acts_b_DH {len(acts_b)}; row i of both must be one translation."
        )
    if same_width and acts_a.shape[1] != acts_b.shape[1]:
        raise ValueError(f"acts_a_DH has {acts_a.shape[1]} features and acts_b_DH {acts_b.shape[1]}; equal is needed.")
    return acts_a, acts_b


def check_varies(acts_DH: np.ndarray, name: str) -> None:
    """Refuse a representation that is the same for all sentences: it has no directions (ValueError)."""
    if not np.ptp(acts_DH, axis=0).any():
        raise ValueError(f"{name} is the same for all {len(acts_DH)} sentences; there is no direction in it.")


def centre(acts_DH: np.ndarray) -> np.ndarray:
    """Subtract the mean over sentences: what all sentences of one language share."""
    return acts_DH - acts_DH.mean(axis=0)


def unit_rows(acts_DH: np.ndarray) -> np.ndarray:
    """Rows divided by their norm; zero rows stay zero."""
    norm_D = np.linalg.norm(acts_DH, axis=1)
    return acts_DH / np.maximum(norm_D, COSINE_EPSILON)[:, None]
