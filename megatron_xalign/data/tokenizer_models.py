"""The three kinds of tokenizer, each as its own library reads it: many texts in, one flat array of ids out.

These are the reference: whatever is faster has to give their ids (:mod:`~megatron_xalign.data.engines`).
"""

# T tokens, N texts, V vocabulary

from __future__ import annotations

import functools
import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, Protocol

import numpy as np

from megatron_xalign import _native
from megatron_xalign.data.sentencepiece_file import BYTE, CONTROL, USER_DEFINED, read_piece_types
from megatron_xalign.data.split_patterns import PATTERNS
from megatron_xalign.errors import ConfigError, CorpusError, FormatError

Kind = Literal["tokenizers", "sentencepiece", "tiktoken"]
FlatIds = tuple[np.ndarray, np.ndarray]
"""Ids of all texts, int32 [T], and how many each text has, int64 [N]."""

# The tokenizers library holds about 100 bytes for a byte of text while it works on it.
_BATCH_CHARACTERS = 500_000
_SURROGATES = (0xD800, 0xE000)


class UnencodableTextError(CorpusError):
    """A text that a tokenizer cannot take; ``index`` is its place in the list that was given."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"text {index} of the batch cannot be tokenised: {reason}")
        self.index = index
        self.reason = reason


class TokenModel(Protocol):
    """What a kind of tokenizer has to know."""

    kind: Kind
    library: str
    """Name and version of the library that reads it."""
    vocab_size: int
    """One more than the largest id."""
    special_ids: frozenset[int]
    """Ids that are not of ordinary text: special, control and added tokens."""
    unknown_id: int | None
    """What a character without a spelling becomes; None: every text has a spelling."""

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """Ids of each text, one after the other."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens show as their names."""

    def id_of(self, token: str) -> int | None:
        """Id of a token given by its name, None if there is none."""

    def name_of(self, token: int) -> str | None:
        """Name of an id, None if there is none."""

    def spells_part_of_character(self, token: int) -> bool:
        """Whether an id stands for bytes that are no whole characters, or only ever for the bytes of rare ones."""

    def use_one_thread(self) -> None:
        """From now on, work on the calling thread alone: other processes have the other cores."""


def refuse_lone_surrogates(texts: Sequence[str]) -> None:
    """Half a UTF-16 pair is no character, and no library encodes it.

    Raises:
        UnencodableTextError: a text holds one.
    """
    counts = _native.count_characters(texts if isinstance(texts, list) else list(texts), _surrogate_table(), 2)
    if counts[:, 1].any():
        raise lone_surrogate(texts, int(np.flatnonzero(counts[:, 1])[0]))


def lone_surrogate(texts: Sequence[str], index: int) -> UnencodableTextError:
    """The error for a text with half a UTF-16 pair."""
    found = re.search("[\ud800-\udfff]", texts[index])
    assert found is not None
    return UnencodableTextError(
        index, f"it holds the lone surrogate U+{ord(found.group()):04X} at character {found.start()}, which is half a "
        "character; the text was decoded wrongly, or a \\u escape was cut in two."
    )


@functools.cache
def _surrogate_table() -> np.ndarray:
    table = np.zeros(0x110000, dtype=np.uint8)
    table[slice(*_SURROGATES)] = 1
    return table


