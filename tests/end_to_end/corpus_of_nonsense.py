"""A corpus in two made-up languages with a word-for-word dictionary, for tests that need no network."""

from __future__ import annotations

import json
import random
from pathlib import Path

LANGUAGES = ("eng_Latn", "fin_Latn")


def write_corpus(folder: Path, num_pairs: int = 900, num_documents: int = 240, seed: int = 7) -> Path:
    """Write pairs.jsonl and a LANGUAGE.jsonl per language; translations share no word."""
    rng = random.Random(seed)
    words = {
        "eng_Latn": [rng.choice("bdfgklmnprst") + rng.choice("aeiou") + rng.choice("bdgklmnprst") for _ in range(160)],
        "fin_Latn": [
            "".join(rng.choice(part) for part in ("hjkmnprstv", ["ää", "öy", "ie", "uo"], "klmnrst", "aäiou"))
            for _ in range(160)
        ],
    }

    def sentence(length: int) -> list[int]:
        return [min(int(rng.expovariate(0.03)), 159) for _ in range(length)]

    def text(language: str, numbers: list[int]) -> str:
        return " ".join(words[language][number] for number in numbers).capitalize() + "."

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for number in range(num_pairs):
            meaning = sentence(rng.randint(6, 14))
            texts = {language: text(language, meaning) for language in LANGUAGES}
            print(json.dumps({"id": f"pair-{number}", "texts": texts}, ensure_ascii=False), file=file)
    for language in LANGUAGES:
        with (folder / f"{language}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(num_documents):
                body = " ".join(text(language, sentence(rng.randint(6, 14))) for _ in range(rng.randint(3, 12)))
                print(json.dumps({"id": f"{language}-{number}", "text": body}, ensure_ascii=False), file=file)
    return folder
