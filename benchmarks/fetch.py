"""How many samples a second does one core read, against BlendedDataset + GPTDataset of megatron.core?

    python benchmarks/fetch.py [--quick] [--work FOLDER] [--rounds N]

Three sources (two of one language, one of pairs; .475, .475, .05), documents of 60 and of 500 tokens on average,
sequences of 2,048, samples in random order, all files in the page cache. The same `.bin` and `.idx` for both. Ours
gives what Megatron's gives (tokens, labels, loss mask, position ids, as torch tensors) and also the language of every
token and label, its source and its document. Ours reads batches of 8, as a micro-batch is read; Megatron reads sample
by sample, and "core, collated" puts 8 of its samples into a batch as a DataLoader does, which is what a step is given.
"with resets" asks ours for reset_position_ids and eod_mask_loss (document ids are always there) and Megatron for the
same and reset_attention_mask, without building the mask.

Every measurement is a process of its own: index built, 500 samples read, then the clock. Contestants take turns; the
median of samples per CPU second counts.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from made_token_files import EOD, VOCAB_SIZE, lognormal_lengths, write_random
from measure import Command, answer, print_result, run_once

SEQ_LENGTH = 2048
BATCH = 8
SOURCES = {"eng": ["eng_Latn"], "fin": ["fin_Latn"], "pairs": ["eng_Latn", "fin_Latn"]}
WEIGHTS = [0.475, 0.475, 0.05]
_SEED = 1234


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short documents, 2 M tokens a source, one round")
    parser.add_argument("--work", type=Path, help="where files are made and left (a temporary folder if left out)")
    parser.add_argument("--rounds", type=int, help="5, or 1 with --quick")
    parser.add_argument("--tokens", type=int, help="of each source; 300 M, or 2 M with --quick")
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
    tokens = options.tokens or (2_000_000 if options.quick else 300_000_000)
    seconds = 1.0 if options.quick else 4.0
    answers = []
    for mean_tokens in (60,) if options.quick else (60, 500):
        folder = work / f"tokens-{tokens}-{mean_tokens}"
        for number, (name, languages) in enumerate(SOURCES.items()):
            if not (folder / f"{name}.manifest.json").exists():
                write_random(
                    folder / name, lognormal_lengths(tokens // mean_tokens, mean_tokens, number), languages, number
                )
        rates = _rates(folder, seconds, options.rounds or (1 if options.quick else 5))
        for job, rate in rates.items():
            print(f"{mean_tokens:4}-token documents  {job:18} {rate:10,.0f} samples per CPU second")
        documents = f"{mean_tokens}-token documents"
        answers += [
            answer(
                f"samples per CPU second, {documents}", ours=rates["ours"], peer=rates["core"], goal=10,
                unit="1/s", better="higher", tokens_per_source=tokens,
            ),
            answer(
                f"the same in batches of {BATCH}, {documents}", ours=rates["ours"], peer=rates["core, collated"],
                goal=10, unit="1/s", better="higher",
            ),
            answer(
                f"the same with resets, {documents}", ours=rates["ours with resets"], peer=rates["core with resets"],
                goal=10, unit="1/s", better="higher",
            ),
            answer(
                f"resets against none, {documents}", ours=rates["ours with resets"] / rates["ours"], peer=None,
                goal=0.7, unit="ratio", better="higher",
            ),
        ]  # fmt: skip
    return answers


def _rates(folder: Path, seconds: float, rounds: int) -> dict[str, float]:
    jobs = {
        f"{who}{' with resets' if resets else ''}": {
            "who": who, "folder": str(folder), "resets": resets, "seconds": seconds
        }
        for who, resets in (("ours", False), ("core", False), ("core, collated", False), ("ours", True), ("core", True))
    }  # fmt: skip
    rates: dict[str, list[float]] = {job: [] for job in jobs}
    for number in range(rounds):
        order = list(jobs)
        for job in order[number % len(order) :] + order[: number % len(order)]:
            argv = [sys.executable, __file__, "--job", json.dumps(jobs[job])]
            printed = run_once(Command(argv, env={"OMP_NUM_THREADS": "1"})).result
            rates[job].append(json.loads(printed.strip().splitlines()[-1]))
    return {job: statistics.median(found) for job, found in rates.items()}


def _measure(who: str, folder: str, resets: bool, seconds: float) -> float:
    """In a process of its own: samples per CPU second."""
    import torch

    torch.set_num_threads(1)
    read = {
        "ours": _ours, "core": _core, "core, collated": functools.partial(_core, collated=True)
    }[who](Path(folder), resets)  # fmt: skip
    read(500)
    done, begin = 0, time.process_time()
    while (taken := time.process_time() - begin) < seconds:
        done += read(400)
    return done / taken


def _ours(folder: Path, resets: bool) -> Callable[[int], int]:
    import torch

    from megatron_xalign import _native
    from megatron_xalign.data.blend_reader import BlendReader
    from megatron_xalign.data.source_stream import SourceStream
    from megatron_xalign.formats.token_file import read_token_file

    languages = ["eng_Latn", "fin_Latn"]
    files = [read_token_file(folder / name, check="sizes") for name in SOURCES]
    streams = [
        SourceStream(name, file, languages, seq_length=SEQ_LENGTH, seed=_SEED)
        for name, file in zip(SOURCES, files, strict=True)
    ]
    num_samples = int(min(stream.num_windows() / weight for stream, weight in zip(streams, WEIGHTS, strict=True)))
    sources = _native.blend_order(np.array([475, 475, 50]), num_samples)
    draws = np.empty(num_samples, dtype=np.int64)
    for source in range(len(streams)):
        draws[sources == source] = np.arange(np.count_nonzero(sources == source))
    index = _native.ListedSamples(sources, draws)
    reader = BlendReader(
        streams, index, seq_length=SEQ_LENGTH, padding_token=EOD, reset_position_ids=resets, eod_mask_loss=resets
    )
    random = np.random.default_rng(0)

    def read(count: int) -> int:
        for samples in random.integers(0, num_samples, (count // BATCH, BATCH)):
            batch = reader.batch(samples)
            tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
            assert len(tensors["tokens"]) == BATCH
        return count // BATCH * BATCH

    return read


def _core(folder: Path, resets: bool, collated: bool = False) -> Callable[[int], int]:
    import torch

    logging.getLogger("megatron").setLevel(logging.ERROR)
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split, compile_helpers

    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        compile_helpers()

    # A blend with a cache asks for its rank.
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = VOCAB_SIZE, EOD, -1, ("made",)

    cache = tempfile.TemporaryDirectory(dir=folder)
    config = GPTDatasetConfig(
        random_seed=_SEED, sequence_length=SEQ_LENGTH, path_to_cache=cache.name, tokenizer=Tokenizer(),
        blend=([str(folder / name) for name in SOURCES], WEIGHTS), split="1,0,0", reset_position_ids=resets,
        reset_attention_mask=resets, eod_mask_loss=resets, create_attention_mask=False,
    )  # fmt: skip
    files = [IndexedDataset(str(folder / name), multimodal=False, mmap=True) for name in SOURCES]
    windows = [(int(file.sequence_lengths.sum(dtype=np.int64)) - 1) // SEQ_LENGTH for file in files]
    num_samples = int(min(number / weight for number, weight in zip(windows, WEIGHTS, strict=True)) / 1.02) - 100
    datasets = [
        GPTDataset(
            file, str(folder / name), np.arange(len(file.sequence_lengths), dtype=np.int32),
            math.ceil(num_samples * weight * 1.005) + 1, Split.train, config,
        )
        for name, file, weight in zip(SOURCES, files, WEIGHTS, strict=True)
    ]  # fmt: skip
    blended = BlendedDataset(datasets, WEIGHTS, num_samples, config)
    random = np.random.default_rng(0)

    def read_batches(count: int) -> int:
        for samples in random.integers(0, num_samples, (count // BATCH, BATCH)).tolist():
            batch = torch.utils.data.default_collate([blended[sample] for sample in samples])
            assert batch["tokens"].shape == (BATCH, SEQ_LENGTH)
        assert cache
        return count // BATCH * BATCH

    def read(count: int) -> int:
        for sample in random.integers(0, num_samples, count).tolist():
            assert len(blended[sample]["tokens"]) == SEQ_LENGTH
        assert cache
        return count

    return read_batches if collated else read


if __name__ == "__main__":
    raise SystemExit(main())
