"""Every command of docs/preprocessing.md does what it says, on small files of the names it uses."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shlex
from pathlib import Path

import pytest

from megatron_xalign.cli import main
from megatron_xalign.formats.token_file import read_token_file, verify_token_file

PAGE = Path(__file__).resolve().parents[2] / "docs" / "preprocessing.md"
LANGUAGES = {"eng_Latn": "en", "fin_Latn": "fi", "swe_Latn": "sv"}
WORDS = {
    "eng_Latn": ["the", "house", "river", "was", "painted", "yesterday", "because", "friends", "wanted", "colour"],
    "fin_Latn": ["talo", "joki", "oli", "maalattu", "eilen", "koska", "ystävät", "halusivat", "väriä", "metsässä"],
    "swe_Latn": ["huset", "floden", "var", "målad", "igår", "eftersom", "vänner", "ville", "färg", "skogen"],
}

pytestmark = pytest.mark.end_to_end


def commands() -> list[str]:
    """The commands of the page, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def sentence(language: str, rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS[language], k=rng.randrange(8, 14))).capitalize() + "."


def write_lines(path: Path, records: list[dict[str, object]]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def make_inputs() -> None:
    """The files of the page, in the working folder."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    rng = random.Random(5)
    for language in ("eng_Latn", "fin_Latn"):
        for number in range(2):
            path = Path("fineweb", language, f"{number:03d}_00000.parquet")
            path.parent.mkdir(parents=True, exist_ok=True)
            texts = [" ".join(sentence(language, rng) for _ in range(4)) for _ in range(30)]
            parquet.write_table(pyarrow.table({"id": [str(k) for k in range(30)], "text": texts}), path)
    write_lines(Path("fin.jsonl"), [{"text": sentence("fin_Latn", rng)} for _ in range(50)])
    write_lines(Path("news.jsonl"), [{"text": sentence("fin_Latn", rng)} for _ in range(20)])
    pairs = [{language: sentence(language, rng) for language in LANGUAGES} for _ in range(80)]
    write_lines(Path("multiway.jsonl"), [{"id": str(k), "texts": pair} for k, pair in enumerate(pairs)])
    two = [{language: pair[language] for language in ("eng_Latn", "fin_Latn")} for pair in pairs]
    write_lines(Path("pairs.jsonl"), [{"id": str(k), "texts": pair} for k, pair in enumerate(two)])
    write_lines(Path("probe.jsonl"), [{"id": str(k), "texts": pair} for k, pair in enumerate(two[:5])])
    Path("opus").mkdir()
    for language in ("eng_Latn", "fin_Latn"):
        text = "".join(pair[language] + "\n" for pair in two)
        Path("opus", f"NLLB.en-fi.{LANGUAGES[language]}").write_text(text, encoding="utf-8")
    units = "".join(
        f'<tu><tuv xml:lang="en"><seg>{pair["eng_Latn"]}</seg></tuv>'
        f'<tuv xml:lang="fi"><seg>{pair["fin_Latn"]}</seg></tuv></tu>'
        for pair in two
    )
    with gzip.open("opus/en-fi.tmx.gz", "wt", encoding="utf-8") as file:
        file.write(f'<?xml version="1.0" encoding="UTF-8"?><tmx version="1.4"><body>{units}</body></tmx>')
    Path("paracrawl").mkdir()
    with gzip.open("paracrawl/en-fi.tsv.gz", "wt", encoding="utf-8") as file:
        file.writelines(f"{pair['eng_Latn']}\t{pair['fin_Latn']}\n" for pair in two)
    Path("hplt").mkdir()
    records = [
        {"text": sentence(language, rng), "lang": [language, "swe_Latn"]}
        for language in ("eng_Latn", "fin_Latn", "swe_Latn") for _ in range(20)
    ]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    Path("hplt", "1.jsonl.zst").write_bytes(zstandard.compress((lines + "no JSON\n").encode()))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files, a queue that takes every job, and the registry's optional packages."""
    pytest.importorskip("eld")
    pytest.importorskip("datatrove")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XALIGN_PROGRESS", "0")
    make_inputs()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho $@ >> queue\necho Submitted batch job 7\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_the_page_has_the_commands_this_test_knows() -> None:
    verbs = {command.split()[1] for command in commands()}
    assert verbs == {"preprocess", "tools/preprocess_data.py", "tokenizer", "verify", "stats", "merge", "pairing"}
    assert len(commands()) >= 18


def run(command: str) -> int:
    words = shlex.split(command)
    if words[0] == "python":
        return main("preprocess_data", words[2:])
    return main(None, words[1:])


def test_every_command_of_the_page_runs(folder: Path) -> None:
    # The tokenizer is the first thing to make, though not the first thing to explain.
    ordered = sorted(commands(), key=lambda command: not command.startswith("xalign tokenizer"))
    for command in ordered:
        if command.startswith("xalign merge"):
            more = "xalign preprocess news.jsonl --language fin_Latn --tokenizer tokenizer --output-prefix"
            assert run(f"{more} tokens/fin_news") == 0
        if "--datatrove" in command:
            # Something else is there under this name by now.
            command = command.replace("tokens/fin_Latn", "tokens/queued")
        for index in range(16 if "$SLURM_ARRAY_TASK_ID" in command else 1):
            assert run(command.replace("$SLURM_ARRAY_TASK_ID", str(index))) == 0, command

    names = [path.name.removesuffix(".idx") for path in Path("tokens").glob("*.idx")]
    documents = {name: read_token_file(Path("tokens", name)) for name in names}
    for name, file in documents.items():
        verify_token_file(Path("tokens", name))
        assert len(file) > 0, name
    # FineWeb's Finnish, two files of 30, was the last to be written there.
    assert len(documents["fin_Latn"]) == 60
    assert {name: len(documents[name]) for name in ("hplt.eng_Latn", "hplt.fin_Latn")} == {
        "hplt.eng_Latn": 20, "hplt.fin_Latn": 20,
    }
    counts = documents["hplt.fin_Latn"].manifest["counts"]
    assert counts["malformed_lines"] == 1
    # The probe's five pairs are in the corpus.
    opus = documents["eng_Latn-fin_Latn"].manifest["counts"]
    assert opus["filtered"]["in the probe set"] == 5
    assert len(documents["tmx"]) > 60
    assert len(documents["paracrawl"]) == len(documents["pairs"]) == 80
    assert len(documents["multiway"]) == 3 * 80
    assert len(documents["pairs_separated"]) == 160
    for control in ("pairs_shuffled", "pairs_separated"):
        assert documents[control].manifest["tokens_by_language"] == documents["pairs"].manifest["tokens_by_language"]
    # The array, the join that waits for it, and a job of datatrove's own for the statistics of each.
    assert len(Path("queue").read_text().splitlines()) == 4
    assert "--dependency=afterok:7" in Path("queue").read_text()
