"""Corpus files to token files: what comes out, whatever the workers and parts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from preprocess_jobs import LANGUAGES, contents, documents, monolingual_job, names, pairs, pairs_job, write_lines

from megatron_xalign.data import preprocess as preprocess_module
from megatron_xalign.data.documents import pair_order, parse_template
from megatron_xalign.data.filters import PairFilters
from megatron_xalign.data.inputs import Fields
from megatron_xalign.data.job import Survey
from megatron_xalign.data.job_settings import JobSettings, SentenceSettings
from megatron_xalign.data.preprocess import describe_plan, preprocess, run_job
from megatron_xalign.data.tokenizer import Tokenizer, train_tokenizer
from megatron_xalign.errors import ConfigError, CorpusError
from megatron_xalign.formats.token_file import check_token_file, read_token_file, verify_token_file

FINNISH = ["Kissa istuu puussa.", "Koira nukkuu, ja lintu laulaa.", "漢字 😀 äöå", "", "  \n", "Viides rivi.\nKuudes."]
PAIRS = [(f"The cat sits in tree {n}.", f"Kissa istuu puussa {n}.") for n in range(30)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = {"eng_Latn": [a for a, _ in PAIRS], "fin_Latn": [*FINNISH, *(b for _, b in PAIRS)]}
    return Tokenizer.load(train_tokenizer(texts, tmp_path_factory.mktemp("t") / "tokenizer", 350))


@pytest.fixture
def finnish(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "fin.jsonl", [{"id": f"f{n}", "text": text} for n, text in enumerate(FINNISH)])


@pytest.fixture
def english_finnish(tmp_path: Path) -> Path:
    records = [{"id": f"p{n}", "texts": {"eng_Latn": a, "fin_Latn": b}} for n, (a, b) in enumerate(PAIRS)]
    records.append({"id": "half", "texts": {"eng_Latn": "No translation", "fin_Latn": ""}})
    return write_lines(tmp_path / "pairs.jsonl", records)


def test_monolingual_documents_come_back_as_their_text(tmp_path: Path, finnish: Path, tokenizer: Tokenizer) -> None:
    manifest = preprocess(monolingual_job([finnish], tmp_path / "tokens" / "fin", tokenizer.path))
    file = read_token_file(tmp_path / "tokens" / "fin")
    assert [tokenizer.decode(document[:-1]) for document in file] == [text for text in FINNISH if text.strip()]
    assert all(document[-1] == tokenizer.eod for document in file)
    assert all(file.language_ids(n).tolist() == [0] * (len(file[n]) - 1) + [-1] for n in range(len(file)))
    text_bytes = sum(len(text.encode()) for text in FINNISH if text.strip())
    assert manifest["counts"] == {
        "read": 6,
        "written": 4,
        "empty": 2,
        "skipped_lines": {},
        "malformed_lines": 0,
        "filtered": {},
        "duplicates": {},
        "text_bytes": text_bytes,
    }
    assert manifest["origin"] == "monolingual" and manifest["template"] is manifest["pairing"] is None
    assert [item["bytes"] for item in manifest["inputs"]] == [finnish.stat().st_size]
    assert verify_token_file(tmp_path / "tokens" / "fin", tokenizer)["documents"] == 4
    assert names(tmp_path / "tokens") == {
        f"fin.{kind}" for kind in ("bin", "idx", "spans", "manifest.json", "log.json")
    }


@pytest.mark.parametrize("direction", ["forward", "backward", "random"])
@pytest.mark.parametrize("template", [None, "<{source}>\n{target}.", "{source}{target}"])
def test_each_side_of_a_pair_keeps_its_language_exactly(
    tmp_path: Path, english_finnish: Path, tokenizer: Tokenizer, direction: str, template: str | None
) -> None:
    options = {"template": template} if template else {}
    job = pairs_job([english_finnish], tmp_path / "x", tokenizer.path, direction=direction, seed=3, **options)
    manifest = preprocess(job)
    file = read_token_file(tmp_path / "x")
    before, between, after = parse_template(job.template)
    assert len(file) == len(PAIRS) and manifest["counts"]["empty"] == 1
    for n, pair in enumerate(PAIRS):
        order = pair_order(f"p{n}", direction, 3)
        tokens, languages = file[n], file.language_ids(n)
        for side in (0, 1):
            assert tokenizer.decode(tokens[languages == side]) == pair[side]
        assert tokenizer.decode(tokens[languages == -1]) == f"{before}{between}{after}<|endoftext|>"
        pieces = tokenizer.encode([before, pair[order[0]], between, pair[order[1]], after])
        assert np.array_equal(tokens, np.concatenate([*pieces, [tokenizer.eod]]))
        if template is None:
            # The default template's tokens are those of the rendered text as a whole.
            assert np.array_equal(tokens[:-1], tokenizer.encode([f"{pair[order[0]]}\n{pair[order[1]]}"])[0])
    assert verify_token_file(tmp_path / "x", tokenizer)["tokens_by_language"] == manifest["tokens_by_language"]


def test_the_second_language_may_come_first(tmp_path: Path, english_finnish: Path, tokenizer: Tokenizer) -> None:
    preprocess(pairs_job([english_finnish], tmp_path / "a", tokenizer.path, direction="backward"))
    fields = Fields(kind="pairs", languages=LANGUAGES[::-1])
    preprocess(pairs_job([english_finnish], tmp_path / "b", tokenizer.path, direction="forward", fields=fields))
    a, b = read_token_file(tmp_path / "a"), read_token_file(tmp_path / "b")
    assert np.array_equal(a.tokens, b.tokens) and a.languages == b.languages[::-1]


def test_workers_and_parts_change_no_byte(tmp_path: Path, tokenizer: Tokenizer) -> None:
    finnish = write_lines(tmp_path / "fin.jsonl", documents(300, "fin_Latn"))
    english = write_lines(tmp_path / "eng.jsonl", documents(200, "eng_Latn"))
    both = write_lines(tmp_path / "pairs.jsonl", [*pairs(400), *pairs(50)])
    made: dict[str, list[tuple[int, dict[str, bytes]]]] = {"documents": [], "pairs": []}
    for workers, part_bytes in ((1, None), (1, 3000), (2, 3000), (3, 3000), (2, 20_000), (3, 500)):
        out = tmp_path / f"out-{workers}-{part_bytes}"
        inputs = [f"fin_Latn={finnish}", f"eng_Latn={english}"]
        options = {"workers": workers, "part_bytes": part_bytes}
        manifest = preprocess(monolingual_job(inputs, out / "documents", tokenizer.path, None, **options))
        assert manifest["documents"] == 500 and manifest["languages"] == ["fin_Latn", "eng_Latn"]
        manifest = preprocess(pairs_job([both], out / "pairs", tokenizer.path, **options))
        assert manifest["documents"] == 400 and manifest["counts"]["duplicates"] == {"duplicate": 50}
        assert part_bytes is None or manifest["shards"][1:]
        for name, kept in made.items():
            kept.append((part_bytes or 0, contents(out / name)))
    for kept in made.values():
        first = kept[0][1]
        for _, content in kept:
            assert {**content, "manifest.json": b""} == {**first, "manifest.json": b""}
        # The manifest tells the parts, and nothing of who did them.
        assert kept[1][1]["manifest.json"] == kept[2][1]["manifest.json"] == kept[3][1]["manifest.json"]


def test_a_finished_file_is_kept_until_something_that_matters_changes(
    tmp_path: Path, english_finnish: Path, tokenizer: Tokenizer
) -> None:
    prefix = tmp_path / "x"

    def made(inputs: Path = english_finnish, **options: object) -> bool:
        before = (tmp_path / "x.bin").stat().st_mtime_ns if (tmp_path / "x.bin").exists() else 0
        outcome = run_job(pairs_job([inputs], prefix, tokenizer.path, **options))
        is_new = (tmp_path / "x.bin").stat().st_mtime_ns != before
        assert is_new == (outcome.figures is not None)
        return is_new

    assert made()
    assert not made()
    assert not made(workers=2, part_bytes=100, on_error="skip")
    assert made(seed=9)
    assert made(direction="forward", seed=1)
    assert not made(direction="forward", seed=2)  # the seed is of the random direction only
    assert made(direction="forward", filters=PairFilters(max_length_ratio=2.0))
    assert made(direction="forward", pairing="separated")
    (tmp_path / "x.spans").write_bytes(b"")
    assert made(direction="forward", pairing="separated")
    english_finnish.touch()
    assert not made(direction="forward", pairing="separated")  # as many bytes, and the same
    (tmp_path / "elsewhere").mkdir()
    moved = english_finnish.rename(tmp_path / "elsewhere" / "other.jsonl")
    assert not made(moved, direction="forward", pairing="separated")
    text = moved.read_text()
    moved.write_text(text.replace("tree 7", "tree 8"))
    assert made(moved, direction="forward", pairing="separated")
    moved.write_text(text + json.dumps({"id": "q", "texts": {"eng_Latn": "aaaa", "fin_Latn": "bbbb"}}) + "\n")
    assert made(moved, direction="forward")
    assert len(read_token_file(prefix)) == len(PAIRS) + 1


def test_a_finished_file_with_malformed_lines_is_kept_only_where_they_may_be_left_out(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    lines = write_lines(tmp_path / "fin.jsonl", [{"text": "yksi"}, "oops", {"text": "kaksi"}])
    manifest = preprocess(monolingual_job([lines], tmp_path / "x", tokenizer.path, on_error="skip"))
    assert manifest["counts"]["malformed_lines"] == 1 and manifest["counts"]["skipped_lines"] == {"not JSON": 1}
    assert len(manifest["examples_of_skipped"]) == 1 and "fin.jsonl:2: not JSON" in manifest["examples_of_skipped"][0]
    assert run_job(monolingual_job([lines], tmp_path / "x", tokenizer.path, on_error="skip")).figures is None
    with pytest.raises(CorpusError, match=r"fin\.jsonl:2: not JSON"):
        preprocess(monolingual_job([lines], tmp_path / "x", tokenizer.path))
    with pytest.raises(CorpusError, match="1 malformed lines are more than --max-skipped 0 allows"):
        preprocess(monolingual_job([lines], tmp_path / "x", tokenizer.path, on_error="skip", max_skipped=0))
    # What was there stays until something else is whole.
    assert check_token_file(tmp_path / "x", tokenizer).good


def test_inputs_that_cannot_be_used_are_corpus_errors_and_leave_nothing(
    tmp_path: Path, english_finnish: Path, tokenizer: Tokenizer
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CorpusError, match="does not exist"):
        preprocess(monolingual_job([tmp_path / "nothing.jsonl"], out / "x", tokenizer.path))
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n\n')
    with pytest.raises(CorpusError, match=r"no document with text \(1 read, 1 empty, 1 lines left out\)"):
        preprocess(monolingual_job([tmp_path / "empty.jsonl"], out / "x", tokenizer.path))
    assert not list(out.iterdir())
    (tmp_path / "bad.jsonl").write_text(english_finnish.read_text() + "oops\n")
    with pytest.raises(CorpusError, match=rf"bad\.jsonl:{len(PAIRS) + 2}: not JSON"):
        preprocess(pairs_job([tmp_path / "bad.jsonl"], out / "x", tokenizer.path))
    with pytest.raises(ConfigError, match="template"):
        preprocess(pairs_job([english_finnish], out / "x", tokenizer.path, template="{source}"))
    assert not list(out.iterdir())
    manifest = preprocess(pairs_job([tmp_path / "bad.jsonl"], out / "x", tokenizer.path, on_error="skip"))
    assert manifest["counts"]["skipped_lines"] == {"not JSON": 1}


def test_languages_of_a_field_go_to_their_documents_and_to_files_of_their_own(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    codes = ["fi", "en", "en", "xx", "fi", "en"]
    records = [{"text": f"text {n}", "lang": code} for n, code in enumerate(codes)]
    lines = write_lines(tmp_path / "mixed.jsonl", records)
    fields = Fields(
        kind="monolingual", language_key="lang", language_map=(("en", "eng_Latn"), ("fi", "fin_Latn"), ("xx", "und"))
    )
    manifests = {}
    for part_bytes in (None, 40):
        job = monolingual_job(
            [lines], tmp_path / f"all-{part_bytes}", tokenizer.path, fields=fields, part_bytes=part_bytes
        )
        manifests[part_bytes] = preprocess(job)
        file = read_token_file(tmp_path / f"all-{part_bytes}")
        assert file.languages == ["fin_Latn", "eng_Latn", "und"]
        assert [file.languages[file.language_ids(n)[0]] for n in range(6)] == [
            {"fi": "fin_Latn", "en": "eng_Latn", "xx": "und"}[code] for code in codes
        ]
        assert [tokenizer.decode(file[n][:-1]) for n in range(6)] == [record["text"] for record in records]
        assert check_token_file(tmp_path / f"all-{part_bytes}", tokenizer).good
    assert manifests[None]["files"] == manifests[40]["files"]

    split = monolingual_job([lines], tmp_path / "s" / "x", tokenizer.path, fields=fields, split_by_language=True)
    outcome = run_job(split)
    assert list(outcome.manifests) == [f"{tmp_path}/s/x.{code}" for code in ("eng_Latn", "fin_Latn", "und")]
    for prefix, numbers in zip(outcome.manifests, ([1, 2, 5], [0, 4], [3]), strict=True):
        file = read_token_file(prefix)
        assert [tokenizer.decode(document[:-1]) for document in file] == [f"text {n}" for n in numbers]
        assert outcome.manifests[prefix]["counts"]["written"] == len(numbers)
    assert run_job(split).figures is None
    assert names(tmp_path / "s") == {"x.log.json"} | {
        f"x.{code}.{kind}"
        for code in ("eng_Latn", "fin_Latn", "und")
        for kind in ("bin", "idx", "spans", "manifest.json")
    }
    fields = Fields(kind="monolingual", language_key="lang")
    hostile = write_lines(tmp_path / "hostile.jsonl", [{"text": "a", "lang": "../../up"}])
    with pytest.raises(CorpusError, match="cannot be part of a file's name"):
        run_job(monolingual_job([hostile], tmp_path / "h", tokenizer.path, fields=fields, split_by_language=True))


def test_every_document_is_accounted_for(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = pairs(40)
    records = [
        *good,
        *good[:3],
        {"id": "empty", "texts": {"eng_Latn": " ", "fin_Latn": "jotain"}},
        {"id": "same", "texts": {"eng_Latn": "The same words", "fin_Latn": "The same words"}},
        {"id": "long", "texts": {"eng_Latn": "Yes.", "fin_Latn": "sana " * 40}},
        {
            "id": "held",
            "texts": {"eng_Latn": "This sentence is held out for probing.", "fin_Latn": "Tätä lausetta ei näytetä."},
        },
        "not a record",
    ]
    lines = write_lines(tmp_path / "pairs.jsonl", records)
    probe = write_lines(
        tmp_path / "probe.jsonl",
        [
            {
                "id": "1",
                "texts": {"eng_Latn": "this sentence is held out for probing", "fin_Latn": "jokin aivan muu asia"},
            }
        ],
    )
    job = pairs_job([lines], tmp_path / "x", tokenizer.path, probe=str(probe), on_error="skip", part_bytes=1000)
    counts = preprocess(job)["counts"]
    assert counts["read"] == 47 and counts["written"] == 40 and counts["empty"] == 1
    assert counts["filtered"] == {"identical sides": 1, "length ratio": 1, "in the probe set": 1}
    assert counts["duplicates"] == {"duplicate": 3} and counts["malformed_lines"] == 1
    left_out = counts["empty"] + sum(counts["filtered"].values()) + sum(counts["duplicates"].values())
    assert counts["read"] == counts["written"] + left_out
    everything = preprocess(
        pairs_job([lines], tmp_path / "y", tokenizer.path, on_error="skip", filters=None, duplicates="keep")
    )["counts"]
    assert everything["written"] == 46 and everything["filtered"] == everything["duplicates"] == {}
    held = write_lines(
        tmp_path / "held.jsonl", [{"text": "Muuta."}, {"text": "Hän sanoi: THIS sentence is held out — for probing!"}]
    )
    counts = preprocess(monolingual_job([held], tmp_path / "z", tokenizer.path, probe=str(probe)))["counts"]
    assert counts["written"] == 1 and counts["filtered"] == {"in the probe set": 1}


def test_near_duplicates_are_left_out_across_parts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = pairs(30)
    text = records[4]["texts"]["eng_Latn"]
    records.append({"id": "near", "texts": {**records[4]["texts"], "eng_Latn": text.upper() + "!"}})
    lines = write_lines(tmp_path / "pairs.jsonl", records)
    for part_bytes in (None, 700):
        job = pairs_job([lines], tmp_path / f"{part_bytes}", tokenizer.path, duplicates="near", part_bytes=part_bytes)
        assert preprocess(job)["counts"]["duplicates"] == {"near duplicate": 1}
    assert contents(tmp_path / "None", ["bin"]) == contents(tmp_path / "700", ["bin"])


def test_a_side_of_too_many_tokens_is_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = pairs(50)
    lines = write_lines(tmp_path / "pairs.jsonl", records)
    lengths = [[ids.size for ids in tokenizer.encode(list(record["texts"].values()))] for record in records]
    most = sorted(max(both) for both in lengths)[20]
    job = pairs_job([lines], tmp_path / "x", tokenizer.path, filters=PairFilters(max_tokens=most))
    kept = sum(max(both) <= most for both in lengths)
    manifest = preprocess(job)
    assert manifest["documents"] == kept < len(records)
    assert manifest["counts"]["filtered"] == {"too many tokens": len(records) - kept}
    assert check_token_file(tmp_path / "x", tokenizer).good


def test_sentences_become_sequences(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["Kissa istuu. Koira nukkuu!", "Yksi lause", " ", "A. B. C."]
    lines = write_lines(tmp_path / "fin.jsonl", [{"text": text} for text in texts])
    made = []
    for workers, part_bytes in ((1, None), (2, 30)):
        job = monolingual_job(
            [lines],
            tmp_path / f"x{workers}",
            tokenizer.path,
            sentences=SentenceSettings(),
            workers=workers,
            part_bytes=part_bytes,
        )
        manifest = preprocess(job)
        file = read_token_file(tmp_path / f"x{workers}")
        assert manifest["sentences"]["fin_Latn"]["sha256"] and manifest["sequences"] == file.num_sequences
        made.append(contents(tmp_path / f"x{workers}", ["bin", "idx", "spans"]))
    assert made[0] == made[1]
    from megatron_xalign.data.job import Job

    splitter = Job.plan(job).splitter("fin_Latn")
    split = [splitter.split(text) for text in texts if text.strip()]
    assert len(split[0]) == 2
    sizes = [[ids.size for ids in tokenizer.encode(pieces)] for pieces in split]
    for lengths in sizes:
        lengths[-1] += 1  # the end of the document belongs to its last sentence
    assert file.sequence_lengths_Q.tolist() == [size for lengths in sizes for size in lengths]
    assert file.document_indices_M.tolist() == np.cumsum([0, *map(len, sizes)]).tolist()
    assert check_token_file(tmp_path / "x1", tokenizer).good


def test_settings_survive_json_and_refuse_contradictions(tmp_path: Path, tokenizer: Tokenizer) -> None:
    job = pairs_job(
        ["a.jsonl"],
        tmp_path / "x",
        tokenizer.path,
        filters=PairFilters(max_tokens=5),
        probe="p",
        duplicates="near",
        fields=Fields(kind="pairs", languages=LANGUAGES, language_map=(("en", "eng_Latn"),)),
    )
    assert JobSettings.from_tree(json.loads(json.dumps(job.to_tree()))) == job
    for options, message in (
        ({"sentences": SentenceSettings()}, "for monolingual documents"),
        ({"direction": "sideways"}, "is not one of forward, backward, random"),
        ({"workers": 0}, "must be 1 or more"),
        ({"max_skipped": 3}, "without that nothing is"),
        ({"duplicates": "near", "near_threshold": 0.1}, "outside"),
        ({"append_eod": False, "pairing": "separated"}, "nothing ends them"),
    ):
        with pytest.raises(ConfigError, match=message):
            pairs_job(["a.jsonl"], tmp_path / "x", tokenizer.path, **options)
    with pytest.raises(ConfigError, match="names no file"):
        pairs_job(["a.jsonl"], f"{tmp_path}/", tokenizer.path)
    with pytest.raises(ConfigError, match="is for pairs"):
        monolingual_job(["a.jsonl"], tmp_path / "x", tokenizer.path, pairing="shuffled")


def test_a_plan_tells_what_a_job_would_do_and_touches_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = write_lines(tmp_path / "fin.jsonl", documents(500, "fin_Latn"))
    out = tmp_path / "out"
    job = monolingual_job([lines], out / "x", tokenizer.path, part_bytes=20_000)
    plan = describe_plan(job)
    assert not out.exists()
    assert json.loads(json.dumps(plan)) == plan
    assert plan["parts"] > 2 and plan["languages"] == ["fin_Latn"] and not plan["is_finished"]
    manifest = preprocess(job)
    assert plan["estimate"]["tokens"] == pytest.approx(manifest["tokens"], rel=0.15)
    size = sum(item["bytes"] for item in manifest["files"].values())
    assert plan["estimate"]["output_bytes"] == pytest.approx(size, rel=0.15)
    assert describe_plan(job)["is_finished"]


def test_a_large_job_is_planned_by_a_process_of_its_own(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_lines(tmp_path / "fin.jsonl", documents(200, "fin_Latn"))
    here = preprocess(monolingual_job([lines], tmp_path / "here" / "x", tokenizer.path, part_bytes=9000))
    monkeypatch.setattr(preprocess_module, "_LARGE_BYTES", 0)
    job = monolingual_job([lines], tmp_path / "there" / "x", tokenizer.path, part_bytes=9000, workers=2)
    assert preprocess(job) == here
    models = SentenceSettings(model=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="holds no Punkt model"):
        run_job(dataclasses.replace(job, sentences=models))
    monkeypatch.setattr(Survey, "make", lambda settings: Survey(settings, (), None, tokenizer, {}, {}))
    lines.unlink()
    monkeypatch.setattr(preprocess_module, "_LARGE_BYTES", -1)
    with pytest.raises(CorpusError, match=r"fin\.jsonl does not exist"):
        run_job(job)
    assert names(tmp_path / "there") == names(tmp_path / "here")
