"""Does a plan of 10^12 tokens work, and how soon does a run of 10^9 samples start?

    python benchmarks/plan.py [--quick] [--work FOLDER] [--only plan|start]

The plan: 32,000 token files in 100 languages, 5 x 10^9 documents, 1.3 x 10^12 tokens, known by their manifests alone;
every window of a file holds what the file holds on average. What each file has to give is worked out, all 4.9 x 10^8
samples of 2,048 tokens are chosen by the closed loop that runs use, kept and opened again, and orders of documents are
looked into at random positions. Checked in Python's integers: every source within one window of its part at every
block, shares and fraction to the sample, orders that are permutations. Time, and the peak of resident memory.

The start: 64 token files (their tokens take no room on the disk) and one of pairs, 10^9 samples of 16 tokens. The index
is built once, cold; then a process of its own opens it, reads a batch from the middle of the run, and says how long
that took after its imports and how much memory it took beside them.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from made_token_files import lognormal_lengths, write_hollow, write_random
from measure import Command, answer, print_result, run_once

from megatron_xalign import _native
from megatron_xalign.config import DataConfig, MixtureConfig, RunConfig, SourceConfig, TrainingConfig
from megatron_xalign.config.tree import to_tree
from megatron_xalign.data.audit import audit_order
from megatron_xalign.data.index_cache import IndexCache
from megatron_xalign.data.mixture import MixturePlan, SourceText, plan_mixture
from megatron_xalign.data.order import Order, build_order, sample_index
from megatron_xalign.data.order_key import order_key
from megatron_xalign.data.source_stream import LeftOut, RowCounts

SEQ_LENGTH, BATCH = 2048, 1024
# English comes with every pair, so that it must have more than the pairs bring.
_SHARES = {"eng_Latn": 0.109, **{f"l{number:02d}_Latn": 0.009 for number in range(1, 100)}}
_SEED = 1234


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10^9 tokens of 1,000 files; 10^6 samples")
    parser.add_argument("--work", type=Path, help="where files are made and left (a temporary folder if left out)")
    parser.add_argument("--only", choices=("plan", "start"))
    parser.add_argument("--opened", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.opened:
        print(json.dumps(_open(Path(options.opened))))
        return 0
    work = options.work or Path(tempfile.mkdtemp(prefix="xalign-benchmark-"))
    work.mkdir(parents=True, exist_ok=True)
    answers: list[dict[str, Any]] = []
    try:
        if options.only != "start":
            answers += _plan(work, *((1_000, 10**9) if options.quick else (32_000, 10**12)))
        if options.only != "plan":
            answers += _start(work, 10**6 if options.quick else 10**9)
        print_result(answers)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    return 0


# --- the plan --------------------------------------------------------------------------------------------------------


class NominalStream:
    """A source known by its manifest: every window holds what the file holds on average, in whole tokens."""

    whole_documents = False
    eod_mask_loss = False

    def __init__(self, text: SourceText, languages: Sequence[str], seq_length: int) -> None:
        self.text = text
        self.name = text.name
        self.num_documents = text.documents
        self.identity = {"name": text.name, "tokens": text.tokens}
        self._num_windows = text.num_windows(seq_length)
        self._seq_length = seq_length
        self._content_K = np.zeros(len(languages), dtype=np.int32)
        for code, tokens in text.content_tokens_by_language.items():
            self._content_K[languages.index(code)] = tokens * seq_length // text.tokens

    def num_windows(self, epoch: int = 0) -> int:
        """The same in every epoch."""
        return self._num_windows

    def windows(self, begin: int, end: int) -> RowCounts:
        """All alike."""
        size = end - begin
        tokens_N = np.full(size, self._seq_length, dtype=np.int32)
        return RowCounts(np.broadcast_to(self._content_K, (size, len(self._content_K))), tokens_N, tokens_N)

    def begun_and_cut(self, num_windows: int) -> tuple[int, int]:
        """What a file gives on average; every border cuts a document."""
        return self.text.documents * num_windows // self._num_windows, num_windows

    def left_out(self, epoch: int = 0) -> LeftOut:
        """The tail."""
        return LeftOut(self.text.tokens - self._num_windows * self._seq_length, 0)

    @property
    def content(self) -> int:
        """Content tokens of a window."""
        return int(self._content_K.sum())


def _plan(work: Path, num_sources: int, train_tokens: int) -> list[dict[str, Any]]:
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        done = work()
        seconds[name] = time.perf_counter() - begin
        print(f"{name:44} {seconds[name]:9.2f} s, {_peak_bytes() / 1e6:8,.0f} MB at most so far", flush=True)
        return done

    texts = _texts(num_sources, train_tokens)
    documents, tokens = sum(text.documents for text in texts), sum(text.tokens for text in texts)
    print(f"{num_sources:,} files, {documents:,} documents, {tokens:,} tokens")
    plan: MixturePlan = timed("plan", lambda: plan_mixture(
        MixtureConfig(parallel_fraction=0.05, seed=_SEED, languages=_SHARES), texts, seq_length=SEQ_LENGTH,
        train_steps=train_tokens // (SEQ_LENGTH * BATCH), global_batch_size=BATCH,
    ))  # fmt: skip
    streams: Any = [NominalStream(text, plan.languages, SEQ_LENGTH) for text in texts]
    cache = IndexCache(work / "plan-cache")
    order: Order = timed(f"order of {plan.num_samples:,} samples", lambda: build_order(plan, streams, cache))
    order = timed("the same, kept", lambda: build_order(plan, streams, cache))
    audit = timed("audit", lambda: audit_order(plan, order, streams, [8, 64]))
    timed("every source within a window at every block", lambda: _check_quotas(plan, order, streams))
    _check_audit(audit, plan)
    look_ups = timed("100,000 samples looked up", lambda: _look_up(plan, order))
    timed("orders of documents, a million positions", lambda: _check_permutations(texts))
    kept = sum(path.stat().st_size for path in (work / "plan-cache").rglob("*") if path.is_file())
    print(f"kept on the disk: {kept / 1e6:,.0f} MB, {kept / plan.num_samples:.2f} bytes a sample")
    name = f"plan of {train_tokens:.0e} tokens, {num_sources:,} files"
    return [
        answer(
            f"{name}: every sample chosen", ours=seconds[f"order of {plan.num_samples:,} samples"], peer=None,
            goal=None, unit="s", better="lower", samples=plan.num_samples, documents=documents,
            plan_seconds=seconds["plan"],
            kept_seconds=seconds["the same, kept"], kept_mb=round(kept / 1e6), look_up_microseconds=look_ups,
            parallel_off_samples=audit["difference_samples"],
        ),
        answer(f"{name}: peak memory", ours=_peak_bytes() / 1e6, peer=None, goal=4000, unit="MB", better="lower"),
    ]  # fmt: skip


def _texts(num_sources: int, train_tokens: int) -> list[SourceText]:
    """Statistics as manifests have them; one file in twenty is of pairs with English."""
    random = np.random.default_rng(_SEED)
    codes = list(_SHARES)
    num_parallel = num_sources // 20
    language = np.concatenate([np.arange(100), random.integers(0, 100, num_sources - num_parallel - 100)])
    # The files of a language share unevenly what the run needs of it, and a third more.
    size = random.lognormal(0.0, 1.0, len(language))
    total = np.bincount(language, weights=size)
    size = size / total[language] * 1.3 * train_tokens * np.array(list(_SHARES.values()))[language]
    texts = []
    for number, (of, tokens) in enumerate(zip(language.tolist(), size.astype(np.int64).tolist(), strict=True)):
        documents = max(tokens // 260, 1)
        texts.append(_text(f"mono-{number}", "monolingual", (codes[of],), tokens, documents))
    size = random.lognormal(0.0, 1.0, num_parallel)
    for number, share in enumerate((size / size.sum()).tolist()):
        tokens = int(share * 0.08 * train_tokens)
        texts.append(_text(f"pairs-{number}", "parallel", (codes[0], codes[1 + number % 99]), tokens, tokens // 64))
    return texts


def _text(name: str, origin: str, languages: tuple[str, ...], tokens: int, documents: int) -> SourceText:
    content = tokens - documents * len(languages)
    by_language = {code: content // len(languages) for code in languages}
    by_language[languages[0]] += content - sum(by_language.values())
    manifest = {
        "origin": origin, "languages": list(languages), "tokens": tokens, "documents": documents,
        "tokens_by_language": by_language,
    }  # fmt: skip
    return SourceText.from_manifest(f"tokens/{name}", manifest, max_repeats=4.0)


def _check_quotas(plan: MixturePlan, order: Order, streams: Sequence[NominalStream]) -> None:
    """Before every block, every source has given its part of its group's content, to within one window."""
    members: dict[int, list[int]] = {}
    for index, item in enumerate(plan.sources):
        if item.weight:
            members.setdefault(item.group, []).append(index)
    lines = np.unique(np.linspace(0, len(order.counts) - 1, 40).astype(np.int64))
    for group in members.values():
        weights = np.array([plan.sources[index].weight for index in group], dtype=object)
        content = np.array([streams[index].content for index in group], dtype=object)
        all_weights = int(weights.sum())
        for line in lines.tolist():
            given = order.counts[line, group].astype(object) * content
            off = given * all_weights - weights * int(given.sum())
            assert max(abs(off)) < SEQ_LENGTH * all_weights, (line, group[:3])
    assert int(order.counts[-1].sum()) == plan.num_samples


