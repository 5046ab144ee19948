"""How fast is text turned into token files, against Megatron-LM's own tool and against the tokenizer engines alone?

    python benchmarks/preprocess.py [--quick] [--corpus FILE.jsonl --tokenizer FOLDER] [--megatron-lm PATH]

End to end, with everything on that is on for users: input checked line by line, languages, side files, checksums, parts
written atomically. One file of JSON lines goes in; whole process trees are measured, start-up included. The raw engines
get the texts in memory and drop the ids; each round they are made anew, since gigatoken remembers words and would be
five times as fast on text it has seen. Contestants take turns; the median counts. MB is 10**6 bytes of UTF-8 text.

"gigatoken by hand" is the script one writes in its place (gigatoken_by_hand.py): one process, start-up included, that
reads the lines with the standard library's json and writes ids and lengths with NumPy; nothing is checked.

`--megatron-lm` is a checkout of Megatron-LM; `--megatron-python` an interpreter that runs its tools/preprocess_data.py
(it needs `six` and `triton` beside megatron-core and transformers). Without it the peer is left out.
Without `--corpus` text installed on this machine is used (see installed_text.py); without `--tokenizer` a byte-level
BPE of 32,000 entries with the split of Llama 3 is trained on the corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from installed_text import default_folders, make_corpus
from measure import Command, Contestant, Cost, answer, interleaved, print_costs, print_result

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"
# The engines get as many texts at a time as our job gives them, about.
_BATCH_BYTES = 2_000_000


def main() -> int:
    """Measure and print."""
    options = _options()
    work = options.work or Path(tempfile.mkdtemp(prefix="xalign-benchmark-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        corpus, tokenizer = _material(options, work)
        texts = [json.loads(line)["text"] for line in corpus.open(encoding="utf-8")]
        print(f"{corpus}: {len(texts):,} documents, {_size(texts) / 1e6:.1f} MB of text; {tokenizer}")
        rounds = options.rounds or (1 if options.quick else 3)
        costs = interleaved(_contestants(options, corpus, tokenizer, texts, work), rounds)
        print_costs(costs)
        print_result(_answers(costs, texts, work, options))
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a small corpus, one round: is it runnable?")
    parser.add_argument("--corpus", type=Path, default=None, help='JSON lines with a "text"')
    parser.add_argument("--tokenizer", type=Path, default=None, help="folder with a byte-level BPE's tokenizer.json")
    parser.add_argument("--megatron-lm", type=Path, default=None, help="checkout of Megatron-LM")
    parser.add_argument("--megatron-python", default=sys.executable, help="interpreter for its tool (this one)")
    parser.add_argument("--workers", type=int, default=2, help="processes of ours and of the tool (2)")
    parser.add_argument("--rounds", type=int, default=None, help="(3; 1 with --quick)")
    parser.add_argument("--megabytes", type=float, default=None, help="of a corpus made here (150; 2 with --quick)")
    parser.add_argument("--only-fast", action="store_true", help="leave the reference engine out, ours and alone")
    parser.add_argument("--work", type=Path, default=None, help="folder to work in, and keep (a temporary one)")
    return parser.parse_args()


def _material(options: argparse.Namespace, work: Path) -> tuple[Path, Path]:
    corpus = options.corpus
    if corpus is None:
        corpus = work / "corpus.jsonl"
        megabytes = options.megabytes or (2.0 if options.quick else 150.0)
        made = make_corpus(corpus, default_folders(), int(megabytes * 1e6))
        print(f"corpus of installed text: {json.dumps(made)}")
    tokenizer = options.tokenizer
    if tokenizer is None:
        tokenizer = work / "tokenizer"
        _train(corpus, tokenizer, 4_000 if options.quick else 32_000)
    return corpus, tokenizer


def _train(corpus: Path, folder: Path, vocab_size: int, most_bytes: int = 30_000_000) -> None:
    """A folder that transformers, tokenizers and we read alike."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    every = max(corpus.stat().st_size // most_bytes, 1)

    def sample() -> Iterator[str]:
        with corpus.open(encoding="utf-8") as file:
            for number, line in enumerate(file):
                if number % every == 0:
                    yield json.loads(line)["text"]

    tokenizer.train_from_iterator(sample(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END, "model_max_length": 10**12}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _contestants(
    options: argparse.Namespace, corpus: Path, tokenizer: Path, texts: Sequence[str], work: Path
) -> dict[str, Contestant]:
    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    runs: dict[str, Contestant] = {"xalign, auto": _ours(corpus, tokenizer, work / "auto", options.workers, "auto")}
    if not options.only_fast:
        runs["xalign, reference"] = _ours(corpus, tokenizer, work / "reference", options.workers, "reference")
        runs["tokenizers alone"] = _tokenizers_alone(file, texts)
    gigatoken = _gigatoken_alone(file, texts)
    if gigatoken is not None:
        runs["gigatoken alone"] = gigatoken
        runs["gigatoken by hand"] = _by_hand(corpus, file, work / "by-hand")
    if not options.quick:
        # What a job takes whatever its size is in both runs, and not in their difference.
        some = texts[: len(texts) // 4]
        quarter = work / "quarter.jsonl"
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in some)
        quarter.write_text("".join(lines), encoding="utf-8")
        runs["xalign, auto, a quarter"] = _ours(quarter, tokenizer, work / "quarter", options.workers, "auto")
        if not options.only_fast:
            runs["tokenizers alone, a quarter"] = _tokenizers_alone(file, some)
        if gigatoken is not None:
            runs["gigatoken by hand, a quarter"] = _by_hand(quarter, file, work / "by-hand-quarter")
            runs["gigatoken alone, a quarter"] = _required(_gigatoken_alone(file, some))
    if options.megatron_lm is not None:
        runs["Megatron-LM's tool"] = _megatron(options, corpus, tokenizer, work / "megatron")
    return runs


def _ours(corpus: Path, tokenizer: Path, folder: Path, workers: int, engine: str) -> Command:
    return Command(
        [
            sys.executable, "-m", "megatron_xalign", "preprocess", str(corpus), "--language", "und", "--tokenizer",
            str(tokenizer), "--end-of-document", _END, "--output-prefix", str(folder / "text"), "--workers",
            str(workers), "--engine", engine,
        ],
        before=lambda: _empty(folder),
        env={"XALIGN_PROGRESS": "0"},
    )


def _by_hand(corpus: Path, file: Path, folder: Path) -> Command:
    script = Path(__file__).with_name("gigatoken_by_hand.py")
    return Command(
        [sys.executable, str(script), str(corpus), str(file), str(folder / "text")], before=lambda: _empty(folder)
    )


def _megatron(options: argparse.Namespace, corpus: Path, tokenizer: Path, folder: Path) -> Command:
    return Command(
        [
            options.megatron_python, str(options.megatron_lm / "tools" / "preprocess_data.py"), "--input", str(corpus),
            "--output-prefix", str(folder / "text"), "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model",
            str(tokenizer), "--append-eod", "--workers", str(options.workers), "--log-interval", "1000000",
        ],
        before=lambda: _empty(folder),
        # Its own megatron.core, not one that is installed beside it.
        env={"PYTHONPATH": str(options.megatron_lm), "OMP_NUM_THREADS": "1"},
    )


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _batches(texts: Sequence[str]) -> list[list[str]]:
    batches: list[list[str]] = [[]]
    size = 0
    for text in texts:
        if size >= _BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(text)
        size += len(text.encode())
    return batches


def _tokenizers_alone(file: Path, texts: Sequence[str]) -> Callable[[], int]:
    from tokenizers import Tokenizer

    batches = _batches(texts)

    def run() -> int:
        engine = Tokenizer.from_file(str(file))
        tokens = 0
        for batch in batches:
            tokens += sum(map(len, engine.encode_batch_fast(batch, add_special_tokens=False)))
        return tokens

    return run


def _gigatoken_alone(file: Path, texts: Sequence[str]) -> Callable[[], int] | None:
    try:
        import gigatoken
    except ImportError:
        print("gigatoken is not installed; left out.")
        return None
    import awkward

    batches = _batches(texts)

    def run() -> int:
        engine = gigatoken.Tokenizer(str(file))
        return sum(int(awkward.count(engine.encode_batch(batch))) for batch in batches)

    return run


def _required(function: Callable[[], int] | None) -> Callable[[], int]:
    assert function is not None
    return function


def _answers(
    costs: dict[str, Cost], texts: Sequence[str], work: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    text_bytes = _size(texts)

    def speed(name: str) -> float | None:
        return text_bytes / 1e6 / costs[name].cpu_seconds if name in costs else None

    def speed_beyond(name: str) -> float | None:
        if f"{name}, a quarter" not in costs:
            return None
        more = text_bytes - _size(texts[: len(texts) // 4])
        return more / 1e6 / (costs[name].cpu_seconds - costs[f"{name}, a quarter"].cpu_seconds)

    manifest = json.loads((work / "auto" / "text.manifest.json").read_text(encoding="utf-8"))
    engine = manifest["engine"]["name"]
    raw = "gigatoken alone" if engine == "gigatoken" else "tokenizers alone"
    ours = speed("xalign, auto")
    assert ours is not None
    hashes = {
        name: _sha256(path)
        for name, path in (
            ("auto", work / "auto" / "text.bin"), ("reference", work / "reference" / "text.bin"),
            ("by hand", work / "by-hand" / "text.bin"),
            ("Megatron-LM", work / "megatron" / "text_text_document.bin"),
        )
        if path.exists()
    }
    more = {
        "engine": engine, "same_bin_file": len(set(hashes.values())) == 1, "compared": sorted(hashes),
        "text_MB": round(text_bytes / 1e6, 1), "workers": options.workers, "quick": options.quick,
    }
    unit = "MB of text per CPU second"
    answers = [
        answer(
            "preprocess, end to end, against Megatron-LM's tool", ours=ours, peer=speed("Megatron-LM's tool"),
            goal=5.0 if options.megatron_lm else None, unit=unit, better="higher", **more,
        ),
        answer(
            f"preprocess, end to end, against the engine it used ({engine}) alone", ours=ours, peer=speed(raw),
            goal=0.8, unit=unit, better="higher",
        ),
        answer(
            "preprocess, wall time, against Megatron-LM's tool",
            ours=text_bytes / 1e6 / costs["xalign, auto"].wall_seconds,
            peer=_wall(costs, text_bytes), goal=None, unit="MB of text per second", better="higher",
        ),
        answer(
            "preprocess, tokens", ours=manifest["tokens"] / costs["xalign, auto"].cpu_seconds, peer=None, goal=None,
            unit="tokens per CPU second", better="higher",
        ),
        answer(
            "preprocess, peak memory of all its processes", ours=costs["xalign, auto"].peak_rss_bytes / 1e6, peer=None,
            goal=1000.0, unit="MB", better="lower",
        ),
    ]
    reference = speed("xalign, reference")
    if reference is not None:
        answers.append(
            answer(
                "preprocess with the reference engine, against tokenizers alone", ours=reference,
                peer=speed("tokenizers alone"), goal=0.8, unit=unit, better="higher",
            )
        )
    by_hand = speed("gigatoken by hand")
    if by_hand is not None:
        answers.append(
            answer(
                "preprocess, end to end, against a script that uses gigatoken", ours=ours, peer=by_hand, goal=None,
                unit=unit, better="higher",
            )
        )
    beyond = speed_beyond("xalign, auto")
    if beyond is not None and by_hand is not None:
        answers.append(
            answer(
                "preprocess, beyond what a job takes whatever its size, against a script that uses gigatoken",
                ours=beyond, peer=speed_beyond("gigatoken by hand"), goal=None, unit=unit, better="higher",
            )
        )
    if beyond is not None:
        answers.append(
            answer(
                f"preprocess, beyond what a job takes whatever its size, against the engine it used ({engine}) alone",
                ours=beyond, peer=speed_beyond(raw), goal=0.8, unit=unit, better="higher",
            )
        )
    return answers


def _wall(costs: dict[str, Cost], text_bytes: int) -> float | None:
    name = "Megatron-LM's tool"
    return text_bytes / 1e6 / costs[name].wall_seconds if name in costs else None


def _size(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    # The raw engine uses threads where ours uses processes; both are told of the same number of cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    raise SystemExit(main())
