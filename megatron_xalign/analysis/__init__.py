"""Statistics to numbers: pure functions over NumPy arrays, and the measures of one run in order (``series``)."""

from megatron_xalign.analysis import neurons, projection, resampling, retrieval, similarity, steering

__all__ = ["neurons", "projection", "resampling", "retrieval", "similarity", "steering"]
