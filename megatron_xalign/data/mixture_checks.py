"""Whether sources and settings of a mixture fit one another at all, before any number is worked out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_xalign.config import MixtureConfig
from megatron_xalign.data.schedule import FractionSchedule
from megatron_xalign.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    from megatron_xalign.data.mixture import SourceText

MOST_SOURCES = 32_767
"""``source_ids`` of a batch are int16."""
MOST_LANGUAGES = 127
"""``language_ids`` of a batch are int8."""


def fraction_setting(mixture: MixtureConfig) -> str:
    """The setting that says what the parallel fraction is, with its value, for messages."""
    if mixture.schedule:
        return f"data.mixture.schedule (up to {_largest(mixture):g})"
    return f"data.mixture.parallel_fraction={mixture.parallel_fraction:g}"


def _largest(mixture: MixtureConfig) -> float:
    return max(max(phase.parallel_fraction, phase.to or 0.0) for phase in mixture.schedule)


def check_sources(mixture: MixtureConfig, sources: Sequence[SourceText], schedule: FractionSchedule) -> None:
    """Refuse sources that cannot make the mixture, whatever their size.

    Raises:
        ConfigError: there is none, two have one name, or an origin or a language that is asked for is missing.
    """
    if not sources:
        raise ConfigError("data.sources is empty; name at least one token file, such as {prefix: tokens/eng_Latn}.")
    if len(sources) > MOST_SOURCES:
        raise ConfigError(
            f"data.sources names {len(sources):,} token files; a batch tells at most {MOST_SOURCES:,} apart (int16). "
            "Join small files of one language into one (xalign merge)."
        )
    prefixes: dict[str, str] = {}
    for source in sources:
        if source.name in prefixes:
            raise ConfigError(
                f"data.sources has {prefixes[source.name]} and {source.prefix}, both named {source.name}; the name "
                "decides the order of a source's text and appears in reports, so each needs its own. Rename one."
            )
        prefixes[source.name] = source.prefix
        if source.origin == "monolingual" and len(source.languages) != 1:
            held = ", ".join(source.languages)
            raise ConfigError(f"{source.prefix} is monolingual by its manifest and holds {held}; one is expected.")
    named = ", ".join(list(prefixes)[:10]) + (", ..." if len(prefixes) > 10 else "")
    origins = {source.origin for source in sources}
    if not schedule.is_never_parallel and "parallel" not in origins:
        raise ConfigError(
            f"{fraction_setting(mixture)} and none of data.sources ({named}) is parallel; add a parallel token file or "
            "use 0."
        )
    if not schedule.is_always_parallel and "monolingual" not in origins:
        left = "a part" if mixture.schedule else f"{1 - mixture.parallel_fraction:g}"
        raise ConfigError(
            f"{fraction_setting(mixture)} leaves {left} of the tokens to monolingual text and none of data.sources "
            f"({named}) is monolingual; add one for each language or use 1."
        )
    if not schedule.is_always_parallel:
        _check_languages_have_sources(mixture, sources)


def _check_languages_have_sources(mixture: MixtureConfig, sources: Sequence[SourceText]) -> None:
    """Languages asked for need text, and text needs a share."""
    present = {language for source in sources for language in source.languages}
    for language, share in mixture.languages.items():
        if language not in present:
            raise ConfigError(
                f"data.mixture.languages.{language}={share:g} and none of data.sources has {language} text; there is "
                f"{', '.join(sorted(present))}."
            )
    for source in sources:
        if source.origin == "monolingual" and mixture.languages and source.languages[0] not in mixture.languages:
            raise ConfigError(
                f"{source.prefix} is {source.languages[0]} and data.mixture.languages gives that language no share; "
                "give it one or leave the source out."
            )


def check_pairing(mixture: MixtureConfig, sources: Sequence[SourceText]) -> None:
    """Refuse parallel sources that were made for another control than the one asked for.

    Raises:
        ConfigError: with the command that makes the right file.
    """
    for source in sources:
        if source.origin == "parallel" and source.pairing != mixture.pairing:
            option = f" --pairing {mixture.pairing}"
            raise ConfigError(
                f"data.mixture.pairing={mixture.pairing} and {source.prefix} was made with pairing={source.pairing} by "
                f"its manifest. Make it again with `xalign preprocess ... --pairs {','.join(source.languages)}{option} "
                f"--output-prefix {source.prefix}-{mixture.pairing}` and name that file, or set "
                f"data.mixture.pairing={source.pairing}."
            )


def check_has_text(sources: Sequence[SourceText], seq_length: int, *, whole_documents: bool) -> None:
    """Refuse a source that would be drawn from and has nothing to give.

    Raises:
        CorpusError: it has less than one sample.
    """
    for source in sources:
        enough = source.tokens > 0 if whole_documents else source.num_windows(seq_length) > 0
        if not enough or source.content_tokens == 0:
            raise CorpusError(
                f"{source.prefix} holds {source.tokens:,} tokens, {source.content_tokens:,} of them content; one "
                f"sample of data.seq_length={seq_length} reads {seq_length + 1}. Use a shorter seq_length, more text, "
                "or leave the source out."
            )


def languages_of_run(mixture: MixtureConfig, languages_of_sources: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Language codes of a run, as ids of its batches count them.

    Args:
        mixture: names languages in an order.
        languages_of_sources: codes of every source.

    Returns:
        Those named in the mixture in its order, then the rest by name: the same in every run of a series.

    Raises:
        ConfigError: there are too many.
    """
    rest = {language for languages in languages_of_sources for language in languages} - set(mixture.languages)
    languages = (*mixture.languages, *sorted(rest))
    if len(languages) > MOST_LANGUAGES:
        raise ConfigError(
            f"data.sources hold {len(languages)} languages; a batch tells at most {MOST_LANGUAGES} apart (int8)."
        )
    return languages
