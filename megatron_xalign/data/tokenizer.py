"""Load a tokenizer of any of three kinds, and turn text into ids and back.

* ``tokenizers``: a ``tokenizer.json``, or the Hugging Face folder that holds one;
* ``sentencepiece``: a ``.model``, or the folder of one;
* ``tiktoken``: a rank file (``.tiktoken``, or Megatron-LM's ``.json`` list) with a named split pattern.

Nothing is downloaded. Which kind a file is, its content decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_xalign.data.tiktoken_file import TiktokenSettings, looks_like_ranks, read_ranks, settings_of
from megatron_xalign.data.tokenizer_models import (
    Kind,
    SentencePieceModel,
    TiktokenModel,
    TokenizersModel,
    TokenModel,
    UnencodableTextError,
)
from megatron_xalign.data.tokenizer_training import (
    END_OF_DOCUMENT,
    MANIFEST_FORMAT,
    SMALLEST_VOCABULARY,
    train_tokenizer,
)
from megatron_xalign.errors import ConfigError, FormatError
from megatron_xalign.formats.atomic import read_json
from megatron_xalign.formats.token_file import check_same_tokenizer

__all__ = [
    "END_OF_DOCUMENT",
    "SMALLEST_VOCABULARY",
    "TiktokenSettings",
    "Tokenizer",
    "UnencodableTextError",
    "check_same_tokenizer",
    "train_tokenizer",
]

# Where nothing says which token ends a document.
_USUAL_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
_MODEL_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A tokenizer ready for use: text to ids and back.

    It can be pickled: the process that unpickles it reads the file again, and refuses a changed one.
    """

    def __init__(
        self, model: TokenModel, *, path: Path, sha256: str, end_of_document: str, options: dict[str, Any],
        arguments: dict[str, Any],
    ) -> None:
        eod = model.id_of(end_of_document)
        if eod is None:
            raise FormatError(f"{path} has no token {end_of_document} to end a document with; name its own.")
        self.model = model
        """What its library made of the file."""
        self.kind: Kind = model.kind
        """``tokenizers``, ``sentencepiece`` or ``tiktoken``."""
        self.eod = eod
        """Id of the end-of-document token."""
        self.eod_token = end_of_document
        """Its name."""
        self.sha256 = sha256
        """Hash of what decides the ids: the file, and for ranks also pattern and special tokens."""
        self.path = path
        """The file it was read from."""
        self.vocab_size = model.vocab_size
        """One more than the largest id."""
        self.options = options
        """Options that change the ids of a text but not what an id means; part of a job's recipe, beside ``sha256``."""
        self._arguments = arguments

    @classmethod
    def load(
        cls,
        path: str | Path,
        end_of_document: str | None = None,
        *,
        parse_special_tokens: bool = False,
        add_special_tokens: bool = False,
        tiktoken: TiktokenSettings | None = None,
    ) -> Tokenizer:
        """Load a tokenizer from a file or folder.

        Megatron-LM's ``tools/preprocess_data.py`` gives the ids of these options. ``HuggingFaceTokenizer``: both true
        (core 0.17 and later, and 0.16 with ``--tokenizer-hf-include-special-tokens`` or ``--legacy-tokenizer``);
        ``parse_special_tokens`` alone (0.16 by default, later with ``--tokenizer-hf-no-include-special-tokens``).
        SentencePiece: neither (0.16's ``--legacy-tokenizer`` adds the first piece for ``Llama2Tokenizer``).
        ``TikTokenizer``: ``parse_special_tokens``.

        Args:
            path: ``tokenizer.json``, ``.model``, rank file, or a folder that holds one of them.
            end_of_document: token that ends a document; otherwise the one our manifest, the folder's
                ``tokenizer_config.json`` or ``special_tokens_map.json`` (``eos_token``) or the model itself names, or
                the first of the usual names that exists.
            parse_special_tokens: text that spells a special token becomes that token. By default it stays text: a
                document must not be able to end itself.
            add_special_tokens: put around every text what the tokenizer puts around a prompt.
            tiktoken: what a rank file does not tell; otherwise the file's name or a ``NAME.json`` beside it says.

        Raises:
            FormatError: missing, unreadable, changed since its manifest was written, or without such a token.
            ConfigError: its library is not installed, or an option does not fit its kind.
        """
        arguments = {
            "end_of_document": end_of_document, "parse_special_tokens": parse_special_tokens,
            "add_special_tokens": add_special_tokens, "tiktoken": tiktoken,
        }
        file = _find_file(Path(path))
        data = file.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        config = _read_config(file.parent)
        if looks_like_ranks(data):
            settings = tiktoken or settings_of(file)
            if add_special_tokens:
                raise ConfigError(f"{file} holds ranks; there is nothing that add_special_tokens could add.")
            ids = settings.shifted(read_ranks(data, file))
            model: TokenModel = TiktokenModel(
                ids, settings.split, settings.special_ids(ids), parse_special_tokens=parse_special_tokens
            )
            sha256 = settings.sha256(sha256)
            named = end_of_document or settings.end_of_document
            options: dict[str, Any] = {"parse_special_tokens": parse_special_tokens}
        elif data.lstrip()[:1] == b"{":
            marked = [config[role] for role in _SPECIAL_ROLES if role in config] if parse_special_tokens else []
            model = _read_tokenizers(
                file, data, parse_special_tokens=parse_special_tokens, add_special_tokens=add_special_tokens,
                special_tokens=marked,
            )
            named = end_of_document or _own_end(file, sha256) or config.get("eos_token")
            options = {"parse_special_tokens": parse_special_tokens, "add_special_tokens": add_special_tokens}
            if marked:
                options["special_tokens"] = sorted(set(marked))
        else:
            if parse_special_tokens:
                raise ConfigError(
                    f"{file} is a SentencePiece model: its control pieces never come from text, in Megatron-LM "
                    "neither; leave parse_special_tokens out."
                )
            model = _read_sentencepiece(file, data, add_special_tokens=add_special_tokens)
            named = end_of_document or config.get("eos_token") or model.name_of(model.processor.eos_id())
            options = {"add_special_tokens": add_special_tokens}
        ends = (named,) if named else _USUAL_ENDS
        end = next((name for name in ends if model.id_of(name) is not None), None)
        if end is None:
            raise FormatError(f"{file} has no token {' or '.join(ends)} to end a document with; name its own.")
        return cls(model, path=file, sha256=sha256, end_of_document=end, options=options, arguments=arguments)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [T_i]; many texts at once use all cores."""
        ids_T, lengths_N = self.model.encode_flat(texts)
        return np.split(ids_T, np.cumsum(lengths_N)[:-1]) if lengths_N.size else []

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of token ids; special tokens show as their names."""
        return self.model.decode([int(token) for token in ids])

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_again, (str(self.path), self._arguments | {"end_of_document": self.eod_token}, self.sha256)


