"""Engines that turn batches of text into flat arrays of ids.

The reference engine is the tokenizer's own library. ``gigatoken`` gives the same ids 5 to 30 times faster where it
knows the tokenizer's split pattern; it is used only after all its ids were equal on adversarial text and on a sample of
the user's own. Three kinds of text still go to the reference: those in which a special token is spelt out (gigatoken
would make it that token), those with characters newer than this Python's Unicode (libraries differ on what those are),
and, for SentencePiece models that trim spaces, those with white space at an end (gigatoken trims every kind).
"""

# T tokens, N texts

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import numpy as np
import psutil

from megatron_xalign import _native
from megatron_xalign.data.engine_proof import adversarial_texts, first_difference
from megatron_xalign.data.packed_texts import SURROGATE, UNASSIGNED, PackedTexts, character_kinds
from megatron_xalign.data.tokenizer import Tokenizer
from megatron_xalign.data.tokenizer_models import (
    FlatIds,
    SentencePieceModel,
    TiktokenModel,
    TokenizersModel,
    TokenModel,
    import_optional,
    lone_surrogate,
)
from megatron_xalign.errors import ConfigError
from megatron_xalign.formats.token_file import token_dtype

_LOG = logging.getLogger(__name__)

EngineName = Literal["reference", "gigatoken"]
WantedEngine = Literal["auto", "reference", "gigatoken"]

# gigatoken remembers every word it has met, for ever; it is built anew when that has cost so much.
_MAX_GROWTH_BYTES = 288 << 20
# Reading a tokenizer takes a tenth of a second; not more often than after so much text.
_MIN_BYTES_BETWEEN = 16 << 20
_TRIMMED = "".join(chr(code) for code in range(0x3001) if chr(code).isspace()) + "▁"
# Names of the patterns in gigatoken's from_tiktoken.
_GIGATOKEN_SPLITS = {"gpt2": "gpt2", "cl100k": "gpt4", "o200k": "o200k", "megatron-v2": "nemotron"}


class Engine(Protocol):
    """Text to ids, many texts at a time."""

    name: EngineName
    library: str
    """Library and version, for manifests."""

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """Ids of all texts one after the other, int32 [T], and how many each has, int64 [N].

        Raises:
            UnencodableText: a text holds half a UTF-16 pair; the error has its index.
        """


class ReferenceEngine:
    """The tokenizer's own library."""

    name: EngineName = "reference"

    def __init__(self, model: TokenModel) -> None:
        self.library = model.library
        self.encode_flat = model.encode_flat


def reference_engine(tokenizer: Tokenizer, *, one_thread: bool = False) -> Engine:
    """The engine that defines the ids.

    Args:
        tokenizer: the tokenizer.
        one_thread: work on the calling thread alone, as a worker process should; holds for the tokenizer from then on.
    """
    if one_thread:
        tokenizer.model.use_one_thread()
    return ReferenceEngine(tokenizer.model)


def engine_named(tokenizer: Tokenizer, name: EngineName) -> Engine:
    """The engine that :func:`choose_engine` chose, for a worker process: nothing is proved again, one thread is used.

    Raises:
        ConfigError: its library is not installed here, or does not take the tokenizer.
    """
    if name == "reference":
        return reference_engine(tokenizer, one_thread=True)
    if name != "gigatoken":
        raise ValueError(f"engine {name!r} is neither reference nor gigatoken.")
    tokenizer.model.use_one_thread()
    return GigatokenEngine(tokenizer)


