"""Turns ``parallel_fraction`` and language shares into what each source has to give: arithmetic, no files.

Everything is exact (``Fraction``): weights come from the statistics of whole sources and from what was asked, never
from the length of the run, so that a longer run begins with the samples of a shorter one. The length only decides
whether there is enough text.

Content tokens belong to a language; end-of-document and template tokens belong to none (docs/mixture.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from megatron_xalign.config import MixtureConfig
from megatron_xalign.errors import ConfigError, CorpusError

PARALLEL = -1
"""``PlannedSource.group`` of parallel sources."""

# A share is a number somebody typed; fifteen decimals are more than a float tells apart and fit the C++ arithmetic.
_FINEST = 10**15
# How far a share may be from what parallel text gives of a language that has no monolingual text to correct it.
_UNSTEERED_TOLERANCE = Fraction(1, 1000)


@dataclass(frozen=True)
class SourceText:
    """What the plan needs to know of one source; counts are of the whole token file."""

    name: str
    """Last part of the prefix; identifies the source in a series."""
    prefix: str
    """Path without extension, for messages."""
    origin: Literal["monolingual", "parallel"]
    languages: tuple[str, ...]
    """Codes, in the order of the token file."""
    tokens: int
    """All tokens, end-of-document and template tokens included."""
    content_tokens_by_language: Mapping[str, int]
    """Tokens that belong to a language."""
    max_repeats: float = 1.0
    """How often the text may be seen."""

    @classmethod
    def from_manifest(cls, prefix: str, manifest: Mapping[str, Any], max_repeats: float = 1.0) -> SourceText:
        """Read the statistics out of a token file's manifest."""
        return cls(
            name=Path(prefix).name,
            prefix=prefix,
            origin=manifest["origin"],
            languages=tuple(manifest["languages"]),
            tokens=manifest["tokens"],
            content_tokens_by_language=dict(manifest["tokens_by_language"]),
            max_repeats=max_repeats,
        )

    @property
    def content_tokens(self) -> int:
        """Tokens that belong to a language, over all languages."""
        return sum(self.content_tokens_by_language.values())

    def num_windows(self, seq_length: int) -> int:
        """Whole samples in one reading; a sample reads one token more than it trains on, shared with the next."""
        return max(self.tokens - 1, 0) // seq_length

    def max_windows(self, seq_length: int) -> int:
        """Samples that ``max_repeats`` allows."""
        return math.floor(Fraction(repr(float(self.max_repeats))) * self.num_windows(seq_length))


@dataclass(frozen=True)
class PlannedSource:
    """One source's part in the plan."""

    text: SourceText
    group: int
    """Index of its language in ``MixturePlan.languages``, or ``PARALLEL``."""
    weight: int
    """Its part of what its group gives: its content tokens, so that sources of a group repeat equally; 0 if unused."""
    expected_samples: float
    """Samples of the run it will give, as far as whole-source averages tell."""


@dataclass(frozen=True)
class MixturePlan:
    """What the blend is to hold to."""

    mixture: MixtureConfig
    """What was asked."""
    languages: tuple[str, ...]
    """Codes; language ids of the run index them."""
    sources: tuple[PlannedSource, ...]
    """In the order of ``data.sources``."""
    parallel_fraction: Fraction
    """Exact value of what was asked."""
    shares: tuple[Fraction, ...]
    """Per language, the share of all steered languages' tokens it is held to; 0 where ``steered`` is false."""
    steered: tuple[bool, ...]
    """Per language, whether monolingual text can correct its share; others get what parallel text brings."""
    monolingual_rates: tuple[Fraction, ...]
    """Per language, tokens its monolingual text has to give for one content token of the run."""
    asked_languages: dict[str, float]
    """Shares as asked; for a language that is not steered, what parallel text is expected to bring."""
    seq_length: int
    """Tokens of a sample."""
    asked_train_steps: int
    """Optimizer steps asked for."""
    train_steps: int
    """Optimizer steps of the run; more than asked for with ``budget_rule: add``."""
    global_batch_size: int
    """Samples of a step."""

    @property
    def num_samples(self) -> int:
        """Samples of the run."""
        return self.train_steps * self.global_batch_size


@dataclass(frozen=True)
class _Groups:
    """Tokens per group (each language's monolingual sources, and all parallel ones) over whole sources."""

    languages: tuple[str, ...]
    windows_per_content: tuple[Fraction | None, ...]  # per language, monolingual; None: no such source
    windows_per_content_parallel: Fraction | None
    parallel_language_shares: tuple[Fraction, ...]


