"""Languages of texts: codes, scripts, and the offline identifier."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from megatron_xalign.data import language_identification
from megatron_xalign.data.filters import PairFilter, PairFilters
from megatron_xalign.data.folding import SCRIPTS, count_characters
from megatron_xalign.data.language_identification import (
    LanguageChecker,
    identifier_code,
    letter_widths,
    script_shares,
    scripts_of,
)
from megatron_xalign.errors import ConfigError

# Article 1 of the Universal Declaration of Human Rights, a document of the United Nations free to reproduce.
ARTICLE = {
    "eng_Latn": "All human beings are born free and equal in dignity and rights.",
    "fin_Latn": "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan.",
    "swe_Latn": "Alla människor är födda fria och lika i värde och rättigheter.",
    "deu_Latn": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "zho_Hans": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心。",
    "arb_Arab": "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق.",
    "fra_Latn": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "spa_Latn": "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "rus_Cyrl": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "est_Latn": "Kõik inimesed sünnivad vabadena ja võrdsetena oma väärikuselt ja õigustelt.",
    "hun_Latn": "Minden emberi lény szabadon születik és egyenlő méltósága és joga van.",
    "dan_Latn": "Alle mennesker er født frie og lige i værdighed og rettigheder.",
    "jpn_Jpan": "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "kor_Hang": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
}  # fmt: skip


def wrong(checker: LanguageChecker, text: str, language: str | None) -> tuple[bool, bool]:
    counts = count_characters([text])
    return (
        bool(checker.wrong_script(counts, language)[0]),
        bool(checker.wrong_language([text], counts, language)[0]),
    )


@pytest.mark.parametrize(
    ("code", "scripts", "identifier"),
    [
        ("eng_Latn", {"Latn"}, "en"), ("en", {"Latn"}, "en"), ("eng", {"Latn"}, "en"), ("EN-us", {"Latn"}, "en"),
        ("zho_Hans", {"Hani", "Bopo"}, "zh"), ("zh", {"Hani", "Bopo"}, "zh"), ("zh_TW", {"Hani", "Bopo"}, "zh"),
        ("zh-Hant-HK", {"Hani", "Bopo"}, "zh"), ("jpn_Jpan", {"Hani", "Bopo", "Kana"}, "ja"), ("pt_BR", {"Latn"}, "pt"),
        ("kor_Hang", {"Hang"}, "ko"), ("arz_Arab", {"Arab"}, "ar"), ("nob_Latn", {"Latn"}, "no"),
        ("srp_Cyrl", {"Cyrl"}, "sr"), ("srp_Latn", {"Latn"}, None), ("sr@latin", {"Latn"}, None),
        ("sr", {"Cyrl"}, "sr"), ("swh_Latn", {"Latn"}, None),
        ("sw", None, None), ("ydd_Hebr", {"Hebr"}, None), ("kas_Deva", {"Deva"}, None), ("ckb_Arab", {"Arab"}, "ku"),
        ("tgl_Latn", {"Latn"}, "tl"), ("xyz_Qaaa", None, None), ("", None, None), ("sat_Olck", {"Olck"}, None),
    ],
)  # fmt: skip
def test_codes_are_understood(code: str, scripts: set[str] | None, identifier: str | None) -> None:
    assert scripts_of(code) == scripts
    assert identifier_code(code) == identifier


def test_every_language_of_the_identifier_has_a_code_and_a_script() -> None:
    pytest.importorskip("eld")
    from eld import LanguageDetector

    LanguageDetector()
    from eld.languageData import languageData

    for code in languageData.lang_codes.values():
        assert identifier_code(code) == code
        assert scripts_of(code) <= set(SCRIPTS)


def test_shares_of_scripts_are_of_letters_alone() -> None:
    shares = script_shares(["дом дом house", "42 - !", ARTICLE["rus_Cyrl"], "人x生カ"], "rus_Cyrl")
    assert shares is not None
    np.testing.assert_allclose(shares, [6 / 11, np.nan, 1.0, 0.0])
    japanese = script_shares(["人x生カ"], "jpn_Jpan")
    assert japanese is not None and japanese[0] == 3 / 4
    assert script_shares(["a"], "xyz_Qaaa") is None


@pytest.mark.parametrize("language", ARTICLE)
@pytest.mark.parametrize("check", ["off", "script", "identify"])
def test_a_text_is_in_its_own_language(language: str, check: str) -> None:
    if check == "identify":
        pytest.importorskip("eld")
    checker = LanguageChecker(check)  # type: ignore[arg-type]
    assert wrong(checker, ARTICLE[language], language) == (False, False)
    assert checker.not_checked == {}


@pytest.mark.parametrize("language", ARTICLE)
def test_another_label_is_noticed(language: str) -> None:
    pytest.importorskip("eld")
    checker = LanguageChecker("identify")
    for label in ARTICLE:
        if label != language:
            script, identified = wrong(checker, ARTICLE[language], label)
            # Han is a script of Japanese too: there the identifier decides.
            assert script or identified, label
            if not {label[-4:], language[-4:]} <= {"Hans", "Jpan"} and label[-4:] != language[-4:]:
                assert script, label


def test_scripts_are_compared_without_an_identifier() -> None:
    checker = LanguageChecker("script")
    assert wrong(checker, ARTICLE["fin_Latn"], "zho_Hans") == (True, False)
    assert wrong(checker, ARTICLE["fin_Latn"], "deu_Latn") == (False, False)
    assert checker.identifier is None


def test_a_language_the_identifier_does_not_know_is_judged_by_its_script_and_counted() -> None:
    pytest.importorskip("eld")
    checker = LanguageChecker("identify")
    assert wrong(checker, ARTICLE["fin_Latn"], "swh_Latn") == (False, False)
    assert checker.not_checked == {"language unknown: swh_Latn": 1}
    assert wrong(checker, ARTICLE["fin_Latn"], "kas_Deva")[0]
    assert wrong(checker, ARTICLE["fin_Latn"], "sw") == (False, False)
    assert checker.not_checked["language unknown: sw"] == 1


def test_short_texts_and_texts_without_a_language_are_kept_and_counted() -> None:
    pytest.importorskip("eld")
    checker = LanguageChecker("identify")
    assert wrong(checker, "Hyvää päivää", "swe_Latn") == (False, False)
    assert wrong(checker, "12345 " * 20, "swe_Latn") == (False, False)
    assert wrong(checker, "", "swe_Latn") == (False, False)
    assert checker.not_checked == {"too short to tell": 3}
    assert wrong(checker, ARTICLE["fin_Latn"], None) == (False, False)
    assert checker.not_checked == {"too short to tell": 3, "no language given": 1}


def test_the_filter_counts_wrong_languages_and_sides_it_could_not_check() -> None:
    pytest.importorskip("eld")
    pair_filter = PairFilter(PairFilters(check_language="identify"))
    english = ARTICLE["eng_Latn"]
    others = [ARTICLE["fin_Latn"], ARTICLE["swe_Latn"], "All people are born free and with equal rights.", "Vapaa!"]
    keep, reasons = pair_filter.apply([english] * 4, others, "eng_Latn", "fin_Latn")
    assert keep.tolist() == [True, False, False, False]
    assert reasons == {"wrong language": 2, "length ratio": 1}
    assert pair_filter.not_checked == {}
    keep, reasons = pair_filter.apply([english] * 2, others[:2], "eng_Latn", ["fin_Latn", "swe_Latn"])
    assert keep.all() and not reasons
    keep, reasons = pair_filter.apply(["Free!"], ["Vapaa!"], "eng_Latn", "fin_Latn")
    assert keep.all() and pair_filter.not_checked == {"too short to tell": 2}
    assert pair_filter.identifier is not None and pair_filter.identifier["name"] == "eld"


def test_a_missing_identifier_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "eld", None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-xalign\[langid\]'"):
        LanguageChecker("identify")
    assert LanguageChecker("script").identifier is None
    with pytest.raises(ConfigError, match="check_language='guess'"):
        LanguageChecker("guess")  # type: ignore[arg-type]


def test_letters_are_weighted_by_their_script() -> None:
    widths = letter_widths(count_characters(["abc", "中文", "かな", "한글", "12 .", "中a"]))
    np.testing.assert_array_equal(widths.sum(axis=1), [3, 6, 2.5, 4, 0, 4])


def test_generated_text_is_identified_or_said_to_be_too_short() -> None:
    pytest.importorskip("eld")
    identifier = language_identification.LanguageIdentifier(["eng_Latn", "fin_Latn"])
    english, finnish, short, french = identifier.identify(
        [
            "The ministers will meet again next week to talk about the budget.",
            "Ministerit tapaavat jälleen ensi viikolla ja puhuvat talousarviosta.",
            "Kyllä se on",
            "Les ministres se réuniront la semaine prochaine pour parler du budget.",
        ],
        wanted="fin_Latn",
    )
    assert (english.language, finnish.language, french.language) == ("eng_Latn", "fin_Latn", None)
    assert finnish.share > english.share and french.determined
    assert short == language_identification.Identified(None, 0.0, False)
    with pytest.raises(ConfigError, match="xho_Latn"):
        language_identification.LanguageIdentifier(["xho_Latn"])
