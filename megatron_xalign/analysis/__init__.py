"""Statistics to numbers: pure functions over NumPy arrays, and the measures of one run in order (``series``)."""

from megatron_xalign.analysis import (
    ablation,
    inference,
    moments,
    neurons,
    projection,
    resampling,
    retrieval,
    similarity,
    steering,
    vocabulary,
)

__all__ = [
    "ablation",
    "inference",
    "moments",
    "neurons",
    "projection",
    "resampling",
    "retrieval",
    "similarity",
    "steering",
    "vocabulary",
]