def plan_mixture(
    mixture: MixtureConfig, sources: Sequence[SourceText], *, seq_length: int, train_steps: int, global_batch_size: int
) -> MixturePlan:
    """Plan what each source gives to a run.

    Args:
        mixture: what was asked.
        sources: statistics of the token files, in the order of ``data.sources``.
        seq_length: tokens of a sample.
        train_steps: optimizer steps asked for; the monolingual budget where ``budget_rule`` is ``add``.
        global_batch_size: samples of a step.

    Returns:
        The plan; shares and weights in it do not depend on ``train_steps``.

    Raises:
        ConfigError: the sources cannot give what is asked, with the numbers and the ways out.
        CorpusError: a source that is needed has less text than one sample.
    """
    plan = _plan(mixture, sources, seq_length, train_steps, global_batch_size)
    for source in plan.sources:
        # The last sample or so is settled by the built index, which knows what each window really holds.
        if source.expected_samples > source.text.max_windows(seq_length) + 1:
            raise too_little_text(plan, source)
    return plan


def _plan(
    mixture: MixtureConfig,
    sources: Sequence[SourceText],
    seq_length: int,
    train_steps: int,
    global_batch_size: int,
    check: bool = True,
) -> MixturePlan:
    _check_sources(mixture, sources)
    fraction = exact(mixture.parallel_fraction)
    languages = _languages_of_run(mixture, sources)
    needed = [source for source in sources if fraction < 1 or source.origin == "parallel"]
    needed = [source for source in needed if fraction > 0 or source.origin == "monolingual"]
    for source in needed:
        if source.num_windows(seq_length) == 0 or source.content_tokens == 0:
            raise CorpusError(
                f"{source.prefix} holds {source.tokens:,} tokens, {source.content_tokens:,} of them content; one "
                f"sample of data.seq_length={seq_length} reads {seq_length + 1}. Use a shorter seq_length, more text, "
                "or leave the source out."
            )
    groups = _group(languages, needed, seq_length)
    steered = tuple(windows is not None for windows in groups.windows_per_content)
    content_fraction = _content_fraction(mixture, fraction, groups)
    shares, asked = _shares(mixture, groups, steered, content_fraction, check)
    rates = _monolingual_rates(mixture, groups, shares, content_fraction)
    if check:
        _check_room(mixture, groups, shares, asked, rates)
    parallel_windows = content_fraction * (groups.windows_per_content_parallel or 0)
    monolingual_windows = _sum(rate * (per or 0) for rate, per in zip(rates, groups.windows_per_content, strict=True))
    asked_train_steps = train_steps
    if mixture.budget_rule == "add":
        train_steps = math.ceil(train_steps * (parallel_windows + monolingual_windows) / monolingual_windows)
    num_samples = train_steps * global_batch_size

    planned = []
    for source in sources:
        group = PARALLEL if source.origin == "parallel" else languages.index(source.languages[0])
        amount = content_fraction if group == PARALLEL else rates[group]
        used = amount > 0 and source in needed
        siblings = [other for other in needed if other.origin == source.origin]
        if group != PARALLEL:
            siblings = [other for other in siblings if other.languages == source.languages]
        expected = Fraction(0)
        if used:
            windows = amount * Fraction(source.tokens, seq_length * sum(other.content_tokens for other in siblings))
            expected = num_samples * windows / (parallel_windows + monolingual_windows)
        planned.append(PlannedSource(source, group, source.content_tokens if used else 0, float(expected)))
    return MixturePlan(
        mixture=mixture,
        languages=languages,
        sources=tuple(planned),
        parallel_fraction=fraction,
        shares=shares,
        steered=steered,
        monolingual_rates=rates,
        asked_languages=asked,
        seq_length=seq_length,
        asked_train_steps=asked_train_steps,
        train_steps=train_steps,
        global_batch_size=global_batch_size,
    )


def exact(number: float) -> Fraction:
    """The number that was typed: 0.05 is one twentieth, not the nearest binary fraction."""
    typed = Fraction(repr(float(number)))
    return typed if typed.denominator <= _FINEST else Fraction(round(typed * _FINEST), _FINEST)


def too_little_text(plan: MixturePlan, source: PlannedSource, wanted_samples: float = 0.0) -> ConfigError:
    """Say that a source would be read more often than allowed: what is there, what was asked, three ways out.

    Args:
        plan: the plan.
        source: the source of it that is too small.
        wanted_samples: samples asked of it, where the built index knows better than the plan.

    Returns:
        The error, to be raised.
    """
    text, seq_length = source.text, plan.seq_length
    wanted = math.ceil(max(source.expected_samples, wanted_samples))
    windows, allowed = text.num_windows(seq_length), text.max_windows(seq_length)
    repeats = max(math.ceil(wanted / windows), math.floor(text.max_repeats) + 1)
    there = (
        f"{text.name} holds {text.tokens:,} and max_repeats={text.max_repeats:g} allows {allowed * seq_length:,} "
        f"(whole samples of {seq_length:,})."
    )
    if source.group == PARALLEL:
        return ConfigError(
            f"data.mixture.parallel_fraction={plan.mixture.parallel_fraction:g} asks for {wanted * seq_length:,} "
            f"tokens of {text.name}; {there} Use a fraction up to {_largest_fraction(plan, source):g}, "
            f"max_repeats={repeats} for {text.name}, or more parallel text."
        )
    language = text.languages[0]
    steps = math.floor(plan.asked_train_steps * Fraction(allowed, wanted))
    return ConfigError(
        f"data.mixture.languages.{language}={plan.asked_languages[language]:g} of "
        f"{plan.num_samples * seq_length:,} tokens asks for {wanted * seq_length:,} tokens of {text.name}; {there} "
        f"Use training.train_steps up to {steps:,}, max_repeats={repeats} for {text.name}, or more {language} text."
    )


