"""What verbs share: how a verb is made, and the types of their arguments."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_xalign.errors import ConfigError

Handler = Callable[[argparse.Namespace], int]


def verb(
    verbs: Any, name: str, summary: str, handler: Handler, examples: str | None = None
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=handler)
    return parser


def print_json(content: Any) -> None:
    print(json.dumps(content, ensure_ascii=False, indent=2))


def language_file(text: str) -> tuple[str, Path]:
    language, separator, path = text.partition("=")
    if not separator or not language or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form LANGUAGE=FILE, e.g. eng_Latn=en.jsonl")
    return language, Path(path)


def language_list(text: str) -> tuple[str, ...]:
    languages = tuple(part.strip() for part in text.split(","))
    if not all(languages) or len(set(languages)) != len(languages):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different codes such as eng_Latn,fin_Latn")
    return languages


def word_list(text: str) -> tuple[str, ...]:
    words = tuple(part.strip() for part in text.split(","))
    if not all(words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as src,tgt")
    return words


def language_map(text: str) -> tuple[tuple[str, str], ...]:
    entries = [part.partition("=") for part in text.split(",")]
    if not all(code.strip() and separator and meaning.strip() for code, separator, meaning in entries):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of CODE=LANGUAGE such as en=eng_Latn,fi=fin_Latn")
    return tuple((code.strip(), meaning.strip()) for code, _, meaning in entries)


def pair_rule(text: str) -> str | tuple[tuple[str, str], ...]:
    if text in ("pivot", "all"):
        return text
    pairs = [part.split("-") for part in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not pivot, all, or a list such as eng_Latn-fin_Latn,eng_Latn-deu_Latn"
        )
    return tuple((first, second) for first, second in pairs)


def size(text: str) -> int:
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


def escaped(text: str) -> str:
    # A shell hands over \\n as two characters.
    return text.replace("\\n", "\n").replace("\\t", "\t")


def fraction_list(text: str) -> tuple[float, ...]:
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


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def natural(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return value


def add_config(parser: argparse.ArgumentParser, what: str = "YAML of a run") -> None:
    parser.add_argument("config", type=Path, help=what)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change one setting, e.g. data.mixture.parallel_fraction=0.02; may be given again",
    )


def check_one_of(options: argparse.Namespace, *names: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) not in (None, False)]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} do not go together.")


def nested(assignments: Sequence[str]) -> dict[str, Any]:
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
