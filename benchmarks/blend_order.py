"""How long does it take to say which source gives each sample, against megatron.core.datasets, and how exact is it?

    python benchmarks/blend_order.py [--quick] [--rounds N]

Twenty million samples of 3, 8 and 64 sources whose sizes are lognormal. Megatron's `build_blending_indices` (greedy, by
weights in floating point) and `build_exhaustive_blending_indices` (by sizes) write the source and its sample number for
every sample, 10 bytes. Ours is `_native.BlendOrder`, in exact integers; it writes one byte a sample, and `RowCounter`
counts the sources before every block, from which the sample number of any sample follows (`SourceRows`): the counting
is part of what is timed, one thread. CPU seconds; contestants take turns in one process. Exactness: the largest
distance of any source from its quota after any of the first million samples, in samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from measure import answer, interleaved, print_costs, print_result

_SEED = 1234
_CHUNK = 1 << 20


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a million samples, one round")
    parser.add_argument("--rounds", type=int, help="5, or 1 with --quick")
    options = parser.parse_args()
    num_samples = 1_000_000 if options.quick else 20_000_000
    answers = []
    for num_sources in (3, 8, 64):
        answers += _compare(num_sources, num_samples, options.rounds or (1 if options.quick else 5))
    print_result(answers)
    return 0


def _compare(num_sources: int, num_samples: int, rounds: int) -> list[dict[str, Any]]:
    sizes = _sizes(num_sources, num_samples)
    runs = {
        "ours": lambda: _ours(sizes, num_samples),
        "core, greedy": _core(sizes, num_samples),
        "core, exhaustive": _core_exhaustive(sizes),
    }
    print(f"\n{num_sources} sources, {num_samples:,} samples")
    costs = interleaved(runs, rounds)
    print_costs(costs)
    exact = min(num_samples, 1_000_000)
    off = {name: _largest_distance(cost.result, sizes, exact) for name, cost in costs.items()}
    for name, distance in off.items():
        print(f"{name:17} at most {distance:.3f} samples from a quota")
    ours = costs["ours"]
    return [
        answer(
            f"blend order of {num_sources} sources, {num_samples:,} samples: against core's {peer.split(', ')[1]}",
            ours=ours.cpu_seconds, peer=costs[peer].cpu_seconds, goal=5 if num_sources == 64 else None, unit="CPU s",
            better="lower", samples_off=[round(off["ours"], 3), round(off[peer], 3)],
            memory_mb=[round(ours.rss_growth_bytes / 1e6), round(costs[peer].rss_growth_bytes / 1e6)],
        )
        for peer in ("core, greedy", "core, exhaustive")
    ]  # fmt: skip


def _sizes(num_sources: int, num_samples: int) -> np.ndarray:
    """int64 [J]: samples each source gives, adding up to what is asked."""
    drawn = np.random.default_rng(_SEED).lognormal(0.0, 1.5, num_sources)
    sizes = np.maximum((drawn / drawn.sum() * num_samples).astype(np.int64), 1)
    sizes[np.argmax(sizes)] += num_samples - sizes.sum()
    return sizes


def _ours(sizes: np.ndarray, num_samples: int) -> np.ndarray:
    from megatron_xalign import _native

    blend, counter = _native.BlendOrder(sizes), _native.RowCounter(len(sizes))
    order = np.empty(num_samples, dtype=np.uint8)
    for begin in range(0, num_samples, _CHUNK):
        chunk = order[begin : begin + _CHUNK]
        blend.fill(chunk)
        counter.append(chunk)
    counter.take_lines()
    return order


def _core(sizes: np.ndarray, num_samples: int) -> Callable[[], np.ndarray]:
    from megatron.core.datasets import helpers

    weights = (sizes / sizes.sum()).tolist()

    def run() -> np.ndarray:
        # As BlendedDataset allocates them.
        source_of, sample_of = np.zeros(num_samples, dtype=np.int16), np.zeros(num_samples, dtype=np.int64)
        helpers.build_blending_indices(source_of, sample_of, weights, len(weights), num_samples, False)
        return source_of

    return run


def _core_exhaustive(sizes: np.ndarray) -> Callable[[], np.ndarray]:
    from megatron.core.datasets import helpers

    def run() -> np.ndarray:
        source_of, sample_of = np.zeros(sizes.sum(), dtype=np.int16), np.zeros(sizes.sum(), dtype=np.int64)
        helpers.build_exhaustive_blending_indices(source_of, sample_of, sizes, len(sizes))
        return source_of

    return run


def _largest_distance(order: np.ndarray, sizes: np.ndarray, num_samples: int) -> float:
    """The largest |given - quota| of any source after any sample."""
    largest, total, at = 0.0, int(sizes.sum()), np.arange(1, num_samples + 1, dtype=np.int64)
    for source, size in enumerate(sizes.tolist()):
        given = np.cumsum(order[:num_samples] == source, dtype=np.int64)
        largest = max(largest, float(np.abs(given * total - at * size).max()) / total)
    return largest


if __name__ == "__main__":
    raise SystemExit(main())
