"""Processes that do the parts of a job: each encodes with one thread, writes its files itself, and answers in a line.

A worker is ``python -m megatron_xalign.data.workers``, not a fork and not multiprocessing's spawn: it runs nothing of
the program that started the job, and nothing is pickled. It gets numbers of parts on its standard input and answers
with lines of JSON. It ends when the job does, however the job ends.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from megatron_xalign import errors
from megatron_xalign.errors import WorkerError, XAlignError

if TYPE_CHECKING:
    from megatron_xalign.data.job_settings import JobSettings

_PR_SET_PDEATHSIG = 1
_TELL_SECONDS = 0.2
_STOP_SECONDS = 10.0
# One thread each; the libraries look at these when they are loaded.
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Engines look words up in tables of 100 MB and more, all over: in large pages that is quicker. For glibc, where the
# system leaves it to programs.
_LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclass
class Done:
    """A part that is done."""

    record: dict[str, Any]
    peak_memory_bytes: int
    """Of the process that did it, so far."""
    worker: int


class _Worker:
    """One process, as the job sees it."""

    def __init__(self, number: int, work_folder: Path) -> None:
        self.number = number
        self.part: int | None = None
        """What it does now."""
        self._rest = b""
        read_end, write_end = os.pipe()
        here = str(Path.cwd())
        modules = os.pathsep.join(path or here for path in sys.path)
        environment = {**_LARGE_PAGES, **os.environ, **_ONE_THREAD, "PYTHONPATH": modules}
        try:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-P", "-m", "megatron_xalign.data.workers", str(work_folder), str(write_end),
                    str(os.getpid()), str(_log_level()),
                ],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[write_end], env=environment,
                # Ctrl-C in a terminal goes to the whole group; the job alone decides what becomes of its workers.
                process_group=0,
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self.answers = read_end
        os.set_blocking(read_end, False)

    def give(self, part: int) -> None:
        """Have it do a part."""
        self.part = part
        self.say({"part": part})

    def say(self, task: Mapping[str, Any]) -> None:
        """Send it a task."""
        assert self.process.stdin is not None
        # If it died, the end of its answers tells so too.
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
            self.process.stdin.flush()

    def read(self, *, once: bool = False) -> tuple[list[dict[str, Any]], bool]:
        """The answers that are there, and whether the process goes on."""
        pieces, goes_on = [self._rest], True
        while True:
            try:
                piece = os.read(self.answers, 1 << 16)
            except BlockingIOError:
                break
            if not piece:
                goes_on = False
                break
            pieces.append(piece)
            if once:
                break
        *lines, self._rest = b"".join(pieces).split(b"\n")
        return [json.loads(line) for line in lines], goes_on

    def stop(self) -> None:
        """Kill it, and wait until it is gone; its unfinished files are removed by whoever cleans the folder."""
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.answers)


class WorkerPool:
    """Several workers on one job; all are gone when the ``with`` block ends."""

    def __init__(self, work_folder: Path, num_workers: int) -> None:
        self._work_folder = work_folder
        self._num_workers = num_workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []

    def plan(self, settings: JobSettings) -> None:
        """Have the first worker plan the job and write the plan; it does parts afterwards, with what it has loaded.

        Raises:
            XAlignError: what planning raised.
            WorkerError: the process was killed.
        """
        worker = _Worker(0, self._work_folder)
        self._workers.append(worker)
        worker.say({"plan": settings.to_tree()})
        os.set_blocking(worker.answers, True)
        name = f"a sample of the input for {settings.output_prefix}"
        goes_on = True
        while goes_on:
            answers, goes_on = worker.read(once=True)
            for answer in answers:
                if "failed" in answer:
                    raise _failure(answer["failed"], worker.number, name)
                os.set_blocking(worker.answers, False)
                return
        raise _death(worker, name)

    def run(
        self, parts: Sequence[int], names: Callable[[int], str], tell: Callable[[Mapping[int, Mapping[str, int]]], None]
    ) -> Iterator[Done]:
        """Do parts; yield each when it is done, in whatever order.

        Args:
            parts: in the order they are begun.
            names: what to call a part when its worker dies.
            tell: called when there is news of how far the workers are.

        Raises:
            XAlignError: what a worker raised, as it raised it; the first counts, and the others are stopped.
            WorkerError: a worker was killed, or failed as it should not.
        """
        waiting = deque(parts)
        current: dict[int, Mapping[str, int]] = {}
        with selectors.DefaultSelector() as selector:
            for number in range(min(self._num_workers, len(parts))):
                if number == len(self._workers):
                    self._workers.append(_Worker(number, self._work_folder))
                worker = self._workers[number]
                selector.register(worker.answers, selectors.EVENT_READ, worker)
                worker.give(waiting.popleft())
            busy = len(self._workers)
            while busy:
                for key, _ in selector.select():
                    worker = key.data
                    answers, goes_on = worker.read()
                    for answer in answers:
                        if "failed" in answer:
                            raise _failure(answer["failed"], worker.number, names(worker.part))
                        if "record" in answer:
                            current.pop(worker.number, None)
                            yield Done(answer["record"], answer["peak_memory_bytes"], worker.number)
                            worker.part = waiting.popleft() if waiting else None
                            if worker.part is not None:
                                worker.give(worker.part)
                            else:
                                busy -= 1
                        else:
                            current[worker.number] = answer["progress"]
                            tell(current)
                    if not goes_on:
                        if worker.part is not None:
                            raise _death(worker, names(worker.part))
                        selector.unregister(worker.answers)


def _failure(failed: Mapping[str, Any], number: int, name: str) -> XAlignError:
    kind = getattr(errors, failed["kind"] or "", None)
    if isinstance(kind, type) and issubclass(kind, XAlignError):
        return kind(failed["message"])
    return WorkerError(
        f"worker {number} failed while reading {name}:\n{failed['message'].rstrip()}\n"
        "This is a bug or a fault of the machine, not of your input. What is done is kept; the same command continues."
    )


def _death(worker: _Worker, name: str) -> WorkerError:
    try:
        code = worker.process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        code = 0
    if code < 0:
        signal_name = signal.Signals(-code).name
        reason = "Was there too little memory? Fewer workers take less. " if -code == signal.SIGKILL else ""
        return WorkerError(
            f"worker {worker.number} was killed by {signal_name} while reading {name}. {reason}What is done is kept; "
            "the same command continues."
        )
    return WorkerError(
        f"worker {worker.number} ended with exit code {code} while reading {name} and left no message. What is done is "
        "kept; the same command continues."
    )


def _log_level() -> int:
    """From what level on this process shows messages; 0 if nobody asked for any."""
    logger = logging.getLogger("megatron_xalign")
    return logger.getEffectiveLevel() if logger.hasHandlers() else 0


def peak_memory_bytes() -> int:
    """The most memory this process has had at once."""
    # Not getrusage: a process begins with the peak of the one that started it.
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


# --- in the worker ----------------------------------------------------------------------------------------------------


def _work(work_folder: Path, parent: int, answers: IO[str]) -> int:
    _end_with(parent)
    # What the terminal sends is for the job, which stops its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def answer(content: Mapping[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    last = 0.0

    def tell(progress: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _TELL_SECONDS:
            last = now
            answer({"progress": progress._asdict()})

    # What is loaded stays: looking for garbage among it again and again is a tenth of the start.
    gc.disable()
    try:
        from megatron_xalign.data.job import Job
        from megatron_xalign.data.job_settings import JobSettings
        from megatron_xalign.data.parts import PartMaker

        maker: PartMaker | None = None
        for line in sys.stdin:
            task = json.loads(line)
            if "plan" in task:
                job = Job.plan(JobSettings.from_tree(task["plan"]))
                job.prepare()
                maker = PartMaker(job)
                _collect_from_here()
                answer({"planned": True})
                continue
            if maker is None:
                maker = PartMaker(Job.load(work_folder))
                _collect_from_here()
            record = maker.make(task["part"], tell)
            answer({"record": record, "peak_memory_bytes": peak_memory_bytes()})
    except BrokenPipeError:
        return 1
    except XAlignError as error:
        answer({"failed": {"kind": type(error).__name__, "message": str(error)}})
        return 1
    except Exception as error:
        answer({"failed": {"kind": None, "message": "".join(traceback.format_exception(error))}})
        return 1
    return 0


def _collect_from_here() -> None:
    """Look for garbage among what is made from now on."""
    gc.freeze()
    gc.enable()


def _end_with(parent: int) -> None:
    """Have the system kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # It ended before the system knew.
        os._exit(1)


def _main(arguments: Sequence[str]) -> int:
    work_folder, descriptor, parent, log_level = arguments
    if int(log_level):
        # As the command line has it; its own process has said what this one would say of the same.
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logging.getLogger("megatron_xalign").setLevel(int(log_level))
    with os.fdopen(int(descriptor), "w", encoding="utf-8") as answers:
        return _work(Path(work_folder), int(parent), answers)


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
