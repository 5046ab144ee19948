"""How the report writes numbers, languages and layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from megatron_xalign.config import MixtureConfig

_NAMES = {
    "arb": "Arabic", "ben": "Bengali", "bul": "Bulgarian", "cat": "Catalan", "ces": "Czech", "cym": "Welsh",
    "dan": "Danish", "deu": "German", "ell": "Greek", "eng": "English", "epo": "Esperanto", "est": "Estonian",
    "eus": "Basque", "fin": "Finnish", "fra": "French", "gle": "Irish", "heb": "Hebrew", "hin": "Hindi",
    "hrv": "Croatian", "hun": "Hungarian", "ind": "Indonesian", "isl": "Icelandic", "ita": "Italian",
    "jpn": "Japanese", "kor": "Korean", "lit": "Lithuanian", "lvs": "Latvian", "nld": "Dutch", "nob": "Norwegian",
    "pes": "Persian", "pol": "Polish", "por": "Portuguese", "ron": "Romanian", "rus": "Russian", "slk": "Slovak",
    "slv": "Slovenian", "spa": "Spanish", "srp": "Serbian", "swe": "Swedish", "swh": "Swahili", "tam": "Tamil",
    "tha": "Thai", "tur": "Turkish", "ukr": "Ukrainian", "vie": "Vietnamese", "zho": "Chinese",
}  # fmt: skip

NO_BREAK = "\u00a0"


def language_name(code: str) -> str:
    """``fin_Latn`` -> ``Finnish``; a code that is not in the table stays as it is."""
    return _NAMES.get(code.partition("_")[0], code)


def pair_name(pair: str, languages: Sequence[str]) -> str:
    """``eng_Latn-fin_Latn`` -> ``English-Finnish``; the languages are needed since a code may hold a hyphen."""
    for one, other in itertools.permutations(languages, 2):
        if f"{one}-{other}" == pair:
            return f"{language_name(one)}-{language_name(other)}"
    return pair


def direction_name(subject: str, languages: Sequence[str]) -> str:
    """``eng_Latn-fin_Latn`` -> ``English to Finnish``; a language by itself by its name."""
    for one, other in itertools.permutations(languages, 2):
        if f"{one}-{other}" == subject:
            return f"{language_name(one)} to {language_name(other)}"
    return language_name(subject)


def layer_name(layer: int) -> str:
    """``emb`` for the embedding output, else the 0-based number."""
    return "emb" if layer < 0 else str(layer)


def layer_words(layer: int) -> str:
    """The layer in a sentence."""
    return "the embedding output" if layer < 0 else f"layer {layer}"


def thousands(value: float, digits: int = 0) -> str:
    """1234567 -> ``1,234,567``."""
    return f"{value:,.{digits}f}"


def percent(share: float, digits: int | None = 1) -> str:
    """0.3 -> ``30.0 %``; with ``digits=None`` as few digits as tell it apart (``30 %``, ``0.5 %``)."""
    number = f"{100 * share:.6g}" if digits is None else f"{100 * share:.{digits}f}"
    return f"{number}{NO_BREAK}%"


def parallel_text(mixture: MixtureConfig, mean: float) -> str:
    """How much of the text is parallel, and when: ``5 %``, or ``30 % on average: 0 % until 1 k tokens, then ...``."""
    told = percent(mean, digits=None)
    if not mixture.schedule:
        return told
    phases = []
    for phase in mixture.schedule:
        end = "" if phase.to is None else f" to {percent(phase.to, digits=None)}"
        phases.append(f"{percent(phase.parallel_fraction, digits=None)}{end} until {amount(phase.until_tokens)} tokens")
    return f"{told} on average: {', then '.join(phases)}"


def amount(count: float) -> str:
    """A large count with three digits and a unit: 4915200 -> ``4.92 M``."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.3g}{NO_BREAK}{unit}"
    return f"{count:.3g}"


def duration(seconds: float) -> str:
    """3725 -> ``1 h 2 min``; 65 -> ``1 min 5 s``; 3.2 -> ``3.2 s``."""
    if seconds < 60:
        return f"{seconds:.1f}{NO_BREAK}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NO_BREAK}min {rest}{NO_BREAK}s"
    return f"{minutes // 60}{NO_BREAK}h {minutes % 60}{NO_BREAK}min"


def listing(items: Iterable[str]) -> str:
    """``a, b and c``."""
    *head, last = list(items)
    return f"{', '.join(head)} and {last}" if head else last
