"""One run's statistics folders become rows that are what the single measures say, or an error that names the folder."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_xalign.analysis import neurons, projection, resampling, retrieval, similarity
from megatron_xalign.analysis.series import LEAST_UNSHARED, AnalysisOptions, analyze_run
from megatron_xalign.analysis.vocabulary import ProbeTokens
from megatron_xalign.config import CaptureConfig, DataConfig, MixtureConfig, RunConfig, TrainingConfig
from megatron_xalign.config.tree import to_yaml
from megatron_xalign.errors import FormatError
from megatron_xalign.formats.neuron_stats import (
    PROBE_ARRAYS,
    STREAM_ARRAYS,
    Shard,
    StatsIndex,
    begin_neuron_stats,
    finish_neuron_stats,
    read_neuron_stats,
    stats_folder,
    write_shard,
)
from megatron_xalign.formats.results import Results, read_results

LANGUAGES = ("ell_Grek", "eng_Latn", "fin_Latn")
NUM_PAIRS, NUM_LAYERS, WIDTH, HIDDEN = 20, 2, 40, 5
OPTIONS = AnalysisOptions(num_resamples=50, num_permutations=2, seed=7, top_rate=0.1)


def write_step(run: Path, step: int, languages: tuple[str, ...] = LANGUAGES, **changes: Any) -> Path:
    """Statistics of one step, invented; ``changes`` replace arrays or fields of the index."""
    random = np.random.default_rng(step)
    num_languages = len(languages)
    num_documents = num_languages * NUM_PAIRS
    # Pair by pair, as a probe file lists them: not language by language.
    own = np.tile(np.arange(num_languages), NUM_PAIRS)
    meaning = np.repeat(random.normal(size=(NUM_PAIRS, NUM_LAYERS + 1, HIDDEN)), num_languages, axis=0)
    tokens = np.full(num_languages, 500)
    shape = (num_languages, NUM_LAYERS, WIDTH)
    gate = random.binomial(500, random.beta(0.4, 2.0, shape))
    arrays: dict[str, np.ndarray] = {
        "probe_neuron_mean_DLF": random.normal(size=(num_documents, NUM_LAYERS, WIDTH)).astype(np.float32)
        + (own[:, None, None] == np.arange(WIDTH) % 7).astype(np.float32),
        "probe_residual_mean_DMH": (
            meaning + 0.7 * random.normal(size=(num_documents, NUM_LAYERS + 1, HIDDEN)) + own[:, None, None]
        ).astype(np.float32),
        "probe_tokens_D": random.integers(5, 30, num_documents),
        "probe_bytes_D": random.integers(20, 90, num_documents),
        "probe_nll_D": random.uniform(20, 200, num_documents),
        "probe_tokens_K": tokens,
        "probe_gate_positive_KLF": gate,
        "stream_tokens_K": 3 * tokens,
        "stream_sum_KLF": random.normal(size=shape),
        "stream_sum_of_squares_KLF": random.uniform(size=shape),
        "stream_max_KLF": random.uniform(size=shape).astype(np.float32),
        "stream_positive_KLF": 2 * gate,
        "stream_gate_positive_KLF": 3 * random.permutation(gate.reshape(-1)).reshape(shape),
    }
    index = StatsIndex(
        run_name="p0.3", step=step, consumed_tokens=step * 1024, languages=languages, num_layers=NUM_LAYERS,
        ffn_hidden_size=WIDTH, hidden_size=HIDDEN,
        document_ids=tuple(f"s{number}" for number in range(num_documents)),
        document_languages=tuple(languages[number] for number in own),
        document_pairs=tuple(f"pair{number // num_languages}" for number in range(num_documents)),
        probe_sha256="ab" * 32, pooling="mean", counted_tokens="all but end of document",
        stream_first_step=step - 49 if step else None, stream_last_step=step or None,
        stream_interval_steps=1 if step else None,
    )  # fmt: skip
    names = {item.name for item in dataclasses.fields(StatsIndex)}
    index = dataclasses.replace(index, **{key: value for key, value in changes.items() if key in names})
    arrays.update({key: value for key, value in changes.items() if key not in names})
    held = (PROBE_ARRAYS if index.document_ids else ()) + (STREAM_ARRAYS if index.stream_last_step else ())
    shard = Shard(
        tensor_rank=0, pipeline_rank=0, layers=tuple(range(NUM_LAYERS)), neurons=(0, WIDTH),
        residual_rows=tuple(range(NUM_LAYERS + 1)), residual_columns=(0, HIDDEN),
        arrays={name: arrays[name] for name in held},
    )  # fmt: skip
    folder = stats_folder(run, step)
    begin_neuron_stats(folder)
    return finish_neuron_stats(folder, index, [write_shard(folder, shard)])


def write_run(path: Path, languages: tuple[str, ...] = LANGUAGES) -> Path:
    config = RunConfig(
        name="p0.3", output_dir=str(path), data=DataConfig(mixture=MixtureConfig(parallel_fraction=0.3)),
        training=TrainingConfig(train_steps=80, save_interval_steps=50), capture=CaptureConfig(),
    )  # fmt: skip
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(config))
    for step in (0, 50, 80):
        write_step(path, step, languages)
    return path


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    run = write_run(tmp_path_factory.mktemp("series") / "p0.3")
    return run, analyze_run(run, OPTIONS)


def value(results: Results, measure: str, layer: int | None, subject: str, step: int) -> float:
    (row,) = results.select(measure=measure, layer=layer, subject=subject, step=step)
    return row.value


def test_what_is_returned_is_what_was_written(analysed: tuple[Path, Results]) -> None:
    run, results = analysed
    written = read_results(run / "analysis")
    assert written.rows == results.rows
    assert written.context == results.context
    for name, array in results.arrays.items():
        np.testing.assert_array_equal(written.arrays[name], array)


def test_every_measure_is_there_for_every_step_layer_and_subject(analysed: tuple[Path, Results]) -> None:
    results = analysed[1]
    pairs = {"ell_Grek-eng_Latn", "ell_Grek-fin_Latn", "eng_Latn-fin_Latn"}
    residual, mlp = {-1, 0, 1}, {None, 0, 1}
    over_pairs = (
        "cosine_translation", "cosine_random", "cosine_gap", "cosine_centred_gap", "cosine_auc", "pwcca",
        "pwcca_permuted", "cka", "cka_permuted", "retrieval", "retrieval_forward", "retrieval_backward",
        "retrieval_centred", "retrieval_csls", "mexa", "pwcca_forward", "pwcca_backward",
    )  # fmt: skip
    over_neurons = (
        "ap_count_0.5", "ap_count_0.75", "ap_count_0.9", "ap_count_0.95", "ap_count_0.99", "ap_null_0.9", "lape_count",
        "ap_low_count_0.9",
    )  # fmt: skip
    expected = {
        **dict.fromkeys(over_pairs, (residual, pairs)),
        **dict.fromkeys(over_neurons, (mlp, set(LANGUAGES))),
        "nll_per_token": ({None}, set(LANGUAGES)),
        "bits_per_byte": ({None}, set(LANGUAGES)),
        "silhouette": (residual, {""}),
        "language_probe": (residual, {""}),
        "ap_top_jaccard": ({None}, pairs),
        "ap_top_kept": ({None}, set(LANGUAGES)),
        "ap_top_split_half": ({None}, set(LANGUAGES)),
    }
    only_last = {"pwcca_split", "svcca"}
    assert {row.measure for row in results.rows} == set(expected) | only_last
    for measure in only_last:
        assert {(row.step, row.layer, row.subject) for row in results.select(measure=measure)} == {
            (80, layer, subject) for layer in residual for subject in pairs
        }
    for measure, (layers, subjects) in expected.items():
        found = {(row.step, row.consumed_tokens, row.layer, row.subject) for row in results.select(measure=measure)}
        assert found == {
            (step, step * 1024, layer, subject) for step in (0, 50, 80) for layer in layers for subject in subjects
        }


def test_rows_of_the_residual_stream_are_what_the_measures_say_of_the_aligned_sentences(
    analysed: tuple[Path, Results],
) -> None:
    run, results = analysed
    stats = read_neuron_stats(stats_folder(run, 50))
    counts = resampling.resample_counts(NUM_PAIRS, 50, seed=7)
    for layer in (-1, 0, 1):
        # Documents lie pair by pair in the file.
        acts = [stats.probe_residual_mean_DMH[number :: len(LANGUAGES), layer + 1] for number in range(3)]
        greek, _, finnish = acts

        def get(measure: str, layer: int = layer) -> float:
            return value(results, measure, layer, "ell_Grek-fin_Latn", 50)

        assert get("cosine_gap") == similarity.cosine(greek, finnish).gap
        assert get("cosine_centred_gap") == similarity.cosine(greek, finnish, centred=True).gap
        both = (similarity.pwcca(greek, finnish).value + similarity.pwcca(finnish, greek).value) / 2
        assert get("pwcca") == pytest.approx(both, abs=1e-12)
        assert get("cka") == similarity.linear_cka(greek, finnish, debiased=True)
        assert get("retrieval") == retrieval.bitext_accuracy(greek, finnish).mean
        assert get("mexa") == retrieval.mexa(finnish, greek)
        (row,) = results.select(measure="cosine_gap", layer=layer, subject="ell_Grek-fin_Latn", step=50)
        low, high = resampling.percentile_interval(similarity.resampled_cosine_gap(greek, finnish, counts))
        assert (row.low, row.high) == (low, high)
        order = np.concatenate(acts)
        expected = projection.silhouette(order, np.repeat(np.arange(3), NUM_PAIRS))
        assert value(results, "silhouette", layer, "", 50) == pytest.approx(expected, abs=1e-12)


def test_neuron_counts_are_those_of_the_scores_and_layers_add_up(analysed: tuple[Path, Results]) -> None:
    run, results = analysed
    stats = read_neuron_stats(stats_folder(run, 80))
    for number, language in enumerate(LANGUAGES):
        scores = stats.probe_neuron_mean_DLF.reshape(len(stats.document_ids), -1)
        precision = neurons.average_precision(scores, stats.document_language_ids == number)
        np.testing.assert_array_equal(
            results.arrays["ap_scores"][number].reshape(-1), precision.astype(np.float32)
        )
        assert value(results, "ap_count_0.5", None, language, 80) == np.count_nonzero(precision >= 0.5) > 0
        for measure in ("ap_count_0.5", "ap_null_0.9", "lape_count"):
            by_layer = [value(results, measure, layer, language, 80) for layer in range(NUM_LAYERS)]
            assert sum(by_layer) == pytest.approx(value(results, measure, None, language, 80))
    found = neurons.lape(stats.stream_gate_positive_KLF, stats.stream_tokens_K, top_rate=0.1)
    assert value(results, "lape_count", 1, "eng_Latn", 80) == found.languages_of[1, 1].sum()


def test_lape_uses_training_tokens_where_there_are_some_of_every_language(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_step(run, 50, stream_tokens_K=np.array([1500, 0, 1500]))
    results = analyze_run(run, OPTIONS)
    assert results.context["lape"]["source_by_step"] == {"0": "probe", "50": "probe", "80": "stream"}
    stats = read_neuron_stats(stats_folder(run, 50))
    found = neurons.lape(stats.probe_gate_positive_KLF, stats.probe_tokens_K, top_rate=0.1)
    assert value(results, "lape_count", 0, "fin_Latn", 50) == found.languages_of[2, 0].sum()


def test_loss_is_nats_over_all_tokens_and_bits_over_all_bytes(analysed: tuple[Path, Results]) -> None:
    run, results = analysed
    stats = read_neuron_stats(stats_folder(run, 0))
    finnish = np.array(stats.document_languages) == "fin_Latn"
    nats = sum(stats.probe_nll_D[finnish])
    (row,) = results.select(measure="nll_per_token", subject="fin_Latn", step=0)
    assert row.value == pytest.approx(nats / sum(stats.probe_tokens_D[finnish]))
    assert row.low is not None and row.high is not None and row.low < row.value < row.high
    bits = nats / np.log(2) / sum(stats.probe_bytes_D[finnish])
    assert value(results, "bits_per_byte", None, "fin_Latn", 0) == pytest.approx(bits)


def test_the_film_has_the_axes_of_the_last_step(analysed: tuple[Path, Results]) -> None:
    run, results = analysed
    arrays = results.arrays
    assert arrays["pca_coordinates"].shape == (3, NUM_LAYERS + 1, 3 * NUM_PAIRS, 2)
    assert arrays["pca_coordinates"].dtype == arrays["pca_explained"].dtype == arrays["ap_scores"].dtype == np.float32
    assert arrays["pca_steps"].tolist() == [0, 50, 80]
    assert arrays["document_languages"].tolist() == [0, 1, 2] * NUM_PAIRS
    first, last = (read_neuron_stats(stats_folder(run, step)).probe_residual_mean_DMH for step in (0, 80))
    for position in range(NUM_LAYERS + 1):
        axes = projection.pca(last[:, position])
        np.testing.assert_allclose(arrays["pca_coordinates"][2, position], axes.coordinates_DC, atol=1e-5)
        np.testing.assert_allclose(arrays["pca_explained"][position], axes.explained_ratio_C, rtol=1e-6)
        centred = first[:, position] - first[:, position].mean(0)
        np.testing.assert_allclose(arrays["pca_coordinates"][0, position], centred @ axes.basis_CH.T, atol=1e-5)


def test_what_each_sentence_adds_is_kept_for_tests_between_runs(analysed: tuple[Path, Results]) -> None:
    results = analysed[1]
    assert results.context["pair_ids"] == [f"pair{number}" for number in range(NUM_PAIRS)]
    subjects = results.context["language_pairs"]
    assert subjects == ["ell_Grek-eng_Latn", "ell_Grek-fin_Latn", "eng_Latn-fin_Latn"]
    gaps, hits, losses = (
        results.arrays[name] for name in ("sentence_gap", "sentence_retrieval", "sentence_nll")
    )
    assert gaps.shape == hits.shape == (3, 3, NUM_LAYERS + 1, NUM_PAIRS) and losses.shape == (3, 3, NUM_PAIRS)
    for at, step in enumerate((0, 50, 80)):
        for number, subject in enumerate(subjects):
            for layer in (-1, 0, 1):
                own = gaps[at, number, layer + 1].mean(), hits[at, number, layer + 1].mean() / 2
                assert own[0] == pytest.approx(value(results, "cosine_gap", layer, subject, step), abs=1e-6)
                assert own[1] == pytest.approx(value(results, "retrieval_centred", layer, subject, step))
        stats = read_neuron_stats(stats_folder(analysed[0], step))
        np.testing.assert_allclose(losses[at, 2], stats.probe_nll_D[stats.rows("fin_Latn")], rtol=1e-6)


def test_what_languages_share_before_any_layer_is_told_where_the_tokens_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by Python's sets; retrieval of the other pairs from what every sentence adds."""
    run = write_run(tmp_path / "p0.3")
    random = np.random.default_rng(1)
    # Token 0 is a full stop, in every sentence; 10 to 14 are each language's own.
    sentences = [
        [0, *random.integers(1, 3, 1), 10 + 5 * (number % len(LANGUAGES))]
        for number in range(NUM_PAIRS * len(LANGUAGES))
    ]
    monkeypatch.setattr("megatron_xalign.analysis.series.LEAST_UNSHARED", 5)
    results = analyze_run(run, OPTIONS, probe_tokens=ProbeTokens(sentences, 40, wordless=[0]))
    one, other = (
        [set(sentences[number]) for number in range(start, len(sentences), len(LANGUAGES))] for start in (1, 2)
    )
    subject = "eng_Latn-fin_Latn"
    used = set.union(*one), set.union(*other)
    assert value(results, "vocabulary_jaccard", None, subject, 80) == len(used[0] & used[1]) / len(used[0] | used[1])
    shared = np.array([bool(a & b - {0}) for a, b in zip(one, other, strict=True)])
    assert 5 < shared.sum() < NUM_PAIRS - 5
    assert value(results, "pairs_sharing_tokens", None, subject, 80) == pytest.approx(shared.mean())
    assert value(results, "pairs_identical", None, subject, 80) == 0
    # Two of three tokens may be shared.
    assert 1 / 3 < value(results, "vocabulary_mass", None, subject, 80) < 2 / 3
    place = results.context["language_pairs"].index(subject)
    for layer in range(-1, NUM_LAYERS):
        hits_P = results.arrays["sentence_retrieval"][1, place, layer + 1] / 2
        assert value(results, "retrieval_centred_unshared", layer, subject, 50) == pytest.approx(hits_P[~shared].mean())
    assert results.context["pairs_without_shared_tokens"][subject] == (~shared).sum()
    monkeypatch.undo()
    few = analyze_run(run, OPTIONS, probe_tokens=ProbeTokens(sentences, 40, wordless=[0]))
    assert NUM_PAIRS <= LEAST_UNSHARED and not few.select(measure="retrieval_centred_unshared")
    with pytest.raises(ValueError, match="59 sentences as tokens; the probe has 60"):
        analyze_run(run, OPTIONS, probe_tokens=ProbeTokens(sentences[1:], 40))


