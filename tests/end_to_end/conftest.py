"""Runs the ``xalign`` command as a user does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from corpus_of_nonsense import LANGUAGES, write_corpus
from xalign_process import Xalign, environment


@pytest.fixture(scope="session")
def xalign() -> Xalign:
    """``xalign("blend", path)`` -> the finished process; ``check=False`` lets it fail."""

    def run(*arguments: object, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_xalign", *map(str, arguments)],
            capture_output=True, text=True, timeout=timeout, env=environment(),
        )
        assert not check or done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory, xalign: Xalign) -> Path:
    """Token files of a small corpus."""
    folder = tmp_path_factory.mktemp("text")
    own = write_corpus(folder / "own")
    files = [f"--monolingual={language}={own}/{language}.jsonl" for language in LANGUAGES]
    xalign("corpus", folder / "corpus", *files, "--pairs", own / "pairs.jsonl", "--num-probe", "20")
    xalign("tokenizer", "train", folder / "corpus", folder / "tokenizer", "--vocab-size", "400")
    for language in LANGUAGES:
        xalign(
            "preprocess", folder / "corpus" / f"{language}.jsonl", "--language", language, "--tokenizer",
            folder / "tokenizer", "--output-prefix", folder / "tokens" / language,
        )
    xalign(
        "preprocess", folder / "corpus" / "pairs.jsonl", "--pairs", ",".join(LANGUAGES), "--tokenizer",
        folder / "tokenizer", "--output-prefix", folder / "tokens" / "-".join(LANGUAGES),
    )
    return folder
