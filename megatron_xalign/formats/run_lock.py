"""One job at a time in a run's folder: two that train the same run would write over each other's checkpoints."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from megatron_xalign.errors import ConfigError
from megatron_xalign.formats.atomic import NO_LOCKS, cannot_write

log = logging.getLogger(__name__)

LOCK = ".training"
"""Held while a job trains; what it holds says which. The system lets go of it however the job ends."""

_LONGEST_NOTE = 4096


class RunLock:
    """Held by the first process of a job.

    Args:
        folder: of the run; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def take(self, patience_seconds: float = 20.0) -> None:
        """Keep other jobs out.

        Args:
            patience_seconds: how long to wait for a job that is about to end, such as one that was requeued and is
                not quite gone.

        Raises:
            ConfigError: another job trains there.
            FormatError: the folder cannot be written.
        """
        path, deadline = self._folder / LOCK, time.monotonic() + patience_seconds
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise cannot_write(path, error) from None
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in NO_LOCKS:
                    log.warning("%s: the file system has no locks; let only one job train there.", self._folder)
                    break
                if time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                note = _note(descriptor)
                os.close(descriptor)
                raise ConfigError(
                    f"output_dir={self._folder} is being trained by another job{note}. Wait for it, end it, or choose "
                    "another output_dir."
                ) from None
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_who()).encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Let other jobs in; nothing if it was not taken."""
        if self._descriptor is not None:
            # Processes that were forked meanwhile have the same lock.
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None


def _who() -> dict[str, str | int]:
    who: dict[str, str | int] = {
        "host": socket.gethostname(), "process": os.getpid(), "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    job = os.environ.get("SLURM_JOB_ID")
    return who | ({"Slurm job": job} if job else {})


def _note(descriptor: int) -> str:
    try:
        who = json.loads(os.pread(descriptor, _LONGEST_NOTE, 0))
        return f" ({', '.join(f'{key} {value}' for key, value in who.items())})"
    except (OSError, ValueError, AttributeError):
        return ""