def test_best_neurons_of_the_last_step_are_all_kept(analysed: tuple[Path, Results]) -> None:
    results = analysed[1]
    assert results.context["top_neurons"] == 1
    for language in LANGUAGES:
        assert value(results, "ap_top_kept", None, language, 80) == 1.0


def test_the_context_says_what_chance_is(analysed: tuple[Path, Results]) -> None:
    results = analysed[1]
    context = results.context
    assert context["parallel_fraction"] == 0.3 and context["run"] == "p0.3"
    assert context["languages"] == list(LANGUAGES) and context["steps"] == [0, 50, 80]
    assert (context["num_layers"], context["ffn_hidden_size"], context["hidden_size"]) == (NUM_LAYERS, WIDTH, HIDDEN)
    assert context["chance"]["retrieval"] == 1 / NUM_PAIRS
    assert context["chance"]["average_precision"] == dict.fromkeys(LANGUAGES, 1 / 3)
    permuted = [row.value for row in results.select(measure="pwcca_permuted")]
    assert context["chance"]["pwcca"] == pytest.approx(np.mean(permuted))
    assert context["pwcca"]["ranks_at_last_step"]["eng_Latn-fin_Latn"]["-1"] == [HIDDEN, HIDDEN]
    assert context["cka"] == "debiased"