class TokenizersModel:
    """A ``tokenizer.json`` in Hugging Face's ``tokenizers``."""

    kind: Kind = "tokenizers"

    def __init__(
        self, data: bytes, *, parse_special_tokens: bool, add_special_tokens: bool, special_tokens: Sequence[str] = ()
    ) -> None:
        """Read one.

        Args:
            data: the file's bytes.
            parse_special_tokens: text that spells a special token becomes that token.
            add_special_tokens: put what the file's post-processor puts around every text.
            special_tokens: further tokens of the vocabulary that count as special, as far as it has them.
        """
        import tokenizers

        engine = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        # Files of sentence encoders cut or fill every text to a length; a corpus must neither lose nor gain.
        engine.no_truncation()
        engine.no_padding()
        engine.add_special_tokens([token for token in special_tokens if engine.token_to_id(token) is not None])
        engine.encode_special_tokens = not parse_special_tokens
        self.engine = engine
        self.library = f"tokenizers {tokenizers.__version__}"
        self.vocab_size = max(engine.get_vocab(with_added_tokens=True).values()) + 1
        self.special_ids = frozenset(engine.get_added_tokens_decoder())
        self._add_special_tokens = add_special_tokens
        self._facts: dict[str, Any] = json.loads(engine.to_str())
        for large in ("vocab", "merges"):
            self._facts["model"].pop(large, None)
        self.unknown_id = self._unknown_id()
        self._can_cut = not add_special_tokens and self._words_end_at_spaces()

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """Ids of each text, one after the other.

        Memory stays near 60 MB whatever the texts are; but a single text of many millions of characters is worked on
        in pieces only where words provably end at spaces (no normaliser, a known split pattern), and takes a hundred
        times its size elsewhere.
        """
        refuse_lone_surrogates(texts)
        lengths_N = np.zeros(len(texts), dtype=np.int64)
        ids = []
        for indices, pieces in self._batches(texts):
            encodings = self.engine.encode_batch_fast(pieces, add_special_tokens=self._add_special_tokens)
            lists = [encoding.ids for encoding in encodings]
            sizes = [len(items) for items in lists]
            np.add.at(lengths_N, indices, sizes)
            ids.append(np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=sum(sizes)))
        return np.concatenate(ids) if ids else np.zeros(0, dtype=np.int32), lengths_N

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens show as their names."""
        return self.engine.decode(ids, skip_special_tokens=False)

    def id_of(self, token: str) -> int | None:
        """Id of a token given by its name, None if there is none."""
        return self.engine.token_to_id(token)

    def name_of(self, token: int) -> str | None:
        """Name of an id, None if there is none."""
        return self.engine.id_to_token(token)

    def spells_part_of_character(self, token: int) -> bool:
        """Whether an id stands for bytes that are no whole characters, or only ever for the bytes of rare ones."""
        name = None if token in self.special_ids else self.name_of(token)
        if name is None:
            return False
        if self._facts["model"].get("byte_fallback"):
            return re.fullmatch("<0x[0-9A-F]{2}>", name) is not None
        if '"ByteLevel"' not in json.dumps(self._facts.get("pre_tokenizer")):
            return False
        return not _is_utf8(bytes(_byte_of_letter()[letter] for letter in name if letter in _byte_of_letter()))

    def use_one_thread(self) -> None:
        """From now on, work on the calling thread alone; the library reads this from the environment at each call."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"

    @property
    def added_tokens(self) -> list[dict[str, Any]]:
        """The file's added tokens, special or not."""
        return self._facts.get("added_tokens") or []

    @property
    def has_normalizer(self) -> bool:
        """Whether text is changed before it is cut."""
        normalizer = self._facts.get("normalizer")
        return normalizer not in (None, {"type": "Sequence", "normalizers": []})

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
        """Texts, or pieces of long ones, with the index of the text each belongs to."""
        indices: list[int] = []
        pieces: list[str] = []
        characters = 0
        for index, text in enumerate(texts):
            for piece in _cut_at_spaces(text, _BATCH_CHARACTERS) if self._can_cut else (text,):
                if characters + len(piece) > _BATCH_CHARACTERS and pieces:
                    yield indices, pieces
                    indices, pieces, characters = [], [], 0
                indices.append(index)
                pieces.append(piece)
                characters += len(piece)
        if pieces:
            yield indices, pieces

    def _words_end_at_spaces(self) -> bool:
        """Whether a text may be cut between a letter and the space before the next word, and give the same ids."""
        facts = self._facts
        before = facts.get("pre_tokenizer") or {}
        steps = before.get("pretokenizers", []) if before.get("type") == "Sequence" else [before]
        steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
        level = {"type": "ByteLevel", "add_prefix_space": False}
        known = steps == [level | {"use_regex": True}] or any(
            steps in ([split], [split, level | {"use_regex": False}])
            for pattern in PATTERNS.values()
            for split in (
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            )
        )
        plain = all(
            not re.search(r"\s", token["content"]) and not token["lstrip"] and not token["rstrip"]
            for token in self.added_tokens
        )
        return known and plain and not self.has_normalizer

    def _unknown_id(self) -> int | None:
        model = self._facts["model"]
        if model.get("byte_fallback") or self._spells_every_byte(model):
            return None
        if model["type"] == "Unigram":
            return model.get("unk_id")
        return None if model.get("unk_token") is None else self.id_of(model["unk_token"])

    def _spells_every_byte(self, model: dict[str, Any]) -> bool:
        from tokenizers import pre_tokenizers

        if '"ByteLevel"' not in json.dumps(self._facts.get("pre_tokenizer")):
            return False
        return all(self.engine.token_to_id(letter) is not None for letter in pre_tokenizers.ByteLevel.alphabet())


