"""What a preprocessing job is asked to do: one frozen, JSON-able object; what of it decides the bytes is its recipe."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_xalign.data.documents import DEFAULT_TEMPLATE, Direction, parse_template
from megatron_xalign.data.duplicates import DEFAULT_THRESHOLD, check_threshold
from megatron_xalign.data.filters import PairFilters
from megatron_xalign.data.inputs import Fields, InputFormat, OnError
from megatron_xalign.errors import ConfigError
from megatron_xalign.formats.token_file import Origin

if TYPE_CHECKING:
    from megatron_xalign.data.tiktoken_file import TiktokenSettings
    from megatron_xalign.data.tokenizer import Tokenizer

Pairing = Literal["aligned", "shuffled", "separated"]
DuplicateRule = Literal["keep", "exact", "near"]
EngineName = Literal["auto", "reference", "gigatoken"]

RECIPE_VERSION = 2
"""Grows when the same settings begin to give other bytes; files and parts made before are then made again."""


@dataclass(frozen=True, kw_only=True)
class SentenceSettings:
    """Documents as several of Megatron's sequences, one a sentence."""

    model: str | None = None
    """Folder of a Punkt model, or of several by language; looked for on this machine, or else trained on the input, if
    left out."""
    keep_newlines: bool = False
    """White space between two sentences ends the one before, instead of being dropped."""
    as_megatron_lm: bool = False
    """Exactly what Megatron-LM's tool does with nltk."""


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """One preprocessing job: some corpus files become one token file (or one for each language)."""

    inputs: tuple[str, ...]
    """Files, folders and patterns, each of them also as ``LANGUAGE=...``."""
    output_prefix: str
    """Path of the token file without its ending."""
    tokenizer: str
    """Path; see ``Tokenizer.load``."""
    fields: Fields
    """How records are read; ``fields.kind`` says whether documents or pairs."""
    input_format: InputFormat | Literal["auto"] = "auto"
    """Of all inputs; by their names if ``auto``."""

    end_of_document: str | None = None
    """Token that ends a document, where the tokenizer does not say."""
    parse_special_tokens: bool = False
    """Text that spells a special token becomes that token."""
    add_special_tokens: bool = False
    """The tokenizer's own beginning and end tokens around every text."""
    tiktoken: TiktokenSettings | None = None
    """What a tiktoken vocabulary leaves open."""
    append_eod: bool = True
    """Every document ends in the end-of-document token. Off only to make what Megatron-LM's tool makes without
    ``--append-eod``."""
    sentences: SentenceSettings | None = None
    """Split documents into sentences."""
    keep_blank: bool = False
    """Monolingual: text of white space alone is a document too, as Megatron-LM's tool has it."""
    split_by_language: bool = False
    """Monolingual: one token file for each language, ``PREFIX.LANGUAGE``."""

    filters: PairFilters | None = field(default_factory=PairFilters)
    """Pairs: which are left out; None for none."""
    probe: str | None = None
    """Held-out pairs; what is in them, or nearly, is left out."""
    duplicates: DuplicateRule | None = None
    """Documents or pairs that come again: kept, or left out when they are the same, or also nearly the same. ``exact``
    for pairs and ``keep`` for documents if left out."""
    near_threshold: float = DEFAULT_THRESHOLD
    """Similarity from which on two are nearly the same."""
    template: str = DEFAULT_TEMPLATE
    """Pairs: text around ``{source}`` and ``{target}``."""
    direction: Direction = "random"
    """Pairs: which side is the source: the first, the second, or one by a hash of seed and id."""
    seed: int = 1234
    """Of ``direction`` and ``pairing``."""
    pairing: Pairing = "aligned"
    """Pairs: the translation beside its source, or one of two controls; see :mod:`.pairing`."""

    on_error: OnError = "raise"
    """A malformed line stops the job, or is counted and left out."""
    max_skipped: int | None = None
    """With ``skip``: more malformed lines stop the job all the same."""
    engine: EngineName = "auto"
    """What tokenises; a faster one than the reference only after it gave the same ids on a sample of the input."""
    workers: int | None = None
    """Processes; as many as this process may use CPUs if left out. Changes no byte."""
    part_bytes: int | None = None
    """Text that a worker takes at a time; by the size of the input if left out. Changes no byte of the tokens."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("inputs is empty.")
        name = Path(self.output_prefix).name
        if not name or self.output_prefix.endswith(("/", ".")):
            raise ConfigError(
                f"output_prefix={self.output_prefix!r} names no file; it is a path without an ending: data/eng_Latn."
            )
        if self.is_pairs:
            parse_template(self.template)
            if self.sentences or self.split_by_language:
                raise ConfigError(
                    "splitting by sentence or by language is for monolingual documents; a pair is one document in two "
                    "languages."
                )
            if not self.append_eod and self.pairing == "separated":
                raise ConfigError("pairing=separated makes documents of sides; without append_eod nothing ends them.")
        elif self.pairing != "aligned":
            raise ConfigError(f"pairing={self.pairing} is for pairs; the input is read as monolingual documents.")
        for value, values, called in (
            (self.direction, ("forward", "backward", "random"), "direction"),
            (self.pairing, ("aligned", "shuffled", "separated"), "pairing"),
            (self.duplicates, ("keep", "exact", "near", None), "duplicates"),
            (self.on_error, ("raise", "skip"), "on_error"),
            (self.engine, ("auto", "reference", "gigatoken"), "engine"),
        ):
            if value not in values:
                known = ", ".join(str(name) for name in values if name)
                raise ConfigError(f"{called}={value!r} is not one of {known}.")
        if self.duplicates == "near":
            check_threshold(self.near_threshold)
        if self.max_skipped is not None and self.max_skipped < 0:
            raise ConfigError(f"--max-skipped {self.max_skipped} is a number of lines, 0 or more.")
        if self.max_skipped is not None and self.on_error == "raise":
            raise ConfigError("--max-skipped bounds what --on-error skip leaves out; without that nothing is.")
        for number, called in ((self.workers, "workers"), (self.part_bytes, "part_bytes")):
            if number is not None and number < 1:
                raise ConfigError(f"{called}={number} must be 1 or more.")

    @property
    def is_pairs(self) -> bool:
        """Whether the input is pairs."""
        return self.fields.kind == "pairs"

    @property
    def origin(self) -> Origin:
        """Of the token file."""
        return "parallel" if self.is_pairs else "monolingual"

    @property
    def duplicate_rule(self) -> DuplicateRule:
        """``duplicates`` with its default filled in."""
        return self.duplicates or ("exact" if self.is_pairs else "keep")

    @property
    def work_folder(self) -> Path:
        """Where parts lie until they are joined."""
        return Path(f"{self.output_prefix}.parts")

    def num_workers(self) -> int:
        """``workers`` with its default filled in."""
        if self.workers is not None:
            return self.workers
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer, as these settings want it.

        Raises:
            ConfigError, FormatError: see ``Tokenizer.load``.
        """
        from megatron_xalign.data.tokenizer import Tokenizer

        return Tokenizer.load(
            self.tokenizer, self.end_of_document, parse_special_tokens=self.parse_special_tokens,
            add_special_tokens=self.add_special_tokens, tiktoken=self.tiktoken,
        )

    def recipe(
        self,
        tokenizer: Tokenizer,
        *,
        sentences: Mapping[str, Any] | None,
        probe_sha256: str | None,
        identifier: Mapping[str, str] | None,
    ) -> dict[str, Any]:
        """What, beside the input, decides the tokens: not where files lie, nor what only decides how the job runs.

        Args:
            tokenizer: the tokenizer.
            sentences: what decides how sentences are split, if they are.
            probe_sha256: of the held-out pairs, if there are any.
            identifier: of languages, if the filters ask one.
        """
        fields = self.fields.to_tree()
        recipe: dict[str, Any] = {
            "version": RECIPE_VERSION, "origin": self.origin, "fields": fields,
            "tokenizer": {
                "kind": tokenizer.kind, "sha256": tokenizer.sha256, "eod": tokenizer.eod, **tokenizer.options,
            },
            "append_eod": self.append_eod, "probe": probe_sha256, "duplicates": self.duplicate_rule,
            "near_threshold": self.near_threshold if self.duplicate_rule == "near" else None,
        }
        if self.is_pairs:
            seeded = self.direction == "random" or self.pairing == "shuffled"
            recipe |= {
                "template": self.template, "direction": self.direction, "pairing": self.pairing,
                "seed": self.seed if seeded else None,
                "filters": asdict(self.filters) if self.filters is not None else None, "identifier": identifier,
            }
        else:
            recipe |= {
                "sentences": sentences, "split_by_language": self.split_by_language, "keep_blank": self.keep_blank,
            }
        return recipe

    def to_tree(self) -> dict[str, Any]:
        """As JSON."""
        tree = {**self.__dict__, "inputs": list(self.inputs), "fields": self.fields.to_tree()}
        for name in ("sentences", "filters", "tiktoken"):
            tree[name] = asdict(tree[name]) if tree[name] is not None else None
        return tree

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> JobSettings:
        """From JSON."""
        from megatron_xalign.data.tiktoken_file import TiktokenSettings

        def built(kind: Any, name: str) -> Any:
            return kind(**tree[name]) if tree[name] is not None else None

        return cls(
            **{
                **tree, "inputs": tuple(tree["inputs"]), "fields": Fields.from_tree(tree["fields"]),
                "sentences": built(SentenceSettings, "sentences"), "filters": built(PairFilters, "filters"),
                "tiktoken": built(TiktokenSettings, "tiktoken"),
            }
        )


def hash_of(content: Any) -> str:
    """SHA-256 of JSON-able content, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
