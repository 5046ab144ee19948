"""The parallel fraction as it changes over a run: exact numbers, and the integers the C++ library holds to.

A phase ends at a number of tokens and goes in a straight line from one fraction to another (usually the same). The
fraction of a sample is the one at its first token; after the last phase the last value holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from megatron_xalign.config import MixtureConfig

# A share is a number somebody typed; fifteen decimals are more than a float tells apart and fit the C++ arithmetic.
_FINEST = 10**15
_LARGEST_DENOMINATOR = 1 << 60
# What a sample's fraction is rounded down to where it lies on a slope.
_SLOPE_DENOMINATOR = 10**12
# Pieces of equal fraction that a slope is taken for in estimates.
_PIECES = 64


def exact(number: float) -> Fraction:
    """The number that was typed: 0.05 is one twentieth, not the nearest binary fraction."""
    typed = Fraction(repr(float(number)))
    return typed if typed.denominator <= _FINEST else Fraction(round(typed * _FINEST), _FINEST)


@dataclass(frozen=True)
class Phase:
    """One stretch of the schedule."""

    until_tokens: int | None
    """Where it ends; None: with the run."""
    begin: Fraction
    """The fraction at its beginning ..."""
    end: Fraction
    """... and at its end."""


@dataclass(frozen=True)
class Stretch:
    """Samples of (about) one fraction."""

    begin: int
    end: int
    fraction: Fraction


@dataclass(frozen=True)
class FractionSchedule:
    """The fraction that every sample is asked to have."""

    phases: tuple[Phase, ...]
    """At least one; the last may have no end."""
    seq_length: int

    @classmethod
    def of(cls, mixture: MixtureConfig, seq_length: int) -> FractionSchedule:
        """The schedule a mixture asks for; one phase without end where it names one fraction."""
        if not mixture.schedule:
            fraction = exact(mixture.parallel_fraction)
            return cls((Phase(None, fraction, fraction),), seq_length)
        phases = []
        for asked in mixture.schedule:
            begin = exact(asked.parallel_fraction)
            phases.append(Phase(asked.until_tokens, begin, begin if asked.to is None else exact(asked.to)))
        return cls(tuple(phases), seq_length)

    @property
    def is_constant(self) -> bool:
        """Whether all samples are asked to have the same fraction."""
        return len({value for phase in self.phases for value in (phase.begin, phase.end)}) == 1

    @property
    def is_never_parallel(self) -> bool:
        """Whether it is 0 everywhere."""
        return all(phase.begin == phase.end == 0 for phase in self.phases)

    @property
    def is_always_parallel(self) -> bool:
        """Whether it is 1 everywhere."""
        return all(phase.begin == phase.end == 1 for phase in self.phases)

    @property
    def denominator(self) -> int:
        """Of the integers: all typed numbers are whole in it, where that is possible, and slopes have fine steps."""
        typed = [value.denominator for phase in self.phases for value in (phase.begin, phase.end)]
        common = math.lcm(*typed)
        if common > _LARGEST_DENOMINATOR:
            return _FINEST
        if any(phase.begin != phase.end for phase in self.phases):
            common *= max(1, -(-_SLOPE_DENOMINATOR // common))
        return common

    def numerators(self, num_samples: int) -> list[tuple[int, int, int]]:
        """(until_tokens, numerator at the beginning, at the end) of every phase, as the C++ library takes them."""
        denominator, last = self.denominator, max(num_samples, 1) * self.seq_length
        rows: list[tuple[int, int, int]] = []
        for phase in self.phases:
            begin, end = round(phase.begin * denominator), round(phase.end * denominator)
            before = rows[-1][0] if rows else 0
            rows.append((max(last, before + 1) if phase.until_tokens is None else phase.until_tokens, begin, end))
        return rows

    def stretches(self, num_samples: int) -> Iterator[Stretch]:
        """The samples of a run in pieces of one fraction each; a slope is some 64 of them, each with its mean."""
        begin = 0
        for index, phase in enumerate(self.phases):
            is_last = index == len(self.phases) - 1
            until = num_samples
            if phase.until_tokens is not None:
                until = min(-(-phase.until_tokens // self.seq_length), num_samples)
            if phase.begin != phase.end and phase.until_tokens is not None:
                whole = -(-phase.until_tokens // self.seq_length)
                pieces = [begin + (whole - begin) * piece // _PIECES for piece in range(_PIECES + 1)]
                for piece, (first, last) in enumerate(itertools.pairwise(pieces)):
                    middle = phase.begin + (phase.end - phase.begin) * Fraction(2 * piece + 1, 2 * _PIECES)
                    if first < min(last, num_samples):
                        yield Stretch(first, min(last, num_samples), middle)
            elif begin < until:
                yield Stretch(begin, until, phase.begin)
            begin = max(begin, until)
            if is_last and begin < num_samples:
                yield Stretch(begin, num_samples, phase.end)
