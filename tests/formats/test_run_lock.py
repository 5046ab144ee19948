"""Two jobs cannot train one run at the same time, and a dead one keeps nobody out."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_xalign.errors import ConfigError, FormatError
from megatron_xalign.formats.run_lock import LOCK, RunLock

HOLDER = """
import os, sys, time
from pathlib import Path
from megatron_xalign.formats.run_lock import RunLock
RunLock(Path(sys.argv[1])).take()
if sys.argv[2] == "forked" and os.fork() == 0:
    deadline = time.monotonic() + 120
    while not os.path.exists(os.path.join(sys.argv[1], "go")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os._exit(0)
print("held", flush=True)
time.sleep(600)
"""


def hold(folder: Path, kind: str = "alone") -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), kind], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_another_job_is_named_and_kept_out_until_it_ends(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    other = hold(run)
    try:
        with pytest.raises(ConfigError, match=rf"is being trained by another job \(host .*process {other.pid}, since"):
            RunLock(run).take(patience_seconds=0.2)
    finally:
        other.kill()
        other.wait()
    lock = RunLock(run)
    lock.take(patience_seconds=10)
    with pytest.raises(ConfigError, match=f"process {os.getpid()}, since"):
        RunLock(run).take(patience_seconds=0)
    lock.release()
    lock.release()
    RunLock(run).take(patience_seconds=0)


def test_it_waits_for_a_job_that_is_about_to_end(tmp_path: Path) -> None:
    """Reading processes that a killed one had forked are there for some seconds more."""
    other = hold(tmp_path, "forked")
    other.send_signal(signal.SIGKILL)
    other.wait()
    with pytest.raises(ConfigError):
        RunLock(tmp_path).take(patience_seconds=0)
    threading.Timer(0.3, (tmp_path / "go").touch).start()
    RunLock(tmp_path).take(patience_seconds=60)
    assert (tmp_path / "go").exists()


def test_a_note_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.take()
    for content in ("", "[]", "\0" * 9):
        (tmp_path / LOCK).write_text(content)
        with pytest.raises(ConfigError, match=r"by another job\. Wait"):
            RunLock(tmp_path).take(patience_seconds=0)


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING):
        RunLock(tmp_path).take()
    assert "has no locks; let only one job train there" in caplog.text


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="file"):
        RunLock(tmp_path / "file" / "run").take()