def choose_engine(
    tokenizer: Tokenizer, sample: Sequence[str], wanted: WantedEngine = "auto"
) -> tuple[Engine, dict[str, Any]]:
    """The fastest engine that proves to give the reference's ids.

    Args:
        tokenizer: the tokenizer.
        sample: texts of the user's own corpus; a few megabytes from different places are right (a second per two
            megabytes).
        wanted: ``auto`` takes gigatoken if it is installed and proves equal, ``reference`` asks for no proof,
            ``gigatoken`` makes it an error if it cannot be used.

    Returns:
        The engine, and what a manifest says about it: ``name`` (for :func:`engine_named`), ``library``, and either
        ``proved`` (documents, bytes and built-in texts that were compared, documents that went to the reference anyway)
        or ``reason`` (why the faster one is not used).

    Raises:
        ConfigError: ``wanted="gigatoken"`` and it is not installed, does not take the tokenizer, or gives other ids.
    """
    reference = reference_engine(tokenizer)
    facts: dict[str, Any] = {"name": "reference", "library": reference.library}
    if wanted == "reference":
        return reference, facts | {"reason": "the reference was asked for"}
    if wanted not in ("auto", "gigatoken"):
        raise ValueError(f"engine {wanted!r} is none of auto, reference, gigatoken.")
    sample = _encodable(sample)
    engine, reason = _proved(tokenizer, reference, sample)
    if engine is None:
        if wanted == "gigatoken":
            raise ConfigError(f"the engine gigatoken cannot be used: {reason}. Use auto or reference.")
        level = logging.INFO if reason == _NOT_INSTALLED else logging.WARNING
        _LOG.log(level, "text is tokenised by %s: %s", reference.library, reason)
        return reference, facts | {"reason": reason}
    proved = {
        "documents": len(sample), "bytes": sum(len(text.encode("utf-8")) for text in sample),
        "built_in_texts": len(adversarial_texts(_names(tokenizer))), "reference": reference.library,
        "documents_by_reference": engine.texts_by_reference,
    }
    engine.texts_by_reference = 0
    _LOG.info(
        "text is tokenised by %s, which gave the ids of %s on all %d sampled documents",
        engine.library, reference.library, len(sample),
    )
    return engine, {"name": engine.name, "library": engine.library, "proved": proved}


_NOT_INSTALLED = "gigatoken is not installed (pip install 'megatron-xalign[gigatoken]')"


def _proved(
    tokenizer: Tokenizer, reference: Engine, sample: Sequence[str]
) -> tuple[GigatokenEngine | None, str]:
    """gigatoken if it gives the reference's ids, else why it is not used."""
    try:
        engine = GigatokenEngine(tokenizer)
    except ConfigError as error:
        return None, str(error)
    if not any(sample):
        return None, "there is no text to prove a faster engine on"
    for texts in (adversarial_texts(_names(tokenizer)), sample):
        engine.texts_by_reference = 0
        difference = first_difference(reference, engine, texts)
        if engine.failure:
            return None, f"{engine.library} failed: {engine.failure}"
        if difference is not None:
            return None, f"{engine.library} gives other ids: {difference}"
    return engine, ""


def _encodable(texts: Sequence[str]) -> list[str]:
    """Texts without half a UTF-16 pair; a job deals with the others where it can name their lines."""
    texts = list(texts)
    halves_N = _native.kinds_in_texts(texts, character_kinds()) & SURROGATE
    return [text for text, halves in zip(texts, halves_N.tolist(), strict=True) if not halves]


class _RefusalError(Exception):
    """gigatoken raised; its panics are no ``Exception`` and are turned into this."""


