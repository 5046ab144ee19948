"""Held-out sentences through the model as it is now: one mean vector per sentence, layer and tensor, and its loss.

A sentence is read as a document of its own: the end-of-document token in front of it, as in training, where every
document follows one; then its tokens, which alone are counted. That token is of the document before, so a model that
keeps documents apart (``data.reset_attention_mask``, ``data.reset_position_ids``) reads the sentence as it does in
training: not seeing that token, or from position 0. Models trained elsewhere may want another token there, or none.
Rows are padded on the right, where a causal model cannot see the padding from the sentence.
"""

# D documents (sentences), B sentences of one batch, S padded length, T tokens in the order of [S, B]
# L layers, F ffn width, M residual rows of this process, H hidden width, K languages



from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_xalign import _native
from megatron_xalign.batch import NO_LANGUAGE, Batch
from megatron_xalign.capture.moments import TokenGroups, count_positive, for_native
from megatron_xalign.capture.recorder import MicroBatch, Recorder
from megatron_xalign.capture.writing import agree, error_of, holds_totals, residual_columns
from megatron_xalign.errors import CorpusError, XAlignError
from megatron_xalign.topology import Ranks

POOLING = "mean over the counted tokens"
COUNTED_TOKENS = (
    "tokens of text; not end-of-document (the one in front of a probe sentence either), template or padding tokens"
)

ForwardOnly = Callable[[list[Batch]], "list[torch.Tensor] | None"]
"""Runs batches through the model without gradients; gives float32 [B, S] losses per token on the last stage."""


@dataclass(frozen=True, eq=False)
class ProbeSentence:
    """One side of a translation pair, tokenised."""

    pair_id: str
    """Sentences of one id are translations of one another."""
    language: str
    """Language code."""
    tokens: np.ndarray
    """int [T]: token ids, without end-of-document or other special tokens."""
    num_bytes: int
    """UTF-8 bytes of its text."""

    @property
    def document_id(self) -> str:
        """Names the sentence among all others."""
        return f"{self.pair_id}:{self.language}"


@dataclass(frozen=True)
class ProbeBatch:
    """Sentences of about one length, padded to a common one."""

    batch: Batch
    """What goes into the model."""
    rows_B: torch.Tensor
    """int64 [B]: which sentence of the probe each sample is."""


def probe_sha256(sentences: Sequence[ProbeSentence]) -> str:
    """Identity of a probe: ids, languages and tokens in their order, as hexadecimal text."""
    digest = hashlib.sha256()
    for sentence in sentences:
        digest.update(f"{sentence.pair_id}\0{sentence.language}\0{len(sentence.tokens)}\0{sentence.num_bytes}\0".encode())
        digest.update(np.ascontiguousarray(sentence.tokens, dtype="<i8").tobytes())
    return digest.hexdigest()


def length_multiple(recorder: Recorder, ranks: Ranks, local: int = 1) -> int:
    """What the padded length of a probe batch must be a multiple of, so that every process has an equal part.

    Args:
        recorder: of the model.
        ranks: this process's place.
        local: what the tokens of a process must be a multiple of besides.
    """
    chunks = 2 if ranks.context_size > 1 else 1
    return ranks.context_size * math.lcm(chunks, ranks.tensor_size if recorder.sequence_parallel else 1, local)


