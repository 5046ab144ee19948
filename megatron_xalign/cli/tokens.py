"""Tokenizers and what is done with token files that are there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_xalign.cli.arguments import natural, positive, print_json, size, verb
from megatron_xalign.cli.records import add_records, fields_of
from megatron_xalign.errors import ConfigError

_TOKENIZER_EXAMPLES = """
examples:
  xalign tokenizer train C T --vocab-size 4096                  a folder that `xalign corpus` made
  xalign tokenizer train eng_Latn=en/*.parquet fin_Latn=fi.jsonl.zst T --vocab-size 32000 --temperature 3.33
  xalign tokenizer fertility T held_out.jsonl --language-key lang
"""
_TRAIN_EXAMPLES = """
examples:
  xalign tokenizer train C T --vocab-size 4096                  a folder that `xalign corpus` made
  xalign tokenizer train eng_Latn=en/*.parquet fin_Latn=fi.jsonl.zst T --vocab-size 32000 --temperature 3.33
  xalign tokenizer train web.jsonl T --language-key lang --model unigram --special-tokens "<|endoftext|>=0" "<|pad|>=1"
  xalign tokenizer train web.jsonl T --language-key lang --vocab-size 50000 --fill-vocab --tensor-model-parallel-size 8

Writes T/tokenizer.json (Hugging Face tokenizers), T/manifest.json (hash, padded size, special ids, and per language
what was read, drawn and spent: tokens a word and a character, parts of characters) and the two small files that
transformers reads. Every text has a spelling: bpe works on bytes, unigram spells rare characters in bytes. Text is
drawn at random up to --max-bytes-per-language, which bounds memory; the same input, settings and seed give the same
bytes. One that is there and was made of the same input with the same settings is kept.
"""
_FERTILITY_EXAMPLES = """
examples:
  xalign tokenizer fertility T en.jsonl --language eng_Latn
  xalign tokenizer fertility llama.model pairs.jsonl --pairs eng_Latn,fin_Latn
  xalign tokenizer fertility tokenizer.json eng_Latn=en.txt zho_Hans=zh.txt --json

Any tokenizer that preprocessing takes. Languages without spaces between words have no tokens a word worth reading;
compare them by tokens a character or bytes a token. Parts of characters: tokens that are bytes of characters the
vocabulary lacks.
"""
_MERGE_EXAMPLES = """
examples:
  xalign merge D/fin D/fin_web D/fin_news
  xalign merge D/all D/megatrons_own D/other --language eng_Latn --tokenizer T

Files of one tokenizer and one kind (monolingual or parallel) become one, their documents in the order named. Memory
does not grow with them; checksums are checked on the way; the result appears whole or not at all.
"""
_STATS_EXAMPLES = """
examples:
  xalign stats D/eng_Latn D/fin_Latn
  xalign stats D/eng_Latn-fin_Latn --tokenizer T --json
"""
_VERIFY_EXAMPLES = """
examples:
  xalign verify D/eng_Latn D/fin_Latn
  xalign verify D/eng_Latn-fin_Latn --tokenizer T --sample 5

Exit code 0 if all are good, 1 if something is wrong with one; Megatron's own files are checked too.
"""
_PAIRING_EXAMPLES = """
examples:
  xalign pairing D/eng_Latn-fin_Latn D/shuffled --pairing shuffled
  xalign pairing D/eng_Latn-fin_Latn D/separated --pairing separated

shuffled: every translation beside the source of another pair of about the same length. separated: each side a document
of its own. Both have exactly the tokens of each language that the file of aligned pairs has.
"""
_ON_ERROR = "a malformed line stops the job, or is passed over and counted (default: raise)"


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this file to the parser of ``xalign``."""
    _add_tokenizer(verbs)
    _add_verify(verbs)
    _add_merge(verbs)
    _add_stats(verbs)
    _add_pairing(verbs)


def _add_tokenizer(verbs: Any) -> None:
    parser = verb(
        verbs, "tokenizer", "train a tokenizer, or see what one spends on each language", _tokenizer_train,
        _TOKENIZER_EXAMPLES,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_fertility(actions)
    train = verb(actions, "train", "train one, balanced by language", _tokenizer_train, _TRAIN_EXAMPLES)
    train.add_argument(
        "corpus", nargs="+", metavar="CORPUS",
        help="folder that `xalign corpus` made; or files, folders and patterns as `xalign preprocess` reads them",
    )
    train.add_argument("out", type=Path, help="folder to write")
    train.add_argument("--vocab-size", type=positive, default=4096, help="entries, special ones too (default: 4096)")
    train.add_argument("--model", choices=("bpe", "unigram"), default="bpe", help="default: bpe (byte-level)")
    train.add_argument("--split", default="gpt2", metavar="NAME", help="how text is cut into words (default: gpt2)")
    train.add_argument(
        "--temperature", type=float, default=None, metavar="T",
        help="a language weighs bytes ** (1 / T): 1 as the corpus has it, inf all the same (default: 3.33)",
    )
    train.add_argument(
        "--special-tokens", nargs="+", default=None, metavar="NAME[=ID]", help="they get the first ids, or those stated"
    )
    train.add_argument("--eod-token", default=None, metavar="NAME", help="the one of them that ends a document")
    train.add_argument(
        "--make-vocab-size-divisible-by", type=positive, default=128, metavar="N", help="as training pads it (128)"
    )
    train.add_argument(
        "--tensor-model-parallel-size", type=positive, default=1, metavar="N", help="of the training to come (1)"
    )
    train.add_argument("--fill-vocab", action="store_true", help="reserved tokens up to the padded size")
    train.add_argument(
        "--max-bytes-per-language", type=size, default=None, metavar="N", help="text drawn at random (default: 200 MB)"
    )
    train.add_argument("--seed", type=natural, default=0, help="of that draw (default: 0)")
    train.add_argument("--on-error", choices=("raise", "skip"), default="raise", help=_ON_ERROR)
    train.add_argument("--dry-run", action="store_true", help="say what would be read and made; touch nothing")
    train.add_argument("--json", action="store_true", help="print the fertility report as JSON")
    add_records(train.add_argument_group("how files are read"))


def _add_fertility(actions: Any) -> None:
    parser = verb(
        actions, "fertility", "count what a tokenizer spends on each language", _tokenizer_fertility,
        _FERTILITY_EXAMPLES,
    )
    parser.add_argument("tokenizer", type=Path, help="tokenizer.json, SentencePiece .model, .tiktoken, or their folder")
    parser.add_argument("corpus", nargs="+", metavar="INPUT", help="files, folders and patterns")
    parser.add_argument(
        "--max-bytes-per-language", type=size, default=10_000_000, metavar="N",
        help="text drawn at random (default: 10 MB)",
    )
    parser.add_argument("--seed", type=natural, default=0, help="of that draw (default: 0)")
    parser.add_argument("--on-error", choices=("raise", "skip"), default="raise", help=_ON_ERROR)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_records(parser.add_argument_group("how files are read"))


def _tokenizer_fertility(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows

    report = workflows.measure_fertility(
        options.tokenizer, options.corpus, fields_of(options), input_format=options.input_format,
        on_error=options.on_error, max_bytes_per_language=options.max_bytes_per_language, seed=options.seed,
    )
    if options.json:
        print_json(report)
    else:
        print(terminal.describe_fertility(report))
    return 0


def _tokenizer_train(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows

    further: dict[str, Any] = {
        "split": options.split, "make_vocab_size_divisible_by": options.make_vocab_size_divisible_by,
        "tensor_model_parallel_size": options.tensor_model_parallel_size, "fill_vocab": options.fill_vocab,
        "seed": options.seed,
    }
    for name in ("temperature", "max_bytes_per_language"):
        if getattr(options, name) is not None:
            further[name] = getattr(options, name)
    if options.eod_token is not None:
        further["end_of_document"] = options.eod_token
    if options.special_tokens is not None:
        further["special_tokens"] = _special_tokens(options.special_tokens)
    elif options.eod_token is not None:
        further["special_tokens"] = (options.eod_token,)
    is_folder = len(options.corpus) == 1 and "=" not in options.corpus[0]
    is_corpus = is_folder and options.language is options.language_key is options.pairs is None
    if options.dry_run:
        return _tokenizer_plan(options, is_corpus)
    if is_corpus:
        manifest = workflows.train_tokenizer(
            Path(options.corpus[0]), options.out, options.vocab_size, options.model, **further
        )
    else:
        manifest = workflows.train_tokenizer_on_files(
            options.corpus, fields_of(options), options.out, options.vocab_size, options.model,
            input_format=options.input_format, on_error=options.on_error, **further,
        )
    if options.json:
        print_json(manifest)
    else:
        print(terminal.describe_tokenizer(manifest))
    return 0


def _tokenizer_plan(options: argparse.Namespace, is_corpus: bool) -> int:
    from megatron_xalign import terminal, workflows

    if is_corpus:
        files = workflows.corpus_files(Path(options.corpus[0]))
    else:
        files = workflows.input_files(options.corpus, fields_of(options), input_format=options.input_format)
    multiple = options.make_vocab_size_divisible_by * options.tensor_model_parallel_size
    facts = {
        "out": str(options.out), "model": options.model, "vocab_size": options.vocab_size,
        "padded_vocab_size": -(-options.vocab_size // multiple) * multiple,
    }
    if options.json:
        print_json({**facts, "inputs": files})
    else:
        print(terminal.describe_tokenizer_plan(files, facts))
    return 0


def _special_tokens(words: Sequence[str]) -> tuple[str, ...] | dict[str, int]:
    """Names, or the id of each name where ids are given."""
    entries = [word.rpartition("=") for word in words]
    if not any(name and number.isdecimal() for name, _, number in entries):
        return tuple(words)
    if not all(name and number.isdecimal() for name, _, number in entries):
        raise ConfigError("--special-tokens has ids for some names and not for others; give all or none: NAME=ID.")
    return {name: int(number) for name, _, number in entries}


def _add_verify(verbs: Any) -> None:
    parser = verb(
        verbs, "verify", "check a token file: sizes, checksums, ids, end of documents, languages",
        _verify, _VERIFY_EXAMPLES,
    )
    parser.add_argument("prefix", type=Path, nargs="+", help="token files, without their ending")
    parser.add_argument("--tokenizer", type=Path, default=None, help="check that this one made it, and show text")
    parser.add_argument("--sample", type=natural, default=3, metavar="N", help="documents to show (default: 3)")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def _verify(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows

    reports = [workflows.verify(prefix, options.tokenizer, options.sample) for prefix in options.prefix]
    if options.json:
        print_json(reports)
    else:
        print("\n".join(map(terminal.describe_verified, reports)))
    bad = [report for report in reports if not report["good"]]
    if bad:
        first = bad[0]["problems"][0]["message"]
        print(f"xalign: error: {len(bad)} of {len(reports)} token files: {first}", file=sys.stderr)
    return 1 if bad else 0


def _add_merge(verbs: Any) -> None:
    parser = verb(verbs, "merge", "join token files in order, documents, languages and all", _merge, _MERGE_EXAMPLES)
    parser.add_argument("out", type=Path, help="token file to write, without its ending")
    parser.add_argument("prefix", type=Path, nargs="+", help="token files, in order")
    parser.add_argument("--language", default=None, help="of files without companions (Megatron's own)")
    parser.add_argument(
        "--origin", choices=("monolingual", "parallel"), default="monolingual", help="if none of them has companions"
    )
    parser.add_argument("--tokenizer", type=Path, default=None, help="that made them, if none has companions")
    parser.add_argument("--overwrite", action="store_true", help="replace a token file that is there")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def _merge(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows

    manifest = workflows.merge(
        options.out, options.prefix, tokenizer=options.tokenizer, language=options.language, origin=options.origin,
        replace=options.overwrite,
    )
    if options.json:
        print_json(manifest)
    else:
        print(terminal.describe_token_file(manifest, options.out))
    return 0


def _add_stats(verbs: Any) -> None:
    parser = verb(
        verbs, "stats", "count what token files hold: documents, lengths, languages, tokens", _stats, _STATS_EXAMPLES
    )
    parser.add_argument("prefix", type=Path, nargs="+", help="token files, without their ending")
    parser.add_argument("--tokenizer", type=Path, default=None, help="shows tokens as text")
    parser.add_argument("--language", default=None, help="of files without companions (Megatron's own)")
    parser.add_argument("--json", action="store_true", help="print all counts as JSON")


def _stats(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows

    counts = [
        workflows.token_statistics(prefix, tokenizer=options.tokenizer, language=options.language)
        for prefix in options.prefix
    ]
    if options.json:
        print_json(counts)
    else:
        print("\n".join(map(terminal.describe_statistics, counts)))
    return 0


def _add_pairing(verbs: Any) -> None:
    parser = verb(
        verbs, "pairing", "make a control of a token file of pairs: the translation elsewhere",
        _pairing, _PAIRING_EXAMPLES,
    )
    parser.add_argument("aligned", type=Path, help="token file of pairs, without its ending")
    parser.add_argument("out", type=Path, help="token file to write; one that is there is replaced")
    parser.add_argument("--pairing", choices=("shuffled", "separated"), required=True, help="which control")
    parser.add_argument("--seed", type=natural, default=1234, help="of shuffled (default: 1234)")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def _pairing(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows

    manifest = workflows.make_pairing(options.aligned, options.out, options.pairing, options.seed)
    if options.json:
        print_json(manifest)
    else:
        print(terminal.describe_token_file(manifest, options.out))
    return 0
