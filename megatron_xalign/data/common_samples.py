"""How many samples two runs read in common before the first that differs."""

# N samples, R rows (windows, or documents where they are mixed), J sources

from __future__ import annotations

import numpy as np

from megatron_xalign.data.blend import Blend

_ROWS_AT_A_TIME = 1 << 22


def common_samples(before: Blend, now: Blend, num_samples: int) -> int:
    """Count the samples that both runs begin with, in whole global batches.

    Args:
        before: one run.
        now: the other, of the same seed, global batch size and sequence length, and the same text under the same names
            of sources: what a source gives at a draw is then the same in both, and only their order can differ.
        num_samples: how far to look.

    Returns:
        ``num_samples`` if so many, or more, are the same; otherwise the first sample of the global batch that holds the
        first difference.
    """
    batch = now.plan.global_batch_size
    # Samples of a batch are shuffled among themselves, so a batch is the same or it is not.
    looked_at = min(-(-num_samples // batch) * batch, len(before), len(now))
    same = _common(before, now, looked_at) // batch * batch
    return num_samples if same >= num_samples else same


def _common(before: Blend, now: Blend, num_samples: int) -> int:
    """The same, before samples are shuffled."""
    borders = before.order.borders_N, now.order.borders_N
    if (borders[0] is None) != (borders[1] is None):
        return 0
    if borders[0] is None or borders[1] is None:
        return _common_rows(before, now, num_samples)
    # Borders are where samples begin; the last sample ends with the row before the next one's.
    ends = min(num_samples + 1, len(borders[0]), len(borders[1]))
    parted = np.flatnonzero(borders[0][:ends] != borders[1][:ends])
    alike = int(parted[0]) - 1 if parted.size else num_samples
    if alike <= 0:
        return 0
    begins_R = borders[1]["row"]
    rows = int(begins_R[alike]) + 1 if alike < len(begins_R) else len(now.order.ids_R)
    common = _common_rows(before, now, rows)
    # A sample is common if all rows that it lies in are.
    return alike if common == rows else max(int(np.searchsorted(begins_R[: alike + 1], common, side="right")) - 1, 0)


def _common_rows(before: Blend, now: Blend, num_rows: int) -> int:
    names = {name: number for number, name in enumerate(now.source_names)}
    now_of_J = np.array([names.get(name, -1) for name in before.source_names])
    # The rows of a run end with its last sample.
    both = min(num_rows, len(before.order.ids_R), len(now.order.ids_R))
    for begin in range(0, both, _ROWS_AT_A_TIME):
        part = slice(begin, min(begin + _ROWS_AT_A_TIME, both))
        parted = np.flatnonzero(now_of_J[before.order.ids_R[part]] != now.order.ids_R[part])
        if parted.size:
            return begin + int(parted[0])
    return num_rows
