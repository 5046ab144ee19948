"""Measure peers and ours side by side: interleaved rounds, medians, CPU seconds and peak memory of whole process trees.

Other work on the machine changes every clock, so contestants take turns (round by round, in rotating order) and the
median round counts. CPU seconds move less than wall seconds; both are kept.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

_SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Command:
    """A program to run as a contestant."""

    argv: Sequence[str]
    before: Callable[[], Any] | None = None
    """Called before every round, unmeasured: remove the output of the round before."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to this process' environment."""
    cwd: Path | None = None
    timeout_seconds: float = 3600.0


@dataclass(frozen=True)
class Cost:
    """What a run took; of several runs, the median of each number by itself."""

    wall_seconds: float
    cpu_seconds: float
    """User and system time of the process and all its descendants that were waited for."""
    peak_rss_bytes: int
    """Largest sum of resident memory over the process tree, sampled; pages that processes share count in each."""
    rss_growth_bytes: int
    """For a function, the peak above what this process held before; for a program, the peak."""
    result: Any = None
    """What the function returned or the program printed, in the last round."""


Contestant = Callable[[], Any] | Sequence[str] | Command


def interleaved(runs: Mapping[str, Contestant], rounds: int, *, warm_up: bool = False) -> dict[str, Cost]:
    """Run every contestant once a round, in rotating order; return the median cost of each.

    Args:
        runs: name -> function without arguments (run in this process), argv, or :class:`Command`.
        rounds: how many times each runs.
        warm_up: run each once more before, unmeasured (imports, page cache).

    Raises:
        RuntimeError: a program failed or took too long; the message ends in what it printed.
    """
    if rounds < 1 or not runs:
        raise ValueError(f"rounds={rounds}, runs={list(runs)}: there must be at least one of each.")
    names = list(runs)
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    if warm_up:
        for name in names:
            run_once(runs[name])
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            costs[name].append(run_once(runs[name]))
    return {name: median(of_name) for name, of_name in costs.items()}


def median(costs: Sequence[Cost]) -> Cost:
    """The median of each number; the result of the last."""
    return Cost(
        wall_seconds=statistics.median(cost.wall_seconds for cost in costs),
        cpu_seconds=statistics.median(cost.cpu_seconds for cost in costs),
        peak_rss_bytes=int(statistics.median(cost.peak_rss_bytes for cost in costs)),
        rss_growth_bytes=int(statistics.median(cost.rss_growth_bytes for cost in costs)),
        result=costs[-1].result,
    )


def run_once(contestant: Contestant) -> Cost:
    """Run one contestant once and measure it."""
    if callable(contestant):
        return _run_function(contestant)
    command = contestant if isinstance(contestant, Command) else Command(list(contestant))
    if command.before is not None:
        command.before()
    return _run_program(command)


def answer(
    name: str,
    *,
    ours: float,
    peer: float | None,
    goal: float | None,
    unit: str,
    better: Literal["higher", "lower"],
    **more: Any,
) -> dict[str, Any]:
    """One question's answer, as ``docs/benchmarks.md`` and the last printed line hold it.

    Args:
        name: what was asked.
        ours: our number.
        peer: the peer's, in the same unit; None where it did not run or there is none.
        goal: with a peer, how many times better ours must be (``ratio >= goal``); without one, the bound on ``ours``
            itself; None where nothing was promised.
        unit: of both numbers.
        better: whether more or less of it is good. ``ratio`` is always the larger the better.
        more: further fields.
    """
    ratio = None
    if peer is not None:
        ratio = (ours / peer if better == "higher" else peer / ours) if ours and peer else None
    if goal is None:
        holds = None
    elif peer is not None:
        holds = ratio is not None and ratio >= goal
    else:
        holds = ours >= goal if better == "higher" else ours <= goal
    return {
        "name": name, "ours": _short(ours), "peer": _short(peer), "ratio": _short(ratio), "goal": goal, "holds": holds,
        "unit": unit, "machine": machine(), **more,
    }