def test_the_same_statistics_give_the_same_bytes(tmp_path: Path, analysed: tuple[Path, Results]) -> None:
    again = tmp_path / "p0.3"
    shutil.copytree(analysed[0], again)
    shutil.rmtree(again / "analysis")
    analyze_run(again, OPTIONS)
    for name in ("results.json", "results.csv", "arrays.safetensors"):
        assert (again / "analysis" / name).read_bytes() == (analysed[0] / "analysis" / name).read_bytes()


def test_one_language_alone_has_a_loss_and_nothing_to_compare(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", languages=("fin_Latn",))
    results = analyze_run(run, OPTIONS)
    assert {row.measure for row in results.rows} == {"nll_per_token", "bits_per_byte"}
    assert "ap_scores" not in results.arrays


def test_a_run_without_a_probe_still_has_lape(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (50, 100):
        write_step(run, step, document_ids=(), document_languages=(), document_pairs=())
    results = analyze_run(run, OPTIONS)
    assert {row.measure for row in results.rows} == {"lape_count"}
    assert not results.arrays


# --- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_missing_step_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    shutil.rmtree(stats_folder(run, 50))
    with pytest.raises(FormatError, match=r"neurons/step-000050 is missing\."):
        analyze_run(run, OPTIONS)
    with pytest.raises(FormatError, match=r"step-000050 is missing"):
        analyze_run(run, OPTIONS, allow_unfinished=True)
    assert not (run / "analysis").exists()


def test_an_unfinished_run_is_taken_only_when_asked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    shutil.rmtree(stats_folder(run, 80))
    with pytest.raises(FormatError, match=r"step-000080 is missing\. The run goes to step 80.*up to 50"):
        analyze_run(run, OPTIONS)
    assert analyze_run(run, OPTIONS, allow_unfinished=True).steps == [0, 50]


def test_no_statistics_and_a_half_written_folder_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (stats_folder(run, 50) / "index.json").unlink()
    with pytest.raises(FormatError, match=r"step-000050 is not a complete statistics folder"):
        analyze_run(run, OPTIONS)
    shutil.rmtree(run / "neurons")
    with pytest.raises(FormatError, match="neurons holds no statistics"):
        analyze_run(run, OPTIONS)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    shard = next(stats_folder(run, 50).glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(FormatError, match=r"step-000050/shard-tp0-pp0\.safetensors is not the file"):
        analyze_run(run, OPTIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probe_sha256": "cd" * 32}, "step-000050 and .*step-000080 differ in probe_sha256"),
        ({"pooling": "last"}, r"differ in pooling \('last' against 'mean'\)"),
    ],
)
def test_steps_of_another_probe_are_refused(tmp_path: Path, change: dict[str, str], message: str) -> None:
    run = write_run(tmp_path / "run")
    write_step(run, 50, **change)
    with pytest.raises(FormatError, match=message):
        analyze_run(run, OPTIONS)


def test_values_that_are_not_finite_and_constant_layers_are_named_with_step_and_layer(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    stats = read_neuron_stats(stats_folder(run, 50))
    residual = stats.probe_residual_mean_DMH.copy()
    residual[4, 1, 2] = np.nan
    write_step(run, 50, probe_residual_mean_DMH=residual)
    with pytest.raises(FormatError, match=r"step-000050, layer 0, residual stream: .*number 4"):
        analyze_run(run, OPTIONS)
    residual[:, 1] = 0.25
    write_step(run, 50, probe_residual_mean_DMH=residual)
    with pytest.raises(FormatError, match=r"step-000050, layer 0, .*same for all 60 sentences"):
        analyze_run(run, OPTIONS)
    residual = stats.probe_residual_mean_DMH.copy()
    residual[stats.rows("fin_Latn"), 2] = 0.25
    write_step(run, 50, probe_residual_mean_DMH=residual)
    with pytest.raises(FormatError, match=r"step-000050, layer 1, ell_Grek-fin_Latn: .*same for all 20 sentences"):
        analyze_run(run, OPTIONS)
    write_step(run, 50)
    scores = stats.probe_neuron_mean_DLF.copy()
    scores[0, 1, 3] = np.inf
    write_step(run, 50, probe_neuron_mean_DLF=scores)
    with pytest.raises(FormatError, match=r"step-000050, layer 1, ell_Grek, .*fin_Latn: scores_DN\[0, 3\] is inf"):
        analyze_run(run, OPTIONS)
    loss = stats.probe_nll_D.copy()
    loss[1] = np.nan
    write_step(run, 50, probe_nll_D=loss)
    with pytest.raises(FormatError, match=r"step-000050, eng_Latn: the loss"):
        analyze_run(run, OPTIONS)


def test_too_few_pairs_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    pairs = tuple(f"pair{number}" for number in range(3 * NUM_PAIRS))
    write_step(run, 0, document_pairs=pairs)
    with pytest.raises(FormatError, match=r"step-000000 has 0 probe pairs .*ell_Grek, eng_Latn, fin_Latn.* at least 4"):
        analyze_run(run, OPTIONS)


def test_pairs_without_a_sentence_in_one_language_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    stats = read_neuron_stats(stats_folder(run, 80))
    pairs = list(stats.index.document_pairs)
    pairs[5] = "elsewhere"
    for step in (0, 50, 80):
        write_step(run, step, document_pairs=tuple(pairs))
    with pytest.raises(FormatError, match=r"step-000080: 2 of 21 probe pairs .* pair1, which has none in fin_Latn"):
        analyze_run(run, OPTIONS)


def test_a_language_missing_at_one_step_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_step(run, 50, languages=LANGUAGES[:2])
    with pytest.raises(FormatError, match=r"step-000050 and .*step-000080 differ in languages"):
        analyze_run(run, OPTIONS)
