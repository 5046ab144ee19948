"""The probe of a run or capture as token ids, which neuron statistics do not hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_xalign.errors import XAlignError
from megatron_xalign.formats.neuron_stats import list_neuron_stats, read_neuron_stats
from megatron_xalign.formats.run_folder import RunFolder
from megatron_xalign.workflows.capturing import probe_sentences

log = logging.getLogger(__name__)


def probe_tokens(run: Path) -> Any:
    """``analysis.vocabulary.ProbeTokens`` of a folder with statistics; None where the probe cannot be read again.

    Probe file and tokenizer are those that the run's config or ``capture.json`` names. They may have been moved or
    changed since: only tokens with the identity that the statistics carry are taken, and why there are none is logged.
    """
    from megatron_xalign.analysis.vocabulary import ProbeTokens

    folders = list_neuron_stats(run)
    if not folders:
        return None
    stats = read_neuron_stats(folders[-1][1])
    if not stats.has_probe:
        return None
    try:
        from megatron_xalign.capture.probe import probe_sha256  # needs torch, which analysis does without

        probe, encode, decode, vocab_size = _tokenizer_of(run, folders[-1][1].name)
        sentences, _ = probe_sentences(probe, encode)
    except (XAlignError, OSError, KeyError, TypeError, ImportError) as error:
        log.warning("%s: what languages share before any layer is not measured: %s", run, error)
        return None
    if probe_sha256(sentences) != stats.index.probe_sha256:
        log.warning(
            "%s: what languages share before any layer is not measured: %s or the tokenizer is not what it was.",
            run, probe,
        )
        return None
    ids = sorted({int(token) for sentence in sentences for token in sentence.tokens})
    return ProbeTokens(
        [sentence.tokens for sentence in sentences], max(vocab_size, ids[-1] + 1 if ids else 1),
        [token for token in ids if not any(letter.isalnum() for letter in decode([token]))],
    )


def _tokenizer_of(
    run: Path, captured: str
) -> tuple[Path, Callable[[Sequence[str]], Sequence[Any]], Callable[[Iterable[int]], str], int]:
    """Probe file, encoding, decoding and number of ids."""
    from megatron_xalign.data.tokenizer import Tokenizer

    if (run / "config.yaml").is_file():
        data = RunFolder(run).config().data
        probe, folder = Path(str(data.probe)), Path(str(data.tokenizer))
    else:
        facts = RunFolder(run).captures()[captured]
        probe, source = Path(facts["probe"]), Path(facts["source"])
        if (source / "config.json").is_file():
            from megatron_xalign.capture import hugging_face

            own = hugging_face.load_tokenizer(source)
            return probe, lambda texts: hugging_face.encode(own, texts), own.decode, len(own)
        folder = Path(facts["tokenizer"])
    tokenizer = Tokenizer.load(folder)
    return probe, tokenizer.encode, tokenizer.decode, tokenizer.vocab_size