def build_probe_batches(
    sentences: Sequence[ProbeSentence],
    languages: Sequence[str],
    eod_id: int | None,
    batch_tokens: int,
    max_length: int,
    multiple_of: int = 1,
    limit: str = "data.seq_length",
) -> list[ProbeBatch]:
    """Pad sentences into batches, shortest first, so that little of the work is padding.

    Args:
        sentences: the probe.
        languages: codes that language ids index.
        eod_id: end-of-document token, put in front of each sentence; None puts nothing there, and the loss of a
            sentence then is without its first token.
        batch_tokens: padded tokens of one batch at most (one sentence is always taken).
        max_length: longest sequence the model is trained on.
        multiple_of: what the padded length must be a multiple of.
        limit: the setting that ``max_length`` comes from, for the message.

    Raises:
        CorpusError: a sentence is empty, too long for the model, or of an unknown language.
    """
    lead = 0 if eod_id is None else 1
    for sentence in sentences:
        if sentence.language not in languages:
            raise CorpusError(
                f"probe sentence {sentence.pair_id!r} is in {sentence.language}; the run's languages are "
                f"{', '.join(languages)}."
            )
        if len(sentence.tokens) == 0:
            raise CorpusError(f"probe sentence {sentence.pair_id!r} in {sentence.language} has no tokens; remove it.")
        if len(sentence.tokens) + lead > max_length:
            raise CorpusError(
                f"probe sentence {sentence.pair_id!r} in {sentence.language} has {len(sentence.tokens)} tokens; "
                f"{'with an end-of-document token in front, ' * lead}{limit}={max_length} allows "
                f"{max_length - lead}. Remove or shorten it."
            )
    # A multiple of 8 whatever the layout: batches, and with them the results, are the same at any tensor-parallel size.
    multiple_of = math.lcm(8, multiple_of)
    order = sorted(range(len(sentences)), key=lambda row: (len(sentences[row].tokens), row))
    batches: list[ProbeBatch] = []
    group: list[int] = []
    for row in order:
        length = _padded(len(sentences[row].tokens) + lead, multiple_of)
        if group and (len(group) + 1) * length > batch_tokens:
            batches.append(_pad(group, sentences, languages, eod_id, multiple_of))
            group = []
        group.append(row)
    if group:
        batches.append(_pad(group, sentences, languages, eod_id, multiple_of))
    return batches


def _padded(length: int, multiple_of: int) -> int:
    return -(-length // multiple_of) * multiple_of


def _pad(
    rows: Sequence[int], sentences: Sequence[ProbeSentence], languages: Sequence[str], eod_id: int | None,
    multiple_of: int,
) -> ProbeBatch:
    # Padding is never counted, so any token will do.
    lead, filler = (0, 0) if eod_id is None else (1, eod_id)
    length = _padded(max(len(sentences[row].tokens) for row in rows) + lead, multiple_of)
    shape = (len(rows), length)
    tokens, labels = np.full(shape, filler, np.int64), np.full(shape, filler, np.int64)
    loss_mask = np.zeros(shape, np.float32)
    language_ids, label_language_ids = np.full(shape, NO_LANGUAGE, np.int8), np.full(shape, NO_LANGUAGE, np.int8)
    for sample, row in enumerate(rows):
        count = len(sentences[row].tokens)
        language = languages.index(sentences[row].language)
        tokens[sample, lead : lead + count] = sentences[row].tokens
        language_ids[sample, lead : lead + count] = language
        # The label at a position is the token read at the next one.
        predicted = count - 1 + lead
        labels[sample, :predicted] = tokens[sample, 1 : predicted + 1]
        loss_mask[sample, :predicted] = 1.0
        label_language_ids[sample, :predicted] = language
    # The token in front ends a document before; what follows is one more.
    of_sentence = torch.arange(length) >= lead
    batch = Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=torch.where(of_sentence, torch.arange(length) - lead, 0).expand(shape).contiguous(),
        language_ids=torch.from_numpy(language_ids),
        label_language_ids=torch.from_numpy(label_language_ids),
        source_ids=torch.full(shape, -1, dtype=torch.int16),
        document_ids=torch.where(of_sentence, lead, 0).int().expand(shape).contiguous(),
    )
    return ProbeBatch(batch, torch.tensor(rows, dtype=torch.int64))


