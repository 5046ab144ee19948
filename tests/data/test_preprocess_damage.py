"""Input and places that jobs should never meet, and do."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from preprocess_jobs import LANGUAGES, contents, documents, monolingual_job, names, pairs, pairs_job, write_lines

from megatron_xalign.data.inputs import Fields
from megatron_xalign.data.job import Job
from megatron_xalign.data.parts import PartMaker
from megatron_xalign.data.preprocess import preprocess, run_job
from megatron_xalign.data.tokenizer import Tokenizer, train_tokenizer
from megatron_xalign.errors import ConfigError, CorpusError, FormatError
from megatron_xalign.formats.token_file import check_token_file, read_token_file


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = {"eng_Latn": [item["text"] for item in documents(100, "eng_Latn")]}
    return Tokenizer.load(train_tokenizer(texts, tmp_path_factory.mktemp("t") / "tokenizer", 400))


def read_back(prefix: Path, tokenizer: Tokenizer) -> list[str]:
    assert check_token_file(prefix, tokenizer).good
    return [tokenizer.decode(document[:-1]) for document in read_token_file(prefix)]


def test_every_text_comes_back_as_it_was(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    texts = [
        "NUL \0 inside",
        "\0",
        "a",
        "שלום עולם, مرحبا",
        "\u202eabc\u202c",
        "สวัสดีชาวโลก",
        "我喜欢狗和猫",
        "ནམ་མཁའ",
        "e\u0301\u00e9",
        "\ufeffmark",
        "<|endoftext|>",
        '\\n "quoted"',
        "\u2028line\u2029",
        "\U0001f468\u200d\U0001f469",
        "tab\tand\r\nCRLF",
        "x" * 100_000,
        *("".join(map(chr, rng.choices(range(1, 0xD7FF), k=50))) for _ in range(50)),
    ]
    lines = write_lines(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    for workers, part_bytes in ((1, None), (3, 300)):
        job = monolingual_job(
            [lines], tmp_path / f"x{workers}", tokenizer.path, "und", workers=workers, part_bytes=part_bytes
        )
        preprocess(job)
        assert read_back(tmp_path / f"x{workers}", tokenizer) == texts


def test_malformed_lines_are_named_or_counted_with_examples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = [json.dumps({"text": f"text {n}"}).encode() for n in range(50)]
    bad = {
        "not UTF-8": b'{"text": "caf\xe9"}',
        "not JSON": b'{"text": "cut',
        "not a JSON object": b'["text"]',
        'no "text"': b'{"title": "x"}',
        '"text" is int': b'{"text": 3}',
        "half of a surrogate pair": b'{"text": "\\ud800"}',
    }
    lines = list(good)
    for place, line in zip((3, 11, 12, 30, 44, 49), bad.values(), strict=True):
        lines.insert(place, line)
    path = tmp_path / "text.jsonl"
    for reason, line in bad.items():
        path.write_bytes(b"\n".join([*good[:7], line, *good[7:]]) + b"\n")
        for workers, part_bytes in ((1, None), (2, 100)):
            job = monolingual_job(
                [path], tmp_path / "out" / "x", tokenizer.path, workers=workers, part_bytes=part_bytes
            )
            with pytest.raises(CorpusError, match=r"text\.jsonl:8: ") as raised:
                preprocess(job)
            assert reason in str(raised.value)
    path.write_bytes(b"\n".join(lines) + b"\n")
    made = []
    for workers, part_bytes in ((1, None), (2, 100)):
        job = monolingual_job(
            [path], tmp_path / f"skip{workers}", tokenizer.path, workers=workers, part_bytes=part_bytes, on_error="skip"
        )
        manifest = preprocess(job)
        assert manifest["counts"]["malformed_lines"] == len(bad) == len(manifest["examples_of_skipped"])
        assert all(any(reason in skipped for skipped in manifest["counts"]["skipped_lines"]) for reason in bad)
        assert [example.split(":")[1] for example in manifest["examples_of_skipped"]] == [
            "4",
            "12",
            "13",
            "31",
            "45",
            "50",
        ]
        assert read_back(tmp_path / f"skip{workers}", tokenizer) == [f"text {n}" for n in range(50)]
        made.append(contents(tmp_path / f"skip{workers}", ["bin", "idx", "spans"]))
        job = monolingual_job(
            [path],
            tmp_path / "cap",
            tokenizer.path,
            workers=workers,
            part_bytes=part_bytes,
            on_error="skip",
            max_skipped=5,
        )
        with pytest.raises(CorpusError, match="malformed lines are more than --max-skipped 5 allows, such as "):
            preprocess(job)
    assert made[0] == made[1]


def test_a_cut_archive_and_files_off_by_one_are_errors_before_or_while_reading(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    whole = gzip.compress(b"".join(json.dumps(item).encode() + b"\n" for item in documents(3000, "fin_Latn")))
    cut = tmp_path / "fin.jsonl.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    for on_error in ("raise", "skip"):
        with pytest.raises(CorpusError, match=r"fin\.jsonl\.gz is not a whole gzip file"):
            preprocess(monolingual_job([cut], tmp_path / "out" / "x", tokenizer.path, on_error=on_error))
    (tmp_path / "t.en").write_text("one\ntwo\nthree\n")
    (tmp_path / "t.fi").write_text("yksi\nkaksi\n")
    fields = Fields(kind="pairs", languages=LANGUAGES, language_map=(("en", "eng_Latn"), ("fi", "fin_Latn")))
    job = pairs_job([tmp_path / "t.en", tmp_path / "t.fi"], tmp_path / "out" / "x", tokenizer.path, fields=fields)
    with pytest.raises(CorpusError, match=r"unequal numbers of lines: .*t\.en 3, .*t\.fi 2"):
        preprocess(job)
    assert not (tmp_path / "out").exists() or not names(tmp_path / "out")
    (tmp_path / "t.fi").write_text("yksi\nkaksi\nkolme")
    preprocess(job)
    assert len(read_token_file(tmp_path / "out" / "x")) == 3


def test_an_input_named_twice_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = write_lines(tmp_path / "fin.jsonl", documents(3, "fin_Latn"))
    with pytest.raises(CorpusError, match="named twice"):
        preprocess(monolingual_job([lines, tmp_path / "." / "fin.jsonl"], tmp_path / "x", tokenizer.path))


def test_places_that_cannot_be_written_are_said(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = write_lines(tmp_path / "fin.jsonl", documents(3, "fin_Latn"))
    (tmp_path / "file").write_text("")
    for prefix, message in (
        (tmp_path / "file" / "x", "a part of the path is a file"),
        (tmp_path / ("x" * 300), "the name has 306 bytes"),
        # Nobody may make a folder there, not even root.
        (Path("/sys/xalign/x"), "cannot be written"),
        (Path("/proc/xalign/x"), "cannot be written"),
    ):
        with pytest.raises(FormatError, match=message):
            preprocess(monolingual_job([lines], prefix, tokenizer.path))
    (tmp_path / "x.bin").mkdir()
    with pytest.raises(FormatError, match="cannot be written"):
        preprocess(monolingual_job([lines], tmp_path / "x", tokenizer.path))


def test_a_damaged_part_is_made_again_by_the_same_command(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = write_lines(tmp_path / "pairs.jsonl", pairs(200))
    whole = pairs_job([lines], tmp_path / "whole", tokenizer.path, part_bytes=5000)
    preprocess(whole)
    for kind, how in (
        ("bin", "flip"),
        ("spans", "flip"),
        ("keys", "flip"),
        ("keys", "remove"),
        ("idx", "cut"),
        ("json", "cut"),
    ):
        prefix = tmp_path / f"{kind}-{how}"
        settings = pairs_job([lines], prefix, tokenizer.path, part_bytes=5000)
        job = Job.plan(settings)
        with job.hold():
            job.prepare()
            maker = PartMaker(job)
            for index in range(job.num_parts):
                maker.make(index)
        assert job.num_parts > 4 and not job.missing()
        path = Path(f"{job.folder.part_prefix(2)}.{kind}")
        content = bytearray(path.read_bytes())
        content[-3] ^= 4
        if how == "remove":
            path.unlink()
        else:
            path.write_bytes(content if how == "flip" else content[:-5])
        if how == "flip":
            with pytest.raises(FormatError):
                run_job(settings)
        outcome = run_job(settings)
        assert outcome.figures["parts_kept"] == job.num_parts - 1
        assert contents(prefix, ["bin", "idx", "spans"]) == contents(tmp_path / "whole", ["bin", "idx", "spans"])


def test_parts_of_other_input_or_settings_are_not_used(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = write_lines(tmp_path / "pairs.jsonl", pairs(200))
    other = write_lines(tmp_path / "other.jsonl", pairs(200, seed=1))

    def prepared(prefix: Path, **options: object) -> Job:
        """A job of which all parts are done, as one killed before the join."""
        job = Job.plan(pairs_job([lines], prefix, tokenizer.path, part_bytes=5000, **options))
        with job.hold():
            job.prepare()
            maker = PartMaker(job)
            for index in range(job.num_parts):
                maker.make(index)
        return job

    for number, options in enumerate(
        ({}, {"seed": 7}, {"filters": None}, {"part_bytes": 4000}, {"template": "{source} {target}"})
    ):
        prefix = tmp_path / str(number)
        job = prepared(prefix)
        if number == 0:
            lines.touch()  # looks changed, and is not
        outcome = run_job(pairs_job([lines], prefix, tokenizer.path, **{"part_bytes": 5000, **options}))
        assert outcome.figures["parts_kept"] == (job.num_parts if number == 0 else 0)
        fresh = preprocess(pairs_job([lines], tmp_path / "fresh", tokenizer.path, **{"part_bytes": 5000, **options}))
        assert {**next(iter(outcome.manifests.values())), "name": ""} == {**fresh, "name": ""}
    prepared(tmp_path / "changed")
    assert lines.stat().st_size - 2 < other.stat().st_size
    text = lines.read_text(encoding="utf-8")
    lines.write_text(text.replace("number 77", "number 78"), encoding="utf-8")
    outcome = run_job(pairs_job([lines], tmp_path / "changed", tokenizer.path, part_bytes=5000))
    assert outcome.figures["parts_kept"] == 0
    with pytest.raises(CorpusError, match="changed"):
        # The plan of a job knows the file it was made for.
        job = prepared(tmp_path / "planned")
        job.folder.remove_part(1)
        lines.write_text(text, encoding="utf-8")
        PartMaker(job).make(1)


def test_a_folder_of_the_users_that_has_the_name_of_the_work_folder_keeps_its_files(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    lines = write_lines(tmp_path / "fin.jsonl", documents(30, "fin_Latn"))
    (tmp_path / "x.parts").mkdir()
    (tmp_path / "x.parts" / "mine.txt").write_text("keep")
    preprocess(monolingual_job([lines], tmp_path / "x", tokenizer.path))
    assert names(tmp_path / "x.parts") == {"mine.txt"}


def test_a_second_job_on_the_same_file_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = write_lines(tmp_path / "fin.jsonl", documents(30, "fin_Latn"))
    job = Job.plan(monolingual_job([lines], tmp_path / "x", tokenizer.path))
    with job.hold(), pytest.raises(ConfigError, match="another job is writing"):
        preprocess(monolingual_job([lines], tmp_path / "x", tokenizer.path))
    with (
        job.hold(shared=True),
        job.hold(shared=True),
        pytest.raises(ConfigError, match="another job is writing"),
        job.hold(),
    ):
        pass
    preprocess(monolingual_job([lines], tmp_path / "x", tokenizer.path))
    assert not (tmp_path / "x.parts").exists()
