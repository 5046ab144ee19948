"""Turns a parallel fraction and language shares into what each source has to give: arithmetic, no files.

Weights and shares are exact (``Fraction``). They come from the statistics of whole sources and from what was asked,
never from the length of the run, so that a longer run begins with the samples of a shorter one. The length only decides
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
from megatron_xalign.data.mixture_checks import (
    check_has_text,
    check_pairing,
    check_sources,
    fraction_setting,
    languages_of_run,
)
from megatron_xalign.data.schedule import FractionSchedule, exact
from megatron_xalign.errors import ConfigError

PARALLEL = -1
"""``PlannedSource.group`` of parallel sources."""

# How far a share may be from what parallel text gives of a language that has no monolingual text to correct it.
_UNSTEERED_TOLERANCE = Fraction(1, 1000)


@dataclass(frozen=True)
class SourceText:
    """What the plan needs to know of one source; counts are of one reading of what is trained on."""

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
    documents: int = 0
    """Documents; only ``packing: mixed_documents`` counts them."""
    windows: int | None = None
    """Samples in one reading, where they are not simply cut from it (whole documents)."""
    pairing: str = "aligned"
    """How a parallel file was made."""

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
            documents=manifest["documents"],
            pairing=manifest.get("pairing") or "aligned",
        )

    @property
    def content_tokens(self) -> int:
        """Tokens that belong to a language, over all languages."""
        return sum(self.content_tokens_by_language.values())

    def num_windows(self, seq_length: int) -> int:
        """Whole samples in one reading; a sample reads one token more than it trains on, shared with the next."""
        return max(self.tokens - 1, 0) // seq_length if self.windows is None else self.windows

    def max_windows(self, seq_length: int) -> int:
        """Samples that ``max_repeats`` allows."""
        return math.floor(Fraction(repr(float(self.max_repeats))) * self.num_windows(seq_length))

    @property
    def max_documents(self) -> int:
        """Documents that ``max_repeats`` allows."""
        return math.floor(Fraction(repr(float(self.max_repeats))) * self.documents)


@dataclass(frozen=True)
class PlannedSource:
    """One source's part in the plan."""

    text: SourceText
    group: int
    """Index of its language in ``MixturePlan.languages``, or ``PARALLEL``."""
    weight: int
    """Its part of what its group gives: its content tokens, so that sources of a group repeat equally; 0 if unused."""
    expected_samples: float
    """Samples of the run it will give (or fill), as far as whole-source averages tell."""

    def expected_documents(self, seq_length: int) -> float:
        """Documents it will give, likewise."""
        return self.expected_samples * seq_length * self.text.documents / max(self.text.tokens, 1)


@dataclass(frozen=True)
class MixturePlan:
    """What the blend is to hold to."""

    mixture: MixtureConfig
    """What was asked."""
    schedule: FractionSchedule
    """The fraction every sample is asked to have."""
    languages: tuple[str, ...]
    """Codes; language ids of the run index them."""
    sources: tuple[PlannedSource, ...]
    """In the order of ``data.sources``."""
    parallel_fraction: Fraction
    """What was asked; of a schedule its mean over the samples of the run."""
    shares: tuple[Fraction, ...]
    """Per language, the share of all steered languages' tokens it is held to; 0 where ``steered`` is false."""
    steered: tuple[bool, ...]
    """Per language, whether monolingual text can correct its share; others get what parallel text brings."""
    rates_without: tuple[Fraction, ...]
    """Per language, tokens its monolingual text has to give for one content token where no text is parallel ..."""
    rates_with: tuple[Fraction, ...]
    """... and where all of it is (negative: it would have to take some away)."""
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

    @property
    def share_scale(self) -> int:
        """The number that makes every share whole."""
        return math.lcm(*(share.denominator for share in self.shares))

    @property
    def mixes_documents(self) -> bool:
        """Whether samples hold documents of all sources (``packing: mixed_documents``)."""
        return self.mixture.packing == "mixed_documents"


@dataclass(frozen=True)
class _Groups:
    """Tokens per group (each language's monolingual sources, and all parallel ones) over whole sources."""

    languages: tuple[str, ...]
    windows_per_content: tuple[Fraction | None, ...]  # per language, monolingual; None: no such source
    windows_per_content_parallel: Fraction | None
    parallel_language_shares: tuple[Fraction, ...]

    @property
    def steered(self) -> tuple[bool, ...]:
        return tuple(windows is not None for windows in self.windows_per_content)


