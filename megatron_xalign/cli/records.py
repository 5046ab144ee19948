"""How records are read: the options that every verb that reads corpora has."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from megatron_xalign.cli.arguments import (
    language_list,
    language_map,
    pair_rule,
    positive,
    word_list,
)
from megatron_xalign.errors import ConfigError

if TYPE_CHECKING:
    from megatron_xalign.data.inputs import Fields


def add_records(group: Any) -> None:
    kind = group.add_mutually_exclusive_group()
    kind.add_argument("--language", help="monolingual documents in this language, e.g. fin_Latn")
    kind.add_argument("--language-key", metavar="KEY", help="monolingual; each record says its language under this key")
    kind.add_argument(
        "--pairs", type=language_list, metavar="A,B[,C]", help="translated pairs of these languages, in this order"
    )
    group.add_argument(
        "--languages", type=language_list, default=(), metavar="A,B", help="with --language-key: only these"
    )
    group.add_argument(
        "--language-map", type=language_map, default=(), metavar="C=A,D=B",
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
        "--side-keys", type=word_list, default=(), metavar="K,L", help="pairs: keys or columns of the sides: src,tgt"
    )
    group.add_argument(
        "--side-language-keys", type=word_list, default=(), metavar="K,L", help="pairs: keys of the sides' languages"
    )
    group.add_argument(
        "--pair-rule", type=pair_rule, default="pivot", metavar="RULE",
        help="of three languages or more: pivot (the first with each other), all, or A-B,A-C,... (default: pivot)",
    )
    group.add_argument(
        "--text-unit", choices=("line", "paragraph", "file"), default="line", help="plain text: one document (line)"
    )
    group.add_argument("--tsv-header", action="store_true", help="the first line of a TSV names its columns")
    group.add_argument(
        "--max-line-bytes", type=positive, default=1 << 30, metavar="N",
        help="a longer line (or plain-text document) counts as malformed (default: 1 GiB)",
    )


def fields_of(options: argparse.Namespace) -> list[Fields]:
    """How records are read; one for each of several keys."""
    from megatron_xalign.data.inputs import Fields

    common: dict[str, Any] = {
        "id_key": options.id_key, "language_map": options.language_map, "text_unit": options.text_unit,
        "tsv_header": options.tsv_header, "max_line_bytes": options.max_line_bytes,
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
