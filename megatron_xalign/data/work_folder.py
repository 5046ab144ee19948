"""The folder beside a token file in which its parts lie until they are joined: who works in it, what is cleaned up."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_xalign.errors import ConfigError
from megatron_xalign.formats.atomic import NO_LOCKS, cannot_write

_LOG = logging.getLogger(__name__)

JOB_FILE = "job.json"
SENTENCES = "sentences"
JOINED = "joined"
"""A token file or a scratch folder that only the join needs."""
_LOCK = "lock"


class WorkFolder:
    """``PREFIX.parts``: holds nothing of the user's, and goes when the token file is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def hold(self, *, shared: bool = False) -> Iterator[None]:
        """Make the folder, and keep other jobs out of it until the block ends.

        Args:
            shared: for tasks of one job that run at the same time; they keep out only who wants the folder alone.

        Raises:
            ConfigError: another job works on the same token file.
            FormatError: the folder cannot be made.
        """
        descriptor = self._lock(shared)
        try:
            yield
        finally:
            os.close(descriptor)

    def _lock(self, shared: bool) -> int:
        path = self.path / _LOCK
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise cannot_write(self.path, error) from None
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                time.sleep(0.01)  # The job before removes the folder just now.
                continue
            except OSError as error:
                raise cannot_write(self.path, error) from None
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in NO_LOCKS:
                    _LOG.warning("%s: the file system has no locks; let only one job write there.", self.path)
                    return descriptor
                os.close(descriptor)
                raise ConfigError(
                    f"another job is writing {self.path.with_suffix('')} (it holds {path}). Wait for it, end it, or "
                    "choose another output prefix."
                ) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(descriptor)):
                    return descriptor
            # Between opening and locking, the job before finished and removed it.
            os.close(descriptor)

    def part_prefix(self, index: int, output: str = "") -> Path:
        """Token file of a part, one of several if ``output`` names it."""
        return self.path / (f"part-{index:05d}.{output}" if output else f"part-{index:05d}")

    def record_path(self, index: int) -> Path:
        """What says that a part is done."""
        return self.path / f"part-{index:05d}.json"

    def has_record(self) -> bool:
        """Whether any part is done."""
        return any(path.name.count(".") == 1 for path in self.path.glob("part-*.json"))

    def remove_part(self, index: int) -> None:
        """Remove a part, what says that it is done first."""
        self.record_path(index).unlink(missing_ok=True)
        for path in self.path.glob(f"part-{index:05d}.*"):
            path.unlink(missing_ok=True)

    def remove_partial(self) -> None:
        """Remove files that were being written; call it while holding the folder alone."""
        for path in self.path.glob(".*.partial-*"):
            _remove(path)

    def clean(self, finished: set[int]) -> None:
        """Remove what killed jobs left, and every part that is not among the finished ones.

        Call it while holding the folder alone: then whatever is half written here, nobody writes any more.
        """
        self.remove_partial()
        for path in self.path.glob("part-*.*"):
            number = path.name.removeprefix("part-").partition(".")[0]
            if not number.isdecimal() or int(number) not in finished:
                path.unlink(missing_ok=True)
        for name in (JOINED, SENTENCES):
            self.remove(name)

    def remove(self, name: str) -> None:
        """Remove a file or folder inside, and token files of that name."""
        for path in (self.path / name, *self.path.glob(f"{name}.*")):
            _remove(path)

    def remove_all(self) -> None:
        """Remove everything a job puts there, and the folder; call it while holding it."""
        self.clean(finished=set())
        for name in (JOB_FILE, _LOCK):
            (self.path / name).unlink(missing_ok=True)
        try:
            self.path.rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            _LOG.warning("%s holds files that are not of this job; it stays.", self.path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