class GigatokenEngine:
    """gigatoken, for one tokenizer; use it through :func:`choose_engine` or :func:`engine_named`."""

    name: EngineName = "gigatoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Build it.

        Raises:
            ConfigError: gigatoken is not installed, or does not know this kind of tokenizer.
        """
        try:
            gigatoken = import_optional("gigatoken", "the fast engine")
        except ConfigError:
            raise ConfigError(_NOT_INSTALLED) from None
        self.library = f"gigatoken {_version('gigatoken')}"
        self.texts_by_reference = 0
        """Texts that were given to the reference so far."""
        self.failure: str | None = None
        """What gigatoken said when it failed on a batch, which the reference then did; the first time."""
        self._reference = tokenizer.model
        self._ends = _ends_around(tokenizer)
        self._eod = tokenizer.eod
        special = sorted(tokenizer.model.special_ids)
        self._special_ranges = _ranges(special)
        self._vocab_size = tokenizer.vocab_size
        self._is_narrow = token_dtype(tokenizer.vocab_size) == np.uint16
        but_eod = _ranges([token for token in special if token != tokenizer.eod])
        self._ranges_but_eod = np.array(but_eod, dtype=np.uint32).reshape(-1, 2)
        self._trims = isinstance(tokenizer.model, SentencePieceModel) and tokenizer.model.trims
        self._load = _loader(gigatoken, tokenizer)
        self._process = psutil.Process()
        self.separator = None if any(self._ends) else _separator(tokenizer)
        """What parts texts that are given in one stretch: the end-of-document token's name. None where a tokenizer may
        see a text otherwise then than by itself."""
        try:
            self._renew()
            with _refusals():
                if self.separator is not None and self._engine.encode(self.separator).tolist() != [self._eod]:
                    self.separator = None
        except _RefusalError as error:
            raise ConfigError(f"{self.library} does not take this tokenizer: {error}") from None

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """Ids of all texts one after the other, int32 [T], and how many each has, int64 [N]."""
        if not texts:
            return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64)
        if self.separator is None:
            return self._encode_each(texts if isinstance(texts, list) else list(texts))
        ids_T, lengths_N = self.encode_ended(PackedTexts.of(texts, self.separator))
        is_text_T = np.ones(ids_T.size, dtype=bool)
        is_text_T[np.cumsum(lengths_N) - 1] = False
        return ids_T[is_text_T].astype(np.int32, copy=False), lengths_N - 1

    def encode_ended(self, texts: PackedTexts) -> FlatIds:
        """The same of texts parted by ``separator``, in one call; each text's ids end in the end-of-document token.

        Ids are in the width of a token file, uint16 or int32, or in int32 where the reference did some.
        """
        if texts.kinds_N.max() & SURROGATE:
            raise lone_surrogate(texts, int(np.flatnonzero(texts.kinds_N & SURROGATE)[0]))
        self._forget_if_large(texts.num_bytes)
        try:
            with _refusals():
                ids_T = self._engine.encode(texts.data)
        except _RefusalError as error:
            return _with_ends(*self._refused(list(texts), error), [], [self._eod])
        try:
            ids_T, lengths_N, is_marked_N, rest = _native.cut_at_ends(
                ids_T, self._eod, self._ranges_but_eod, self._vocab_size, self._is_narrow
            )
        except ValueError as error:
            # An id that the tokenizer does not have.
            return _with_ends(*self._refused(list(texts), error), [], [self._eod])
        if lengths_N.size != len(texts) or rest:
            # A text spells the token out.
            return _with_ends(*self._encode_each(list(texts)), [], [self._eod])
        by_reference_N = ((texts.kinds_N & UNASSIGNED) != 0) | (is_marked_N != 0)
        if by_reference_N.any():
            ids_T, lengths_N = self._corrected(texts, ids_T, lengths_N, np.flatnonzero(by_reference_N), [self._eod])
        return ids_T, lengths_N

    def _encode_each(self, texts: list[str]) -> FlatIds:
        """What ``encode_flat`` gives, of texts that gigatoken sees one by one."""
        kinds_N = _native.kinds_in_texts(texts, character_kinds())
        if kinds_N.max() & SURROGATE:
            raise lone_surrogate(texts, int(np.flatnonzero(kinds_N & SURROGATE)[0]))
        self._forget_if_large(sum(map(len, texts)))
        try:
            offsets, ids_T = self._encode(texts)
        except _RefusalError as error:
            return self._refused(texts, error)
        by_reference_N = (kinds_N & UNASSIGNED) != 0
        if self._trims:
            by_reference_N |= np.fromiter((len(text.strip(_TRIMMED)) < len(text) for text in texts), bool, len(texts))
        for first, last in self._special_ranges:
            by_reference_N[np.searchsorted(offsets, _within(ids_T, first, last), side="right") - 1] = True
        ids_T, lengths_N = ids_T.view(np.int32), np.diff(offsets)
        if any(self._ends):
            ids_T, lengths_N = _with_ends(ids_T, lengths_N, *self._ends)
        if by_reference_N.any():
            ids_T, lengths_N = self._corrected(texts, ids_T, lengths_N, np.flatnonzero(by_reference_N), [])
        return ids_T, lengths_N

    def _refused(self, texts: list[str], error: Exception) -> FlatIds:
        """The reference's ids of texts that gigatoken failed on."""
        if self.failure is None:
            self.failure = str(error)
            _LOG.warning("%s failed (%s); the reference does what it cannot", self.library, error)
        self.texts_by_reference += len(texts)
        return self._reference.encode_flat(texts)

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Offsets int64 [N + 1] and ids uint32 [T], as gigatoken gives them."""
        if self.separator is not None:
            # Seldom, and not worth what a batch of gigatoken's loads in the first place: 0.2 seconds, 30 MB.
            with _refusals():
                rows = [self._engine.encode(text) for text in texts]
            return np.cumsum([0, *map(len, rows)]), np.concatenate(rows)
        with _refusals():
            layout = self._engine.encode_batch(texts, parallel=False).layout
            offsets = np.asarray(layout.offsets.data, dtype=np.int64)
            ids_T = np.asarray(layout.content.data)
        if offsets.shape != (len(texts) + 1,) or ids_T.dtype != np.uint32:
            raise _RefusalError(f"{len(texts)} texts gave {offsets.shape[0] - 1} rows of {ids_T.dtype}")
        return offsets - offsets[0], ids_T[offsets[0] : offsets[-1]]

    def _corrected(
        self, texts: Sequence[str], ids_T: np.ndarray, lengths_N: np.ndarray, indices: np.ndarray, after: list[int]
    ) -> FlatIds:
        """The same with the reference's ids, and some behind them, for some texts."""
        self.texts_by_reference += indices.size
        right_T, right_M = self._reference.encode_flat([texts[index] for index in indices])
        if after:
            right_T, right_M = _with_ends(right_T, right_M, [], after)
        starts = np.concatenate([[0], np.cumsum(lengths_N)])
        right_starts = np.concatenate([[0], np.cumsum(right_M)])
        pieces, kept_from = [], 0
        for place, index in enumerate(indices):
            pieces += [ids_T[kept_from : starts[index]], right_T[right_starts[place] : right_starts[place + 1]]]
            kept_from = starts[index + 1]
        lengths_N = lengths_N.copy()
        lengths_N[indices] = right_M
        return np.concatenate([*pieces, ids_T[kept_from:]]), lengths_N

    def _forget_if_large(self, characters: int) -> None:
        """Build it anew when the words it remembers have cost too much memory."""
        self._characters += characters
        if self._characters > _MIN_BYTES_BETWEEN and self._memory() - self._memory_at_start > _MAX_GROWTH_BYTES:
            self._renew()

    def _renew(self) -> None:
        self._engine: Any = None
        with _refusals():
            self._engine = self._load()
        self._characters = 0
        self._memory_at_start = self._memory()

    def _memory(self) -> int:
        return int(self._process.memory_info().rss)


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns what gigatoken raises into ``_RefusalError``: errors of many kinds, and panics, no ``Exception`` at all."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            # The first line says what; the rest is a place in gigatoken's source.
            raise _RefusalError(str(error).strip().split("\n", 1)[0].rstrip(".")) from error
        raise


