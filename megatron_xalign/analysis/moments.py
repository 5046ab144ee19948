"""Sums from which canonical correlations follow, gathered block by block: sentences come and go, O(H^2) stays.

Everything is float64. Values are shifted by a pilot mean (that of the first block) before they are multiplied, so that
a large common vector costs no digits. Sums of two parts of the sentences add up (``merge``), in any order and from any
process. Matrices are kept in BLAS's memory order and updated in place; of symmetric ones only the lower triangle is.
"""

# D sentences, H features; a and b the two representations



from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import blas

from megatron_xalign.analysis.representations import as_pair

_BLOCK_VALUES = 1 << 20
"""Values of a block that is converted to float64 at a time, of each side."""


@dataclass
class Scatter:
    """Sums of products of two representations about their means."""

    num_sentences: int
    mean_a_H: np.ndarray
    mean_b_H: np.ndarray
    aa_HH: np.ndarray
    """float64 [H_a, H_a], lower triangle only: sum over sentences of (a - mean)(a - mean)'."""
    ab_HH: np.ndarray
    """float64 [H_a, H_b]: sum of (a - mean)(b - mean)'."""
    bb_HH: np.ndarray
    """float64 [H_b, H_b], lower triangle only."""

    def swapped(self) -> Scatter:
        """The same with the two representations exchanged; no matrix is copied."""
        return Scatter(
            self.num_sentences, self.mean_b_H, self.mean_a_H, self.bb_HH, self.ab_HH.T, self.aa_HH
        )

    def take(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The matrices aa, ab and bb, which are then no longer held here, so that each can be let go of after use."""
        matrices = self.aa_HH, self.ab_HH, self.bb_HH
        self.aa_HH = self.ab_HH = self.bb_HH = np.zeros((0, 0))
        return matrices


class PairMoments:
    """Sums of two aligned representations: number, means and products of features."""

    def __init__(self, width_a: int, width_b: int, device: str | None = None) -> None:
        """Start at zero.

        Args:
            width_a: H of the first representation.
            width_b: H of the second.
            device: ``cpu``, or a device of torch such as ``cuda``, which then multiplies; the first CUDA device if
                there is one and ``cpu`` if not, when left out.
        """
        if width_a < 1 or width_b < 1:
            raise ValueError(f"width_a={width_a} and width_b={width_b} must be positive.")
        self.width_a, self.width_b = width_a, width_b
        self.device = device or _device()
        self.num_sentences = 0
        self._pilot = np.zeros(width_a), np.zeros(width_b)
        self._sums = np.zeros(width_a), np.zeros(width_b)
        self._products: Any = None if self.device == "cpu" else _TorchProducts(width_a, width_b, self.device)
        if self._products is None:
            self._products = _BlasProducts(width_a, width_b)

    def update(self, acts_a_DH: np.ndarray, acts_b_DH: np.ndarray) -> None:
        """Add sentences; row i of both is one translation.

        Raises:
            ValueError: numbers of sentences differ, widths are not the stated ones, or a value is not finite. Nothing
                has been added then.
        """
        if np.ndim(acts_a_DH) == np.ndim(acts_b_DH) == 2 and len(acts_a_DH) == len(acts_b_DH) == 0:
            return
        for name, acts, width in (("acts_a_DH", acts_a_DH, self.width_a), ("acts_b_DH", acts_b_DH, self.width_b)):
            if np.ndim(acts) == 2 and np.shape(acts)[1] != width:
                raise ValueError(f"{name} has {np.shape(acts)[1]} features; these moments are of {width}.")
        rows = max(1, _BLOCK_VALUES // max(self.width_a, self.width_b))
        blocks = [slice(start, start + rows) for start in range(0, max(len(acts_a_DH), len(acts_b_DH)), rows)]
        if len(blocks) > 1:
            for name, acts in (("acts_a_DH", acts_a_DH), ("acts_b_DH", acts_b_DH)):
                if not all(np.isfinite(acts[block]).all() for block in blocks):
                    raise ValueError(
                        f"{name} holds NaN or infinity (an empty sentence or a diverged model gives such values)."
                    )
            if len(acts_a_DH) != len(acts_b_DH):
                raise ValueError(f"acts_a_DH has {len(acts_a_DH)} sentences and acts_b_DH {len(acts_b_DH)}.")
        for block in blocks:
            self._add(*as_pair(acts_a_DH[block], acts_b_DH[block], min_sentences=1, same_width=False))

    def _add(self, acts_a: np.ndarray, acts_b: np.ndarray) -> None:
        if self.num_sentences == 0:
            self._pilot = acts_a.mean(axis=0), acts_b.mean(axis=0)
        # as_pair has made copies.
        acts_a -= self._pilot[0]
        acts_b -= self._pilot[1]
        self._sums[0][:] += acts_a.sum(axis=0)
        self._sums[1][:] += acts_b.sum(axis=0)
        self._products.add(acts_a, acts_b)
        self.num_sentences += len(acts_a)

    def merge(self, other: PairMoments) -> None:
        """Add another part of the sentences, of another batch or process.

        Raises:
            ValueError: the widths differ.
        """
        if (self.width_a, self.width_b) != (other.width_a, other.width_b):
            raise ValueError(
                f"moments of {other.width_a} and {other.width_b} features do not add to those of {self.width_a} and "
                f"{self.width_b}."
            )
        if other.num_sentences == 0:
            return
        aa, ab, bb = other._products.matrices()
        if self.num_sentences == 0:
            self._pilot = other._pilot[0].copy(), other._pilot[1].copy()
        step_a, step_b = other._pilot[0] - self._pilot[0], other._pilot[1] - self._pilot[1]
        sum_a, sum_b = other._sums
        count = other.num_sentences

        def moved(
            products: np.ndarray, sum_one: np.ndarray, sum_two: np.ndarray, one: np.ndarray, two: np.ndarray
        ) -> np.ndarray:
            return products + np.outer(sum_one, two) + np.outer(one, sum_two) + count * np.outer(one, two)

        self._products.add_matrices(
            moved(aa, sum_a, sum_a, step_a, step_a), moved(ab, sum_a, sum_b, step_a, step_b),
            moved(bb, sum_b, sum_b, step_b, step_b),
        )  # fmt: skip
        self._sums[0][:] += sum_a + count * step_a
        self._sums[1][:] += sum_b + count * step_b
        self.num_sentences += count

    def state(self) -> dict[str, np.ndarray]:
        """Everything as arrays, to be saved or sent to another process."""
        aa, ab, bb = self._products.matrices()
        return {
            "num_sentences": np.array(self.num_sentences, np.int64),
            "pilot_a": self._pilot[0], "pilot_b": self._pilot[1], "sum_a": self._sums[0], "sum_b": self._sums[1],
            "aa": aa, "ab": ab, "bb": bb,
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray], device: str | None = None) -> PairMoments:
        """The moments whose ``state`` this is."""
        moments = cls(len(state["sum_a"]), len(state["sum_b"]), device)
        moments.num_sentences = int(state["num_sentences"])
        moments._pilot = np.array(state["pilot_a"], np.float64), np.array(state["pilot_b"], np.float64)
        moments._sums = np.array(state["sum_a"], np.float64), np.array(state["sum_b"], np.float64)
        moments._products.add_matrices(state["aa"], state["ab"], state["bb"])
        return moments

    def scatter(self, consume: bool = False) -> Scatter:
        """Products about the means.

        Args:
            consume: give the matrices away instead of copying them; these moments cannot be used any more.

        Raises:
            ValueError: there are fewer than two sentences.
        """
        if self.num_sentences < 2:
            raise ValueError(f"moments of {self.num_sentences} sentence(s); at least two are needed.")
        aa, ab, bb = self._products.matrices()
        if consume:
            self._products = None
        else:
            aa, ab, bb = (matrix.copy(order="F") for matrix in (aa, ab, bb))
        sum_a, sum_b = self._sums
        share = -1.0 / self.num_sentences
        aa = blas.dsyr(share, sum_a, a=aa, lower=1, overwrite_a=1)
        bb = blas.dsyr(share, sum_b, a=bb, lower=1, overwrite_a=1)
        ab = blas.dger(share, sum_a, sum_b, a=ab, overwrite_a=1)
        return Scatter(
            self.num_sentences, self._pilot[0] + sum_a / self.num_sentences,
            self._pilot[1] + sum_b / self.num_sentences, aa, ab, bb,
        )  # fmt: skip


class _BlasProducts:
    """A'A, A'B and B'B, added to in place."""

    def __init__(self, width_a: int, width_b: int) -> None:
        self._aa = np.zeros((width_a, width_a), order="F")
        self._ab = np.zeros((width_a, width_b), order="F")
        self._bb = np.zeros((width_b, width_b), order="F")

    def add(self, acts_a: np.ndarray, acts_b: np.ndarray) -> None:
        # Rows of sentences are columns in BLAS's order, so nothing is copied.
        self._aa = blas.dsyrk(1.0, acts_a.T, beta=1.0, c=self._aa, overwrite_c=1, lower=1)
        self._bb = blas.dsyrk(1.0, acts_b.T, beta=1.0, c=self._bb, overwrite_c=1, lower=1)
        self._ab = blas.dgemm(1.0, acts_a.T, acts_b.T, beta=1.0, c=self._ab, overwrite_c=1, trans_b=1)

    def add_matrices(self, aa: np.ndarray, ab: np.ndarray, bb: np.ndarray) -> None:
        self._aa += aa
        self._ab += ab
        self._bb += bb

    def matrices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._aa, self._ab, self._bb


class _TorchProducts:
    """The same on a device of torch; the sums come back when they are asked for."""

    def __init__(self, width_a: int, width_b: int, device: str) -> None:
        import torch

        self._torch, self._device = torch, torch.device(device)
        self._aa, self._ab, self._bb = (
            torch.zeros(shape, dtype=torch.float64, device=self._device)
            for shape in ((width_a, width_a), (width_a, width_b), (width_b, width_b))
        )

    def add(self, acts_a: np.ndarray, acts_b: np.ndarray) -> None:
        one, two = (self._torch.from_numpy(acts).to(self._device) for acts in (acts_a, acts_b))
        self._aa.addmm_(one.T, one)
        self._ab.addmm_(one.T, two)
        self._bb.addmm_(two.T, two)

    def add_matrices(self, aa: np.ndarray, ab: np.ndarray, bb: np.ndarray) -> None:
        for own, more in ((self._aa, aa), (self._ab, ab), (self._bb, bb)):
            own += self._torch.from_numpy(np.ascontiguousarray(more, np.float64)).to(self._device)

    def matrices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        aa, ab, bb = (np.array(matrix.cpu().numpy(), order="F") for matrix in (self._aa, self._ab, self._bb))
        return aa, ab, bb


def _device() -> str:
    """``cuda`` where there is one; torch, which takes seconds to import, is asked only where a driver is loaded."""
    if not Path("/dev/nvidiactl").exists():
        return "cpu"
    try:
        import torch
    except ImportError:
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"