def _largest_fraction(plan: MixturePlan, source: PlannedSource) -> float:
    """The largest parallel fraction, to three digits, that the text of a parallel source is enough for."""
    at = plan.sources.index(source)
    texts = [item.text for item in plan.sources]

    def fits(fraction: float) -> bool:
        asked = replace(plan.mixture, parallel_fraction=fraction)
        other = _plan(asked, texts, plan.seq_length, plan.asked_train_steps, plan.global_batch_size, check=False)
        return other.sources[at].expected_samples <= source.text.max_windows(plan.seq_length)

    low, high = 0.0, plan.mixture.parallel_fraction
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return _floor_digits(low, 3)


def _check_sources(mixture: MixtureConfig, sources: Sequence[SourceText]) -> None:
    if not sources:
        raise ConfigError("data.sources is empty; name at least one token file, such as {prefix: tokens/eng_Latn}.")
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
    origins = {source.origin for source in sources}
    if mixture.parallel_fraction > 0 and "parallel" not in origins:
        raise ConfigError(
            f"data.mixture.parallel_fraction={mixture.parallel_fraction:g} and none of data.sources "
            f"({', '.join(prefixes)}) is parallel; add a parallel token file or use 0."
        )
    if mixture.parallel_fraction < 1 and "monolingual" not in origins:
        raise ConfigError(
            f"data.mixture.parallel_fraction={mixture.parallel_fraction:g} leaves "
            f"{1 - mixture.parallel_fraction:g} of the tokens to monolingual text and none of data.sources "
            f"({', '.join(prefixes)}) is monolingual; add one for each language or use 1."
        )
    if mixture.parallel_fraction < 1:
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


def _languages_of_run(mixture: MixtureConfig, sources: Sequence[SourceText]) -> tuple[str, ...]:
    """Those asked for in the order asked, then the rest by name: the same in every run of a series."""
    rest = {language for source in sources for language in source.languages} - set(mixture.languages)
    languages = (*mixture.languages, *sorted(rest))
    if len(languages) > 127:
        raise ConfigError(f"data.sources hold {len(languages)} languages; a batch tells at most 127 apart (int8).")
    return languages


def _group(languages: tuple[str, ...], sources: Sequence[SourceText], seq_length: int) -> _Groups:
    def per_content(members: list[SourceText]) -> Fraction | None:
        content = sum(source.content_tokens for source in members)
        return Fraction(sum(source.tokens for source in members), seq_length * content) if content else None

    parallel = [source for source in sources if source.origin == "parallel"]
    content = sum(source.content_tokens for source in parallel)
    return _Groups(
        languages=languages,
        windows_per_content=tuple(
            per_content([source for source in sources if source.origin != "parallel" and source.languages == (code,)])
            for code in languages
        ),
        windows_per_content_parallel=per_content(parallel),
        parallel_language_shares=tuple(
            Fraction(sum(source.content_tokens_by_language.get(code, 0) for source in parallel), content or 1)
            for code in languages
        ),
    )


def _content_fraction(mixture: MixtureConfig, fraction: Fraction, groups: _Groups) -> Fraction:
    """Parallel share of the content tokens; differs from the fraction asked where that counts all tokens."""
    if mixture.fraction_of == "content" or fraction in (0, 1):
        return fraction
    steered = tuple(windows is not None for windows in groups.windows_per_content)

    # Monolingual windows per content token are a straight line in the content fraction; so two points give it.
    def monolingual_windows(content_fraction: Fraction) -> Fraction:
        shares, _ = _shares(mixture, groups, steered, content_fraction, check=False)
        rates = _monolingual_rates(mixture, groups, shares, content_fraction)
        return _sum(rate * (per or 0) for rate, per in zip(rates, groups.windows_per_content, strict=True))

    at_none = monolingual_windows(Fraction(0))
    slope = monolingual_windows(Fraction(1)) - at_none
    parallel_windows = groups.windows_per_content_parallel or Fraction(0)
    return fraction * at_none / (parallel_windows * (1 - fraction) - fraction * slope)


