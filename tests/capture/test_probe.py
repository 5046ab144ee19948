from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from plain_model import FFN, LAYERS, ONE_PROCESS, VOCAB, Model

from megatron_xalign.batch import Batch, CurrentBatch
from megatron_xalign.capture.probe import ProbeSentence, build_probe_batches, probe_sha256, run_probe
from megatron_xalign.capture.recorder import Recorder
from megatron_xalign.errors import CorpusError, XAlignError

EOD = 0
LANGUAGES = ("eng_Latn", "fin_Latn")


def make_sentences(count: int = 9) -> list[ProbeSentence]:
    rng = np.random.default_rng(4)
    return [
        ProbeSentence(str(pair), language, rng.integers(1, VOCAB, rng.integers(1, 20)), int(rng.integers(1, 99)))
        for pair in range(count)
        for language in LANGUAGES
    ]


def test_batches_hold_every_sentence_once_with_its_labels_and_nothing_else_counted() -> None:
    sentences = make_sentences()
    batches = build_probe_batches(sentences, LANGUAGES, EOD, batch_tokens=64, max_length=32, multiple_of=3)
    rows = torch.cat([item.rows_B for item in batches]).tolist()
    assert sorted(rows) == list(range(len(sentences)))
    for item in batches:
        batch = item.batch
        assert batch.tokens.numel() <= 64 and batch.tokens.shape[1] % 24 == 0
        for sample, row in enumerate(item.rows_B.tolist()):
            tokens, language = sentences[row].tokens, LANGUAGES.index(sentences[row].language)
            counted = batch.language_ids[sample] != -1
            assert batch.tokens[sample, 0] == EOD and not counted[0]
            np.testing.assert_array_equal(batch.tokens[sample, counted], tokens)
            assert set(batch.language_ids[sample, counted].tolist()) == {language}
            bearing = batch.loss_mask[sample] > 0
            np.testing.assert_array_equal(batch.labels[sample, bearing], tokens)
            # The label at a position is the token read at the next one.
            np.testing.assert_array_equal(bearing[:-1], counted[1:])
            assert batch.label_language_ids[sample].tolist() == [language if b else -1 for b in bearing]
    lengths = [len(sentences[row].tokens) for row in rows]
    assert lengths == sorted(lengths)


def test_the_tensor_parallel_size_does_not_change_the_batches() -> None:
    one, two = (build_probe_batches(make_sentences(), LANGUAGES, EOD, 64, 32, multiple_of=size) for size in (1, 2))
    assert all(torch.equal(a.batch.tokens, b.batch.tokens) for a, b in zip(one, two, strict=True))


def test_sentences_that_cannot_be_probed_are_refused_with_their_number() -> None:
    def build(sentence: ProbeSentence) -> None:
        build_probe_batches([sentence], LANGUAGES, EOD, 64, 16)

    build(ProbeSentence("fits", "eng_Latn", np.ones(15, np.int64), 1))
    with pytest.raises(CorpusError, match=r"'long'.*16 tokens.*15"):
        build(ProbeSentence("long", "eng_Latn", np.ones(16, np.int64), 1))
    with pytest.raises(CorpusError, match=r"'none'.*no tokens"):
        build(ProbeSentence("none", "eng_Latn", np.ones(0, np.int64), 1))
    with pytest.raises(CorpusError, match="deu_Latn"):
        build(ProbeSentence("x", "deu_Latn", np.ones(1, np.int64), 1))


def test_the_identity_of_a_probe_depends_on_every_token_and_the_order() -> None:
    sentences = make_sentences(2)
    changed = sentences[3].tokens.copy()
    changed[-1] += 1
    others = [
        [*sentences[:3], dataclasses.replace(sentences[3], tokens=changed)], sentences[:3], sentences[::-1],
        [dataclasses.replace(sentences[0], language="fin_Latn"), *sentences[1:]],
    ]
    digests = [probe_sha256(case) for case in [sentences, *others]]
    assert len(set(digests)) == len(digests)
    assert probe_sha256(make_sentences(2)) == digests[0]


def forward_with(model: Model, current: CurrentBatch, copies: bool = False):  # type: ignore[no-untyped-def]
    """As the training loop does it; the loss of the token with id t at any place is t / 8."""

    def forward_only(batches: list[Batch]) -> list[torch.Tensor]:
        losses = []
        with torch.no_grad():
            for batch in batches:
                current.batch = batch.to(torch.device("cpu")) if not copies else Batch(
                    **{item.name: getattr(batch, item.name).clone() for item in dataclasses.fields(batch)}
                )
                model(batch.tokens)
                losses.append(batch.labels / 8)
        return losses

    return forward_only


def test_batched_means_are_those_of_each_sentence_alone() -> None:
    model, current, sentences = Model(), CurrentBatch(), make_sentences()
    batches = build_probe_batches(sentences, LANGUAGES, EOD, 64, 32)
    recorder = Recorder([model], ONE_PROCESS, current)
    result = run_probe(recorder, forward_with(model, current, copies=True), batches, len(sentences), 2, ONE_PROCESS)
    assert result.neuron_mean_DLF.dtype == result.residual_mean_DMH.dtype == np.float32
    gates = np.zeros((2, LAYERS, FFN), np.int64)
    for row, sentence in enumerate(sentences):
        # No attention in this model, so a sentence's tokens can be put through it without what is around them.
        x = model.embedding.weight.detach().double()[torch.from_numpy(sentence.tokens)]
        np.testing.assert_allclose(result.residual_mean_DMH[row, 0], x.mean(0), rtol=1e-5, atol=1e-6)
        for index, layer in enumerate(model.decoder):
            gate, up = (x @ layer.mlp.linear_fc1.weight.detach().double().t()).chunk(2, dim=-1)
            gates[LANGUAGES.index(sentence.language), index] += (gate > 0).sum(0).numpy()
            act = torch.nn.functional.silu(gate) * up
            np.testing.assert_allclose(result.neuron_mean_DLF[row, index], act.mean(0), rtol=1e-5, atol=1e-6)
            x = x + act @ layer.mlp.linear_fc2.weight.detach().double().t()
            np.testing.assert_allclose(result.residual_mean_DMH[row, index + 1], x.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(result.gate_positive_KLF, gates)
    np.testing.assert_allclose(result.nll_D, [sentence.tokens.sum() / 8 for sentence in sentences])
    assert not recorder.listening


def test_a_forward_pass_of_something_else_during_a_probe_is_refused() -> None:
    model, current, sentences = Model(), CurrentBatch(), make_sentences()
    batches = build_probe_batches(sentences, LANGUAGES, EOD, 64, 32)
    recorder = Recorder([model], ONE_PROCESS, current)
    forward = forward_with(model, current)
    with pytest.raises(XAlignError, match="not number 0 of the probe"):
        run_probe(recorder, lambda given: forward(given[::-1]), batches, len(sentences), 2, ONE_PROCESS)
    assert not recorder.listening
