"""Small corpora, tokenizers and jobs that tests of preprocessing share."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_xalign.data.inputs import Fields
from megatron_xalign.data.job_settings import JobSettings

LANGUAGES = ("eng_Latn", "fin_Latn")
KINDS = ("bin", "idx", "spans", "manifest.json")
_TEXT = {
    "eng_Latn": "the cat sits in a tree and sleeps while small birds sing of snow don't 12345 naïve café — end",
    "fin_Latn": "kissa istuu puussa ja nukkuu kun pienet linnut laulavat lumesta yö äiti öljy 漢字 😀 loppu",
}
_WORDS = {language: text.split() for language, text in _TEXT.items()}


def sentence(rng: random.Random, language: str, num_words: int) -> str:
    """Words at random."""
    return " ".join(rng.choices(_WORDS[language], k=num_words)) + rng.choice([".", "!", "?", "\n", ""])


def documents(count: int, language: str, seed: int = 0) -> list[dict[str, Any]]:
    """Records of a monolingual corpus."""
    rng = random.Random(f"{seed} {language}")
    return [{"id": f"{language}-{n}", "text": sentence(rng, language, rng.randint(4, 60))} for n in range(count)]


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Records of a corpus of pairs, no two the same."""
    rng = random.Random(seed)
    made = []
    for n in range(count):
        num_words = rng.randint(8, 24)
        texts = {language: f"{sentence(rng, language, num_words).strip()} number {n}" for language in LANGUAGES}
        made.append({"id": f"p{n}", "texts": texts})
    return made


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    """JSON lines; a string is written as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def monolingual_job(
    inputs: Sequence[Path | str], prefix: Path, tokenizer: Path, language: str | None = "fin_Latn", **options: Any
) -> JobSettings:
    """A job on documents, in this process unless told otherwise."""
    fields = options.pop("fields", None) or Fields(kind="monolingual", language=language)
    return JobSettings(
        inputs=tuple(map(str, inputs)), output_prefix=str(prefix), tokenizer=str(tokenizer), fields=fields,
        **{"workers": 1, **options},
    )


def pairs_job(inputs: Sequence[Path | str], prefix: Path, tokenizer: Path, **options: Any) -> JobSettings:
    """A job on pairs, in this process unless told otherwise."""
    fields = options.pop("fields", None) or Fields(kind="pairs", languages=LANGUAGES)
    return JobSettings(
        inputs=tuple(map(str, inputs)), output_prefix=str(prefix), tokenizer=str(tokenizer), fields=fields,
        **{"workers": 1, **options},
    )


def contents(prefix: Path, kinds: Sequence[str] = KINDS) -> dict[str, bytes]:
    """What the files of a prefix hold."""
    return {kind: Path(f"{prefix}.{kind}").read_bytes() for kind in kinds}


def names(folder: Path) -> set[str]:
    """What lies in a folder."""
    return {path.name for path in folder.iterdir()}
