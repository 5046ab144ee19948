from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_model import FFN, LAYERS, LENGTH, ONE_PROCESS, VOCAB, Model, make_batches, train_on
from sklearn.metrics import average_precision_score

from megatron_xalign.analysis.neurons import lape
from megatron_xalign.batch import Batch, CurrentBatch
from megatron_xalign.batch_sizes import batch_sizes
from megatron_xalign.capture.observer import NeuronObserver
from megatron_xalign.capture.probe import ProbeSentence
from megatron_xalign.config import CaptureConfig, DataConfig, RunConfig, SampleConfig, TrainingConfig
from megatron_xalign.errors import ConfigError, FormatError, XAlignError
from megatron_xalign.formats.neuron_samples import read_samples, samples_path
from megatron_xalign.formats.neuron_stats import list_neuron_stats, read_neuron_stats
from megatron_xalign.training.trackers import Tracker, flat
from megatron_xalign.workflows.training import _score_functions

LANGUAGES = ("eng_Latn", "fin_Latn")
SENTENCES = [
    ProbeSentence(pair, language, np.array(tokens), 9)
    for pair, language, tokens in (("p", "fin_Latn", [3, 4]), ("p", "eng_Latn", [5]), ("q", "eng_Latn", [6, 7, 8]))
]


def run(
    folder: Path, steps: int, probe: list[ProbeSentence] = SENTENCES, model: Model | None = None, score: Any = None,
    rampup: tuple[int, ...] = (), poisoned: int | None = None, back_to: int | None = None, **capture: Any,
) -> list[dict[str, Any]]:
    """A training loop in small: two micro-batches of 2 samples a step, the weights doubled at each.

    In step ``poisoned`` the activations are no numbers and its update is passed over; where ``back_to`` is given, the
    run then goes back to what it kept after that step.
    """
    config = RunConfig(
        output_dir=str(folder), capture=CaptureConfig(**capture), data=DataConfig(seq_length=LENGTH),
        training=TrainingConfig(
            train_steps=steps, global_batch_size=4, micro_batch_size=2, rampup_batch_size=rampup,
            nonfinite_policy="stop" if poisoned is None else "skip" if back_to is None else "rewind",
        ),
    )
    model, current = model or Model(), CurrentBatch()

    def forward_only(batches: list[Batch]) -> list[torch.Tensor]:
        losses = []
        for batch in batches:
            current.batch = batch
            model(batch.tokens)
            losses.append(torch.ones(batch.tokens.shape))
        return losses

    observer = NeuronObserver(
        config, model_chunks=[model], ranks=ONE_PROCESS, current_batch=current, forward_only=forward_only, probe=probe,
        languages=LANGUAGES, eod_id=0, score=score,
    )
    heard: list[dict[str, Any]] = []
    sizes, kept = batch_sizes(config.training), {}
    try:
        for step in range(sizes.num_steps):
            observer.before_step(step)
            weights = model.embedding.weight.detach().clone()
            with torch.no_grad():
                model.embedding.weight *= torch.nan if step + 1 == poisoned else 1
            train_on(model, make_batches(step + 1, [2] * (sizes.size_of(step) // 2)), current)
            heard.append({"step": step + 1})
            with torch.no_grad():
                model.embedding.weight.copy_(weights * (1 if step + 1 == poisoned else 2))
            if step + 1 == poisoned:
                heard[-1]["passed_over"] = True
                if back_to is not None:
                    observer.restore(kept[back_to])
            observer.after_step(step + 1, heard[-1])
            kept[step + 1] = observer.state()
            observer.restore(kept[step + 1])
    finally:
        observer.close()
    return heard


class Failing:
    """Stands in for the measures of analysis."""

    def __getattr__(self, name: str) -> Any:
        def fail(*arguments: Any) -> None:
            raise ArithmeticError(f"{name} was made to fail")

        return fail


def tokens_of(step: int) -> np.ndarray:
    ids = torch.cat([batch.language_ids for batch in make_batches(step, [2, 2])])
    return np.array([int((ids == k).sum()) for k in range(2)])


def test_step_0_every_interval_and_the_last_step_are_written_and_sums_begin_anew(tmp_path: Path) -> None:
    run(tmp_path, steps=5, probe_interval_steps=2)
    stats = {step: read_neuron_stats(path) for step, path in list_neuron_stats(tmp_path)}
    assert list(stats) == [0, 2, 4, 5]
    assert not stats[0].has_stream
    for step, window in ((2, (1, 2)), (4, (3, 4)), (5, (5,))):
        assert (stats[step].index.stream_first_step, stats[step].index.stream_last_step) == (window[0], window[-1])
        np.testing.assert_array_equal(stats[step].stream_tokens_K, sum(tokens_of(n) for n in window))
    # The embedding doubles at every step, so the file of step n shows the weights after n steps.
    ratio = stats[4].probe_residual_mean_DMH[:, 0] / stats[2].probe_residual_mean_DMH[:, 0]
    np.testing.assert_allclose(ratio, 4.0)
    assert [stats[5].index.step, stats[5].consumed_tokens] == [5, 5 * 4 * LENGTH]
    np.testing.assert_array_equal(stats[5].probe_nll_D, [2.0, 1.0, 3.0])
    np.testing.assert_array_equal(stats[5].probe_tokens_D, [2, 1, 3])
    assert stats[5].pair_ids == ["p"]


def test_every_third_step_is_summed_when_asked(tmp_path: Path) -> None:
    run(tmp_path, steps=8, probe_interval_steps=4, stream_interval_steps=3)
    first, second = (read_neuron_stats(tmp_path / "neurons" / f"step-{step:06d}") for step in (4, 8))
    np.testing.assert_array_equal(first.stream_tokens_K, tokens_of(3))
    np.testing.assert_array_equal(second.stream_tokens_K, tokens_of(6))
    assert second.index.stream_interval_steps == 3


def test_steps_that_grow_are_counted_as_they_are(tmp_path: Path) -> None:
    """Five full batches in seven steps: four of 2 samples, then the full ones."""
    run(tmp_path, steps=5, rampup=(2, 2, 8), probe_interval_steps=4)
    stats = {step: read_neuron_stats(path) for step, path in list_neuron_stats(tmp_path)}
    assert list(stats) == [0, 4, 7]
    assert [found.consumed_tokens for found in stats.values()] == [0, 8 * LENGTH, 20 * LENGTH]
    small = [torch.cat([batch.language_ids for batch in make_batches(step, [2])]) for step in (1, 2, 3, 4)]
    expected = [sum(int((ids == k).sum()) for ids in small) for k in range(2)]
    np.testing.assert_array_equal(stats[4].stream_tokens_K, expected)
    np.testing.assert_array_equal(stats[7].stream_tokens_K, sum(tokens_of(step) for step in (5, 6, 7)))


@pytest.mark.parametrize("back_to", [None, 3])
def test_what_is_no_number_in_a_step_that_is_passed_over_leaves_no_trace(tmp_path: Path, back_to: int | None) -> None:
    """Steps 3 and 4 are a window; step 5 is bad, in the middle of the next. Going back, steps 4 and 5 are undone."""
    sample: dict[str, Any] = {"sample": SampleConfig(neurons={"1": (3, 5)}, tokens_per_language=9)}
    run(tmp_path, steps=6, probe_interval_steps=3, poisoned=5, back_to=back_to, **sample)
    first, second = (read_neuron_stats(tmp_path / "neurons" / f"step-{step:06d}") for step in (3, 6))
    assert first.index.stream_left_out_steps == ()
    if back_to is None:
        assert (second.index.stream_first_step, second.index.stream_left_out_steps) == (4, (5,))
        np.testing.assert_array_equal(second.stream_tokens_K, tokens_of(4) + tokens_of(6))
    else:  # the checkpoint of step 3 was between two windows
        assert (second.index.stream_first_step, second.index.stream_left_out_steps) == (6, ())
        np.testing.assert_array_equal(second.stream_tokens_K, tokens_of(6))
    for name in ("stream_sum_KLF", "stream_sum_of_squares_KLF", "stream_max_KLF"):
        assert np.isfinite(getattr(second, name)).all()
    kept = read_samples(samples_path(tmp_path, 6))
    assert np.isfinite(kept.arrays["act_KRN"]).all() and np.isfinite(kept.arrays["top_act_NE"]).all()


def test_going_back_into_a_window_takes_its_sums_and_names_what_is_undone(tmp_path: Path) -> None:
    run(tmp_path, steps=6, probe_interval_steps=6, poisoned=5, back_to=3)
    stats = read_neuron_stats(tmp_path / "neurons" / "step-000006")
    assert (stats.index.stream_first_step, stats.index.stream_left_out_steps) == (1, (4, 5))
    np.testing.assert_array_equal(stats.stream_tokens_K, sum(tokens_of(step) for step in (1, 2, 3, 6)))
    assert np.isfinite(stats.stream_sum_KLF).all()


def test_the_stream_alone_and_the_probe_alone_can_be_captured(tmp_path: Path) -> None:
    run(tmp_path / "stream", steps=2, probe=[])
    assert [step for step, _ in list_neuron_stats(tmp_path / "stream")] == [2]
    stats = read_neuron_stats(tmp_path / "stream" / "neurons" / "step-000002")
    assert stats.has_stream and not stats.has_probe
    run(tmp_path / "probe", steps=2, stream=False)
    stats = read_neuron_stats(tmp_path / "probe" / "neurons" / "step-000002")
    assert stats.has_probe and not stats.has_stream
    with pytest.raises(FormatError, match="stream_sum_KLF"):
        _ = stats.stream_sum_KLF
    with pytest.raises(ConfigError, match=r"capture\.stream=false"):
        run(tmp_path / "nothing", steps=2, probe=[], stream=False)


def test_a_layer_missed_in_training_stops_the_run_and_leaves_no_hooks(tmp_path: Path) -> None:
    model = Model()
    model.skip = 2
    with pytest.raises(XAlignError, match="layer 2 0 times in 2 micro-batches"):
        run(tmp_path, steps=1, probe=[], model=model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_another_probe_has_another_identity_in_the_file(tmp_path: Path) -> None:
    changed = [*SENTENCES[:2], dataclasses.replace(SENTENCES[2], tokens=np.array([6, 7, VOCAB - 1]))]
    digests = []
    for name, probe in (("a", SENTENCES), ("b", SENTENCES), ("c", changed)):
        run(tmp_path / name, steps=1, probe=probe, stream=False)
        digests.append(read_neuron_stats(tmp_path / name / "neurons" / "step-000001").index.probe_sha256)
    assert digests[0] == digests[1] != digests[2]


def many_sentences(pairs: int = 8) -> list[ProbeSentence]:
    rng = np.random.default_rng(8)
    sentences = [
        ProbeSentence(f"p{pair}", language, rng.integers(1, VOCAB, rng.integers(1, LENGTH)), 9)
        for pair in range(pairs)
        for language in LANGUAGES
    ]
    del sentences[4]  # pair 2 has no English side
    return sentences


def test_scores_of_every_probe_are_those_of_the_statistics_written(tmp_path: Path) -> None:
    heard = run(
        tmp_path, steps=4, probe=many_sentences(), score=_score_functions(), probe_interval_steps=2, stream=False
    )
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4]
    for line in lines:
        stats = read_neuron_stats(tmp_path / "neurons" / f"step-{line['step']:06d}")
        acts_PLF = [stats.probe_neurons(language) for language in LANGUAGES]
        scores = np.concatenate(acts_PLF).reshape(14, -1)
        for k, language in enumerate(LANGUAGES):
            in_language = np.arange(14) // 7 == k
            own_N = [average_precision_score(in_language, column) >= 0.9 for column in scores.T]
            counts_L = np.sum(np.reshape(own_N, (LAYERS, FFN)), axis=1)
            assert line["ap_count_0.9"][language] == {"all": counts_L.sum(), "layers": counts_L.tolist()}
        found = lape(stats.probe_gate_positive_KLF, stats.probe_tokens_K).languages_of
        assert [line["lape_count"][code]["layers"] for code in LANGUAGES] == found.sum(2).tolist()
        english, finnish = (stats.probe_residual(language).astype(float) for language in LANGUAGES)
        for row in range(LAYERS + 1):
            unit = [a[:, row] / np.linalg.norm(a[:, row], axis=1, keepdims=True) for a in (english, finnish)]
            cosines = unit[0] @ unit[1].T
            gap = np.trace(cosines) / 7 - cosines.mean()
            assert line["cosine_gap"]["eng_Latn-fin_Latn"]["layers"][row] == pytest.approx(gap, abs=1e-9)
            hits = [(cosines.argmax(axis) == np.arange(7)).mean() for axis in (0, 1)]
            assert line["retrieval"]["eng_Latn-fin_Latn"]["layers"][row] == pytest.approx(np.mean(hits))
    assert [item.get("scores", {}).keys() == lines[0].keys() - {"step", "consumed_tokens"} for item in heard] == [
        False, True, False, True,
    ]
    # The untrained model's are told with the first step, once.
    assert ["scores_at_start" in item for item in heard] == [True, False, False, False]
    sent: list[tuple[int, dict[str, float]]] = []
    tracker = Tracker("x", lambda step, numbers: sent.append((step, numbers)), lambda: None)
    for step, item in enumerate(heard, 1):
        tracker.after_step(step, item)
    assert [step for step, _ in sent if sent[0][1].keys() <= _.keys()] == [0, 2, 4]
    assert sent[0][1]["scores/cosine_gap/eng_Latn-fin_Latn/layer_02"] == (
        lines[0]["cosine_gap"]["eng_Latn-fin_Latn"]["layers"][3]
    )
    # Trackers take numbers by name.
    for_trackers = dict(flat({"scores": heard[-1]["scores"]}))
    assert for_trackers["scores/ap_count_0.9/fin_Latn/layer_01"] == lines[-1]["ap_count_0.9"]["fin_Latn"]["layers"][1]
    gaps = lines[-1]["cosine_gap"]["eng_Latn-fin_Latn"]
    assert for_trackers["scores/cosine_gap/eng_Latn-fin_Latn/layer_input"] == gaps["layers"][0]
    assert for_trackers["scores/cosine_gap/eng_Latn-fin_Latn/layer_02"] == gaps["layers"][3]
    assert len(for_trackers) == 2 * 2 * (1 + LAYERS) + 2 * (2 + LAYERS)


def test_lape_of_the_training_batches_is_logged_with_and_without_a_probe(tmp_path: Path) -> None:
    for name, probe in (("probe", many_sentences()), ("none", [])):
        heard = run(tmp_path / name, steps=4, probe=probe, score=_score_functions(), probe_interval_steps=2)
        lines = [json.loads(line) for line in (tmp_path / name / "scores.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == ([0, 2, 4] if probe else [2, 4])
        for line in lines[-2:]:
            stats = read_neuron_stats(tmp_path / name / "neurons" / f"step-{line['step']:06d}")
            found = lape(stats.stream_gate_positive_KLF, stats.stream_tokens_K).languages_of
            assert [line["lape_count_stream"][code]["layers"] for code in LANGUAGES] == found.sum(2).tolist()
        assert ("lape_count" in lines[-1]) == bool(probe)
        numbers = dict(flat({"scores": heard[-1]["scores"]}))
        assert numbers["scores/lape_count_stream/eng_Latn/all"] == lines[-1]["lape_count_stream"]["eng_Latn"]["all"]


def test_scores_done_again_replace_those_of_a_killed_run(tmp_path: Path) -> None:
    common: dict[str, Any] = {"probe": many_sentences(), "score": _score_functions(), "probe_interval_steps": 1}
    run(tmp_path, steps=3, **common)
    path = tmp_path / "scores.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 4, "ap_co')
    run(tmp_path, steps=3, **common)
    assert path.read_text() == whole


def test_a_failing_observer_stops_the_run_or_is_switched_off_by_choice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common: dict[str, Any] = {"steps": 3, "probe": many_sentences(), "score": Failing(), "probe_interval_steps": 1}
    with pytest.raises(ArithmeticError, match="made to fail"):
        run(tmp_path / "stop", **common)
    model = Model()
    heard = run(tmp_path / "off", model=model, on_error="disable", **common)
    assert len(heard) == 3 and "capture is off" not in heard[-1]
    assert "off for the rest of this run" in caplog.text and "made to fail" in caplog.text
    assert caplog.text.count("off for the rest") == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert list_neuron_stats(tmp_path / "off") == []