def _loader(gigatoken: Any, tokenizer: Tokenizer) -> Callable[[], Any]:
    """Builds gigatoken's form of a tokenizer from the bytes of its file; never from a name, which it would download."""
    model = tokenizer.model
    data = tokenizer.path.read_bytes()
    if isinstance(model, SentencePieceModel):
        return lambda: gigatoken.Tokenizer.from_sentencepiece(data)
    if isinstance(model, TiktokenModel):
        scheme = _GIGATOKEN_SPLITS.get(model.split)
        if scheme is None or model.first_rank:
            raise ConfigError(f"gigatoken does not know ranks that are cut by {model.split} or do not start at 0")
        return lambda: gigatoken.Tokenizer.from_tiktoken(tokenizer.path, scheme, model.special_tokens)
    assert isinstance(model, TokenizersModel)
    if model.has_normalizer and any(token["normalized"] for token in model.added_tokens):
        # They are looked for in the normalised text, where their spelling is not that of the text.
        raise ConfigError("the tokenizer has added tokens that are looked for after normalising, and a normaliser")
    if data.lstrip()[:1] != b"{" or not json.loads(data).get("model"):
        raise ConfigError(f"{tokenizer.path} is not a tokenizer.json")
    return lambda: gigatoken.Tokenizer.from_json(data)