def _shares(
    mixture: MixtureConfig,
    groups: _Groups,
    steered: tuple[bool, ...],
    content_fraction: Fraction,
    check: bool = True,
) -> tuple[tuple[Fraction, ...], dict[str, float]]:
    """Shares among steered languages (adding up to 1, 0 for the others), and shares as asked."""
    replace = mixture.budget_rule == "replace"
    brought = [content_fraction * share if replace else Fraction(0) for share in groups.parallel_language_shares]
    loose = [index for index, held in enumerate(steered) if not held]
    left = 1 - _sum(brought[index] for index in loose)
    if mixture.languages:
        total = _sum(exact(share) for share in mixture.languages.values())
        asked = [exact(mixture.languages.get(code, 0.0)) / total for code in groups.languages]
        for index in loose if check else ():
            if abs(asked[index] - brought[index]) > _UNSTEERED_TOLERANCE:
                raise _cannot_steer(mixture, groups, steered, asked, brought, index)
    else:
        asked = [left / max(sum(steered), 1)] * len(steered)
    for index in loose:
        asked[index] = brought[index]
    held = _sum(share for share, is_held in zip(asked, steered, strict=True) if is_held)
    shares = tuple(share / held if is_held else Fraction(0) for share, is_held in zip(asked, steered, strict=True))
    return shares, {code: float(share) for code, share in zip(groups.languages, asked, strict=True)}


def _cannot_steer(
    mixture: MixtureConfig,
    groups: _Groups,
    steered: tuple[bool, ...],
    asked: list[Fraction],
    brought: list[Fraction],
    index: int,
) -> ConfigError:
    language = groups.languages[index]
    fit = {code: float(share) for code, share in zip(groups.languages, asked, strict=True)}
    if not any(steered):
        fit = {code: float(share) for code, share in zip(groups.languages, brought, strict=True)}
    else:
        held = _sum(share for share, is_held in zip(asked, steered, strict=True) if is_held)
        left = 1 - _sum(share for share, is_held in zip(brought, steered, strict=True) if not is_held)
        for at, is_held in enumerate(steered):
            fit[groups.languages[at]] = float(asked[at] / held * left if is_held and held else brought[at])
    shown = ", ".join(f"{code}: {share:.4f}" for code, share in fit.items() if share > 0)
    return ConfigError(
        f"data.mixture.languages.{language}={float(asked[index]):g} with parallel_fraction="
        f"{mixture.parallel_fraction:g}: no monolingual source with a part in the run is {language}, so it gets what "
        f"parallel text brings, {float(brought[index]):.4f}. Use languages: {{{shown}}}, leave languages out, or add "
        f"monolingual {language} text{' and a fraction below 1' if mixture.parallel_fraction == 1 else ''}."
    )


def _monolingual_rates(
    mixture: MixtureConfig, groups: _Groups, shares: tuple[Fraction, ...], content_fraction: Fraction
) -> tuple[Fraction, ...]:
    """Monolingual content tokens of each language for one content token of the run; negative where there is no room."""
    if mixture.budget_rule == "add":
        return tuple(share * (1 - content_fraction) for share in shares)
    brought = [content_fraction * share for share in groups.parallel_language_shares]
    held = 1 - _sum(part for part, share in zip(brought, shares, strict=True) if share == 0)
    return tuple(share * held - part if share else Fraction(0) for share, part in zip(shares, brought, strict=True))


def _check_room(
    mixture: MixtureConfig,
    groups: _Groups,
    shares: tuple[Fraction, ...],
    asked: Mapping[str, float],
    rates: tuple[Fraction, ...],
) -> None:
    """Parallel text alone must not exceed a language's share."""
    for index, rate in enumerate(rates):
        if rate >= 0 or not shares[index]:
            continue
        language = groups.languages[index]
        brought = asked[language] - float(rate)
        largest = _floor_digits(mixture.parallel_fraction * asked[language] / brought, 3)
        raise ConfigError(
            f"data.mixture.languages.{language}={asked[language]:g} is less than parallel text alone brings: at "
            f"parallel_fraction={mixture.parallel_fraction:g} that is {brought:.4f}. Use a share of at least "
            f"{math.ceil(brought * 1000) / 1000:g}, a fraction up to {largest:g}, or budget_rule=add, where shares are "
            "of monolingual text only."
        )


def _sum(parts: Any) -> Fraction:
    return sum(parts, start=Fraction(0))


def _floor_digits(number: float, digits: int) -> float:
    """Round down to so many significant digits, so that the number can be used as it is printed."""
    if number <= 0:
        return 0.0
    scale = 10 ** (digits - 1 - math.floor(math.log10(number)))
    return float(Fraction(math.floor(Fraction(number) * Fraction(scale))) / Fraction(scale))
