"""Whether a text is in the language it is said to be in: by its script, and by an offline language identifier.

The identifier is ``eld`` (Apache-2.0, 60 languages, pure Python, extra ``langid``). On 4,000 sentences of help pages, a
handbook and law in 13 languages it named the language of 98.9 %, py3langid 0.4 of 97.6 %; on 15,000 software messages
of 20 characters and more in 36 languages both 91 %; eld in half to three quarters of the time. Neither is right often
enough on short or technical text to drop whatever it names differently, so texts with few letters are not asked, and
one is called wrong only if its own language scores less than 0.7 of the best. With labels exchanged at random that
found 99 % (sentences) and 95 % (messages) of those of 40 to 80 characters, and all but neighbours like Danish and
Norwegian beyond; of those labelled right it called wrong none of the sentences and 0.6 % of the messages, most of
them commands and names in English.
"""

# N texts, S scripts

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_xalign.data.folding import FIRST_SCRIPT, SCRIPTS, count_characters
from megatron_xalign.errors import ConfigError

CheckLanguage = Literal["off", "script", "identify"]
Languages = str | Sequence[str] | None
"""One code for all texts, one for each, or unknown."""

LEAST_LETTERS = 30
"""Shorter texts are not checked; in Latin letters, of which an ideograph counts :data:`SCRIPT_WIDTHS`."""
LEAST_SHARE = 0.7
"""Of the best language's score, which the declared language must reach."""
LEAST_SCRIPT_SHARE, LEAST_LATIN_SHARE = 0.1, 0.5
"""Of a text's letters, by width, that must be of the declared language's scripts. Names of programs, firms and commands
are in Latin letters in texts of any script, but hardly the other way round."""

TOO_SHORT, NO_LANGUAGE, UNKNOWN_LANGUAGE = "too short to tell", "no language given", "language unknown"
"""Why a text's language was not checked. Of a language the identifier does not know only the script is compared."""

SCRIPT_WIDTHS = {"Hani": 3.0, "Hang": 2.0, "Kana": 1.25}
"""How many characters of an alphabet one character stands for, measured against English.

Solved from characters in all (white space and combining marks left out) of English and Chinese, Japanese and Korean
in translated pairs: Han 3.4 in the Universal Declaration of Human Rights and the Debian handbook, 3.0 in LibreOffice's
help, 2.9 in Debian 12's message catalogues (zh_CN, messages of 40 characters and more); kana, with Han at 3.0, 1.24
(ja) and Hangul 2.1 (ko) in the same catalogues. 33 other languages in 20 scripts have 0.7 to 1.25 characters for one of
English, which no table needs to correct.
"""

_ANY_HAN, _HANGUL = frozenset(("Hani", "Bopo")), frozenset(("Hang",))
_SCRIPTS_OF_SUBTAG = {
    "Hans": _ANY_HAN, "Hant": _ANY_HAN, "Hani": _ANY_HAN, "Jpan": _ANY_HAN | {"Kana"}, "Hira": frozenset(("Kana",)),
    # Korean has a few Han characters at most, Chinese nothing else.
    "Kore": _HANGUL, "Hang": _HANGUL,
}  # fmt: skip
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]+")
_MODIFIERS = {"latin": "Latn", "cyrillic": "Cyrl", "devanagari": "Deva", "arabic": "Arab"}
"""Scripts in POSIX locale names."""

# Code of the identifier, ISO 639-3 codes of the same language (FLORES uses those of varieties), script.
_LANGUAGES = """
am amh Ethi | ar ara,arb,arz,ary,apc,ajp,acm,acq,aeb,ars Arab | az aze,azj Latn | be bel Cyrl | bg bul Cyrl
bn ben Beng
ca cat Latn | cs ces Latn | da dan Latn | de deu Latn | el ell Grek | en eng Latn | es spa Latn | et est,ekk Latn
eu eus Latn | fa fas,pes,prs Arab | fi fin Latn | fr fra Latn | gu guj Gujr | he heb Hebr | hi hin Deva | hr hrv Latn
hu hun Latn | hy hye Armn | is isl Latn | it ita Latn | ja jpn Jpan | ka kat Geor | kn kan Knda | ko kor Hang
ku ckb Arab | lo lao Laoo | lt lit Latn | lv lav,lvs Latn | ml mal Mlym | mr mar Deva | ms msa,zsm Latn | nl nld Latn
no nor,nob,nno,nb,nn Latn | or ori,ory Orya | pa pan Guru | pl pol Latn | pt por Latn | ro ron Latn | ru rus Cyrl
sk slk Latn | sl slv Latn | sq sqi,als Latn | sr srp Cyrl | sv swe Latn | ta tam Taml | te tel Telu | th tha Thai
tl tgl,fil Latn | tr tur Latn | uk ukr Cyrl | ur urd Arab | vi vie Latn | yo yor Latn | zh zho,cmn Hani
"""