def _names(tokenizer: Tokenizer) -> list[str]:
    """Names of special and added tokens, at most 300 of them."""
    model = tokenizer.model
    names = [model.name_of(token) for token in sorted(model.special_ids)]
    return [name for name in names if name][:300]


def _ends_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after every text.

    Raises:
        ConfigError: what it puts there depends on the text.
    """
    if not tokenizer.options.get("add_special_tokens"):
        return [], []
    around = []
    for text in ("a", "漢字 b"):
        ids = tokenizer.model.encode_flat([text])[0].tolist()
        places = [place for place, token in enumerate(ids) if token not in tokenizer.model.special_ids]
        if not places:
            raise ConfigError("the tokenizer makes special tokens of ordinary text")
        around.append((ids[: places[0]], ids[places[-1] + 1 :]))
    empty = tokenizer.model.encode_flat([""])[0].tolist()
    if around[0] != around[1] or empty != around[0][0] + around[0][1]:
        raise ConfigError("the special tokens that the tokenizer adds depend on the text")
    return around[0]


def _separator(tokenizer: Tokenizer) -> bytes | None:
    """The end-of-document token's name, if it parts texts so that each is seen as if it were alone."""
    model = tokenizer.model
    if tokenizer.eod not in model.special_ids or isinstance(model, SentencePieceModel):
        return None
    if isinstance(model, TokenizersModel):
        # Some tokens take white space beside them, or are none inside a word; and a normaliser may look further.
        flags = ("lstrip", "rstrip", "single_word")
        tokens = [token for token in model.added_tokens if token["id"] == tokenizer.eod]
        if model.has_normalizer or any(token[flag] for token in tokens for flag in flags):
            return None
    return tokenizer.eod_token.encode()


def _within(ids_T: np.ndarray, first: int, last: int) -> np.ndarray:
    """Where the ids from one to another are."""
    # One unsigned comparison: ids below the range wrap around to large ones.
    places: np.ndarray = np.flatnonzero(ids_T - np.uint32(first) <= np.uint32(last - first))
    return places


def _with_ends(ids_T: np.ndarray, lengths_N: np.ndarray, before: list[int], after: list[int]) -> FlatIds:
    """The same ids with some put before and after each text's."""
    new_N = lengths_N + (len(before) + len(after))
    stops = np.cumsum(new_N)
    out = np.empty(int(stops[-1]), dtype=np.int32)
    inner = np.ones(out.size, dtype=bool)
    for place, token in enumerate(before):
        out[stops - new_N + place] = token
        inner[stops - new_N + place] = False
    for place, token in enumerate(reversed(after), 1):
        out[stops - place] = token
        inner[stops - place] = False
    out[inner] = ids_T
    return out, new_N


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted numbers as ranges of neighbours, both ends included."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = ranges[-1][0], number
        else:
            ranges.append((number, number))
    return ranges


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