def print_result(answers: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Print the last line of a benchmark: one JSON object, or a list of them."""
    print(json.dumps(answers if isinstance(answers, Mapping) else list(answers)), flush=True)


def print_costs(costs: Mapping[str, Cost]) -> None:
    """Print a table of costs for people."""
    width = max(map(len, costs))
    print(f"{'':{width}}  {'wall s':>9} {'CPU s':>9} {'peak MB':>9} {'growth MB':>9}")
    for name, cost in costs.items():
        print(
            f"{name:{width}}  {cost.wall_seconds:9.3f} {cost.cpu_seconds:9.3f} "
            f"{cost.peak_rss_bytes / 1e6:9.0f} {cost.rss_growth_bytes / 1e6:9.0f}"
        )


def machine() -> str:
    """The machine in words: processor, cores this process may use, memory, Python."""
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    memory = psutil.virtual_memory().total / 2**30
    return f"{len(os.sched_getaffinity(0))} x {model}, {memory:.0f} GiB, Python {platform.python_version()}"


def _run_function(function: Callable[[], Any]) -> Cost:
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    with _Sampler(process) as sampler:
        children = _children_seconds()
        cpu, wall = time.process_time(), time.perf_counter()
        result = function()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        children = _children_seconds() - children
    return Cost(
        wall_seconds=wall,
        cpu_seconds=max(cpu + children - sampler.cpu_seconds, 0.0),
        peak_rss_bytes=sampler.peak_bytes,
        rss_growth_bytes=max(sampler.peak_bytes - before, 0),
        result=result,
    )


def _run_program(command: Command) -> Cost:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        begin = time.perf_counter()
        program = subprocess.Popen(
            list(command.argv), stdin=subprocess.DEVNULL, stdout=out, stderr=errors, cwd=command.cwd,
            env={**os.environ, **command.env},
        )
        peak, usage, late = 0, None, False
        process = psutil.Process(program.pid)
        while usage is None:
            peak = max(peak, _tree_rss(process))
            if time.perf_counter() - begin > command.timeout_seconds and not late:
                late = True
                program.kill()
            # wait4 and not Popen.wait: it says what this child took, its descendants included.
            pid, status, taken = os.wait4(program.pid, os.WNOHANG)
            if pid:
                usage = taken
                program.returncode = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(_SAMPLE_SECONDS)
        wall = time.perf_counter() - begin
        out.seek(0)
        printed = out.read().decode("utf-8", "replace")
        if program.returncode or late:
            errors.seek(0)
            said = (printed + errors.read().decode("utf-8", "replace"))[-4000:]
            why = f"took over {command.timeout_seconds} s" if late else f"ended with {program.returncode}"
            raise RuntimeError(f"{' '.join(map(str, command.argv))} {why}:\n{said}")
    # Not ru_maxrss: of a child of a large process it is that process' own peak.
    return Cost(wall, usage.ru_utime + usage.ru_stime, peak, peak, printed)


class _Sampler:
    """Watches the memory of this process and its children from a thread while a function runs."""

    def __init__(self, process: psutil.Process) -> None:
        self.peak_bytes = 0
        self.cpu_seconds = 0.0
        self._process = process
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Sampler:
        # Sets the kernel's own high-water mark back, so that no peak between two samples is missed.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.peak_bytes = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        with suppress(OSError, StopIteration, ValueError):
            status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            mark = next(line for line in status if line.startswith("VmHWM:"))
            self.peak_bytes = max(self.peak_bytes, int(mark.split()[1]) * 1024)

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, _tree_rss(self._process))
            self.cpu_seconds = time.thread_time()


def _tree_rss(process: psutil.Process) -> int:
    total = 0
    with suppress(psutil.Error):
        for member in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += member.memory_info().rss
    return total


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _short(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.4g}")
