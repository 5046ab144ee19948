"""Models changed while they run: text pushed towards a language, neurons switched off."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_xalign.cli.arguments import natural, positive, print_json, verb
from megatron_xalign.errors import ConfigError

_EXAMPLES = """
examples:
  xalign steer RUN --from eng_Latn --to fin_Latn --pairs C/probe.jsonl --prompts prompts.txt --out S
  xalign steer HF_FOLDER --from eng_Latn --to fin_Latn --stats RUN/neurons/step-001000 --prompts p.jsonl --out S

The strength is chosen on the first --dev prompts and reported on the --test prompts after them. A judge is asked only
where --judge-url is given; --dry-run shows what it would cost, and --yes says that it may be asked.
"""


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this file to the parser of ``xalign``."""
    _add_steer(verbs)
    _add_ablate(verbs)


def _add_ablate(verbs: Any) -> None:
    parser = verb(verbs, "ablate", "switch off each language's neurons and measure every language's loss", _ablate)
    parser.add_argument("model", type=Path, help="run folder, checkpoint, or Hugging Face folder")
    parser.add_argument("--stats", type=Path, required=True, help="RUN/neurons/step-N, in which the neurons are found")
    parser.add_argument("--pairs", type=Path, required=True, help="translations whose loss is measured (probe file)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; must not exist")
    parser.add_argument("--find", choices=("lape", "average_precision"), default="lape", help="how to find them (lape)")
    parser.add_argument("--count", type=positive, default=1000, help="neurons a language by average precision (1000)")
    parser.add_argument("--max-pairs", type=positive, default=500, help="pairs whose loss is measured (500)")
    parser.add_argument("--batch-size", type=positive, default=16, help="sentences at once (16)")
    parser.add_argument("--seed", type=natural, default=1234, help="of the random neurons and the resamples (1234)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _ablate(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows

    report = workflows.ablate(
        workflows.AblateOptions(
            model=options.model, stats=options.stats, pairs=options.pairs, find=options.find, count=options.count,
            max_pairs=options.max_pairs, batch_size=options.batch_size, seed=options.seed,
        ),
        options.out,
    )  # fmt: skip
    if options.json:
        print_json(report)
    else:
        print(terminal.describe_ablation(report, options.out))
    return 0


def _add_steer(verbs: Any) -> None:
    parser = verb(verbs, "steer", "steer a model's text towards a language and measure what comes", _steer, _EXAMPLES)
    parser.add_argument("model", type=Path, help="run folder, checkpoint, or Hugging Face folder")
    parser.add_argument("--from", dest="source", required=True, metavar="LANGUAGE", help="language of the prompts")
    parser.add_argument("--to", dest="target", required=True, metavar="LANGUAGE", help="language to steer towards")
    parser.add_argument("--prompts", type=Path, required=True, help="one a line, or .jsonl with text")
    parser.add_argument("--pairs", type=Path, default=None, help="translations to make control vectors of (probe file)")
    parser.add_argument("--stats", type=Path, default=None, help="or statistics of this model: RUN/neurons/step-N")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--strengths", type=_numbers, default=(0.5, 1.0, 2.0, 4.0), help="default 0.5,1,2,4")
    parser.add_argument("--dev", type=positive, default=50, help="prompts to choose the strength on (50)")
    parser.add_argument("--test", type=positive, default=200, help="other prompts to report on (200)")
    parser.add_argument("--max-pairs", type=positive, default=1000, help="pairs the vectors are made of (1000)")
    parser.add_argument("--new-tokens", type=positive, default=30, help="tokens of a continuation (30)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the most likely token (0.7)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus to draw from (0.95)")
    parser.add_argument("--seed", type=natural, default=42, help="of the draws (42)")
    parser.add_argument("--batch-size", type=positive, default=16, help="prompts at once (16)")
    parser.add_argument("--plain", action="store_true", help="only add, without restoring each state's norm")
    parser.add_argument("--layers", type=_layers, default=None, help="0-based layers to steer, e.g. 4,5,6 (all)")
    parser.add_argument("--uncached", action="store_true", help="a checkpoint in Megatron's own model, without a cache")
    parser.add_argument("--judge-url", default=None, help="OpenAI-compatible server, e.g. http://localhost:8000/v1")
    parser.add_argument("--judge-model", default=None, help="name of the judge's model")
    parser.add_argument("--judge-key-env", default=None, metavar="NAME", help="environment variable with its key")
    parser.add_argument("--judge-prices", type=_numbers, default=None, metavar="IN,OUT", help="of a million tokens")
    parser.add_argument("--yes", action="store_true", help="ask the judge without a dry run first")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and what a judge would cost")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _steer(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows

    settings = workflows.SteerOptions(
        model=options.model, source=options.source, target=options.target, prompts=options.prompts,
        pairs=options.pairs, stats=options.stats, strengths=options.strengths, num_dev=options.dev,
        num_test=options.test, max_pairs=options.max_pairs, max_new_tokens=options.new_tokens,
        temperature=options.temperature, top_p=options.top_p, seed=options.seed, batch_size=options.batch_size,
        norm_preserving=not options.plain, layers=options.layers, uncached=options.uncached,
        judge=_judge(options),
    )  # fmt: skip
    plan = workflows.plan_steering(settings)
    if options.dry_run:
        print_json(plan)
        return 0
    if settings.judge is not None and not options.yes:
        raise ConfigError(
            f"asking the judge takes {plan['judge']['in_words']}; give --yes if that is meant, or --dry-run for more."
        )
    report = workflows.steer(settings, options.out)
    if options.json:
        print_json(report)
    else:
        print(terminal.describe_steering(report, options.out))
    return 0


def _judge(options: argparse.Namespace) -> dict[str, Any] | None:
    if options.judge_url is None:
        return None
    if options.judge_model is None:
        raise ConfigError("--judge-url needs --judge-model, the name its server knows the judge by.")
    prices = options.judge_prices or (None, None)
    if len(prices) != 2:
        raise ConfigError("--judge-prices takes two numbers: of a million tokens read and of a million written.")
    return {
        "base_url": options.judge_url, "model": options.judge_model, "api_key_env": options.judge_key_env,
        "input_price": prices[0], "output_price": prices[1],
    }  # fmt: skip


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = (float("nan"),)
    if not all(abs(number) < float("inf") for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.5,1,2")
    return numbers


def _layers(text: str) -> tuple[int, ...]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 4,5,6")
    return tuple(int(part) for part in text.split(","))