class SentenceMeans:
    """Means over each sentence's tokens, of the layers and columns of this process; a ``recorder.Listener``.

    Args:
        batches: what goes through the model, in this order.
        num_sentences: D.
        num_languages: K.
        recorder: what this process holds.
        device: where the means are kept.
    """

    wants_residual = True

    def __init__(
        self,
        batches: Sequence[ProbeBatch],
        num_sentences: int,
        num_languages: int,
        recorder: Recorder,
        device: torch.device,
    ) -> None:
        layers, width = len(recorder.layers), recorder.neurons[1] - recorder.neurons[0]
        self.neuron_mean_DLF = torch.zeros(num_sentences, layers, width, device=device)
        """float32 [D, L, F]; zero for sentences that other data-parallel ranks read; under context parallelism this
        rank's tokens' part of the mean."""
        self.residual_mean_DMH = torch.zeros(
            num_sentences, len(recorder.residual_rows), recorder.hidden_size, device=device
        )
        """float32 [D, M, H]; under sequence and context parallelism this rank's tokens' part of the mean."""
        self.gate_positive_KLF = torch.zeros(num_languages, layers, width, dtype=torch.int64, device=device)
        """int64 [K, L, F]: counted tokens at which the gate is above zero."""
        self._batches = batches
        self._num_languages = num_languages
        self._now: _Now | None = None

    def take_neurons(self, row: int, act_SBF: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Mean post-activations of one batch and layer."""
        now = self._look_at(micro_batch)
        self.neuron_mean_DLF[now.rows_B, row] = now.part_of_mean(act_SBF, micro_batch.positions)

    def take_gates(self, row: int, gate_SBF: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Signs of the gates of one batch and layer."""
        count_positive(self._look_at(micro_batch).languages, gate_SBF, self.gate_positive_KLF[:, row])

    def take_residual(self, row: int, hidden_SBH: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Mean residual stream of one batch and row."""
        now = self._look_at(micro_batch)
        self.residual_mean_DMH[now.rows_B, row] = now.part_of_mean(hidden_SBH, micro_batch.positions)

    def _look_at(self, micro_batch: MicroBatch) -> _Now:
        """What all layers need of a batch, worked out at the first of them."""
        batch = micro_batch.batch
        if self._now is not None and self._now.batch is batch:
            return self._now
        # The loop may have moved the batch to the device, so it is known by its place in the order and by its content.
        expected = self._batches[micro_batch.number] if micro_batch.number < len(self._batches) else None
        whole = micro_batch.whole
        if expected is None or not torch.equal(expected.batch.tokens.to(whole.tokens.device), whole.tokens):
            raise XAlignError(
                f"capture is shown a micro-batch that is not number {micro_batch.number} of the probe; no other "
                "forward pass may run during a probe."
            )
        self._now = _Now(
            batch, expected.rows_B.to(batch.tokens.device), (whole.language_ids >= 0).sum(1),
            TokenGroups(batch.language_ids, self._num_languages),
        )
        return self._now


class _Now:
    """The batch that is running, and what all layers need of it.

    Args:
        batch: what the model sees.
        rows_B: which sentence of the probe each sample is.
        tokens_B: int64 [B]: tokens that each sentence's mean is over.
        languages: which token is of which language.
    """

    def __init__(self, batch: Batch, rows_B: torch.Tensor, tokens_B: torch.Tensor, languages: TokenGroups) -> None:
        self.batch, self.rows_B, self.languages = batch, rows_B, languages
        self._tokens_B = tokens_B
        self._counted_BS = batch.language_ids >= 0
        self._sentences: dict[tuple[int, int], TokenGroups] = {}

    def part_of_mean(self, values_SBX: torch.Tensor, positions: slice) -> torch.Tensor:
        """float32 [B, X]: what the tokens at these positions give to the mean of their sentence, summed in float64."""
        counted_BS = self._counted_BS[:, positions]
        native = for_native(values_SBX.flatten(0, 1))
        if native is None:
            weights_B1S = counted_BS.double()[:, None, :]
            sums_BX = torch.bmm(weights_B1S, values_SBX.transpose(0, 1).double())[:, 0]
        else:
            key, batch_size = (positions.start, positions.stop), len(counted_BS)
            if key not in self._sentences:
                sentence_B1 = torch.arange(batch_size)[:, None]
                self._sentences[key] = TokenGroups(torch.where(counted_BS, sentence_B1, -1), batch_size)
            sums_BX = torch.zeros(batch_size, values_SBX.shape[2], dtype=torch.float64)
            _native.add_to_groups(native, self._sentences[key].for_native, batch_size, sum=sums_BX.numpy())
        return (sums_BX / self._tokens_B[:, None]).float()


@dataclass(frozen=True)
class ProbeResult:
    """What a probe measured, of the layers and columns of this process, on the CPU."""

    neuron_mean_DLF: np.ndarray
    """float32 [D, L, F]."""
    residual_mean_DMH: np.ndarray
    """float32 [D, M, H]: all coordinates."""
    gate_positive_KLF: np.ndarray
    """int64 [K, L, F]."""
    nll_D: np.ndarray | None
    """float64 [D]: nats of each sentence; None where the loss is not computed (all but the last pipeline stage)."""


def run_probe(
    recorder: Recorder,
    forward_only: ForwardOnly,
    batches: Sequence[ProbeBatch],
    num_sentences: int,
    num_languages: int,
    ranks: Ranks,
) -> ProbeResult:
    """Put the probe through the model; every process of the job calls it.

    Data-parallel ranks share the batches between them; each ends up with the results of all.

    Raises:
        XAlignError: a layer was missed or seen twice, here or in another process.
    """
    own = list(batches)[ranks.data_rank :: ranks.data_size]
    means = SentenceMeans(own, num_sentences, num_languages, recorder, ranks.device)
    losses: list[torch.Tensor] | None = []
    recorder.start(means)
    try:
        if own:
            losses = forward_only([item.batch for item in own])
        agree(ranks, error_of(lambda: recorder.stop(micro_batches=len(own))))
    finally:
        recorder.close()
    nll_D = None
    if ranks.is_last_stage:
        if losses is None or len(losses) != len(own):
            raise XAlignError(f"the probe of {len(own)} batches gave {len(losses or [])} losses.")
        total_D = torch.zeros(num_sentences, dtype=torch.float64, device=ranks.device)
        for item, loss_BS in zip(own, losses, strict=True):
            mask_BS = item.batch.loss_mask.to(loss_BS.device)
            # Not a product: a loss at a padded position may be anything.
            sums_B = torch.where(mask_BS > 0, loss_BS.double(), 0.0).sum(1)
            total_D[item.rows_B.to(ranks.device)] = sums_B.to(ranks.device)
        nll_D = ranks.sum_over(total_D, "data").cpu().numpy()
    # Sentences of other data-parallel ranks are zero here, so these sums are exact; over context-parallel ranks, which
    # hold parts of the mean, they are rounded once. A layer at a time: bounded copies.
    shared = ranks.size_of("data_context") > 1
    if shared:
        for row in range(means.neuron_mean_DLF.shape[1]):
            means.neuron_mean_DLF[:, row] = ranks.sum_over(means.neuron_mean_DLF[:, row], "data_context")
    for row in range(means.residual_mean_DMH.shape[1]):
        if recorder.sequence_parallel:
            means.residual_mean_DMH[:, row] = ranks.sum_over(means.residual_mean_DMH[:, row], "tensor")
        if shared:
            means.residual_mean_DMH[:, row] = ranks.sum_over(means.residual_mean_DMH[:, row], "data_context")
    return ProbeResult(
        neuron_mean_DLF=means.neuron_mean_DLF.cpu().numpy(),
        residual_mean_DMH=means.residual_mean_DMH.cpu().numpy(),
        gate_positive_KLF=ranks.sum_over(means.gate_positive_KLF, "data_context").cpu().numpy(),
        nll_D=nll_D,
    )


def probe_arrays(
    result: ProbeResult,
    sentences: Sequence[ProbeSentence],
    languages: Sequence[str],
    recorder: Recorder,
    ranks: Ranks,
) -> dict[str, np.ndarray]:
    """This process's part of what a statistics folder holds of a probe."""
    first, stop = residual_columns(recorder, ranks)
    arrays = {
        "probe_neuron_mean_DLF": result.neuron_mean_DLF,
        "probe_residual_mean_DMH": result.residual_mean_DMH[:, :, first:stop],
        "probe_gate_positive_KLF": result.gate_positive_KLF,
    }
    if holds_totals(ranks):
        tokens = np.array([len(sentence.tokens) for sentence in sentences], dtype=np.int64)
        tokens_K = np.zeros(len(languages), dtype=np.int64)
        np.add.at(tokens_K, [languages.index(sentence.language) for sentence in sentences], tokens)
        assert result.nll_D is not None
        arrays |= {
            "probe_tokens_D": tokens,
            "probe_bytes_D": np.array([sentence.num_bytes for sentence in sentences], dtype=np.int64),
            "probe_nll_D": result.nll_D,
            "probe_tokens_K": tokens_K,
        }
    return arrays
