"""Run one function in several processes that form a job, as torchrun would, and get back what each returned.

    results = run_processes(FILE, "function", {"argument": ...}, num_processes=2)

Arguments and results are JSON. Every wait is bounded; a process that fails ends the others, and the test fails with
the end of its standard error. The processes run this file as a script, so that functions may start processes of
their own (Megatron's checkpoint writer does), which needs a ``__main__`` guard.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class ProcessError(AssertionError):
    """A process of the job failed, or the job took too long."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def run_processes(
    file: str | Path,
    function: str,
    arguments: dict[str, Any] | None = None,
    num_processes: int = 1,
    timeout_seconds: float = 900,
) -> list[Any]:
    """Call ``function(**arguments)`` of a Python file in every process of a new job; results in rank order."""
    with tempfile.TemporaryDirectory(prefix="xalign-test-") as name:
        folder = Path(name)
        (folder / "arguments.json").write_text(json.dumps(arguments or {}), encoding="utf-8")
        master_port = str(free_port())
        started = []
        for rank in range(num_processes):
            settings = {
                **os.environ, "OMP_NUM_THREADS": "1", "XALIGN_PROGRESS": "0", "MASTER_ADDR": "localhost",
                "MASTER_PORT": master_port, "WORLD_SIZE": str(num_processes), "RANK": str(rank),
                "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": "",
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            }
            with (folder / f"{rank}.log").open("wb") as log_file:
                started.append(
                    subprocess.Popen(
                        [sys.executable, __file__, str(file), function, name, str(rank)], env=settings,
                        stdout=log_file, stderr=subprocess.STDOUT,
                    )
                )
        try:
            _wait(started, folder, time.monotonic() + timeout_seconds)
        finally:
            for process in started:
                process.kill()
                process.wait()
        return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(num_processes)]


def _wait(started: list[subprocess.Popen[bytes]], folder: Path, deadline: float) -> None:
    while any(process.poll() is None for process in started):
        failed = [rank for rank, process in enumerate(started) if process.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    codes = [process.poll() for process in started]
    if any(codes) or None in codes:
        logs = "\n".join(
            f"--- process {rank}: {'still running' if code is None else f'exit code {code}'}\n"
            + (folder / f"{rank}.log").read_text(encoding="utf-8", errors="replace")[-4000:]
            for rank, code in enumerate(codes)
        )
        raise ProcessError(logs)


if __name__ == "__main__":
    script, called, place, own_rank = sys.argv[1:]
    sys.path.insert(0, str(Path(script).parent))
    spec = importlib.util.spec_from_file_location(Path(script).stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[Path(script).stem] = module
    spec.loader.exec_module(module)
    given = json.loads((Path(place) / "arguments.json").read_text(encoding="utf-8"))
    result = getattr(module, called)(**given)
    (Path(place) / f"{own_rank}.json").write_text(json.dumps(result), encoding="utf-8")
