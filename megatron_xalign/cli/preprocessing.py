"""Text to token files: ``xalign preprocess`` and the door that takes Megatron-LM's flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_xalign.cli.arguments import (
    check_one_of,
    escaped,
    natural,
    nested,
    positive,
    print_json,
    size,
    verb,
)
from megatron_xalign.cli.records import add_records, fields_of
from megatron_xalign.errors import ConfigError

if TYPE_CHECKING:
    from megatron_xalign.data.job_settings import JobSettings
    from megatron_xalign.data.preprocess import Outcome

_PREPROCESS_EXAMPLES = """
examples:
  xalign preprocess en.jsonl --language eng_Latn --tokenizer T --output-prefix D/eng_Latn
  xalign preprocess fineweb/ --language-key lang --split-by-language --tokenizer T --output-prefix D/web
  xalign preprocess eng_Latn=en/*.parquet fin_Latn=fi.jsonl.zst --tokenizer T --output-prefix D/both
  xalign preprocess pairs.jsonl --pairs eng_Latn,fin_Latn --tokenizer T --output-prefix D/eng_Latn-fin_Latn
  xalign preprocess OPUS.en-fi.en OPUS.en-fi.fi --pairs eng_Latn,fin_Latn --language-map en=eng_Latn,fi=fin_Latn \\
      --probe probe.jsonl --duplicates near --on-error skip --max-skipped 100 --tokenizer T --output-prefix D/opus

Reads JSON lines, parquet, plain text, TSV, line-aligned files and TMX, plain or in .gz or .zst, and writes PREFIX.bin
and PREFIX.idx (Megatron's), PREFIX.spans (which language each token is), PREFIX.manifest.json (counts, checksums,
recipe) and PREFIX.log.json (what the run took). A kill loses at most the parts in progress; the same command continues.

as an array job, then its join, with the same arguments and a file system that all tasks see:
  xalign preprocess ... --task $SLURM_ARRAY_TASK_ID/16
  xalign preprocess ... --join
"""
_PREPROCESS_DATA_EXAMPLES = """
example:
  python tools/preprocess_data.py --input en.jsonl --output-prefix en --tokenizer-type HuggingFaceTokenizer \\
      --tokenizer-model T --append-eod --workers 8

A flag of Megatron-LM's that is not listed here is not carried, and an error. `xalign preprocess` can do more.
"""


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this file to the parser of ``xalign``."""
    _add_preprocess(verbs)
    _add_preprocess_data(verbs)


def _add_preprocess(verbs: Any) -> None:
    parser = verb(
        verbs, "preprocess", "turn text into Megatron token files, a language for every token",
        _preprocess, _PREPROCESS_EXAMPLES,
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="files, folders, patterns; LANGUAGE=INPUT says the language of one"
    )
    parser.add_argument("--output-prefix", type=Path, required=True, help="path of the token file without its ending")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="tokenizer.json, SentencePiece .model, .tiktoken, or their folder"
    )
    add_records(parser.add_argument_group("how the input is read"))
    _add_tokens(parser.add_argument_group("what becomes of a text"))
    _add_pairs(parser.add_argument_group("pairs"))
    group = parser.add_argument_group("what is left out")
    group.add_argument(
        "--duplicates", choices=("keep", "exact", "near"), default=None,
        help="what is the same as an earlier one, or nearly (default: exact for pairs, keep for documents)",
    )
    group.add_argument(
        "--near-threshold", type=float, default=0.8, metavar="J", help="similarity that counts as nearly (default: 0.8)"
    )
    group.add_argument("--probe", type=Path, metavar="FILE", help="held-out pairs: leave out what touches them")
    group.add_argument(
        "--on-error", choices=("raise", "skip"), default="raise", help="a malformed line stops the job, or is counted"
    )
    group.add_argument(
        "--max-skipped", type=natural, default=None, metavar="N", help="with skip: more malformed lines stop it too"
    )
    group = parser.add_argument_group("the job")
    group.add_argument("--workers", type=positive, default=None, metavar="N", help="processes (default: usable CPUs)")
    group.add_argument(
        "--part-bytes", type=size, default=None, metavar="N", help="text a worker takes at a time (default: up to 64M)"
    )
    group.add_argument(
        "--engine", choices=("auto", "reference", "gigatoken"), default="auto",
        help="auto: the fastest that gives the reference's ids on a sample of the input",
    )
    group.add_argument("--dry-run", action="store_true", help="say what would be done and about what it takes")
    group.add_argument("--json", action="store_true", help="print the manifest as JSON")
    _add_cluster(parser.add_argument_group("one job as many tasks"))


def _add_cluster(group: Any) -> None:
    group.add_argument(
        "--task", default=None, metavar="I/N", help="do only the parts of task I (0 to N-1) of N, as in an array job"
    )
    group.add_argument("--join", action="store_true", help="join what the tasks did; the same arguments otherwise")
    group.add_argument(
        "--datatrove", choices=("local", "slurm", "ray"), default=None, help="have an executor of datatrove do all that"
    )
    group.add_argument("--tasks", type=positive, default=None, metavar="N", help="with --datatrove: how many")
    group.add_argument(
        "--datatrove-option", action="append", default=[], metavar="KEY=VALUE",
        help="argument of the executor, e.g. partition=cpu, time=04:00:00, sbatch_args.account=me; may be given again",
    )


def _add_tokens(group: Any) -> None:
    group.add_argument(
        "--end-of-document", metavar="TOKEN", help="token that ends a document, where the tokenizer does not say"
    )
    group.add_argument(
        "--no-append-eod", dest="append_eod", action="store_false", help="no such token (Megatron-LM's tool's default)"
    )
    group.add_argument(
        "--parse-special-tokens", action="store_true", help="text that spells a special token becomes that token"
    )
    group.add_argument(
        "--add-special-tokens", action="store_true", help="the tokenizer's own tokens around every text"
    )
    group.add_argument("--split-by-language", action="store_true", help="a file for each language, PREFIX.LANGUAGE")
    group.add_argument("--split-sentences", action="store_true", help="one sequence a sentence, as Megatron-LM's tool")
    group.add_argument(
        "--punkt-model", type=Path, metavar="DIR", help="how sentences end; else found here or trained on the input"
    )
    group.add_argument("--keep-newlines", action="store_true", help="white space between sentences is kept")


def _add_pairs(group: Any) -> None:
    group.add_argument(
        "--direction", choices=("forward", "backward", "random"), default="random",
        help="which side of a pair comes first (default: random, fixed per pair by --seed)",
    )
    group.add_argument("--seed", type=natural, default=1234, help="of direction and pairing (default: 1234)")
    group.add_argument(
        "--template", type=escaped, default=None,
        help="text around {source} and {target} (default: '{source}\\n{target}')",
    )
    group.add_argument(
        "--pairing", choices=("aligned", "shuffled", "separated"), default="aligned",
        help="controls: the translation beside a wrong source, or as a document of its own (default: aligned)",
    )
    group.add_argument("--no-filters", action="store_true", help="keep every pair with text on both sides")
    group.add_argument("--keep-identical", action="store_true", help="keep pairs whose sides are the same")
    group.add_argument("--min-characters", type=natural, default=None, metavar="N", help="a side (default: 1)")
    group.add_argument("--max-characters", type=positive, default=None, metavar="N", help="a side (default: 5000)")
    group.add_argument("--max-tokens", type=positive, default=None, metavar="N", help="a side (default: no limit)")
    group.add_argument(
        "--max-length-ratio", type=float, default=None, metavar="R", help="longer side by shorter one (default: 3.0)"
    )
    group.add_argument(
        "--min-letter-fraction", type=float, default=None, metavar="F", help="of what is visible (default: 0.25)"
    )
    group.add_argument(
        "--check-language", choices=("off", "script", "identify"), default=None,
        help="leave out sides in another script, or that an offline identifier takes for another language (script)",
    )


_FILTER_OPTIONS = (
    "min_characters", "max_characters", "max_tokens", "max_length_ratio", "min_letter_fraction", "check_language",
)


def _preprocess_jobs(options: argparse.Namespace) -> list[JobSettings]:
    """The jobs that arguments of ``preprocess`` describe: one, or one for each of several keys."""
    from megatron_xalign.data.filters import PairFilters
    from megatron_xalign.data.job_settings import JobSettings, SentenceSettings

    filters: PairFilters | None = PairFilters(
        drop_identical=not options.keep_identical,
        **{name: getattr(options, name) for name in _FILTER_OPTIONS if getattr(options, name) is not None},
    )
    common: dict[str, Any] = {
        "inputs": tuple(options.inputs), "tokenizer": str(options.tokenizer), "input_format": options.input_format,
        "end_of_document": options.end_of_document, "append_eod": options.append_eod,
        "parse_special_tokens": options.parse_special_tokens, "add_special_tokens": options.add_special_tokens,
        "split_by_language": options.split_by_language, "filters": None if options.no_filters else filters,
        "probe": str(options.probe) if options.probe is not None else None, "duplicates": options.duplicates,
        "near_threshold": options.near_threshold, "direction": options.direction, "seed": options.seed,
        "pairing": options.pairing, "on_error": options.on_error, "max_skipped": options.max_skipped,
        "engine": options.engine, "workers": options.workers, "part_bytes": options.part_bytes,
    }
    if options.template is not None:
        common["template"] = options.template
    if options.split_sentences:
        model = str(options.punkt_model) if options.punkt_model is not None else None
        common["sentences"] = SentenceSettings(model=model, keep_newlines=options.keep_newlines)
    elif options.punkt_model is not None or options.keep_newlines:
        raise ConfigError("--punkt-model and --keep-newlines are about sentences; they go with --split-sentences.")
    prefix, several = str(options.output_prefix), len(options.json_keys) > 1 and options.pairs is None
    return [
        JobSettings(fields=fields, output_prefix=f"{prefix}_{fields.text_key}" if several else prefix, **common)
        for fields in fields_of(options)
    ]


def _preprocess(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows

    jobs = _preprocess_jobs(options)
    check_one_of(options, "dry_run", "task", "join", "datatrove")
    if options.task is not None or options.join or options.datatrove is not None:
        return _preprocess_tasks(options, jobs)
    if options.tasks is not None or options.datatrove_option:
        raise ConfigError("--tasks and --datatrove-option go with --datatrove.")
    if options.dry_run:
        plans = workflows.plan_preprocessing(jobs)
        if options.json:
            print_json(plans if len(plans) > 1 else plans[0])
        else:
            print("\n".join(map(terminal.describe_preprocessing_plan, plans)))
        return 0
    return _print_outcomes(workflows.preprocess_all(jobs), options.json)


def _print_outcomes(outcomes: Sequence[Outcome], as_json: bool) -> int:
    from megatron_xalign import terminal

    if as_json:
        manifests = [manifest for outcome in outcomes for manifest in outcome.manifests.values()]
        print_json(manifests if len(manifests) > 1 else manifests[0])
    else:
        print("\n".join(map(terminal.describe_preprocessed, outcomes)))
    return 0


def _preprocess_tasks(options: argparse.Namespace, jobs: Sequence[JobSettings]) -> int:
    from megatron_xalign import workflows

    if options.task is not None:
        done = workflows.preprocess_task(jobs, options.task)
        if options.json:
            print_json(done if len(done) > 1 else done[0])
        else:
            for job, figures in zip(jobs, done, strict=True):
                print(f"{job.output_prefix}: task {options.task}, {figures['parts']} parts done")
        return 0
    if options.join:
        return _print_outcomes(workflows.join_tasks(jobs), options.json)
    if options.tasks is None:
        raise ConfigError("--datatrove needs --tasks N: how many tasks the parts are dealt to.")
    arguments = nested(options.datatrove_option)
    outcomes = workflows.preprocess_with_datatrove(jobs, options.datatrove, options.tasks, arguments)
    if outcomes is None:
        print("submitted; the last job in the queue joins the parts")
        return 0
    return _print_outcomes(outcomes, options.json)


def _add_preprocess_data(verbs: Any) -> None:
    """The flags of Megatron-LM's tools/preprocess_data.py; not listed among the verbs."""
    parser = verbs.add_parser(
        "preprocess_data", allow_abbrev=False, prog="preprocess_data.py", epilog=_PREPROCESS_DATA_EXAMPLES,
        description="The job of Megatron-LM's tools/preprocess_data.py by its flags: the same .bin and .idx.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=_preprocess_data)
    parser.add_argument("--input", required=True, help="JSON lines, plain, .gz or .zst; a pattern for several files")
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="(text)")
    parser.add_argument("--split-sentences", action="store_true", help="one sequence a sentence, by nltk's Punkt")
    parser.add_argument("--keep-newlines", action="store_true", help="keep white space between sentences")
    parser.add_argument("--lang", default="english", help="language of the sentences, by nltk's name (english)")
    parser.add_argument("--append-eod", action="store_true", help="end every document in the end-of-document token")
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX_KEY_document or PREFIX_KEY_sentence")
    parser.add_argument("--workers", type=positive, default=None, help="processes (as many as CPUs)")
    parser.add_argument("--partitions", type=positive, default=1, help="no meaning here; documents keep their order")
    parser.add_argument("--keep-sequential-samples", action="store_true", help="always so here")
    parser.add_argument("--log-interval", type=positive, default=1000, help="no meaning here")
    parser.add_argument("--tokenizer-type", required=True)
    parser.add_argument("--tokenizer-model", required=True, help="file or folder of the tokenizer")
    parser.add_argument("--vocab-size", type=positive, default=None, help="TikTokenizer")
    parser.add_argument("--tiktoken-pattern", choices=("v1", "v2"), default="v2")
    parser.add_argument("--tiktoken-num-special-tokens", type=natural, default=1000)
    parser.add_argument("--tokenizer-special-tokens", "--tiktoken-special-tokens", nargs="+", default=None)
    special = parser.add_mutually_exclusive_group()
    special.add_argument("--tokenizer-hf-include-special-tokens", action="store_true", default=None, dest="special")
    special.add_argument("--tokenizer-hf-no-include-special-tokens", action="store_false", default=None, dest="special")
    parser.add_argument("--tokenizer-hf-use-fast", action="store_true", help="always so here")
    parser.add_argument("--use-gigatoken", action="store_true", help="used anyway where it gives the same ids")
    parser.add_argument("--language", default=None, help="ours: code of the texts' language for .spans, e.g. fin_Latn")
    parser.add_argument("--punkt-model", default=None, metavar="DIR", help="ours: how sentences end")


def _preprocess_data(options: argparse.Namespace) -> int:
    from megatron_xalign import workflows
    from megatron_xalign.data.megatron_lm import MegatronFlags, jobs_of

    flags = MegatronFlags(
        input=options.input, output_prefix=options.output_prefix, tokenizer_type=options.tokenizer_type,
        tokenizer_model=options.tokenizer_model, json_keys=tuple(options.json_keys), append_eod=options.append_eod,
        split_sentences=options.split_sentences, keep_newlines=options.keep_newlines, lang=options.lang,
        workers=options.workers, partitions=options.partitions,
        keep_sequential_samples=options.keep_sequential_samples, hf_special_tokens=options.special,
        vocab_size=options.vocab_size, tiktoken_pattern=options.tiktoken_pattern,
        tiktoken_num_special_tokens=options.tiktoken_num_special_tokens,
        special_tokens=tuple(options.tokenizer_special_tokens) if options.tokenizer_special_tokens else None,
        language=options.language, punkt_model=options.punkt_model,
    )
    return _print_outcomes(workflows.preprocess_all(jobs_of(flags)), False)