def _check_audit(audit: dict[str, Any], plan: MixturePlan) -> None:
    assert audit["holds"], audit
    assert audit["tokens"] == plan.num_samples * SEQ_LENGTH == plan.train_steps * BATCH * SEQ_LENGTH
    assert audit["difference_samples"] <= 0.5
    assert sum(source["samples"] for source in audit["sources"]) == plan.num_samples
    for size in ("8", "64"):
        # Counted step by step for runs that are not too long for it.
        assert audit["data_parallel"][size].get("most_uneven_step_samples", 0) <= 8


def _look_up(plan: MixturePlan, order: Order) -> float:
    """Microseconds to find source and draw of a sample, anywhere in the run; draws checked against the counts."""
    index: Any = sample_index(plan, order)
    samples = np.random.default_rng(_SEED).integers(0, plan.num_samples, 100_000)
    begin = time.perf_counter()
    sources, draws = index.origins(samples)
    seconds = time.perf_counter() - begin
    assert (draws < order.drawn_J[sources]).all() and draws.max() > 0
    assert len(np.unique(np.stack([sources, draws]), axis=1).T) == len(np.unique(samples))
    return round(seconds / len(samples) * 1e6, 2)


def _check_permutations(texts: Sequence[SourceText]) -> None:
    """Orders of documents and windows at random positions, and the way back; the largest order is of all documents."""
    random = np.random.default_rng(_SEED)
    every = sum(text.documents for text in texts)
    for name, size in [("all", every), ("beyond", 10**12), *((text.name, text.documents) for text in texts[:100])]:
        order = _native.Permutation(order_key(_SEED, name, "documents", 0), size)
        positions = random.integers(0, size, 10_000)
        numbers = np.array([order[int(position)] for position in positions])
        assert numbers.min() >= 0 and numbers.max() < size
        assert [order.position_of(int(number)) for number in numbers] == positions.tolist()
        if size > 1 << 40:
            assert numbers.max() > 1 << 32
    # Nothing overlaps: a stretch of the order has as many different numbers as positions.
    order = _native.Permutation(order_key(_SEED, "all", "documents", 0), every)
    assert len(np.unique(order.fill(every // 2, 100_000))) == 100_000


# --- the start -------------------------------------------------------------------------------------------------------


def _start(work: Path, num_samples: int) -> list[dict[str, Any]]:
    seq_length = 16
    config_path = work / f"start-{num_samples}.json"
    config = _start_config(work / f"start-{num_samples}", num_samples, seq_length)
    config_path.write_text(json.dumps(to_tree(config)), encoding="utf-8")
    # In processes of their own: memory counts from nothing.
    argv = [sys.executable, __file__, "--opened", str(config_path)]
    cold, kept = (json.loads(run_once(Command(argv)).result.strip().splitlines()[-1]) for _ in range(2))
    for name, cost in (("built", cold), ("opened", kept)):
        print(
            f"{num_samples:,} samples {name}: {cost['seconds']:.3f} s ({cost['cpu_seconds']:.3f} CPU s), first batch "
            f"{cost['batch_seconds']:.3f} s, "
            f"{cost['growth_bytes'] / 1e6:.1f} MB over the {cost['before_bytes'] / 1e6:.0f} MB of the imports"
        )
    name = f"kept run of {num_samples:.0e} samples"
    return [
        answer(
            f"{name}: start", ours=kept["seconds"], peer=None, goal=1.0, unit="s", better="lower",
            cpu_seconds=kept["cpu_seconds"], built_seconds=cold["seconds"], built_cpu_seconds=cold["cpu_seconds"],
            built_mb=cold["growth_bytes"] / 1e6, batch_seconds=kept["batch_seconds"],
        ),
        answer(f"{name}: memory", ours=kept["growth_bytes"] / 1e6, peer=None, goal=100, unit="MB", better="lower"),
    ]  # fmt: skip


def _start_config(folder: Path, num_samples: int, seq_length: int) -> RunConfig:
    num_files = 64
    tokens = int(1.1 * num_samples * seq_length / num_files)
    languages = [f"l{number}_Latn" for number in range(8)]
    sources = []
    for number in range(num_files):
        prefix = folder / f"mono{number}"
        if not prefix.with_name(f"{prefix.name}.manifest.json").exists():
            write_hollow(prefix, lognormal_lengths(max(tokens // 500, 100), 500, number), languages[number % 8])
        sources.append(SourceConfig(prefix=str(prefix), max_repeats=3))
    pairs = folder / "pairs"
    if not pairs.with_name("pairs.manifest.json").exists():
        write_random(pairs, lognormal_lengths(max(num_samples * seq_length // 6000, 100), 60, 99), languages[:2], 5)
    sources.append(SourceConfig(prefix=str(pairs), max_repeats=3))
    return RunConfig(
        data=DataConfig(
            sources=tuple(sources), seq_length=seq_length, index_cache_dir=str(folder / "cache"),
            mixture=MixtureConfig(
                parallel_fraction=0.01, seed=_SEED, languages={code: float(Fraction(1, 8)) for code in languages}
            ),
        ),
        training=TrainingConfig(train_steps=num_samples // 1000, global_batch_size=1000, micro_batch_size=1000),
    )  # fmt: skip


def _open(config_path: Path) -> dict[str, float]:
    from megatron_xalign.config.tree import from_tree
    from megatron_xalign.data.blend import build_blend

    config = from_tree(RunConfig, json.loads(config_path.read_text(encoding="utf-8")))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    begin, cpu = time.perf_counter(), time.process_time()
    blend = build_blend(config)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    middle = len(blend) // 2
    blend.batch(range(middle, middle + 8))
    return {
        "seconds": seconds, "cpu_seconds": cpu, "batch_seconds": time.perf_counter() - begin - seconds,
        "growth_bytes": _resident("VmHWM") - before, "before_bytes": before,
    }  # fmt: skip


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in status if line.startswith(name)).split()[1]) * 1024


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    raise SystemExit(main())
