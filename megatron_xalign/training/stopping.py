"""End a run early but whole: on SIGTERM or SIGUSR1, or when its time is up, it saves and leaves."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from megatron_xalign import signals
from megatron_xalign.topology import Ranks

_SIGNALS = {1: signal.SIGUSR1, 2: signal.SIGTERM}
_TIME_IS_UP = 3


class StopRequest:
    """Listens for reasons to stop while its block runs; all processes hear of a reason that one of them has.

    Args:
        ranks: this process's place.
        exit_duration_minutes: stop when the block has run so long; 0 is never.
    """

    def __init__(self, ranks: Ranks, exit_duration_minutes: float = 0.0) -> None:
        self._ranks = ranks
        self._limit_seconds = exit_duration_minutes * 60
        self._heard = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if (early := signals.pending()) in _SIGNALS.values():
            self._hear(early, None)
        # Python hands signals to the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in _SIGNALS.values()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> str | None:
        """Why to stop now, the same on every process; None to go on. Every process calls it, after the same step."""
        own = self._heard
        if not own and self._limit_seconds and time.monotonic() - self._started >= self._limit_seconds:
            own = _TIME_IS_UP
        said = torch.tensor([own], dtype=torch.int64, device=self._ranks.device)
        heard = max(int(code) for code in self._ranks.gather_over(said, "world"))
        if not heard:
            return None
        if heard == _TIME_IS_UP:
            return f"its {self._limit_seconds / 60:g} minutes (training.exit_duration_minutes) are over"
        return f"it received {_SIGNALS[heard].name}"

    def _hear(self, number: int, frame: FrameType | None) -> None:
        signals.leave_if_the_job_ends(number)
        self._heard = next(code for code, known in _SIGNALS.items() if known == number)
