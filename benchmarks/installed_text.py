"""A corpus out of the text that is installed on this machine: documentation, help pages and manual pages.

    python benchmarks/installed_text.py OUT.jsonl [--folder DIR ...] [--megabytes 150]

Any Linux has some (/usr/share/doc, /usr/share/man, the documentation of Python packages). More, and in more languages,
is in documentation packages, which need not be installed: `apt-get download libreoffice-help-fi`, then
`dpkg -x FILE.deb DIR` and `--folder DIR`. A paragraph occurs once; documents are consecutive paragraphs of a file, of
20 to 5,000 words, spread evenly over the orders of magnitude between, as pages of the web are.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import random
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

_SHORTEST_WORDS, _LONGEST_WORDS = 20, 5_000
# Of one file no more than this is read: change logs of many years say the same things.
_MOST_BYTES = 4_000_000
_ENDINGS = (".txt", ".rst", ".md", ".html", ".htm", ".xhtml", ".page", ".xml", ".adoc")
_MANUAL = re.compile(r"\.[1-9][a-z]*$")
# Lists of changes, names and numbers are not running text.
_LEFT_OUT = re.compile(r"(?i)changelog|copyright|licen[cs]e|index|/news|authors|contributors|credits|genindex|record$")


def default_folders() -> list[Path]:
    """Where documentation usually lies."""
    places = ["/usr/share/doc", "/usr/share/man", "/usr/share/help", "/usr/share/perl", "/usr/lib/python3"]
    return [path for path in map(Path, [*places, sysconfig.get_paths()["stdlib"]]) if path.is_dir()]


def make_corpus(out: Path, folders: Sequence[Path], most_bytes: int, seed: int = 0) -> dict[str, Any]:
    """Write ``{"id", "text"}`` lines; return what went in.

    Files are taken in an order drawn by their names, so a smaller corpus is a fair sample of a larger one.

    Args:
        out: file to write.
        folders: searched through for text.
        most_bytes: of UTF-8 text, without the JSON around it.
        seed: of the order and of the documents' lengths.
    """
    files = sorted({path for folder in folders for path in _text_files(folder)}, key=lambda path: _rank(path, seed))
    seen: set[bytes] = set()
    total_bytes = documents = repeated = 0
    by_folder: Counter[str] = Counter()
    with out.open("w", encoding="utf-8") as file:
        for path in files:
            if total_bytes >= most_bytes:
                break
            paragraphs = []
            for paragraph in _paragraphs(path):
                digest = hashlib.blake2b(paragraph.encode(), digest_size=8).digest()
                if digest in seen:
                    repeated += 1
                    continue
                seen.add(digest)
                paragraphs.append(paragraph)
            for number, text in enumerate(_documents(paragraphs, random.Random(f"{seed} {path}"))):
                file.write(json.dumps({"id": f"{path.name}:{number}", "text": text}, ensure_ascii=False) + "\n")
                size = len(text.encode())
                total_bytes += size
                documents += 1
                by_folder[str(next(folder for folder in folders if folder in path.parents))] += size
    return {
        "text_bytes": total_bytes, "documents": documents, "repeated_paragraphs_left_out": repeated,
        "bytes_by_folder": dict(by_folder.most_common()),
    }


def _rank(path: Path, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed} {path}".encode("utf-8", "replace"), digest_size=8).digest()


def _text_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        name = path.name.removesuffix(".gz")
        wanted = name.endswith(_ENDINGS) or (_MANUAL.search(name) and "man" in path.parts)
        if wanted and not _LEFT_OUT.search(str(path)) and path.is_file() and not path.is_symlink():
            yield path


def _paragraphs(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            text = file.read(_MOST_BYTES).decode("utf-8")
    except (OSError, EOFError, ValueError):
        return
    name = path.name.removesuffix(".gz")
    if name.endswith((".html", ".htm", ".xhtml", ".page", ".xml")):
        parser = _Text()
        with suppress(AssertionError):  # html.parser's answer to some malformed declarations
            parser.feed(text)
            parser.close()
        text = "".join(parser.pieces)
    elif _MANUAL.search(name):
        text = _without_roff(text)
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        letters = sum(map(str.isalpha, paragraph))
        # A table of numbers or an ASCII drawing is no text; nor is a line of a menu.
        if len(paragraph) >= 40 and letters >= 0.6 * len(paragraph):
            yield paragraph


def _documents(paragraphs: Sequence[str], rng: random.Random) -> Iterator[str]:
    wanted, held, words = 0.0, [], 0
    for paragraph in paragraphs:
        if not held:
            wanted = math.exp(rng.uniform(math.log(_SHORTEST_WORDS), math.log(_LONGEST_WORDS)))
        held.append(paragraph)
        # Chinese and Japanese have no spaces; six bytes are about a word in any language.
        words += max(paragraph.count(" ") + 1, len(paragraph.encode()) // 12)
        if words >= wanted:
            yield "\n".join(held)
            held, words = [], 0
    if held:
        yield "\n".join(held)


def _without_roff(text: str) -> str:
    lines = []
    for line in text.splitlines():
        if line.startswith((".SH", ".SS", ".PP", ".P", ".TP", ".IP", ".LP", ".Pp", ".sp", ".Sh")):
            lines.append("")
        if line.startswith((".", "'")):
            continue
        lines.append(re.sub(r"\\f.|\\\(..|\\[&,/|^%c]|\\s[-+]?\d", "", line).replace("\\-", "-").replace("\\e", "\\"))
    return "\n".join(lines)


class _Text(HTMLParser):
    _SKIPPED = ("script", "style", "head", "svg", "nav")
    _BLOCKS = (
        "p", "div", "li", "h1", "h2", "h3", "h4", "h5", "td", "th", "tr", "pre", "dt", "dd", "br", "title", "section",
        "table", "ul", "ol", "item", "para", "paragraph",
    )

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in self._SKIPPED:
            self._skipping += 1
        elif tag in self._BLOCKS:
            self.pieces.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._SKIPPED:
            self._skipping = max(self._skipping - 1, 0)
        elif tag in self._BLOCKS:
            self.pieces.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.pieces.append(re.sub(r"\n\s*\n", "\n", data))


def main() -> int:
    """Make a corpus by the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path, action="append", default=[], help="where to look (the usual places)")
    parser.add_argument("--megabytes", type=float, default=150.0)
    options = parser.parse_args()
    made = make_corpus(options.out, options.folder or default_folders(), int(options.megabytes * 1e6))
    json.dump(made, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