@dataclass(frozen=True)
class _Expected:
    """What a run of some length holds, as far as whole-source averages tell."""

    samples: int
    parallel_windows: Fraction
    monolingual_windows: tuple[Fraction, ...]  # per language
    content: Fraction
    parallel_content: Fraction

    @property
    def content_fraction(self) -> Fraction:
        return self.parallel_content / self.content if self.content else Fraction(0)


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
        # The last sample or so is settled by the built index, which knows what each window really holds; and a slope
        # of the schedule is an estimate here.
        if not _fits(source, plan, Fraction(1) if plan.schedule.is_constant else Fraction(101, 100)):
            raise too_little_text(plan, source)
    return plan


def _fits(source: PlannedSource, plan: MixturePlan, slack: Fraction, more: int = 1) -> bool:
    if plan.mixes_documents:
        return source.expected_documents(plan.seq_length) <= slack * source.text.max_documents + more
    return source.expected_samples <= slack * source.text.max_windows(plan.seq_length) + more


def _plan(
    mixture: MixtureConfig,
    sources: Sequence[SourceText],
    seq_length: int,
    train_steps: int,
    global_batch_size: int,
    check: bool = True,
) -> MixturePlan:
    schedule = FractionSchedule.of(mixture, seq_length)
    check_sources(mixture, sources, schedule)
    check_pairing(mixture, sources)
    languages = languages_of_run(mixture, [source.languages for source in sources])
    idle = "parallel" if schedule.is_never_parallel else "monolingual" if schedule.is_always_parallel else ""
    needed = [source for source in sources if source.origin != idle]
    check_has_text(needed, seq_length, whole_documents=mixture.packing == "mixed_documents")
    groups = _group(languages, needed, seq_length)
    asked_train_steps = train_steps
    if mixture.budget_rule == "add":
        train_steps = _steps_of_longer_run(mixture, schedule, groups, train_steps, global_batch_size)
    expected = _expect(mixture, schedule, groups, train_steps * global_batch_size)
    shares, asked = _shares(mixture, groups, expected.content_fraction, check)
    if check:
        rates = _monolingual_rates(mixture, groups, shares, expected.content_fraction)
        _check_room(mixture, groups, shares, asked, rates, expected.content_fraction)

    group_of = {source.name: _group_index(source, languages) for source in sources}
    windows_of_group: dict[int, Fraction] = {}
    for source in needed:
        group = group_of[source.name]
        windows_of_group[group] = windows_of_group.get(group, Fraction(0)) + _windows_of(source, seq_length)
    planned = []
    for source in sources:
        group = group_of[source.name]
        windows = expected.parallel_windows if group == PARALLEL else expected.monolingual_windows[group]
        if source.origin == idle or (group != PARALLEL and not shares[group]):
            planned.append(PlannedSource(source, group, 0, 0.0))
            continue
        part = _windows_of(source, seq_length) / windows_of_group[group]
        planned.append(PlannedSource(source, group, source.content_tokens, float(max(windows, Fraction(0)) * part)))
    return MixturePlan(
        mixture=mixture,
        schedule=schedule,
        languages=languages,
        sources=tuple(planned),
        parallel_fraction=_mean_fraction(schedule, train_steps * global_batch_size),
        shares=shares,
        steered=groups.steered,
        rates_without=_monolingual_rates(mixture, groups, shares, Fraction(0)),
        rates_with=_monolingual_rates(mixture, groups, shares, Fraction(1)),
        asked_languages=asked,
        seq_length=seq_length,
        asked_train_steps=asked_train_steps,
        train_steps=train_steps,
        global_batch_size=global_batch_size,
    )


