"""Start the worker processes of one job on this machine and, if one dies, say which and why.

The workers run under torch's elastic agent, the machinery of ``torchrun``: when one fails the others are stopped,
killed after half a minute if they do not listen, and all are started again as often as is allowed. Added to that:
the port is checked before the start; the message names the first cause rather than the peers' "connection closed"
that follow from it; SIGTERM and SIGUSR1 go to the workers, which save and leave, and count neither as a failure nor
as a restart; and what cannot be cured by another attempt (a wrong setting) is not attempted again.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from megatron_xalign import signals
from megatron_xalign.errors import ConfigError, StoppedEarly, StuckError, WorkerError, XAlignError
from megatron_xalign.formats.atomic import read_json, write_json

STOPPED_EARLY = 75
"""EX_TEMPFAIL: not done, no error; the same command goes on."""

_ERROR_FOLDER = "XALIGN_ERROR_FOLDER"
_MAX_RESTARTS = "XALIGN_MAX_RESTARTS"
_STOPPED = "stopped.json"
_ASKED = "asked-to-stop"
_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 1.0
_PATIENCE_SECONDS = 30
"""How long the agent lets survivors end by themselves; torch's own default, where it cannot be set."""


@dataclass(frozen=True)
class Nodes:
    """The machines of one job; each runs ``run_workers`` with the same values."""

    count: int = 1
    """How many."""
    endpoint: str | None = None
    """``HOST:PORT`` where they meet; the first machine's, seen by all. Needed for more than one."""
    job_id: str | None = None
    """A name that only this job has at that endpoint, such as the scheduler's number."""