class SentencePieceModel:
    """A SentencePiece ``.model`` in its own library. Memory grows to 20 to 40 times a single text's size."""

    kind: Kind = "sentencepiece"

    def __init__(self, data: bytes, *, add_special_tokens: bool) -> None:
        """Read one.

        Args:
            data: the file's bytes.
            add_special_tokens: put the beginning-of-sentence piece before every text.
        """
        sentencepiece = import_optional("sentencepiece", "a SentencePiece model")
        types = read_piece_types(data)
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except Exception as error:  # RuntimeError, or UnicodeDecodeError out of its own message
            raise FormatError(f"the SentencePiece library refuses the model: {error}.") from None
        if add_special_tokens and processor.bos_id() < 0:
            raise ConfigError("add_special_tokens asks for a beginning-of-sentence piece; the model has none.")
        self.processor = processor
        self.library = f"sentencepiece {sentencepiece.__version__}"
        self.vocab_size = len(types.texts)
        self.special_ids = frozenset(np.flatnonzero(np.isin(types.types_V, (CONTROL, USER_DEFINED))).tolist())
        has_bytes = int((types.types_V == BYTE).sum()) == 256
        self.unknown_id: int | None = None if has_bytes else processor.unk_id()
        self.trims = processor.encode("a  b") == processor.encode("a b")
        """Whether spaces at the ends, and second ones inside, are dropped."""
        self._control_ids = frozenset(np.flatnonzero(types.types_V == CONTROL).tolist())
        self._id_of = {text: index for index, text in enumerate(types.texts)}
        self._options: dict[str, Any] = {"add_bos": True} if add_special_tokens else {}
        # Arrays at once where the library has them; lists of Python ints otherwise.
        has_arrays = "return_type" in inspect.signature(processor.Encode).parameters
        self._options |= {"return_type": "numpy"} if has_arrays else {"out_type": int}

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """Ids of each text, one after the other."""
        refuse_lone_surrogates(texts)
        if not texts:
            return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64)
        return _flat(self.processor.encode(list(texts), **self._options))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens show as their names."""
        parts: list[str] = []
        run: list[int] = []
        for token in ids:
            if token in self._control_ids:
                parts += [self.processor.decode(run), self.processor.id_to_piece(token)]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self.processor.decode(run)])

    def id_of(self, token: str) -> int | None:
        """Id of a piece given by its text, None if there is none."""
        return self._id_of.get(token)

    def name_of(self, token: int) -> str | None:
        """Text of a piece, None if there is none."""
        return self.processor.id_to_piece(token) if 0 <= token < self.vocab_size else None

    def spells_part_of_character(self, token: int) -> bool:
        """Whether an id stands for bytes that are no whole characters, or only ever for the bytes of rare ones."""
        return bool(self.processor.is_byte(token))

    def use_one_thread(self) -> None:
        """From now on, work on the calling thread alone."""
        self._options["num_threads"] = 1


class TiktokenModel:
    """Ranks of byte strings in ``tiktoken``, with a pattern and special tokens that the file does not tell."""

    kind: Kind = "tiktoken"
    unknown_id: int | None = None

    def __init__(
        self, ids: dict[bytes, int], split: str, special_tokens: dict[str, int], *, parse_special_tokens: bool
    ) -> None:
        """Build one.

        Args:
            ids: id of each byte string; every single byte must be there.
            split: name of the pattern that cuts text into words.
            special_tokens: id of each special token.
            parse_special_tokens: text that spells a special token becomes that token.
        """
        tiktoken = import_optional("tiktoken", "a tiktoken rank file")
        self.encoding = tiktoken.Encoding(
            name="megatron-xalign", pat_str=PATTERNS[split], mergeable_ranks=ids, special_tokens=special_tokens
        )
        self.library = f"tiktoken {tiktoken.__version__}"
        self.split = split
        self.first_rank = min(ids.values())
        """Id of the first byte string; Megatron-LM puts special tokens before it."""
        self.special_tokens = special_tokens
        self.vocab_size = max(chain(ids.values(), special_tokens.values())) + 1
        self.special_ids = frozenset(special_tokens.values())
        self._parsed = frozenset(special_tokens) if parse_special_tokens else frozenset()

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """Ids of each text, one after the other.

        Raises:
            UnencodableTextError: a lone surrogate, or a run of a million spaces, at which the library gives up.
        """
        refuse_lone_surrogates(texts)
        arrays = []
        for index, text in enumerate(texts):
            try:
                arrays.append(
                    self.encoding.encode_to_numpy(text, allowed_special=self._parsed, disallowed_special=())
                )
            except ValueError as error:
                raise UnencodableTextError(index, f"tiktoken says: {error}.") from None
        return _flat(arrays)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens show as their names."""
        return self.encoding.decode(list(ids))

    def id_of(self, token: str) -> int | None:
        """Id of a token given by its name, None if there is none."""
        if token in self.special_tokens:
            return self.special_tokens[token]
        try:
            return self.encoding.encode_single_token(token)
        except KeyError:
            return None

    def name_of(self, token: int) -> str | None:
        """Name of an id, None if there is none."""
        try:
            return self.encoding.decode_single_token_bytes(token).decode("utf-8", "replace")
        except KeyError:
            return None

    def spells_part_of_character(self, token: int) -> bool:
        """Whether an id stands for bytes that are no whole characters, or only ever for the bytes of rare ones."""
        try:
            return not _is_utf8(self.encoding.decode_single_token_bytes(token))
        except KeyError:
            return False

    def use_one_thread(self) -> None:
        """It never uses more."""


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """The byte that each letter of byte-level tokens stands for: visible characters for themselves, others in order."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


def import_optional(module: str, what: str) -> Any:
    """A library that only some tokenizers need.

    Raises:
        ConfigError: it is not installed; says how to.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{what} needs {error.name}, which is not installed: pip install 'megatron-xalign[{module}]'."
        ) from None


