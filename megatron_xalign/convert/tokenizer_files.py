"""The files of a tokenizer that go with a model, and the ids of its special tokens.

A tokenizer of ours (``xalign tokenizer train``) has a manifest that names the token which ends a document; it becomes
``eos``, and there is no ``bos``. A Hugging Face folder is copied as it is: its own files say what its tokens mean.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xalign.errors import FormatError
from megatron_xalign.formats.atomic import read_json, sha256_of, write_json

ROLES = ("bos", "eos", "pad")

# Chat templates stay behind: what is trained here is a base model.
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt",
)


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer that was found and belongs to the model."""

    folder: Path
    special_ids: dict[str, int | None]
    """Ids of ``bos``, ``eos`` and ``pad``; None where there is no such token."""
    num_ids: int
    """One more than the largest id."""
    end_of_document: str | None
    """The token that ends a document, of a tokenizer of ours; None of others."""

    def write(self, out: Path, seq_length: int) -> None:
        """Write the files into a Hugging Face folder."""
        if self.end_of_document is None:
            for name in _COPIED:
                if (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, out / name)
            return
        shutil.copyfile(self.folder / "tokenizer.json", out / "tokenizer.json")
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if (self.folder / "tokenizer_config.json").is_file():
            settings = read_json(self.folder / "tokenizer_config.json")
        settings |= {"eos_token": self.end_of_document, "model_max_length": seq_length}
        settings.setdefault("pad_token", self.end_of_document)
        write_json(out / "tokenizer_config.json", settings)
        special: dict[str, Any] = {}
        if (self.folder / "special_tokens_map.json").is_file():
            special = read_json(self.folder / "special_tokens_map.json")
        special = {"pad_token": self.end_of_document} | special | {"eos_token": self.end_of_document}
        write_json(out / "special_tokens_map.json", special)


def read_tokenizer(folder: Path, expected_sha256: str | None) -> TokenizerFiles:
    """Look at the tokenizer in a folder.

    Args:
        folder: holds ``tokenizer.json``.
        expected_sha256: of that file, if the model was trained with a known one.

    Raises:
        FormatError: it is missing, damaged or another one.
    """
    folder = folder.parent if folder.name == "tokenizer.json" else folder
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FormatError(f"{file} does not exist; name the folder of the run's tokenizer.")
    if expected_sha256 and sha256_of(file) != expected_sha256:
        raise FormatError(
            f"{file} has SHA-256 {sha256_of(file)}; the checkpoint was trained with a tokenizer of {expected_sha256}. "
            "Name the one the run used."
        )
    ids = _ids(file)
    if (folder / "manifest.json").is_file():
        manifest = read_json(folder / "manifest.json")
        if not isinstance(manifest.get("eod"), int) or not isinstance(manifest.get("eod_token"), str):
            raise FormatError(f"{folder / 'manifest.json'} does not say which token ends a document (eod, eod_token).")
        special: dict[str, int | None] = {"bos": None, "eos": manifest["eod"], "pad": None}
        return TokenizerFiles(folder, special, max(ids.values()) + 1, manifest["eod_token"])
    named = _names_of_special_tokens(folder)
    unknown = [token for token in named.values() if token not in ids]
    if unknown:
        raise FormatError(f"{folder} names the special token {unknown[0]!r}, which {file} does not have.")
    return TokenizerFiles(
        folder, {role: ids[named[role]] if role in named else None for role in ROLES}, max(ids.values()) + 1, None
    )


def _ids(file: Path) -> dict[str, int]:
    """Ids of all tokens."""
    from tokenizers import Tokenizer

    try:
        vocabulary: dict[str, int] = Tokenizer.from_str(file.read_text(encoding="utf-8")).get_vocab()
    except Exception as error:  # what tokenizers raises for a file it cannot read
        raise FormatError(f"{file} is not a tokenizer: {error}.") from None
    if not vocabulary:
        raise FormatError(f"{file} has no tokens.")
    return vocabulary


def _names_of_special_tokens(folder: Path) -> dict[str, str]:
    """The text of each role's token, by the folder's settings."""
    named: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = read_json(folder / name) if (folder / name).is_file() else {}
        if not isinstance(settings, dict):
            raise FormatError(f"{folder / name} holds no settings but a {type(settings).__name__}.")
        for role in ROLES:
            token = settings.get(f"{role}_token")
            token = token.get("content") if isinstance(token, Mapping) else token
            if isinstance(token, str):
                named[role] = token
    return named


def special_ids_of_config(settings: Mapping[str, Any]) -> dict[str, int | list[int] | None]:
    """``bos``, ``eos`` and ``pad`` of a ``config.json``; ``eos`` may be several."""
    found: dict[str, int | list[int] | None] = {}
    for role in ROLES:
        value = settings.get(f"{role}_token_id")
        found[role] = value if isinstance(value, (int, list)) else None
    return json.loads(json.dumps(found))
