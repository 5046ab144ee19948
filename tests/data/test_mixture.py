"""The plan of a mixture: arithmetic on sources' statistics."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_xalign.config import MixtureConfig
from megatron_xalign.data.mixture import PARALLEL, MixturePlan, SourceText, exact, plan_mixture
from megatron_xalign.errors import ConfigError, CorpusError

SEQ_LENGTH = 100


def monolingual(language: str, content: int, tokens: int | None = None, repeats: float = 1.0) -> SourceText:
    return SourceText(
        name=language.split("_")[0],
        prefix=f"tokens/{language.split('_')[0]}",
        origin="monolingual",
        languages=(language,),
        tokens=tokens or content + content // 50,
        content_tokens_by_language={language: content},
        max_repeats=repeats,
    )


def parallel(english: int, finnish: int, tokens: int | None = None, repeats: float = 1.0) -> SourceText:
    return SourceText(
        name="pairs",
        prefix="tokens/pairs",
        origin="parallel",
        languages=("eng_Latn", "fin_Latn"),
        tokens=tokens or english + finnish + (english + finnish) // 20,
        content_tokens_by_language={"eng_Latn": english, "fin_Latn": finnish},
        max_repeats=repeats,
    )


ENGLISH, FINNISH = monolingual("eng_Latn", 4_000_000), monolingual("fin_Latn", 4_000_000)
PAIRS = parallel(400_000, 600_000)
HALVES = {"eng_Latn": 0.5, "fin_Latn": 0.5}


def plan(
    mixture: MixtureConfig, *sources: SourceText, train_steps: int = 1000, global_batch_size: int = 10
) -> MixturePlan:
    return plan_mixture(
        mixture, sources, seq_length=SEQ_LENGTH, train_steps=train_steps, global_batch_size=global_batch_size
    )


def expected_content(made: MixturePlan, at: int) -> float:
    source = made.sources[at]
    return source.expected_samples * SEQ_LENGTH * source.text.content_tokens / source.text.tokens


def test_parallel_text_takes_the_place_of_monolingual_text_of_its_own_languages() -> None:
    made = plan(MixtureConfig(parallel_fraction=0.1, languages=HALVES), ENGLISH, FINNISH, PAIRS)
    english, finnish, pairs = (expected_content(made, at) for at in range(3))
    total = english + finnish + pairs
    assert pairs / total == pytest.approx(0.1)
    assert (english + 0.4 * pairs) / total == pytest.approx(0.5)
    assert (finnish + 0.6 * pairs) / total == pytest.approx(0.5)
    assert sum(source.expected_samples for source in made.sources) == pytest.approx(made.num_samples)


def test_fraction_of_all_tokens_is_the_share_of_samples() -> None:
    made = plan(MixtureConfig(parallel_fraction=0.1, fraction_of="all", languages=HALVES), ENGLISH, FINNISH, PAIRS)
    assert made.sources[2].expected_samples == pytest.approx(0.1 * made.num_samples)
    english, finnish, pairs = (expected_content(made, at) for at in range(3))
    assert (english + 0.4 * pairs) / (english + finnish + pairs) == pytest.approx(0.5)


@pytest.mark.parametrize("fraction_of", ["content", "all"])
def test_pairs_may_be_of_languages_without_other_text(fraction_of: str) -> None:
    arabic = monolingual("ara_Arab", 4_000_000)
    made = plan(MixtureConfig(parallel_fraction=0.1, fraction_of=fraction_of), arabic, PAIRS)  # type: ignore[arg-type]
    own, pairs = (expected_content(made, at) for at in range(2))
    if fraction_of == "content":
        assert pairs / (own + pairs) == pytest.approx(0.1)
    else:
        assert made.sources[1].expected_samples == pytest.approx(0.1 * made.num_samples)
    assert sum(source.expected_samples for source in made.sources) == pytest.approx(made.num_samples)


def test_add_keeps_the_monolingual_budget_and_the_run_grows() -> None:
    asked = MixtureConfig(parallel_fraction=0.2, budget_rule="add", languages=HALVES)
    made = plan(asked, ENGLISH, FINNISH, parallel(4_000_000, 6_000_000))
    assert made.asked_train_steps == 1000
    assert made.train_steps > 1250  # pairs have less content in a sample, so more than one sample in five is theirs
    assert made.sources[0].expected_samples == pytest.approx(made.sources[1].expected_samples)
    monolingual_samples = made.sources[0].expected_samples + made.sources[1].expected_samples
    assert 10_000 <= monolingual_samples < 10_010


def test_weights_and_shares_do_not_depend_on_run_length() -> None:
    asked = MixtureConfig(parallel_fraction=0.05, languages=HALVES)
    short, long = plan(asked, ENGLISH, FINNISH, PAIRS, train_steps=1), plan(asked, ENGLISH, FINNISH, PAIRS)
    for name in ("languages", "shares", "steered", "rates_without", "rates_with", "parallel_fraction"):
        assert getattr(short, name) == getattr(long, name)
    assert [source.weight for source in short.sources] == [source.weight for source in long.sources]


def test_no_languages_named_means_equal_shares() -> None:
    made = plan(MixtureConfig(), ENGLISH, FINNISH, monolingual("swe_Latn", 4_000_000))
    assert made.languages == ("eng_Latn", "fin_Latn", "swe_Latn")
    assert made.shares == (Fraction(1, 3),) * 3


def test_sources_of_one_language_give_by_size() -> None:
    larger = replace(monolingual("eng_Latn", 3_000_000), name="web", prefix="tokens/web")
    made = plan(MixtureConfig(), monolingual("eng_Latn", 1_000_000), larger)
    assert made.sources[1].expected_samples == pytest.approx(3 * made.sources[0].expected_samples)


def test_a_parallel_source_listed_at_fraction_zero_gives_nothing() -> None:
    made = plan(MixtureConfig(languages=HALVES), ENGLISH, FINNISH, replace(PAIRS, tokens=5))
    assert (made.sources[2].group, made.sources[2].weight, made.sources[2].expected_samples) == (PARALLEL, 0, 0.0)


def test_at_fraction_one_languages_are_what_parallel_text_brings() -> None:
    made = plan(MixtureConfig(parallel_fraction=1.0), PAIRS, train_steps=100)
    assert made.steered == (False, False)
    assert made.asked_languages == {"eng_Latn": 0.4, "fin_Latn": 0.6}
    assert made.sources[0].expected_samples == made.num_samples


def test_a_language_of_parallel_text_only_gets_what_that_brings() -> None:
    made = plan(MixtureConfig(parallel_fraction=0.1), ENGLISH, PAIRS, train_steps=100)
    assert made.steered == (True, False)
    assert made.asked_languages == pytest.approx({"eng_Latn": 0.94, "fin_Latn": 0.06})


def test_a_typed_number_is_taken_as_written() -> None:
    assert exact(0.05) == Fraction(1, 20)
    assert exact(1 / 3) != Fraction(1 / 3)


def test_too_little_parallel_text_is_an_error_with_three_ways_out_that_work() -> None:
    asked = MixtureConfig(parallel_fraction=0.3, languages=HALVES)
    small = parallel(40_000, 60_000, repeats=2)
    with pytest.raises(ConfigError) as caught:
        plan(asked, ENGLISH, FINNISH, small)
    message = str(caught.value)
    assert "data.mixture.parallel_fraction=0.3 asks for 3" in message
    assert "pairs holds 105,000 and max_repeats=2 allows 209,800" in message
    fraction = float(re.search(r"fraction up to ([\d.]+\d)", message)[1])  # type: ignore[index]
    repeats = int(re.search(r"max_repeats=(\d+) for pairs", message)[1])  # type: ignore[index]
    plan(replace(asked, parallel_fraction=fraction), ENGLISH, FINNISH, small)
    plan(asked, ENGLISH, FINNISH, replace(small, max_repeats=repeats))
    with pytest.raises(ConfigError):
        plan(replace(asked, parallel_fraction=fraction * 1.02), ENGLISH, FINNISH, small)
    with pytest.raises(ConfigError):
        plan(asked, ENGLISH, FINNISH, replace(small, max_repeats=repeats - 1))


def test_too_little_monolingual_text_is_an_error_with_three_ways_out_that_work() -> None:
    asked, small = MixtureConfig(languages=HALVES), monolingual("fin_Latn", 200_000)
    with pytest.raises(ConfigError) as caught:
        plan(asked, ENGLISH, small)
    message = str(caught.value)
    assert "data.mixture.languages.fin_Latn=0.5 of 1,000,000 tokens asks for 500,000 tokens of fin" in message
    assert "fin holds 204,000 and max_repeats=1 allows 203,900" in message
    steps = int(re.search(r"train_steps up to (\d+)", message)[1])  # type: ignore[index]
    repeats = int(re.search(r"max_repeats=(\d+) for fin", message)[1])  # type: ignore[index]
    plan(asked, ENGLISH, small, train_steps=steps)
    plan(asked, ENGLISH, replace(small, max_repeats=repeats))
    with pytest.raises(ConfigError):
        plan(asked, ENGLISH, small, train_steps=steps + 2)


@pytest.mark.parametrize(
    ("mixture", "sources", "words"),
    [
        (MixtureConfig(), [], "data.sources is empty"),
        (MixtureConfig(), [ENGLISH, replace(FINNISH, name="eng")], "both named eng"),
        (MixtureConfig(parallel_fraction=0.05), [ENGLISH], r"parallel_fraction=0.05 and none .*\(eng\) is parallel"),
        (MixtureConfig(parallel_fraction=0.05), [PAIRS], "leaves 0.95 of the tokens to monolingual text"),
        (MixtureConfig(languages={"eng_Latn": 0.5, "swe_Latn": 0.5}), [ENGLISH], "no.* has swe_Latn text"),
        (MixtureConfig(languages={"eng_Latn": 1.0}), [ENGLISH, FINNISH], "gives that language no share"),
        (
            MixtureConfig(parallel_fraction=0.3, languages={"eng_Latn": 0.9, "fin_Latn": 0.1}),
            [ENGLISH, FINNISH, PAIRS],
            r"fin_Latn=0.1 .*that is 0.1800. Use a share of at least 0.18, a fraction up to 0.166, or budget_rule=add",
        ),
        (
            MixtureConfig(parallel_fraction=0.1, languages=HALVES),
            [ENGLISH, PAIRS],
            r"no monolingual source .* is fin_Latn.* Use languages: \{eng_Latn: 0.9400, fin_Latn: 0.0600\}",
        ),
        (
            MixtureConfig(parallel_fraction=1.0, languages=HALVES),
            [PAIRS],
            r"Use languages: \{eng_Latn: 0.4000, fin_Latn: 0.6000\}, leave languages out, or .* a fraction below 1",
        ),
    ],
)
def test_what_cannot_be_is_an_error_that_names_the_setting(
    mixture: MixtureConfig, sources: list[SourceText], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(mixture, *sources, train_steps=10)


def test_a_source_smaller_than_one_sample_is_an_error() -> None:
    with pytest.raises(CorpusError, match="tokens/fin holds 100 tokens, 98 of them content"):
        plan(MixtureConfig(), ENGLISH, monolingual("fin_Latn", 98, tokens=100), train_steps=1)


@settings(max_examples=60, deadline=None)
@given(
    fraction=st.integers(0, 90).map(lambda percent: percent / 100),
    english_share=st.integers(1, 99).map(lambda percent: percent / 100),
    content=st.lists(st.integers(10_000, 10**9), min_size=4, max_size=4),
    of_all=st.booleans(),
    rule=st.sampled_from(["replace", "add"]),
)
def test_expected_samples_reach_what_was_asked(
    fraction: float, english_share: float, content: list[int], of_all: bool, rule: str
) -> None:
    asked = MixtureConfig(
        parallel_fraction=fraction,
        fraction_of="all" if of_all else "content",
        budget_rule=rule,  # type: ignore[arg-type]
        languages={"eng_Latn": english_share, "fin_Latn": round(1 - english_share, 2)},
    )
    sources = [monolingual("eng_Latn", content[0], repeats=1e9), monolingual("fin_Latn", content[1], repeats=1e9)]
    sources.append(parallel(content[2], content[3], repeats=1e9))
    try:
        made = plan(asked, *sources, train_steps=100)
    except ConfigError as error:
        assert "less than parallel text alone brings" in str(error)
        assume(False)
    english, finnish, pairs = (expected_content(made, at) for at in range(3))
    if of_all:
        assert made.sources[2].expected_samples == pytest.approx(fraction * made.num_samples)
    else:
        assert pairs == pytest.approx(fraction * (english + finnish + pairs))
    share = content[2] / (content[2] + content[3])
    if rule == "add":
        assert english == pytest.approx(english_share * (english + finnish))
    else:
        assert english + share * pairs == pytest.approx(english_share * (english + finnish + pairs))