def too_little_text(plan: MixturePlan, source: PlannedSource, wanted_draws: float = 0.0) -> ConfigError:
    """Say that a source would be read more often than allowed: what is there, what was asked, three ways out.

    Args:
        plan: the plan.
        source: the source of it that is too small.
        wanted_draws: samples (documents, where they are mixed) asked of it, where the built index knows better.

    Returns:
        The error, to be raised.
    """
    text, seq_length = source.text, plan.seq_length
    if plan.mixes_documents:
        wanted = math.ceil(max(source.expected_documents(seq_length), wanted_draws))
        of_one_reading, allowed, unit = text.documents, text.max_documents, "whole documents"
        tokens_of_draw = Fraction(text.tokens, max(text.documents, 1))
    else:
        wanted = math.ceil(max(source.expected_samples, wanted_draws))
        of_one_reading, allowed = text.num_windows(seq_length), text.max_windows(seq_length)
        unit, tokens_of_draw = f"whole samples of {seq_length:,}", Fraction(seq_length)
    repeats = max(math.ceil(wanted / of_one_reading), math.floor(text.max_repeats) + 1)
    asks = f"asks for {math.ceil(wanted * tokens_of_draw):,} tokens of {text.name}"
    there = (
        f"{text.name} holds {text.tokens:,} and max_repeats={text.max_repeats:g} allows "
        f"{math.floor(allowed * tokens_of_draw):,} ({unit})."
    )
    if source.group == PARALLEL:
        factor = _largest_factor(plan, source)
        lower = f"a fraction up to {_floor_digits(plan.mixture.parallel_fraction * factor, 3):g}"
        if plan.mixture.schedule:
            lower = f"fractions {_floor_digits(factor, 3):g} times as large"
        return ConfigError(
            f"{fraction_setting(plan.mixture)} {asks}; {there} Use {lower}, max_repeats={repeats} for {text.name}, or "
            "more parallel text."
        )
    language = text.languages[0]
    steps = math.floor(plan.asked_train_steps * Fraction(allowed, wanted))
    return ConfigError(
        f"data.mixture.languages.{language}={plan.asked_languages[language]:g} of "
        f"{plan.num_samples * seq_length:,} tokens {asks}; {there} "
        f"Use training.train_steps up to {steps:,}, max_repeats={repeats} for {text.name}, or more {language} text."
    )


def _largest_factor(plan: MixturePlan, source: PlannedSource) -> float:
    """By how much at most the fraction(s) may be multiplied for the text of a parallel source to be enough."""
    at = plan.sources.index(source)
    texts = [item.text for item in plan.sources]

    def fits(factor: float) -> bool:
        mixture = plan.mixture
        phases = tuple(
            replace(
                phase,
                parallel_fraction=phase.parallel_fraction * factor,
                to=None if phase.to is None else phase.to * factor,
            )
            for phase in mixture.schedule
        )
        asked = replace(mixture, parallel_fraction=mixture.parallel_fraction * factor, schedule=phases)
        other = _plan(asked, texts, plan.seq_length, plan.asked_train_steps, plan.global_batch_size, check=False)
        return _fits(other.sources[at], other, Fraction(1), more=0)

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _group_index(source: SourceText, languages: tuple[str, ...]) -> int:
    return PARALLEL if source.origin == "parallel" else languages.index(source.languages[0])


def _windows_of(source: SourceText, seq_length: int) -> Fraction:
    """Samples that one reading fills."""
    return Fraction(source.tokens, seq_length) if source.windows is None else Fraction(source.windows)


def _group(languages: tuple[str, ...], sources: Sequence[SourceText], seq_length: int) -> _Groups:
    def per_content(members: list[SourceText]) -> Fraction | None:
        content = sum(source.content_tokens for source in members)
        return _sum(_windows_of(source, seq_length) for source in members) / content if content else None

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


def _expect(mixture: MixtureConfig, schedule: FractionSchedule, groups: _Groups, num_samples: int) -> _Expected:
    """What a run of so many samples holds."""
    parallel = content = parallel_content = Fraction(0)
    monolingual = [Fraction(0)] * len(groups.languages)
    for stretch in schedule.stretches(max(num_samples, 1)):
        fraction = _content_fraction(mixture, stretch.fraction, groups)
        by_language = _windows_per_content(mixture, groups, fraction)
        by_parallel = fraction * (groups.windows_per_content_parallel or 0)
        held = (stretch.end - stretch.begin) / (_sum(by_language) + by_parallel)
        if not schedule.is_constant:
            # An estimate; numerators and denominators of many exact ones would grow without end.
            held = held.limit_denominator(10**9)
        content += held
        parallel_content += held * fraction
        parallel += held * by_parallel
        monolingual = [sum_ + held * windows for sum_, windows in zip(monolingual, by_language, strict=True)]
    return _Expected(max(num_samples, 1), parallel, tuple(monolingual), content, parallel_content)


def _steps_of_longer_run(
    mixture: MixtureConfig, schedule: FractionSchedule, groups: _Groups, train_steps: int, global_batch_size: int
) -> int:
    """Steps of a run whose monolingual text alone is as many samples as were asked for (``budget_rule: add``)."""
    asked = train_steps * global_batch_size

    def is_enough(steps: int) -> bool:
        expected = _expect(mixture, schedule, groups, steps * global_batch_size)
        return _sum(expected.monolingual_windows) >= asked

    low, high = 0, train_steps
    while not is_enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _mean_fraction(schedule: FractionSchedule, num_samples: int) -> Fraction:
    if schedule.is_constant:
        return schedule.phases[0].begin
    held = _sum((stretch.end - stretch.begin) * stretch.fraction for stretch in schedule.stretches(num_samples))
    return held / num_samples