@cache
def _identifier_languages() -> dict[str, tuple[str, str]]:
    """Language subtag -> the identifier's code and the script it knows it in."""
    table = {}
    for entry in re.split(r"[|\n]", _LANGUAGES.strip()):
        code, others, script = entry.split()
        table.update(dict.fromkeys((code, *others.split(",")), (code, script)))
    return table


def _subtags(language: str) -> tuple[str, str | None]:
    """``zho_Hans``, ``zh-Hans-CN``, ``zh_CN``, ``sr@latin`` -> language subtag and script subtag, if there is one."""
    first, *rest = re.split(r"[-_@.]", language)
    rest = [_MODIFIERS.get(tag.lower(), tag) for tag in rest]
    script = next((tag.title() for tag in rest if len(tag) == 4 and tag.isalpha()), None)
    return first.lower(), script


@cache
def scripts_of(language: str) -> frozenset[str] | None:
    """Scripts a language is written in, of ``folding.SCRIPTS``; None if the code does not tell."""
    name, script = _subtags(language)
    if script is None:
        script = _identifier_languages().get(name, ("", None))[1]
    if script is None:
        return None
    scripts = _SCRIPTS_OF_SUBTAG.get(script, frozenset((script,)))
    return scripts if scripts <= set(SCRIPTS) else None


@cache
def _told_by_script() -> frozenset[str]:
    """The identifier's codes of languages that no other language it knows shares the script with."""
    scripts_of_code = {
        code: _SCRIPTS_OF_SUBTAG.get(script, {script}) for code, script in _identifier_languages().values()
    }
    return frozenset(
        code
        for code, scripts in scripts_of_code.items()
        if not any(scripts & others for other, others in scripts_of_code.items() if other != code)
    )


@cache
def identifier_code(language: str) -> str | None:
    """What the identifier calls a language; None if it does not know it, or not in this script."""
    name, _ = _subtags(language)
    code, script = _identifier_languages().get(name, (None, ""))
    return code if code and scripts_of(language) == scripts_of(f"{name}_{script}") else None