def _flat(arrays: Sequence[Any]) -> FlatIds:
    lengths_N = np.fromiter(map(len, arrays), dtype=np.int64, count=len(arrays))
    if not lengths_N.sum():
        return np.zeros(0, dtype=np.int32), lengths_N
    if isinstance(arrays[0], np.ndarray):
        return np.concatenate(arrays).astype(np.int32, copy=False), lengths_N
    ids: Iterable[int] = chain.from_iterable(arrays)
    return np.fromiter(ids, dtype=np.int32, count=int(lengths_N.sum())), lengths_N


# Every pattern of split_patterns cuts between a letter and the one space or line break before another letter, and
# behind a single line break before a letter. (Not behind two: some look ahead from a run of white space.)
_PLACES = re.compile(r"(?<=\w)(?=[ \n]\w)|(?<=\S\n)(?=\w)")


def _cut_at_spaces(text: str, size: int) -> Iterator[str]:
    """Pieces of about ``size`` characters that tokenise as the whole text does; longer where it has no such places."""
    start = 0
    while len(text) - start > size + size // 10:
        places = (place.start() for place in _PLACES.finditer(text, start + size))
        at = next((place for place in places if _between_words(text, place)), None)
        if at is None:
            break
        yield text[start:at]
        start = at
    yield text[start:] if start else text


def _between_words(text: str, at: int) -> bool:
    """Whether a place of ``_PLACES`` has letters around it: ``\\w`` also matches digits and underscores."""
    return text[at + 1].isalpha() and text[at - 1].isalpha() if text[at] in " \n" else text[at].isalpha()
