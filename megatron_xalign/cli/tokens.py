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


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this file to the parser of ``xalign``."""
    _add_tokenizer(verbs)
    _add_verify(verbs)
    _add_merge(verbs)
    _add_stats(verbs)
    _add_pairing(verbs)


def _add_tokenizer(verbs: Any) -> None:
    parser = verb(verbs, "tokenizer", "train a tokenizer", _tokenizer_train)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    train = actions.add_parser("train", help="train one on a corpus folder, balanced by language")
    train.set_defaults(handler=_tokenizer_train)
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
    train.add_argument("--json", action="store_true", help="print the fertility report as JSON")
    add_records(train.add_argument_group("how files are read"))


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
    if is_folder and options.language is options.language_key is options.pairs is None:
        manifest = workflows.train_tokenizer(
            Path(options.corpus[0]), options.out, options.vocab_size, options.model, **further
        )
    else:
        manifest = workflows.train_tokenizer_on_files(
            options.corpus, fields_of(options), options.out, options.vocab_size, options.model,
            input_format=options.input_format, **further,
        )
    if options.json:
        print_json(manifest)
    else:
        print(terminal.describe_tokenizer(manifest))
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
    parser = verb(verbs, "merge", "join token files in order, documents, languages and all", _merge)
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
    parser = verb(verbs, "stats", "count what token files hold: documents, lengths, languages, tokens", _stats)
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
