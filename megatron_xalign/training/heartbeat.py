"""Notice that a process of the job hangs, has vanished or has fallen behind, say which and where, and end the job.

Training is lock-step: when one process stands still, all others wait in a collective, and after
``parallel.distributed_timeout_seconds`` they fail with an error that names everything but the cause. So each process
tells a store, from a thread of its own, where it is; two of them read what all have said. Shortly before the
collectives would give up, the one that everybody waits for is named, with the line of Python it stands in.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from megatron_xalign.topology import Ranks

log = logging.getLogger(__name__)

_WAITING_IN = ("torch/distributed/", "pipeline_parallel/p2p_communication", "distributed/param_and_grad_buffer")
"""Where Python stands while it waits for other processes."""


@dataclass(frozen=True)
class Beat:
    """What one process says of itself."""

    rank: int
    host: str
    number: int
    """Grows with every beat."""
    marks: int
    """Places it has been at so far; all processes pass the same ones."""
    step: int
    place: str
    bounded: bool
    """Whether a healthy process leaves this place within the limit."""
    seconds: float
    """How long it has been there."""
    waits: bool
    """Whether it waits for other processes there."""
    stack: str
    """The innermost lines of Python it stands in."""


class Heartbeat:
    """Watches the job while its block runs. ``at`` says where this process is.

    Args:
        ranks: this process's place.
        limit_seconds: how long a process may be silent, or at one place that is to take a moment.
        interval_seconds: between beats; 0 turns it off.
        end: called with what is wrong, in a thread, on one process; ends the process, and with it the job.
    """

    def __init__(
        self, ranks: Ranks, limit_seconds: float, interval_seconds: float, end: Callable[[str], None]
    ) -> None:
        self._ranks, self._limit, self._interval, self._end = ranks, limit_seconds, interval_seconds, end
        self._place, self._marks = (0, "starting", False, time.monotonic()), 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, step: int, place: str, bounded: bool = True) -> None:
        """Note that this process is about to do something; costs nothing.

        Args:
            step: finished optimizer steps.
            place: what, for people.
            bounded: False for what may rightly take long on all processes at once: saves, what observers do.
        """
        self._place = (step, place, bounded, time.monotonic())
        self._marks += 1

    def __enter__(self) -> Self:
        if self._interval <= 0:
            return self
        name = self._ranks.broadcast_object(os.urandom(8).hex() if self._ranks.rank == 0 else None)
        main = threading.get_ident()
        self._thread = threading.Thread(target=self._run, args=(name, main), daemon=True, name="heartbeat")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _run(self, name: str, main: int) -> None:
        try:
            board = _board(self._ranks, name)
        except (RuntimeError, OSError) as error:
            log.warning("this run is not watched for processes that hang: %s", str(error).splitlines()[0])
            return
        number, watch = 0, Watch(self._limit, self._ranks.world_size)
        reads = self._ranks.rank < 2
        while not self._stop.wait(self._interval):
            number += 1
            own = self._beat(number, main)
            try:
                board[str(self._ranks.rank)] = json.dumps(vars(own))
                beats = [Beat(**json.loads(text)) for text in board.values()] if reads else []
            except (RuntimeError, OSError, ValueError):
                # The store went with a process that has ended; the others' collectives fail on their own.
                continue
            problem = watch.problem(beats, time.monotonic()) if reads else None
            if problem is None:
                continue
            # The second one speaks only if the first cannot.
            if self._ranks.rank == 1 and self._stop.wait(3 * self._interval):
                return
            self._end(problem)
            return

    def _beat(self, number: int, main: int) -> Beat:
        step, place, bounded, since = self._place
        frame = sys._current_frames().get(main)
        return Beat(
            rank=self._ranks.rank, host=socket.gethostname(), number=number, marks=self._marks, step=step, place=place,
            bounded=bounded, seconds=time.monotonic() - since, waits=_waits(frame), stack=_innermost(frame),
        )


class Watch:
    """Looks for what is wrong in the beats of all processes."""

    def __init__(self, limit_seconds: float, world_size: int) -> None:
        self._limit, self._world_size = limit_seconds, world_size
        self._heard: dict[int, tuple[int, float]] = {}
        self._began: float | None = None

    def problem(self, beats: Sequence[Beat], now: float) -> str | None:
        """What is wrong, in words; None if nothing is."""
        self._began = now if self._began is None else self._began
        for beat in beats:
            if self._heard.get(beat.rank, (-1, 0.0))[0] != beat.number:
                self._heard[beat.rank] = (beat.number, now)
        is_stuck = any(beat.bounded and beat.seconds > self._limit for beat in beats)
        # Where the others are stuck, half the limit is silence enough.
        if silent := self._silent(beats, now, self._limit / 2 if is_stuck else self._limit):
            return silent
        if not is_stuck:
            return None
        last = min(beat.marks for beat in beats)
        behind = [beat for beat in beats if beat.marks == last]
        if len(behind) == len(beats):
            # All are at the same place; who does not wait for others is who they wait for.
            behind = [beat for beat in beats if not beat.waits] or list(beats)
        if len(behind) == len(beats) and len(beats) > 1:
            return (
                f"all {self._world_size} processes have been {_where(behind[0])} for {behind[0].seconds:.0f} s. "
                f"Process 0 stands in:\n{behind[0].stack}"
            )
        named = ", ".join(f"{beat.rank} on {beat.host}" for beat in behind[:8])
        return (
            f"process {named} has been {_where(behind[0])} for {behind[0].seconds:.0f} s and the others wait for it. "
            f"It stands in:\n{behind[0].stack}"
        )


    def _silent(self, beats: Sequence[Beat], now: float, limit: float) -> str | None:
        """Who has been silent for longer than the limit, longest first."""
        assert self._began is not None
        since = {rank: self._heard.get(rank, (0, self._began))[1] for rank in range(self._world_size)}
        rank = min(since, key=lambda rank: since[rank])
        if now - since[rank] <= limit:
            return None
        last = next((beat for beat in beats if beat.rank == rank), None)
        return (
            f"process {rank}{f' on {last.host}' if last else ''} has not been heard of for {now - since[rank]:.0f} s: "
            "it, or its machine, stands still." + (f" It was {_where(last)}." if last else "")
        )


def _where(beat: Beat) -> str:
    return f"at step {beat.step}, {beat.place}"


def _board(ranks: Ranks, name: str) -> Any:
    """Text by process number, seen by all processes."""
    if ranks.world_size == 1:
        return {}
    return _StoreBoard(name, ranks.world_size)


class _StoreBoard:
    """The job's store through a connection of its own, since the main thread's may wait for minutes in a call."""

    def __init__(self, name: str, world_size: int) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = torch._C._distributed_c10d.TCPStore(address, port, None, False, timedelta(seconds=30))
        self._keys = [f"xalign/beats/{name}/{rank}" for rank in range(world_size)]

    def __setitem__(self, rank: str, text: str) -> None:
        self._store.set(self._keys[int(rank)], text)

    def values(self) -> list[str]:
        """What those who have spoken said last."""
        if self._store.check(self._keys):
            return [text.decode() for text in self._store.multi_get(self._keys)]
        return [self._store.get(key).decode() for key in self._keys if self._store.check([key])]


def _waits(frame: FrameType | None) -> bool:
    for _ in range(6):
        if frame is None:
            return False
        if any(part in frame.f_code.co_filename for part in _WAITING_IN):
            return True
        frame = frame.f_back
    return False


def _innermost(frame: FrameType | None) -> str:
    if frame is None:
        return ""
    return "".join(traceback.format_list(traceback.extract_stack(frame)[-4:])).rstrip()
