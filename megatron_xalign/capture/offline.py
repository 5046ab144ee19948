"""The probe alone, of a model that is not in training: one statistics folder, as training writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_xalign.batch import CurrentBatch
from megatron_xalign.capture.hook_points import ModelPoints
from megatron_xalign.capture.probe import (
    COUNTED_TOKENS,
    POOLING,
    ForwardOnly,
    ProbeSentence,
    build_probe_batches,
    length_multiple,
    probe_arrays,
    probe_sha256,
    run_probe,
)
from megatron_xalign.capture.recorder import Recorder
from megatron_xalign.capture.writing import write_statistics
from megatron_xalign.errors import CorpusError
from megatron_xalign.formats.neuron_stats import StatsIndex, stats_folder
from megatron_xalign.topology import Ranks


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model that is looked at."""

    name: str
    """Shown in results."""
    points: ModelPoints
    forward_only: ForwardOnly
    current_batch: CurrentBatch
    """Set by ``forward_only`` while each batch runs."""
    prefix_token: int | None
    """In front of every sentence, not counted; None for nothing."""
    prefix_is_end_of_document: bool
    """Whether that is the token between documents, as in runs of this program."""
    longest: int
    """Tokens it takes at once."""
    longest_by: str
    """The setting that says so."""
    step: int = 0
    consumed_tokens: int = 0


def capture_probe(
    subject: Subject,
    sentences: Sequence[ProbeSentence],
    languages: Sequence[str],
    out: str | Path,
    ranks: Ranks,
    *,
    layers: Sequence[int] | None = None,
    batch_tokens: int = 4096,
) -> Path:
    """Put a probe through a model and write ``OUT/neurons/step-NNNNNN``; every process of the job calls it.

    Returns:
        the folder, complete.

    Raises:
        CorpusError: a sentence does not fit the model.
        ConfigError: the model cannot be captured exactly, or lacks one of the layers.
    """
    if not sentences:
        raise CorpusError("the probe holds no sentence.")
    recorder = Recorder(subject.points, ranks, subject.current_batch, layers=layers, defer_errors=True)
    batches = build_probe_batches(
        sentences, languages, subject.prefix_token, batch_tokens, subject.longest,
        multiple_of=length_multiple(recorder, ranks), limit=subject.longest_by,
    )
    result = run_probe(recorder, subject.forward_only, batches, len(sentences), len(languages), ranks)
    index = StatsIndex(
        run_name=subject.name,
        step=subject.step,
        consumed_tokens=subject.consumed_tokens,
        languages=tuple(languages),
        num_layers=recorder.num_layers,
        ffn_hidden_size=recorder.ffn_hidden_size,
        hidden_size=recorder.hidden_size,
        layers=None if layers is None else tuple(layers),
        document_ids=tuple(sentence.document_id for sentence in sentences),
        document_languages=tuple(sentence.language for sentence in sentences),
        document_pairs=tuple(sentence.pair_id for sentence in sentences),
        probe_sha256=probe_sha256(sentences),
        pooling=POOLING,
        counted_tokens=_counted_tokens(subject),
    )
    arrays = probe_arrays(result, sentences, languages, recorder, ranks)
    return write_statistics(stats_folder(out, subject.step), index, arrays, recorder, ranks)


def _counted_tokens(subject: Subject) -> str:
    if subject.prefix_token is None:
        return "all tokens of text, nothing in front of a sentence; the loss is without the first token"
    if subject.prefix_is_end_of_document:
        return COUNTED_TOKENS
    return f"tokens of text; not token {subject.prefix_token} in front of each sentence, nor padding tokens"