def _load_again(path: str, arguments: dict[str, Any], sha256: str) -> Tokenizer:
    tokenizer = Tokenizer.load(path, **arguments)
    if tokenizer.sha256 != sha256:
        raise FormatError(
            f"{path} was changed while a job was using it: its hash was {sha256}, now {tokenizer.sha256}."
        )
    return tokenizer


def _find_file(path: Path) -> Path:
    """The file a path means."""
    if not path.is_dir():
        if not path.is_file():
            raise FormatError(f"{path} does not exist; name a tokenizer.json, a .model, a .tiktoken file or a folder.")
        return path
    candidates = [path / name for name in ("tokenizer.json", *_MODEL_NAMES)]
    ranks = sorted(path.glob("*.tiktoken"))
    found = next((file for file in candidates if file.is_file()), ranks[0] if len(ranks) == 1 else None)
    if found is None:
        raise FormatError(
            f"{path / 'tokenizer.json'} does not exist, nor {', '.join(_MODEL_NAMES)} or one .tiktoken file beside it; "
            "name the folder or file of a tokenizer. (A vocab.json with merges.txt becomes a tokenizer.json by "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers.)"
        )
    return found


def _read_tokenizers(file: Path, data: bytes, **options: Any) -> TokenizersModel:
    try:
        return TokenizersModel(data, **options)
    except Exception as error:  # the library raises bare Exception
        raise FormatError(f"{file} is not a tokenizer of the tokenizers library: {error}.") from None


def _read_sentencepiece(file: Path, data: bytes, *, add_special_tokens: bool) -> SentencePieceModel:
    try:
        return SentencePieceModel(data, add_special_tokens=add_special_tokens)
    except FormatError as error:
        raise FormatError(
            f"{file} is neither a tokenizer.json, nor ranks, nor a SentencePiece model: {error}"
        ) from None


def _read_config(folder: Path) -> dict[str, str]:
    """Names of the special tokens that a Hugging Face folder's settings give, by their roles."""
    named: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        settings = read_json(folder / name)
        if not isinstance(settings, dict):
            raise FormatError(f"{folder / name} is not a JSON object.")
        for role in _SPECIAL_ROLES:
            token = settings.get(role)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                named[role] = text
    return named


def _own_end(file: Path, sha256: str) -> str | None:
    """The end-of-document token that our manifest beside the file states, after checking the file's hash."""
    path = file.with_name("manifest.json")
    if not path.exists():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        # Somebody else's; a folder of a model may hold one.
        return None
    if manifest.get("version") not in (1, 2):
        raise FormatError(f"{path} is not the manifest of a tokenizer of version 1 or 2.")
    if not isinstance(manifest.get("sha256"), str) or not isinstance(manifest.get("eod_token"), str):
        raise FormatError(f"{path} lacks sha256 or eod_token.")
    if manifest["sha256"] != sha256:
        raise FormatError(
            f"{file} has SHA-256 {sha256}; its manifest says {manifest['sha256']}. It was changed after it was "
            "trained: token files made with it no longer fit."
        )
    return manifest["eod_token"]