def run_workers(
    arguments: list[str], processes: int, master_port: int | None = None, *, max_restarts: int = 0,
    nodes: Nodes | None = None,
) -> None:
    """Run ``xalign ARGUMENTS`` in several processes and wait for all of them.

    Args:
        arguments: verb and options, as on the command line.
        processes: how many on this machine; each gets one thread unless ``OMP_NUM_THREADS`` says otherwise.
        master_port: TCP port of the rendezvous on one machine; a free one is taken if left out.
        max_restarts: how often all workers are started again after one of them failed.
        nodes: the machines of the job; this one alone if left out.

    Raises:
        ConfigError: there are several machines and no endpoint.
        WorkerError: the port is in use, or a worker failed once too often; names the first cause.
        KeyboardInterrupt: the job was interrupted; the workers have been stopped.
        StoppedEarly: the workers saved their state and left, because they, or this process, received SIGTERM or
            SIGUSR1, or their time was up. A second SIGTERM ends them at once.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    nodes = nodes or Nodes()
    if nodes.count > 1 and not nodes.endpoint:
        raise ConfigError(f"{nodes.count} nodes need --rdzv-endpoint HOST:PORT, where they meet; the first node's.")
    if master_port is not None:
        check_port(master_port)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The agent's own account of a failure names processes; ours, below, names the cause.
    for part in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{part}").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="xalign-errors-") as name:
        errors = Path(name)
        os.environ[_ERROR_FOLDER] = name
        os.environ[_MAX_RESTARTS] = str(max_restarts)
        config = _launch_config(processes, master_port, max_restarts, nodes)

        def pass_on(number: int, frame: FrameType | None) -> None:
            # First the note: a worker that is being started does not listen yet.
            name = signal.Signals(number).name
            if number == signal.SIGTERM and (errors / _ASKED).is_file() and name in (errors / _ASKED).read_text():
                # Asked before, and still here: workers that hang do not save.
                raise SignalException(f"received {name} twice", sigval=signal.SIGTERM)
            (errors / _ASKED).write_text(name, encoding="utf-8")
            if not _pass_on(number):
                raise StoppedEarly(f"received {name} while no worker was running.")

        before = {number: signal.signal(number, pass_on) for number in signals.STOP_SIGNALS}
        try:
            if early := signals.pending():
                raise StoppedEarly(f"received {signal.Signals(early).name} before the workers had begun.")
            elastic_launch(config, sys.executable)("-m", "megatron_xalign", *arguments)
            if (errors / _STOPPED).is_file():
                raise StoppedEarly(str(read_json(errors / _STOPPED)))
        except (ChildFailedError, SignalException) as error:
            if (errors / _STOPPED).is_file():
                raise StoppedEarly(str(read_json(errors / _STOPPED))) from None
            if (errors / _ASKED).is_file() and _all_ended_by(error, signals.STOP_SIGNALS):
                asked = (errors / _ASKED).read_text(encoding="utf-8")
                raise StoppedEarly(f"received {asked} before the workers had begun.") from None
            if isinstance(error, SignalException):
                raise KeyboardInterrupt from error
            attempts = f" ({max_restarts} restart(s) did not help.)" if max_restarts else ""
            raise WorkerError(_first_cause(error, errors) + attempts) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            del os.environ[_ERROR_FOLDER], os.environ[_MAX_RESTARTS]


def _launch_config(processes: int, master_port: int | None, max_restarts: int, nodes: Nodes) -> Any:
    from torch.distributed.launcher.api import LaunchConfig

    # SIGTERM is ours; versions of torch without this field end the workers on it, with half a minute for their save.
    wanted = {"signals_to_handle": "SIGINT,SIGHUP,SIGQUIT", "shutdown_timeout": _PATIENCE_SECONDS}
    known = {item.name for item in dataclasses.fields(LaunchConfig)}
    options: dict[str, Any] = {name: value for name, value in wanted.items() if name in known}
    if nodes.count > 1 and "SLURM_NODEID" in os.environ:
        # Which machine is meant by the endpoint, and how others call this one: names that a node gives itself often
        # mean nothing to its neighbours.
        options["rdzv_configs"] = {"is_host": os.environ["SLURM_NODEID"] == "0"}
        options["local_addr"] = os.environ.get("SLURMD_NODENAME")
    return LaunchConfig(
        min_nodes=nodes.count, max_nodes=nodes.count, nproc_per_node=processes,
        run_id=nodes.job_id or f"xalign-{os.getpid()}", rdzv_backend="c10d",
        rdzv_endpoint=nodes.endpoint or f"localhost:{master_port or 0}", max_restarts=max_restarts,
        monitor_interval=0.1, **options,
    )


def _all_ended_by(error: object, numbers: Sequence[int]) -> bool:
    codes = [failure.exitcode for failure in getattr(error, "failures", {}).values()]
    return bool(codes) and all(-code in numbers for code in codes)


def _pass_on(number: int) -> int:
    """Hand a signal to the workers, for which the agent does not care; return how many there are."""
    workers = psutil.Process().children()
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(number)
    return len(workers)


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
    """Called first thing in a worker process.

    It dies with the parent, so that no orphan trains on; it hears stop signals from now on; and if it was started
    again, it says why, or leaves at once where another attempt could only end in the same way.
    """
    if "RANK" not in os.environ:
        return
    folder = os.environ.get(_ERROR_FOLDER)
    if folder and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signals.listen()
    if folder and (Path(folder) / _ASKED).is_file():
        asked = (Path(folder) / _ASKED).read_text(encoding="utf-8")
        report_stop(f"received {asked} before the workers had begun.")
        raise SystemExit(0)
    attempt = _attempt()
    if attempt == 0:
        return
    if folder is None:
        if _note_for_torchrun().is_file():
            raise SystemExit(STOPPED_EARLY)
        return
    reports = _reports(Path(folder))
    if any(not report["again"] for report, _ in reports):
        raise SystemExit(1)
    if os.environ.get("LOCAL_RANK") == "0":
        cause = _first_report(reports) or "a worker was killed."
        print(
            f"xalign: restart {attempt} of {os.environ.get(_MAX_RESTARTS, '?')}, from the last whole checkpoint: "
            f"{cause}",
            file=sys.stderr, flush=True,
        )


def report_failure(error: BaseException) -> None:
    """Called in a failing worker: leave the reason where ``run_workers`` finds it; nothing outside a worker."""
    folder = os.environ.get(_ERROR_FOLDER)
    if folder and "RANK" in os.environ:
        expected, follows = isinstance(error, XAlignError), isinstance(error, WorkerError)
        text = str(error) if expected else "".join(traceback.format_exception(error))
        write_json(
            Path(folder) / f"{_attempt()}-rank-{os.environ['RANK']}.json",
            {
                "time": time.time(), "text": text, "expected": expected, "follows": follows,
                "again": isinstance(error, (WorkerError, StuckError)) or not expected,
            },
        )
        if follows or not expected:
            # A peer that was killed may be noticed here before the agent has seen it end; let it be seen first.
            time.sleep(_GRACE_SECONDS)


def end_stuck_job(text: str) -> None:
    """End this process, and with it a job that hangs, from any thread; ``text`` is the cause."""
    error = StuckError(text)
    report_failure(error)
    if not in_worker():
        print(f"xalign: error: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def report_stop(text: str) -> None:
    """Called in a worker that was asked to stop and has saved: leave the reason where ``run_workers`` finds it.

    Under plain ``torchrun --max-restarts`` a note keeps the workers, which it would start again, from going on.
    """
    if "RANK" not in os.environ:
        return
    folder = os.environ.get(_ERROR_FOLDER)
    if folder:
        # Every worker, not the first: the agent ends the others as soon as one has left.
        write_json(Path(folder) / _STOPPED, text)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        _note_for_torchrun().touch()


def in_worker() -> bool:
    """Whether this process was started by ``run_workers``."""
    return _ERROR_FOLDER in os.environ and "RANK" in os.environ


def _attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _note_for_torchrun() -> Path:
    """A file that the workers of one ``torchrun`` on this machine share, whichever attempt they belong to."""
    agent = psutil.Process(os.getppid())
    return Path(tempfile.gettempdir()) / f"xalign-stopped-{agent.pid}-{int(agent.create_time())}"


def _reports(folder: Path) -> list[tuple[dict[str, Any], str]]:
    """What the workers of the last attempt that said anything said, with their ranks."""
    found: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for path in folder.glob("*-rank-*.json"):
        attempt, _, rank = path.stem.partition("-rank-")
        found.setdefault(int(attempt), []).append((read_json(path), rank))
    return found[max(found)] if found else []


def _first_report(reports: list[tuple[dict[str, Any], str]]) -> str | None:
    if not reports:
        return None
    # Losing a peer follows from what happened to the peer.
    report, rank = min(reports, key=lambda item: (item[0]["follows"], item[0]["time"]))
    return str(report["text"]) if report["expected"] else f"worker {rank} failed:\n{report['text']}"


def _first_cause(error: object, folder: Path) -> str:
    failures = getattr(error, "failures", {})
    reports = _reports(folder)
    # The agent ends the survivors with SIGTERM; whoever died of another signal went first, and its peers' errors
    # ("connection closed") only follow from that. Survivors that do not listen are killed in the end: then an error
    # that no loss of a peer explains came long before.
    long_ago = time.time() - 0.7 * _PATIENCE_SECONDS
    was_killed_late = any(not report["follows"] and report["time"] < long_ago for report, _ in reports)
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM and not was_killed_late:
            name = signal.Signals(-failure.exitcode).name
            reason = " (often the system's out-of-memory killer)" if name == "SIGKILL" else ""
            return f"worker {rank} was killed by {name}{reason}; the other workers were stopped."
    said = _first_report(reports)
    if said is not None:
        return said
    rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    return f"worker {rank} ended with exit code {failure.exitcode} and left no message."
