"""The flags of Megatron-LM's ``tools/preprocess_data.py`` as jobs of ours that write the same ``.bin`` and ``.idx``.

What theirs does by accident is not imitated, and said where it shows: with ``--partitions`` above 1 and without
``--keep-sequential-samples`` it deals lines out to partitions, so documents change places; an empty text becomes a
document without a sequence; and a vocabulary of 65,500 to 65,536 ids is stored in int32, which its own fast index path
reads wrong. Ours keeps the order, leaves empty texts out and counts them, and stores uint16.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_xalign.data.inputs import Fields
from megatron_xalign.data.job_settings import JobSettings, SentenceSettings
from megatron_xalign.errors import ConfigError

_LOG = logging.getLogger(__name__)

TOKENIZER_TYPES = (
    "HuggingFaceTokenizer", "SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer",
)
"""Their ``--tokenizer-type`` that are carried."""
UNKNOWN_LANGUAGE = "und"

# What nltk calls a language, as --lang has it, in the codes our files are written in.
_CODES = {
    "czech": "ces_Latn", "danish": "dan_Latn", "dutch": "nld_Latn", "english": "eng_Latn", "estonian": "est_Latn",
    "finnish": "fin_Latn", "french": "fra_Latn", "german": "deu_Latn", "greek": "ell_Grek", "italian": "ita_Latn",
    "malayalam": "mal_Mlym", "norwegian": "nob_Latn", "polish": "pol_Latn", "portuguese": "por_Latn",
    "russian": "rus_Cyrl", "slovene": "slv_Latn", "spanish": "spa_Latn", "swedish": "swe_Latn", "turkish": "tur_Latn",
}
_PROBE = ("a", "Two words.", "ä")


@dataclass(frozen=True, kw_only=True)
class MegatronFlags:
    """Their flags, by their names."""

    input: str
    """A file, or a pattern of files."""
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: str
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    split_sentences: bool = False
    keep_newlines: bool = False
    lang: str = "english"
    workers: int | None = None
    partitions: int = 1
    keep_sequential_samples: bool = False
    hf_special_tokens: bool | None = None
    """``--tokenizer-hf-include-special-tokens`` (True) or ``--tokenizer-hf-no-include-special-tokens``; its default
    changed between versions, so where it matters one of the two has to be said."""
    vocab_size: int | None = None
    tiktoken_pattern: Literal["v1", "v2"] = "v2"
    tiktoken_num_special_tokens: int = 1000
    special_tokens: tuple[str, ...] | None = None
    """``--tokenizer-special-tokens`` or ``--tiktoken-special-tokens``."""
    language: str | None = None
    """Ours: language of the texts, for the files beside ``.bin`` and ``.idx``."""
    punkt_model: str | None = None
    """Ours: folder of a Punkt model; see ``sentences.find_model``."""


def jobs_of(flags: MegatronFlags) -> list[JobSettings]:
    """One job for each of ``json_keys``, which writes ``PREFIX_KEY_document`` or ``PREFIX_KEY_sentence``.

    Raises:
        ConfigError: flags contradict one another, or mean something that depends on Megatron-LM's version.
        FormatError: the tokenizer cannot be read.
    """
    if flags.tokenizer_type not in TOKENIZER_TYPES:
        raise ConfigError(
            f"--tokenizer-type {flags.tokenizer_type} is not carried; {', '.join(TOKENIZER_TYPES)} are. "
            + (
                "GPT-2's vocab.json and merges.txt become a folder for HuggingFaceTokenizer by transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
                if flags.tokenizer_type == "GPT2BPETokenizer"
                else "For another one use Megatron-LM's own tool; `xalign verify` and training read what it writes."
            )
        )
    if len(set(flags.json_keys)) != len(flags.json_keys):
        raise ConfigError(f"--json-keys {' '.join(flags.json_keys)} names a key twice.")
    if flags.keep_newlines and not flags.split_sentences:
        raise ConfigError("--keep-newlines says how sentences are split; it goes with --split-sentences.")
    if flags.workers is not None and flags.partitions and flags.workers % flags.partitions:
        raise ConfigError(f"--workers {flags.workers} is not divisible by --partitions {flags.partitions}.")
    if flags.partitions > 1 and not flags.keep_sequential_samples:
        _LOG.info(
            "--partitions %d: documents stay in the order of the input, as with --keep-sequential-samples.",
            flags.partitions,
        )
    language = flags.language or (_CODES.get(flags.lang, flags.lang) if flags.split_sentences else UNKNOWN_LANGUAGE)
    sentences = None
    if flags.split_sentences:
        sentences = SentenceSettings(model=flags.punkt_model, keep_newlines=flags.keep_newlines, as_megatron_lm=True)
    level = "sentence" if flags.split_sentences else "document"
    tokenizer = _tokenizer_options(flags)
    return [
        JobSettings(
            inputs=(flags.input,), output_prefix=f"{flags.output_prefix}_{key}_{level}",
            tokenizer=flags.tokenizer_model, input_format="jsonl",
            fields=Fields(kind="monolingual", text_key=key, language=language),
            append_eod=flags.append_eod, sentences=sentences, workers=flags.workers, keep_blank=True, **tokenizer,
        )
        for key in flags.json_keys
    ]


def _tokenizer_options(flags: MegatronFlags) -> dict[str, Any]:
    """What ``JobSettings`` says of the tokenizer so that it gives their ids."""
    hugging_face = flags.tokenizer_type == "HuggingFaceTokenizer"
    tiktoken = flags.tokenizer_type == "TikTokenizer"
    if flags.hf_special_tokens is not None and not hugging_face:
        raise ConfigError("--tokenizer-hf-include-special-tokens and its opposite are for HuggingFaceTokenizer.")
    if (flags.vocab_size is not None or flags.special_tokens is not None) and not tiktoken:
        raise ConfigError(f"--vocab-size and special tokens are for TikTokenizer, not for {flags.tokenizer_type}.")
    if hugging_face:
        return {"parse_special_tokens": True, "add_special_tokens": _adds_special_tokens(flags)}
    if tiktoken:
        from megatron_xalign.data.tiktoken_file import TiktokenSettings

        settings = TiktokenSettings.of_megatron(
            f"megatron-{flags.tiktoken_pattern}", flags.special_tokens, flags.tiktoken_num_special_tokens,
            **({} if flags.vocab_size is None else {"vocab_size": flags.vocab_size}),
        )
        return {"parse_special_tokens": True, "tiktoken": settings}
    return {}


def _adds_special_tokens(flags: MegatronFlags) -> bool:
    """Whether a Hugging Face tokenizer puts its begin and end tokens around texts."""
    if flags.hf_special_tokens is not None:
        return flags.hf_special_tokens
    from megatron_xalign.data.tokenizer import Tokenizer

    path = Path(flags.tokenizer_model)
    plain, added = (
        Tokenizer.load(path, parse_special_tokens=True, add_special_tokens=add).encode(_PROBE) for add in (False, True)
    )
    if _same(plain, added):
        return False
    raise ConfigError(
        f"{path} puts special tokens around every text. Megatron-LM 0.16's tool leaves them out unless told otherwise, "
        "later ones put them in; say --tokenizer-hf-include-special-tokens or --tokenizer-hf-no-include-special-tokens."
    )


def _same(first: Sequence[object], second: Sequence[object]) -> bool:
    return all(list(a) == list(b) for a, b in zip(first, second, strict=True))  # type: ignore[call-overload]
