"""Where texts, languages and ids are found in the records of a corpus, and which pairs of languages are taken."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_xalign.errors import ConfigError

PairRule = Literal["pivot", "all"] | tuple[tuple[str, str], ...]

# Regions in which Chinese is written in the other script; zh-TW is not zh.
_TRADITIONAL = ("tw", "hk", "mo")
_MOST_REMEMBERED = 10_000


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Where texts, languages and ids are found in a record; the same for every file of a job. Hashable."""

    kind: Literal["monolingual", "pairs"]
    """Whether a record holds a text, or the same text in two or more languages."""
    text_key: str = "text"
    """Monolingual: key, parquet column, or TSV column (a name of the first line, or a number from 1)."""
    id_key: str = "id"
    """Pairs: key of the id (text or integer), which decides the direction; a pair without one is known by its
    texts."""
    language: str | None = None
    """Monolingual: language of files that have none of their own (``LANGUAGE=PATH``)."""
    language_key: str | None = None
    """Monolingual: key of the record's language (text, or a list whose first counts); goes before the other two."""
    languages: tuple[str, ...] = ()
    """Pairs: the languages wanted, two or more; their order decides the first side. Monolingual with ``language_key``:
    the languages wanted. Empty, where records name their languages: all of them."""
    language_map: tuple[tuple[str, str], ...] = ()
    """(code in the data, code in the token file): ``(("en", "eng_Latn"), ("fi", "fin_Latn"))``; without regard to case,
    and for a code with a region (``en-US``) also by what stands before it."""
    texts_key: str = "texts"
    """Pairs: key of ``{language: text, ...}``, used where ``side_keys`` is empty; often ``translation``."""
    side_keys: tuple[str, ...] = ()
    """Pairs: the keys (or TSV columns) of the sides. Their languages are ``languages``, in this order, or those of
    ``side_language_keys``. For TSV, if empty, the first columns."""
    side_language_keys: tuple[str, ...] = ()
    """Pairs: the keys (or TSV columns) of the sides' languages."""
    pair_rule: PairRule = "pivot"
    """Pairs taken from a record in more than two languages: ``pivot`` (the first of ``languages`` with each other),
    ``all`` (each with each), or a list of pairs."""
    text_unit: Literal["line", "paragraph", "file"] = "line"
    """Plain text: what is one document; a paragraph ends at a blank line. A line, if not said otherwise."""
    tsv_header: bool = False
    """Whether the first line of a TSV names its columns; so it is anyway if one of the columns wanted is no number."""
    max_line_bytes: int = 1 << 30
    """A longer line (record) is malformed."""

    def __post_init__(self) -> None:
        if self.kind not in ("monolingual", "pairs"):
            raise ValueError(f"kind={self.kind!r} is neither 'monolingual' nor 'pairs'.")
        if self.text_unit not in ("line", "paragraph", "file"):
            raise ConfigError(f"text_unit={self.text_unit!r} is not one of line, paragraph, file.")
        if self.max_line_bytes < 1:
            raise ConfigError(f"max_line_bytes={self.max_line_bytes} must be positive.")
        twice = [code for number, code in enumerate(self.languages) if code in self.languages[:number]]
        if twice:
            raise ConfigError(f"languages={', '.join(self.languages)} names {twice[0]} twice.")
        meanings: dict[str, str] = {}
        for code, meaning in self.language_map:
            other = meanings.setdefault(_folded(code), meaning)
            if other != meaning:
                raise ConfigError(f"language_map says that {code} is {other} and that it is {meaning}.")
        if self.kind == "pairs":
            self._check_pairs()
        elif self.text_key == self.language_key:
            raise ConfigError(f"text_key and language_key are both {self.text_key}.")

    def _check_pairs(self) -> None:
        if len(self.languages) == 1:
            raise ConfigError(f"languages={self.languages[0]} is one language; pairs need two or more.")
        keys = (*self.side_keys, *self.side_language_keys, self.id_key)
        if len(self.side_keys) == 1 or len(set(keys)) < len(keys):
            raise ConfigError(
                f"side_keys={', '.join(self.side_keys)} must be two or more, and no key be used twice among them, "
                f"side_language_keys={', '.join(self.side_language_keys)} and id_key={self.id_key}."
            )
        if self.side_language_keys and len(self.side_language_keys) != len(self.side_keys):
            raise ConfigError(
                f"side_language_keys={', '.join(self.side_language_keys)} must be as many as "
                f"side_keys={', '.join(self.side_keys) or '(none)'}."
            )
        if not self.side_keys and self.texts_key == self.id_key:
            raise ConfigError(f"texts_key and id_key are both {self.id_key}.")
        if self.side_keys and not self.side_language_keys and len(self.languages) != len(self.side_keys):
            raise ConfigError(
                f"side_keys={', '.join(self.side_keys)} need {len(self.side_keys)} languages, one for each in this "
                f"order; languages={', '.join(self.languages) or '(none)'}."
            )
        if isinstance(self.pair_rule, str):
            if self.pair_rule not in ("pivot", "all"):
                raise ConfigError(f"pair_rule={self.pair_rule!r} is not pivot, all or a list of pairs of languages.")
            return
        if not self.pair_rule:
            raise ConfigError("pair_rule is an empty list; name at least one pair of languages.")
        for first, second in self.pair_rule:
            if first == second:
                raise ConfigError(f"pair_rule has the pair {first}-{second}; a pair is in two languages.")
            for code in (first, second):
                if self.languages and code not in self.languages:
                    raise ConfigError(
                        f"pair_rule has the pair {first}-{second}; {code} is not among "
                        f"languages={', '.join(self.languages)}."
                    )
        if len({frozenset(pair) for pair in self.pair_rule}) != len(self.pair_rule):
            raise ConfigError("pair_rule names a pair of languages twice; which one is the source is set by direction.")

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The pairs of languages that are taken, in order; empty if the records decide."""
        return pairs_among(self.languages, self.pair_rule)

    def to_tree(self) -> dict[str, Any]:
        """As JSON."""
        tree = asdict(self)
        return {key: _listed(value) for key, value in tree.items()}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Fields:
        """From JSON."""
        return cls(**{key: _tupled(value) for key, value in tree.items()})


def pairs_among(languages: Iterable[str], rule: PairRule) -> tuple[tuple[str, str], ...]:
    """The pairs that a rule takes of texts in these languages, in their order."""
    languages = tuple(languages)
    if not isinstance(rule, str):
        return rule
    if rule == "all":
        return tuple(itertools.combinations(languages, 2))
    return tuple((languages[0], other) for other in languages[1:])


class LanguageCodes:
    """Codes as data has them (``en``, ``EN-us``, ``eng_Latn``) to the codes of the token file."""

    def __init__(self, fields: Fields) -> None:
        wanted = [*fields.languages, *([fields.language] if fields.language else [])]
        if not isinstance(fields.pair_rule, str):
            wanted += itertools.chain.from_iterable(fields.pair_rule)
        self._meanings = {_folded(code): code for code in wanted}
        self._meanings.update({_folded(code): meaning for code, meaning in fields.language_map})
        self._seen: dict[str, str] = {}

    def __call__(self, code: str) -> str:
        """The code of the token file; ``code`` itself if nothing is known of it."""
        found = self._seen.get(code)
        if found is None:
            found = self._find(code)
            if len(self._seen) < _MOST_REMEMBERED:
                self._seen[code] = found
        return found

    def _find(self, code: str) -> str:
        subtags = _folded(code).split("-")
        while subtags:
            meaning = self._meanings.get("-".join(subtags))
            if meaning is not None:
                return meaning
            last = subtags.pop()
            # A script (Latn) changes the language as it is written here; a region does not, but for Chinese.
            is_region = (len(last) == 2 and last.isalpha()) or (len(last) == 3 and last.isdigit())
            if not is_region or (subtags[:1] == ["zh"] and last in _TRADITIONAL):
                break
        return code


def _folded(code: str) -> str:
    return code.strip().replace("_", "-").casefold()


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, (tuple, list)) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, (tuple, list)) else value
