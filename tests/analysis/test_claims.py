"""Series whose answer is known: what was built in must be found, and what was not must not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_xalign.analysis import retrieval
from megatron_xalign.analysis.claims import Claim, weigh_claims
from megatron_xalign.config import CaptureConfig, DataConfig, MixtureConfig, RunConfig
from megatron_xalign.config.tree import to_yaml
from megatron_xalign.errors import FormatError
from megatron_xalign.formats.results import Results, Row, write_results

LANGUAGES = ("eng_Latn", "fin_Latn")
PAIR = "eng_Latn-fin_Latn"
SENTENCES, HIDDEN = 120, 12
STEPS = (0, 10, 20, 40, 60)


def alignment(step: int, early: float, final: float) -> float:
    """Share of a sentence's vector that both languages have, from 0 to ``final``; ``early`` speeds the rise."""
    return final * (1 - np.exp(-step * (0.05 + early)))


def write_run(root: Path, fraction: float, seed: int, early: float, final: float, neurons: int) -> Path:
    name = f"p{fraction:g}-s{seed}"
    run = root / name
    config = RunConfig(
        name=name, output_dir=str(run), seed=seed, capture=CaptureConfig(),
        data=DataConfig(mixture=MixtureConfig(parallel_fraction=fraction, seed=seed)),
    )
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    rows, hits = [], np.zeros((len(STEPS), 1, 2, SENTENCES), np.uint8)
    for place, step in enumerate(STEPS):
        random = np.random.default_rng([seed, step, int(1000 * fraction)])
        shared = np.random.default_rng(0).normal(size=(SENTENCES, HIDDEN))
        part = alignment(step, early, final)
        sides = [part * shared + (1 - part) * random.normal(size=(SENTENCES, HIDDEN)) + side for side in (0, 3)]
        found = retrieval.bitext_accuracy(*sides, centred=True)
        hits[place] = found.forward_hit_D.astype(np.uint8) + found.backward_hit_D
        for layer in (-1, 0):
            rows.append(Row(step, step * 100, "retrieval_centred", layer, PAIR, part * (0.5 if layer < 0 else 1)))
        for language in LANGUAGES:
            rows.append(Row(step, step * 100, "ap_count_0.9", None, language, float(neurons + seed)))
    context = {"probed_languages": list(LANGUAGES), "language_pairs": [PAIR], "steps": list(STEPS)}
    write_results(run / "analysis", Results(context, rows, {"sentence_retrieval": hits}))
    return run


def weighed(root: Path, seeds: int, early: float, final: float, neurons: int) -> dict[str, Claim]:
    """Three fractions; each step up changes early speed, final level and neurons by so much."""
    runs = [
        write_run(root, fraction, seed, early * dose, 0.8 + final * dose, 500 + neurons * dose)
        for dose, fraction in enumerate((0.0, 0.05, 0.2)) for seed in range(1, seeds + 1)
    ]
    return {claim.claim: claim for claim in weigh_claims(runs)}


EARLY, NEURONS, FINAL = "accelerates early sharing", "fewer language-specific neurons", "same final level"


def test_three_seeds_find_what_was_built_in(tmp_path: Path) -> None:
    claims = weighed(tmp_path, 3, early=0.05, final=0.0, neurons=-40)
    assert {name: claim.verdict for name, claim in claims.items()} == {EARLY: "for", NEURONS: "for", FINAL: "for"}
    assert "over 9 runs, every order" in claims[EARLY].test and "seeds averaged" in claims[FINAL].test
    assert "layer 0" in claims[EARLY].numbers  # the better one in the results
    assert "1003 to" not in claims[NEURONS].numbers
    assert "1004 (1002 to 1006) at 0 %" in claims[NEURONS].numbers


def test_the_opposite_is_found_too(tmp_path: Path) -> None:
    claims = weighed(tmp_path, 3, early=-0.015, final=-0.25, neurons=40)
    assert {name: claim.verdict for name, claim in claims.items()} == {
        EARLY: "against", NEURONS: "against", FINAL: "against"
    }


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    claims = weighed(tmp_path, 2, early=0.0, final=0.0, neurons=0)
    assert claims[EARLY].verdict == claims[NEURONS].verdict == "undecided"
    assert claims[FINAL].verdict == "for"


def test_one_seed_says_what_it_cannot_say(tmp_path: Path) -> None:
    claims = weighed(tmp_path, 1, early=0.08, final=0.0, neurons=-40)
    assert claims[EARLY].verdict == "for" and "another seed may differ" in claims[EARLY].test
    assert "over sentences" in claims[EARLY].test
    assert claims[NEURONS].verdict == "undecided" and "tells nothing" in claims[NEURONS].test


def test_one_fraction_makes_no_claim_and_controls_stand_aside(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, 0.05, seed, 0, 0.8, 500) for seed in (1, 2)]
    assert weigh_claims(runs) == []
    runs.append(write_run(tmp_path, 0.2, 1, 0, 0.8, 500))
    assert weigh_claims(runs, {"p0.2-s1": "shuffled"}) == []


def test_controls_stand_beside_the_numbers_and_change_no_verdict(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, fraction, seed, 0.05 * dose, 0.8, 500 - 40 * dose)
            for dose, fraction in enumerate((0.0, 0.05, 0.2)) for seed in (1, 2, 3)]
    without = weigh_claims(runs)
    # As good as the best of the series, and of its fraction: it would be averaged into it if it took part.
    control = write_run(tmp_path, 0.21, 1, 0.1, 0.8, 420)
    claims = weigh_claims([*runs, control], {"p0.21-s1": "shuffled"})
    assert [(claim.verdict, claim.test) for claim in claims] == [(claim.verdict, claim.test) for claim in without]
    for claim, before in zip(claims, without, strict=True):
        assert claim.numbers.startswith(before.numbers + "; in the control shuffled: ")
    assert claims[1].numbers.endswith("in the control shuffled: 842 at 21 %")


def test_a_run_that_was_not_analysed_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, 0.05, 1, 0, 0.8, 500)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(FormatError, match="empty/analysis"):
        weigh_claims([run, tmp_path / "empty"])
    write_results(tmp_path / "empty" / "analysis", Results({"steps": list(STEPS)}, [Row(0, 0, "cka", 0, PAIR, 0.5)]))
    with pytest.raises(FormatError, match=r"sentence_retrieval.*xalign analyze"):
        weigh_claims([run, tmp_path / "empty"])
