"""Workers: a dead one ends the job in bounded time and is named; a used port is named."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megatron_xalign.errors import WorkerError
from megatron_xalign.launch import check_port

# A stand-in for the xalign command: the workers import it instead of the real package's __main__.
PRELUDE = '''
import os, signal, sys, time
from megatron_xalign import launch
from megatron_xalign.errors import ConfigError, WorkerError
rank = int(os.environ.get("RANK", -1))


def meet():
    """Return when both workers are here: the first to fail may stop the other before it has begun."""
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    open(f"met-{attempt}-{rank}", "w").close()
    while not os.path.exists(f"met-{attempt}-{1 - rank}"):
        time.sleep(0.01)
'''


def run_job(folder: Path, worker: str, processes: int = 2, max_restarts: int = 0) -> tuple[str, float]:
    """Run ``worker`` (Python source) under ``run_workers``; return what its error said and the seconds taken."""
    package = folder / "megatron_xalign"
    real = Path(__file__).resolve().parents[1] / "megatron_xalign"
    package.mkdir()
    for item in real.iterdir():
        if item.name != "__main__.py":
            (package / item.name).symlink_to(item)
    body = textwrap.indent(textwrap.dedent(worker), "    ")
    (package / "__main__.py").write_text(
        f"{PRELUDE}\nlaunch.enter_worker()\ntry:\n{body}\nexcept Exception as error:\n"
        "    launch.report_failure(error)\n    sys.exit(1)\n",
        encoding="utf-8",
    )
    main = (
        "from megatron_xalign import launch\n"
        "from megatron_xalign.errors import StoppedEarly, WorkerError\n"
        "if __name__ == '__main__':\n"
        f"    try: launch.run_workers(['train'], {processes}, max_restarts={max_restarts})\n"
        "    except (WorkerError, StoppedEarly) as error: print('SAID', type(error).__name__, error)\n"
        "    else: print('SAID nothing')\n"
    )
    (folder / "job.py").write_text(main, encoding="utf-8")
    started = time.monotonic()
    done = subprocess.run([sys.executable, "job.py"], cwd=folder, capture_output=True, text=True, timeout=400)
    assert "SAID" in done.stdout, done.stderr
    (folder / "stderr").write_text(done.stderr, encoding="utf-8")
    return done.stdout.split("SAID ", 1)[1], time.monotonic() - started


@pytest.mark.distributed
def test_workers_that_end_well_end_the_job_well(tmp_path: Path) -> None:
    assert run_job(tmp_path, "pass")[0].strip() == "nothing"


@pytest.mark.distributed
def test_a_killed_worker_stops_the_others_and_is_named_as_the_first_cause(tmp_path: Path) -> None:
    worker = """
    other = os.path.join(os.environ["XALIGN_ERROR_FOLDER"], "pid")
    if rank == 1:
        open(f"{other}.new", "w").write(str(os.getpid()))
        os.replace(f"{other}.new", other)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    while not os.path.exists(other) or os.path.exists(f"/proc/{open(other).read()}/fd/0"):
        pass
    raise RuntimeError("connection closed by peer")  # what the survivor of a collective says, at the same moment
    """
    said, seconds = run_job(tmp_path, worker)
    assert "worker 1 was killed by SIGKILL" in said
    assert seconds < 90


@pytest.mark.distributed
def test_a_clear_error_of_one_worker_is_the_message_of_the_job(tmp_path: Path) -> None:
    worker = """
    if rank == 1:
        raise ConfigError("lr=-1 must be positive.")
    time.sleep(600)
    """
    said, seconds = run_job(tmp_path, worker)
    assert said.strip() == "WorkerError lr=-1 must be positive."
    assert seconds < 90


@pytest.mark.distributed
def test_a_bug_in_one_worker_is_the_cause_and_not_that_the_others_lost_it(tmp_path: Path) -> None:
    worker = """
    meet()
    if rank == 1:
        raise RuntimeError("the bug")
    while not os.path.exists(os.path.join(os.environ["XALIGN_ERROR_FOLDER"], "0-rank-1.json")):
        time.sleep(0.01)
    raise WorkerError("process 0 lost another process")
    """
    said, _ = run_job(tmp_path, worker)
    assert "the bug" in said
    assert "lost another process" not in said


@pytest.mark.distributed
def test_an_unexpected_error_comes_with_its_traceback(tmp_path: Path) -> None:
    said, _ = run_job(tmp_path, "assert rank != 1, 'rank one is odd'\ntime.sleep(600)")
    assert "worker 1 failed" in said
    assert "rank one is odd" in said


def test_a_port_in_use_is_named_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(WorkerError, match=f"port {port} cannot be used"):
            check_port(port)


def test_a_free_port_passes() -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    check_port(port)


@pytest.mark.distributed
def test_after_a_kill_all_workers_start_again_and_say_why(tmp_path: Path) -> None:
    worker = """
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    open(f"started-{attempt}-{rank}", "w").close()
    meet()
    if attempt == "0" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if attempt == "0":
        raise WorkerError("lost another process of this job.")
    """
    said, _ = run_job(tmp_path, worker, max_restarts=2)
    assert said.strip() == "nothing"
    assert sorted(path.name for path in tmp_path.glob("started-*")) == [
        "started-0-0", "started-0-1", "started-1-0", "started-1-1"
    ]
    assert "restart 1 of 2, from the last whole checkpoint: " in (tmp_path / "stderr").read_text(encoding="utf-8")


@pytest.mark.distributed
def test_what_no_restart_can_cure_is_not_attempted_again(tmp_path: Path) -> None:
    worker = """
    with open(f"work-of-{rank}", "a") as file:
        file.write("x")
    raise ConfigError("lr=-1 must be positive.")
    """
    said, _ = run_job(tmp_path, worker, max_restarts=2)
    assert "lr=-1 must be positive" in said
    # The first to fail may stop the other before it has begun.
    assert {path.read_text() for path in tmp_path.glob("work-of-?")} == {"x"}


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_stop_signal_to_the_launcher_reaches_the_workers_and_is_no_failure(tmp_path: Path, name: str) -> None:
    # The workers stop as the command line does: they leave a note and end well.
    worker = f"""
    from megatron_xalign import signals
    open(f"ready-{{rank}}", "w").close()
    if rank == 0:
        while not os.path.exists("ready-1"):
            time.sleep(0.01)
        os.kill(os.getppid(), signal.{name})
    deadline = time.monotonic() + 100
    while not signals.pending() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(rank)
    launch.report_stop(f"saved after {{signal.Signals(signals.pending()).name}}.")
    """
    said, _ = run_job(tmp_path, worker, max_restarts=2)
    assert said.strip() == f"StoppedEarly saved after {name}."


@pytest.mark.distributed
def test_a_stop_signal_before_the_workers_listen_starts_no_others(tmp_path: Path) -> None:
    worker = """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in the first moments of a process
    open(f"ready-{rank}-{os.environ['TORCHELASTIC_RESTART_COUNT']}", "w").close()
    if rank == 0:
        while not os.path.exists("ready-1-0"):
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(100)
    """
    said, _ = run_job(tmp_path, worker, max_restarts=1)
    assert said.strip() == "StoppedEarly received SIGTERM before the workers had begun."
    assert not (tmp_path / "ready-0-1").exists()
