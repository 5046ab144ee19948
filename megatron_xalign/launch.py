"""Start the worker processes of one job on this machine and, if one dies, say which and why.

The workers run under torch's elastic agent, the machinery of ``torchrun``: when one fails the others are stopped,
killed after half a minute if they do not listen. Two things are added: the port is checked before the start, and
the message names the first cause rather than the peers' "connection closed" that follow from it.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from megatron_xalign.errors import StoppedEarly, WorkerError, XAlignError
from megatron_xalign.formats.atomic import write_json

_ERROR_FOLDER = "XALIGN_ERROR_FOLDER"
_STOPPED = "stopped.json"
_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 1.0


def run_workers(arguments: list[str], processes: int, master_port: int | None = None) -> None:
    """Run ``xalign ARGUMENTS`` in several processes and wait for all of them.

    Args:
        arguments: verb and options, as on the command line.
        processes: how many; each gets one thread unless ``OMP_NUM_THREADS`` says otherwise.
        master_port: TCP port of the rendezvous; a free one is taken if left out.

    Raises:
        WorkerError: the port is in use, or a worker failed; names the first cause.
        KeyboardInterrupt: the job was interrupted; the workers have been stopped.
        StoppedEarly: the workers saved their state and left, because they, or this process, received SIGTERM or
            SIGUSR1, or their time was up.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if master_port is not None:
        check_port(master_port)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The agent's own account of a failure names processes; ours, below, names the cause.
    for part in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{part}").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="xalign-errors-") as errors:
        os.environ[_ERROR_FOLDER] = errors
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=f"xalign-{os.getpid()}",
            rdzv_backend="c10d", rdzv_endpoint=f"localhost:{master_port or 0}", max_restarts=0, monitor_interval=0.1,
        )
        before = signal.signal(signal.SIGUSR1, _pass_on)
        try:
            elastic_launch(config, sys.executable)("-m", "megatron_xalign", *arguments)
        except (ChildFailedError, SignalException) as error:
            stopped = Path(errors) / _STOPPED
            if stopped.is_file():
                raise StoppedEarly(str(json.loads(stopped.read_text(encoding="utf-8")))) from None
            if isinstance(error, SignalException):
                raise KeyboardInterrupt from error
            raise WorkerError(_first_cause(error, Path(errors))) from None
        finally:
            signal.signal(signal.SIGUSR1, before)
            del os.environ[_ERROR_FOLDER]


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Hand a signal to the workers, for which the agent does not care."""
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            child.send_signal(number)


def check_port(port: int) -> None:
    """Raise WorkerError if a TCP port cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("localhost", port))
        except (OSError, OverflowError) as error:
            raise WorkerError(
                f"port {port} cannot be used ({error}); choose another with --master-port, "
                "or leave that out and a free one is taken."
            ) from None


def enter_worker() -> None:
    """Called first thing in a worker process: die with the parent, so that no orphan trains on."""
    if _ERROR_FOLDER in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def report_failure(error: BaseException) -> None:
    """Called in a failing worker: leave the reason where ``run_workers`` finds it; nothing outside a worker."""
    folder = os.environ.get(_ERROR_FOLDER)
    if folder and "RANK" in os.environ:
        expected, follows = isinstance(error, XAlignError), isinstance(error, WorkerError)
        text = str(error) if expected else "".join(traceback.format_exception(error))
        write_json(
            Path(folder) / f"rank-{os.environ['RANK']}.json",
            {"time": time.time(), "text": text, "expected": expected, "follows": follows},
        )
        if follows or not expected:
            # A peer that was killed may be noticed here before the agent has seen it end; let it be seen first.
            time.sleep(_GRACE_SECONDS)


def report_stop(text: str) -> None:
    """Called in a worker that was asked to stop and has saved: leave the reason where ``run_workers`` finds it."""
    folder = os.environ.get(_ERROR_FOLDER)
    if folder and "RANK" in os.environ:
        # Every worker, not the first: the agent ends the others as soon as one has left.
        write_json(Path(folder) / _STOPPED, text)


def in_worker() -> bool:
    """Whether this process was started by ``run_workers``."""
    return _ERROR_FOLDER in os.environ and "RANK" in os.environ


def _first_cause(error: object, folder: Path) -> str:
    failures = getattr(error, "failures", {})
    # The agent ends the survivors with SIGTERM; whoever died of another signal went first, and its peers' errors
    # ("connection closed") only follow from that.
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:
            name = signal.Signals(-failure.exitcode).name
            reason = " (often the system's out-of-memory killer)" if name == "SIGKILL" else ""
            return f"worker {rank} was killed by {name}{reason}; the other workers were stopped."
    reports = []
    for path in folder.glob("rank-*.json"):
        reports.append((json.loads(path.read_text(encoding="utf-8")), path.stem.removeprefix("rank-")))
    if reports:
        # Losing a peer follows from what happened to the peer.
        report, rank = min(reports, key=lambda item: (item[0]["follows"], item[0]["time"]))
        return str(report["text"]) if report["expected"] else f"worker {rank} failed:\n{report['text']}"
    rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    return f"worker {rank} ended with exit code {failure.exitcode} and left no message."