def _content_fraction(mixture: MixtureConfig, fraction: Fraction, groups: _Groups) -> Fraction:
    """Parallel share of the content tokens; differs from the fraction asked where that counts all tokens."""
    if mixture.fraction_of == "content" or fraction in (0, 1):
        return fraction
    # Monolingual windows per content token are a straight line in the content fraction; so two points give it.
    at_none = _sum(_windows_per_content(mixture, groups, Fraction(0)))
    slope = _sum(_windows_per_content(mixture, groups, Fraction(1))) - at_none
    parallel_windows = groups.windows_per_content_parallel or Fraction(0)
    return fraction * at_none / (parallel_windows * (1 - fraction) - fraction * slope)


def _windows_per_content(mixture: MixtureConfig, groups: _Groups, content_fraction: Fraction) -> list[Fraction]:
    """Monolingual samples of each language for one content token of the run."""
    shares, _ = _shares(mixture, groups, content_fraction, check=False)
    rates = _monolingual_rates(mixture, groups, shares, content_fraction)
    return [rate * (per or 0) for rate, per in zip(rates, groups.windows_per_content, strict=True)]


def _shares(
    mixture: MixtureConfig, groups: _Groups, content_fraction: Fraction, check: bool = True
) -> tuple[tuple[Fraction, ...], dict[str, float]]:
    """Shares among steered languages (adding up to 1, 0 for the others), and shares as asked."""
    steered, replaces = groups.steered, mixture.budget_rule == "replace"
    brought = [content_fraction * share if replaces else Fraction(0) for share in groups.parallel_language_shares]
    loose = [index for index, held in enumerate(steered) if not held]
    left = 1 - _sum(brought[index] for index in loose)
    if mixture.languages:
        total = _sum(exact(share) for share in mixture.languages.values())
        asked = [exact(mixture.languages.get(code, 0.0)) / total for code in groups.languages]
        for index in loose if check else ():
            if abs(asked[index] - brought[index]) > _UNSTEERED_TOLERANCE:
                raise _cannot_steer(mixture, groups, asked, brought, index, content_fraction)
    else:
        asked = [left / max(sum(steered), 1)] * len(steered)
    for index in loose:
        asked[index] = brought[index]
    held = _sum(share for share, is_held in zip(asked, steered, strict=True) if is_held)
    if held:
        shares = tuple(share / held if is_held else Fraction(0) for share, is_held in zip(asked, steered, strict=True))
    else:
        # Parallel text of other languages is all there is: whatever steered languages share is nothing.
        shares = tuple(Fraction(is_held, max(sum(steered), 1)) for is_held in steered)
    return shares, {code: float(share) for code, share in zip(groups.languages, asked, strict=True)}


def _cannot_steer(
    mixture: MixtureConfig,
    groups: _Groups,
    asked: list[Fraction],
    brought: list[Fraction],
    index: int,
    content_fraction: Fraction,
) -> ConfigError:
    language, steered = groups.languages[index], groups.steered
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
        f"data.mixture.languages.{language}={float(asked[index]):g} with {_fraction_held(mixture, content_fraction)}: "
        f"no monolingual source with a part in the run is {language}, so it gets what "
        f"parallel text brings, {float(brought[index]):.4f}. Use languages: {{{shown}}}, leave languages out, or add "
        f"monolingual {language} text{' and a fraction below 1' if content_fraction == 1 else ''}."
    )


def _fraction_held(mixture: MixtureConfig, content_fraction: Fraction) -> str:
    if mixture.schedule:
        return f"a schedule that comes to {float(content_fraction):.4g} of the content tokens"
    return f"parallel_fraction={mixture.parallel_fraction:g}"


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
    content_fraction: Fraction,
) -> None:
    """Parallel text alone must not exceed a language's share."""
    for index, rate in enumerate(rates):
        if rate >= 0 or not shares[index]:
            continue
        language = groups.languages[index]
        brought = asked[language] - float(rate)
        factor = asked[language] / brought
        lower = f"a fraction up to {_floor_digits(mixture.parallel_fraction * factor, 3):g}"
        if mixture.schedule:
            lower = f"fractions {_floor_digits(factor, 3):g} times as large"
        raise ConfigError(
            f"data.mixture.languages.{language}={asked[language]:g} is less than parallel text alone brings: at "
            f"{_fraction_held(mixture, content_fraction)} that is {brought:.4f}. Use a share of at least "
            f"{math.ceil(brought * 1000) / 1000:g}, {lower}, or budget_rule=add, where shares are "
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
