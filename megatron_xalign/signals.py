"""SIGTERM and SIGUSR1 ask a training job to save and leave; it hears them from its first moment on.

Schedulers send them before a time limit or a pre-emption, and may do so while a job is still reading its data. What
comes before the loop listens is kept for it here. torch's agent sends SIGTERM too, to the survivors when a worker has
died: they can save nothing together any more, and end.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

import psutil

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_pending = 0


def listen() -> None:
    """Keep stop signals from ending this process; ``pending`` tells of them. Main thread only, else nothing is done."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, _note)


def pending() -> int:
    """The stop signal that came since ``listen``; 0 if none did."""
    return _pending


def ends_the_job(number: int) -> bool:
    """Whether a signal is the agent's to the survivors of a job: SIGTERM, when another of its workers is gone."""
    workers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if number != signal.SIGTERM or workers == 1:
        return False
    try:
        siblings = psutil.Process(os.getppid()).children()
        return sum(sibling.status() != psutil.STATUS_ZOMBIE for sibling in siblings) < workers
    except psutil.Error:
        return False


def leave_if_the_job_ends(number: int) -> None:
    """End this process at once, as SIGTERM does by itself, if that is what the signal is for."""
    if ends_the_job(number):
        os._exit(128 + number)


def _note(number: int, frame: FrameType | None) -> None:
    global _pending
    leave_if_the_job_ends(number)
    _pending = number
