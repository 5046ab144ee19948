"""Preprocessing jobs that are killed, interrupted, or run where they cannot: nothing is lost, nothing left behind."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from preprocess_jobs import KINDS, contents, documents, names, pairs, write_lines
from xalign_process import environment

from megatron_xalign.data.tokenizer import train_tokenizer

pytestmark = pytest.mark.end_to_end

NUM_KILLS = 10
PART_BYTES = 60 << 10
_WAIT_SECONDS = 300.0


class Corpus:
    """Text, a tokenizer, and what an undisturbed job makes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fin = write_lines(folder / "fin.jsonl", documents(5000, "fin_Latn"))
        self.both = write_lines(folder / "pairs.jsonl", [*pairs(3600), *pairs(200)])
        texts = {"fin_Latn": [item["text"] for item in documents(300, "fin_Latn")]}
        self.tokenizer = train_tokenizer(texts, folder / "tokenizer", 400)
        self.expected = {}
        self.num_parts = {
            kind: -(-path.stat().st_size // PART_BYTES)
            for kind, path in (("documents", self.fin), ("pairs", self.both))
        }
        for kind in ("documents", "pairs"):
            prefix = folder / "undisturbed" / kind
            done = self.start(kind, prefix, workers=1)
            _, errors = done.communicate(timeout=_WAIT_SECONDS)
            assert done.returncode == 0, errors
            self.expected[kind] = contents(prefix)

    def start(self, kind: str, prefix: Path, workers: int = 2, **options: object) -> subprocess.Popen[str]:
        """Start the command in a session of its own, listening to Ctrl-C even where the tests were started without."""
        options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        what = [str(self.fin), "--language", "fin_Latn"]
        if kind == "pairs":
            what = [str(self.both), "--pairs", "eng_Latn,fin_Latn", "--duplicates", "near", "--pairing", "shuffled"]
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "megatron_xalign",
                "preprocess",
                *what,
                "--tokenizer",
                str(self.tokenizer),
                "--output-prefix",
                str(prefix),
                "--workers",
                str(workers),
                "--part-bytes",
                str(PART_BYTES),
                "--engine",
                "reference",
            ],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )

    def check(self, kind: str, prefix: Path) -> None:
        """The files are those of an undisturbed job, and nothing else is there."""
        expected = self.expected[kind]
        made = contents(prefix)
        # The manifest holds the name of its file.
        made["manifest.json"] = made["manifest.json"].replace(f'"{prefix.name}"'.encode(), f'"{kind}"'.encode())
        assert made == expected
        assert names(prefix.parent) == {f"{prefix.name}.{ending}" for ending in (*KINDS, "log.json")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    yield Corpus(tmp_path_factory.mktemp("corpus"))


def wait_until(happens: Callable[[], bool]) -> None:
    """Wait for something that is about to happen."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_parts(
    job: subprocess.Popen[str], prefix: Path, num_parts: int, more: int | None, rng: random.Random
) -> None:
    """Wait until so many more parts are done, or all (None: until the job has ended), and a moment longer."""
    if more is None:
        job.wait(_WAIT_SECONDS)
        return

    def num_done() -> int:
        return len(list(prefix.parent.glob(f"{prefix.name}.parts/part-?????.json")))

    wanted = num_done() + more
    wait_until(lambda: job.poll() is not None or num_done() >= min(wanted, num_parts))
    deadline = time.monotonic() + rng.uniform(0.0, 0.4 if more else 1.5)
    while job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def records(prefix: Path) -> list[Path]:
    """What says that a part is done, one file for each."""
    return list(prefix.parent.glob(f"{prefix.name}.parts/part-?????.json"))


def held_between_parts(folder: Path, corpus: Corpus, workers: int = 2) -> tuple[Path, subprocess.Popen[str]]:
    """A job of documents that is stopped with parts done and others missing, and its prefix.

    The newest record of each worker may have its name and not be safe on the disk: it goes if the job is interrupted
    then, and with it the folder if there is no other.
    """
    for attempt in range(20):
        prefix = folder / str(attempt) / "documents"
        job = corpus.start("documents", prefix, workers)
        wait_until(lambda prefix=prefix, job=job: len(records(prefix)) > workers or job.poll() is not None)  # type: ignore[misc]
        job.send_signal(signal.SIGSTOP)
        wait_until(lambda job=job: job.poll() is not None or is_held(job))  # type: ignore[misc]
        # Records are few again when all is joined and the job clears up.
        is_joined = Path(f"{prefix}.bin").exists()
        num_done, num_parts = len(records(prefix)), corpus.num_parts["documents"]
        if job.poll() is None and not is_joined and workers < num_done < num_parts - workers:
            return prefix, job
        # This process was away for so long that the job came to its end.
        job.send_signal(signal.SIGCONT)
        _, errors = job.communicate(timeout=_WAIT_SECONDS)
        assert job.returncode == 0, errors
    pytest.fail("no job could be stopped before its end")


def is_held(job: subprocess.Popen[str]) -> bool:
    try:
        return psutil.Process(job.pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("kind", ["documents", "pairs"])
def test_a_job_killed_again_and_again_ends_with_the_same_files_and_leaves_no_process(
    tmp_path: Path, corpus: Corpus, kind: str
) -> None:
    rng = random.Random(kind)
    kills = rounds = 0
    while kills < NUM_KILLS:
        prefix = tmp_path / str(rounds) / kind
        rounds += 1
        # At the start of a job, and with more and more parts done until they are joined; what is done stays.
        for more in (0, rng.randint(1, 9), rng.randint(1, 9), corpus.num_parts[kind], corpus.num_parts[kind], None):
            job = corpus.start(kind, prefix)
            wait_for_parts(job, prefix, corpus.num_parts[kind], more, rng)
            workers = children(job)
            if job.poll() is None:
                os.kill(job.pid, signal.SIGKILL)
                job.wait(_WAIT_SECONDS)
                kills += 1
            _, errors = job.communicate(timeout=_WAIT_SECONDS)
            wait_until(lambda workers=workers: not any(map(is_alive, workers)))  # type: ignore[misc]
            assert job.returncode in (0, -signal.SIGKILL), errors
        assert job.returncode == 0
        corpus.check(kind, prefix)


def test_a_killed_worker_is_named_and_the_same_command_continues(tmp_path: Path, corpus: Corpus) -> None:
    rng = random.Random(1)
    kills = rounds = 0
    while kills < NUM_KILLS:
        prefix = tmp_path / str(rounds) / "documents"
        rounds += 1
        for more in (0, *(rng.randint(1, 5) for _ in range(5)), None):
            job = corpus.start("documents", prefix)
            if more == 0:
                wait_until(lambda job=job: bool(children(job)) or job.poll() is not None)  # type: ignore[misc]
            wait_for_parts(job, prefix, corpus.num_parts["documents"], more, rng)
            workers = children(job)
            if not workers or job.poll() is not None:
                _, errors = job.communicate(timeout=_WAIT_SECONDS)
                assert job.returncode == 0, errors
                continue
            with suppress(psutil.NoSuchProcess):
                rng.choice(workers).kill()
            _, errors = job.communicate(timeout=_WAIT_SECONDS)
            # A worker that had nothing left to do is not missed.
            if job.returncode == 0:
                continue
            kills += 1
            assert job.returncode == 1
            assert "was killed by SIGKILL while reading" in errors and str(corpus.fin) in errors
            assert "the same command continues" in errors and "Traceback" not in errors
            assert not any(map(is_alive, workers))
            left = names(prefix.parent / "documents.parts") if (prefix.parent / "documents.parts").exists() else set()
            assert not any("partial" in name for name in left)
        corpus.check("documents", prefix)


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_at_once_and_the_same_command_continues(tmp_path: Path, corpus: Corpus, workers: int) -> None:
    prefix, job = held_between_parts(tmp_path, corpus, workers)
    processes = children(job)
    assert len(processes) == (workers if workers > 1 else 0)
    os.killpg(job.pid, signal.SIGINT)  # as a terminal does
    job.send_signal(signal.SIGCONT)
    _, errors = job.communicate(timeout=_WAIT_SECONDS)
    assert job.returncode == 130
    assert "the same command continues" in errors and "Traceback" not in errors
    assert not any(map(is_alive, processes))
    finished = len(records(prefix))
    assert not any("partial" in name for name in names(Path(f"{prefix}.parts")))
    job = corpus.start("documents", prefix, workers)
    _, errors = job.communicate(timeout=_WAIT_SECONDS)
    assert job.returncode == 0 and f"{finished} of " in errors
    corpus.check("documents", prefix)


def test_a_worker_that_meets_a_malformed_line_stops_the_job_with_file_and_line(tmp_path: Path, corpus: Corpus) -> None:
    lines = corpus.fin.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[4000] = '{"text": "cut in the mid\n'
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(lines), encoding="utf-8")
    good, corpus.fin = corpus.fin, bad
    try:
        job = corpus.start("documents", tmp_path / "out" / "documents")
        _, errors = job.communicate(timeout=_WAIT_SECONDS)
        assert job.returncode == 1 and f"{bad}:4001: not JSON" in errors and "Traceback" not in errors
        bad.write_text(good.read_text(encoding="utf-8"), encoding="utf-8")
        job = corpus.start("documents", tmp_path / "out" / "documents")
        _, errors = job.communicate(timeout=_WAIT_SECONDS)
        assert job.returncode == 0, errors
        assert contents(tmp_path / "out" / "documents", ["bin", "idx", "spans"]) == {
            kind: content for kind, content in corpus.expected["documents"].items() if kind != "manifest.json"
        }
    finally:
        corpus.fin = good


def test_only_one_job_writes_a_token_file(tmp_path: Path, corpus: Corpus) -> None:
    prefix, first = held_between_parts(tmp_path, corpus)
    second = corpus.start("documents", prefix)
    _, errors = second.communicate(timeout=_WAIT_SECONDS)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 1 and "another job is writing" in errors, errors
    _, errors = first.communicate(timeout=_WAIT_SECONDS)
    assert first.returncode == 0, errors
    corpus.check("documents", prefix)


def test_a_full_disk_is_said_and_what_is_done_stays(tmp_path: Path, corpus: Corpus) -> None:
    # No file may grow beyond this: enough for the parts, not for the whole.
    most = len(corpus.expected["documents"]["bin"]) // 2
    prefix = tmp_path / "out" / "documents"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        # As Python itself does, so that the limit is an error and not a signal.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    job = corpus.start("documents", prefix, preexec_fn=limited)
    _, errors = job.communicate(timeout=_WAIT_SECONDS)
    assert job.returncode == 1 and "Traceback" not in errors, errors
    assert "cannot be written" in errors and "file is larger than" in errors
    assert names(prefix.parent) == {"documents.parts"}
    done = len(list(tmp_path.glob("out/documents.parts/part-?????.json")))
    job = corpus.start("documents", prefix)
    _, errors = job.communicate(timeout=_WAIT_SECONDS)
    assert job.returncode == 0 and f"{done} of {done} parts are there from before" in errors, errors
    corpus.check("documents", prefix)
