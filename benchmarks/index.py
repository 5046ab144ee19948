"""How long does a run wait for its index, against megatron.core.datasets doing the same work cold?

    python benchmarks/index.py [--quick] [--work FOLDER] [--rounds N]

Ten million documents of 500 tokens on average (lognormal; 5 G tokens), sequences of 2,048, one and three epochs. The
same `.bin` and `.idx` for both. Megatron's GPTDataset builds its document index, sample index and shuffle index; ours
builds what a SourceStream needs so that any sample can be read: with 2 threads, nothing kept from before. Every
measurement is a process of its own; imports and the opening of the file come before the clock. Contestants take turns.
Wall and CPU seconds, and the peak of resident memory over what the process held before, pages of mapped files included.
"Kept" is both with their caches on a disk, written in the first round and read in the second. Counting the content of
every window (what a blend decides by; Megatron has nothing like it) is measured apart.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from made_token_files import lognormal_lengths, write_hollow
from measure import Command, answer, print_result, run_once

SEQ_LENGTH = 2048
_SEED = 1234


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100,000 documents, one round")
    parser.add_argument("--work", type=Path, help="where files are made and left (a temporary folder if left out)")
    parser.add_argument("--rounds", type=int, help="5, or 1 with --quick")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(_measure(**json.loads(options.job))))
        return 0
    work = options.work or Path(tempfile.mkdtemp(prefix="xalign-benchmark-"))
    try:
        print_result(_compare(options, work))
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    return 0


def _compare(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    num_documents = 100_000 if options.quick else 10_000_000
    prefix = work / f"tokens-{num_documents}"
    if not prefix.with_name(f"{prefix.name}.manifest.json").exists():
        write_hollow(prefix, lognormal_lengths(num_documents, 500, _SEED), "fin_Latn")
    jobs = {
        (who, epochs): {"who": who, "prefix": str(prefix), "epochs": epochs, "threads": options.threads}
        for epochs in (1, 3)
        for who in ("ours", "core", "counts")
    }
    results: dict[tuple[str, int], list[dict[str, float]]] = {job: [] for job in jobs}
    for number in range(options.rounds or (1 if options.quick else 5)):
        order = list(jobs)
        for job in order[number % len(order) :] + order[: number % len(order)]:
            argv = [sys.executable, __file__, "--job", json.dumps(jobs[job])]
            printed = run_once(Command(argv, env={"OMP_NUM_THREADS": "1"})).result
            results[job].append(json.loads(printed.strip().splitlines()[-1]))
    medians = {
        job: {name: statistics.median(result[name] for result in found) for name in found[0]}
        for job, found in results.items()
    }
    print(f"{num_documents:,} documents\n{'':12} epochs   wall s    CPU s  peak MB over base  windows")
    for (who, epochs), cost in medians.items():
        print(
            f"{who:12} {epochs:6} {cost['wall']:8.3f} {cost['cpu']:8.3f} {cost['growth_bytes'] / 1e6:18.1f} "
            f"{int(cost['windows']):8,}"
        )
    answers = []
    for epochs in (1, 3):
        ours, core = medians["ours", epochs], medians["core", epochs]
        what = f"index of {num_documents:,} documents, {epochs} epoch{'s' if epochs > 1 else ''}"
        answers.append(
            answer(
                f"{what}: wall", ours=ours["wall"], peer=core["wall"], goal=10, unit="s", better="lower",
                threads=options.threads, cpu_seconds=[ours["cpu"], core["cpu"]],
                counts_too_seconds=medians["counts", epochs]["wall"],
            )
        )
        answers.append(
            answer(
                f"{what}: memory", ours=ours["growth_bytes"] / 1e6, peer=core["growth_bytes"] / 1e6, goal=3, unit="MB",
                better="lower",
            )
        )
    return answers


def _measure(who: str, prefix: str, epochs: int, threads: int) -> dict[str, float]:
    """In a process of its own: open, then build under the clock."""
    build = {"ours": _ours, "core": _core, "counts": _counts}[who](prefix, epochs, threads)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    usage, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    windows = build()
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
    return {"wall": wall, "cpu": cpu, "growth_bytes": _resident("VmHWM") - before, "windows": windows}


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in status if line.startswith(name)).split()[1]) * 1024


def _ours(prefix: str, epochs: int, threads: int, count: bool = False) -> Callable[[], int]:
    from megatron_xalign.data.index_cache import IndexCache
    from megatron_xalign.data.source_stream import SourceStream
    from megatron_xalign.formats.token_file import read_token_file

    file = read_token_file(prefix, check="sizes")

    def build() -> int:
        stream = SourceStream(
            "fin", file, ["fin_Latn"], seq_length=SEQ_LENGTH, seed=_SEED, cache=IndexCache(None), num_threads=threads
        )
        windows = epochs * stream.num_windows()
        stream.prepare(windows)
        if count:
            for epoch in range(epochs):
                stream.native.count_epoch(epoch, threads)
        stream.native.window(windows - 1)
        return windows

    return build


def _counts(prefix: str, epochs: int, threads: int) -> Callable[[], int]:
    return _ours(prefix, epochs, threads, count=True)


def _core(prefix: str, epochs: int, threads: int) -> Callable[[], int]:
    logging.getLogger("megatron").setLevel(logging.ERROR)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    import numpy as np
    from megatron.core.datasets import helpers
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split, compile_helpers

    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        compile_helpers()
    assert helpers

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = 50_304, 0, -1, ("made",)

    dataset = IndexedDataset(prefix, multimodal=False, mmap=True)
    indices = np.arange(len(dataset.sequence_lengths), dtype=np.int32)
    # Not from the lengths: their pages are to be touched under the clock, as ours are.
    per_epoch = (Path(f"{prefix}.bin").stat().st_size // 2 - 1) // SEQ_LENGTH

    def build() -> int:
        with tempfile.TemporaryDirectory(dir=Path(prefix).parent) as cache:
            config = GPTDatasetConfig(
                random_seed=_SEED, sequence_length=SEQ_LENGTH, path_to_cache=cache, tokenizer=Tokenizer(),
                blend=([prefix], None), split="1,0,0", reset_position_ids=False, reset_attention_mask=False,
                eod_mask_loss=False, create_attention_mask=False,
            )  # fmt: skip
            made = GPTDataset(dataset, prefix, indices, epochs * per_epoch, Split.train, config)
            return len(made)

    return build


if __name__ == "__main__":
    raise SystemExit(main())