def letter_widths(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Letters of each script in the measure of an alphabet's.

    Args:
        counts: int64 [N, NUM_COLUMNS] of ``folding.count_characters``.

    Returns:
        float64 [N, S].
    """
    widths_S = np.array([SCRIPT_WIDTHS.get(script, 1.0) for script in SCRIPTS])
    return counts[:, FIRST_SCRIPT:] * widths_S


def script_shares(texts: Sequence[str], language: str) -> NDArray[np.float64] | None:
    """Share of each text's letters that are of a script the language is written in; None if the code does not tell.

    Characters count one each, whatever they stand for; white space, marks, digits and punctuation are no letters.

    Returns:
        float64 [N]; NaN for a text without letters.
    """
    scripts = scripts_of(language)
    if scripts is None:
        return None
    letters_NS = count_characters(list(texts))[:, FIRST_SCRIPT:].astype(np.float64)
    total_N = letters_NS.sum(axis=1)
    own_N = letters_NS[:, [script in scripts for script in SCRIPTS]].sum(axis=1)
    return np.divide(own_N, total_N, out=np.full(len(texts), np.nan), where=total_N > 0)


class LanguageChecker:
    """Tells texts that are not in the language they are said to be in; counts those it cannot tell of."""

    def __init__(self, check: CheckLanguage) -> None:
        """ConfigError if ``identify`` is asked for and ``eld`` is not installed."""
        if check not in ("off", "script", "identify"):
            raise ConfigError(f"check_language={check!r} is not one of off, script, identify.")
        self.check = check
        self._detector = _load_detector() if check == "identify" else None
        self.not_checked: Counter[str] = Counter()
        """Texts whose language was asked for and could not be checked, by reason; they are kept."""

    @property
    def identifier(self) -> dict[str, str] | None:
        """Name and version of the identifier, if one is used: results may change with it."""
        return {"name": "eld", "version": version("eld")} if self._detector is not None else None

    def wrong_script(self, counts: NDArray[np.int64], languages: Languages) -> NDArray[np.bool_]:
        """bool [N]: True where too few letters are of a script the language is written in.

        Args:
            counts: int64 [N, NUM_COLUMNS] of ``folding.count_characters``.
            languages: of the texts.
        """
        wrong_N = np.zeros(len(counts), dtype=bool)
        if self.check == "off" or languages is None:
            return wrong_N
        widths_NS = letter_widths(counts)
        total_N = widths_NS.sum(axis=1)
        long_N = total_N >= LEAST_LETTERS
        for language, of_language_N in _by_language(languages, len(counts)):
            scripts = scripts_of(language)
            if scripts is None:
                continue
            columns = [index for index, script in enumerate(SCRIPTS) if script in scripts]
            least = LEAST_LATIN_SHARE if "Latn" in scripts else LEAST_SCRIPT_SHARE
            wrong_N |= of_language_N & long_N & (widths_NS[:, columns].sum(axis=1) < least * total_N)
        return wrong_N

    def wrong_language(
        self, texts: Sequence[str], counts: NDArray[np.int64], languages: Languages
    ) -> NDArray[np.bool_]:
        """bool [N]: True where the identifier finds another language much more likely; counts what is not checked.

        Args:
            texts: N texts, already known to be in the right script.
            counts: as above.
            languages: of the texts.
        """
        wrong_N = np.zeros(len(texts), dtype=bool)
        if self.check == "off":
            return wrong_N
        if languages is None:
            self.not_checked[NO_LANGUAGE] += len(texts)
            return wrong_N
        widths_NS = letter_widths(counts)
        for language, of_language_N in _by_language(languages, len(texts)):
            scripts, code = scripts_of(language), identifier_code(language)
            # Latin letters in a text of another script are names; the identifier would take them for English.
            names_aside = self._detector is not None and scripts is not None and "Latn" not in scripts
            columns = [index for index, script in enumerate(SCRIPTS) if not names_aside or script in (scripts or ())]
            letters_N = widths_NS[:, columns].sum(axis=1)
            long_N = letters_N >= LEAST_LETTERS
            self.not_checked[TOO_SHORT] += int(np.count_nonzero(of_language_N & ~long_N))
            asked = np.flatnonzero(of_language_N & long_N)
            if (self._detector is not None and code is None) or scripts is None:
                self.not_checked[f"{UNKNOWN_LANGUAGE}: {language}"] += len(asked)
            if self._detector is None or code is None or code in _told_by_script():
                continue
            for index in asked.tolist():
                text = _LATIN.sub(" ", texts[index]) if names_aside else texts[index]
                scores = self._detector.detect(text).scores()
                wrong_N[index] = bool(scores) and scores.get(code, 0.0) < LEAST_SHARE * max(scores.values())
        self.not_checked += Counter()  # Drops zeros.
        return wrong_N


@dataclass(frozen=True)
class Identified:
    """What the identifier makes of one text."""

    language: str | None
    """The one of the languages asked about that it takes the text for; None for another or where it cannot tell."""
    share: float
    """Score of the language asked for over the sum of all scores; 0 where it cannot tell."""
    determined: bool
    """False where the text has too few letters to tell."""


LEAST_IDENTIFIED_LETTERS = 20
"""Generated text is short; below this, identification is noise and the text is counted as undetermined."""


class LanguageIdentifier:
    """Says which of some languages texts are in, offline."""

    def __init__(self, languages: Sequence[str]) -> None:
        """Load the identifier.

        Raises:
            ConfigError: ``eld`` is not installed, or does not know one of the languages.
        """
        self._code_of = {}
        for language in languages:
            code = identifier_code(language)
            if code is None:
                raise ConfigError(f"the language identifier eld does not know {language}.")
            self._code_of[language] = code
        self._detector = _load_detector()
        self.name = {"name": "eld", "version": version("eld")}
        """Name and version: results may change with it."""

    def identify(self, texts: Sequence[str], wanted: str) -> list[Identified]:
        """Language of each text, and how much speaks for ``wanted``."""
        widths_N = letter_widths(count_characters(list(texts))).sum(axis=1)
        language_of = {code: language for language, code in self._code_of.items()}
        found = []
        for text, letters in zip(texts, widths_N, strict=True):
            scores = self._detector.detect(text).scores() if letters >= LEAST_IDENTIFIED_LETTERS else {}
            if not scores:
                found.append(Identified(None, 0.0, False))
                continue
            best = max(scores, key=lambda code: scores[code])
            share = scores.get(self._code_of[wanted], 0.0) / sum(scores.values())
            found.append(Identified(language_of.get(best), share, True))
        return found


def _by_language(languages: str | Sequence[str], num_texts: int) -> list[tuple[str, NDArray[np.bool_]]]:
    """Each language that occurs and, bool [N], which texts are in it."""
    if isinstance(languages, str):
        return [(languages, np.ones(num_texts, dtype=bool))]
    if len(languages) != num_texts:
        raise ValueError(f"{len(languages)} languages for {num_texts} texts.")
    number_of: dict[str, int] = {}
    numbers_N = np.array([number_of.setdefault(language, len(number_of)) for language in languages], dtype=np.int64)
    return [(language, numbers_N == number) for language, number in number_of.items()]


def _load_detector() -> Any:
    try:
        from eld import LanguageDetector
    except ModuleNotFoundError:
        raise ConfigError(
            "check_language=identify needs the language identifier eld, which is not installed. Install it with "
            "pip install 'megatron-xalign[langid]', or compare scripts only with check_language=script."
        ) from None
    return LanguageDetector()
