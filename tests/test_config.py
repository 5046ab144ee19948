"""Config: YAML in, YAML out, overrides, and errors that name the setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_xalign.config import (
    CaptureConfig,
    DataConfig,
    Fp8Config,
    Fp16Config,
    MixtureConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SchedulePhase,
    SourceConfig,
    TrainingConfig,
    read_config,
)
from megatron_xalign.config.tree import from_tree, to_yaml
from megatron_xalign.errors import ConfigError


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, text: str, *overrides: str) -> RunConfig:
    return read_config(written(folder, text), overrides, RunConfig)


def test_a_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = RunConfig(
        name="päivä",
        data=DataConfig(
            sources=(SourceConfig(prefix="a"), SourceConfig(prefix="b", max_repeats=4.0)),
            mixture=MixtureConfig(parallel_fraction=0.05, languages={"eng_Latn": 0.25, "fin_Latn": 0.75}),
        ),
        capture=CaptureConfig(probe_interval_steps=25),
    )
    assert read(tmp_path, to_yaml(config)) == config


def test_an_override_beats_the_file_and_the_file_beats_the_default(tmp_path: Path) -> None:
    config = read(tmp_path, "optimizer: {lr: 3e-3, min_lr: 1e-4}", "optimizer.min_lr=2e-4")
    assert (config.optimizer.lr, config.optimizer.min_lr, config.optimizer.weight_decay) == (3e-3, 2e-4, 0.1)


def test_an_override_reaches_into_a_list(tmp_path: Path) -> None:
    config = read(tmp_path, "data: {sources: [{prefix: a}, {prefix: b}]}", "data.sources.1.max_repeats=3")
    assert [source.max_repeats for source in config.data.sources] == [1.0, 3.0]


def test_an_optional_group_can_be_switched_on_by_an_override(tmp_path: Path) -> None:
    assert read(tmp_path, "").capture is None
    assert read(tmp_path, "", "capture.stream=false").capture == CaptureConfig(stream=False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {mixture: {paralel_fraction: 0.1}}", "did you mean data.mixture.parallel_fraction?"),
        ("data: {mixture: {parallel_fraction: 1.5}}", "data.mixture.parallel_fraction=1.5 is outside [0, 1]"),
        ("data: {mixture: {parallel_fraction: .nan}}", "parallel_fraction=nan"),
        ("data: {mixture: {parallel_fraction: five}}", "data.mixture.parallel_fraction='five' should be float"),
        ("data: {mixture: {languages: {eng_Latn: 0.6, fin_Latn: 0.6}}}", "add up to 1.2"),
        ("training: {train_steps: 1.5}", "training.train_steps=1.5 should be int"),
        ("training: {train_steps: true}", "training.train_steps=True should be int"),
        ("training: {train_steps: 0}", "train_steps=0 must be positive"),
        ("parallel: {use_megatron_fsdp: true}", "use_distributed_optimizer=true shards optimizer state"),
        ("training: {params_dtype: fp8}", "training.params_dtype='fp8' is not one of fp32, bf16"),
        ("training: {global_batch_size: 10, micro_batch_size: 4}", "is not divisible by micro_batch_size=4"),
        ("model: {hidden_size: 100, num_attention_heads: 6}", "hidden_size=100 is not divisible"),
        ("model: 3", "model=3 should be a group of settings"),
        ("parallel: {tensor_model_parallel_size: 4}", "num_attention_heads=6 is not divisible"),
        ("parallel: {virtual_pipeline_model_parallel_size: 2}", "an interleaved pipeline needs at least 2 of both"),
        (
            "parallel: {pipeline_model_parallel_size: 2, virtual_pipeline_model_parallel_size: 3}",
            "model.num_layers=4 is not divisible by parallel.pipeline_model_parallel_size=2 times "
            "parallel.virtual_pipeline_model_parallel_size=3",
        ),
        ("{parallel: {context_parallel_size: 3}, data: {seq_length: 256}}", "seq_length=256 is not divisible by 6"),
        ("data: {sources: [{max_repeats: 2}]}", "data.sources.0.prefix is missing"),
        ("[1, 2]", "holds a list"),
        ("a: [1", "is not YAML"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lr", "is not of the form"),
        ("optimizer.lr.peak=1", "lr is a value"),
        ("data.sources.7.prefix=a", "7 is not an item number"),
        ("seed=[1", "is not YAML"),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "optimizer: {lr: 1e-3}\ndata: {sources: []}", override)
    assert said in str(caught.value)


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_config(tmp_path / "none.yaml")


def test_the_budget_is_steps_times_batch_times_sequence() -> None:
    config = RunConfig(
        training=TrainingConfig(train_steps=7, global_batch_size=12, micro_batch_size=4), data=DataConfig(seq_length=64)
    )
    assert (config.train_samples, config.train_tokens) == (84, 84 * 64)


def test_derived_sizes_follow_megatron() -> None:
    model = ModelConfig(hidden_size=96, num_attention_heads=6, num_query_groups=2)
    assert (model.head_size, model.query_groups, ModelConfig().query_groups) == (16, 2, 6)
    assert ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3).model_parallel_size == 6
    assert ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2).model_parallel_size == 4


def test_precision_is_a_word_or_a_group_and_comes_back_from_yaml(tmp_path: Path) -> None:
    assert (read(tmp_path, "").params_dtype, read(tmp_path, "precision: bf16").params_dtype) == ("fp32", "bf16")
    half = read(tmp_path, "precision: fp16")
    assert half.fp16 == Fp16Config() and half.params_dtype == "fp16" and half.fp8 is None
    assert read(tmp_path, "precision: {fp16: {loss_scale: 128}}").fp16 == Fp16Config(loss_scale=128.0)
    config = read(tmp_path, "precision: {fp8: {recipe: delayed, margin: 1}}", "precision.fp8.format=e4m3")
    assert config.fp8 == Fp8Config(recipe="delayed", margin=1, format="e4m3")
    assert (config.params_dtype, config.fp16, config.precision_name) == ("bf16", None, "FP8 (delayed, e4m3)")
    for one in (half, config):
        assert read(tmp_path, to_yaml(one)) == one


def test_the_older_name_of_precision_is_read_and_not_beside_the_new_one(tmp_path: Path) -> None:
    assert read(tmp_path, "training: {params_dtype: bf16, train_steps: 7}") == read(
        tmp_path, "precision: bf16\ntraining: {train_steps: 7}"
    )
    with pytest.raises(ConfigError, match=r"params_dtype=bf16 and precision=fp16 say different things"):
        read(tmp_path, "precision: fp16\ntraining: {params_dtype: bf16}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("precision: fp64", "precision='fp64' is not one of bf16, fp16, fp32"),
        ("precision: fp8", "precision='fp8' is not one of bf16, fp16, fp32 and no group of settings"),
        ("precision: {}", "precision.fp8 and fp16: exactly one of them"),
        ("precision: {fp8: {}, fp16: {}}", "exactly one of them"),
        ("precision: {fp8: {recipe: mxfp4}}", "precision.fp8.recipe='mxfp4' is not one of delayed, tensorwise"),
        ("precision: {fp8: {amax_history_len: 0, recipe: delayed}}", "amax_history_len=0 must be positive"),
        ("precision: {fp8: {margin: 2}}", "margin=2 belongs to recipe=delayed"),
        ("precision: {fp16: {loss_scale: -1}}", "loss_scale=-1.0 must be positive"),
        ("precision: {fp16: {min_loss_scale: 9, initial_loss_scale: 8}}", "min_loss_scale=9.0 is above"),
        ("backend: {layers: triton}", "backend.layers='triton' is not one of auto, te, local"),
    ],
)
def test_a_bad_precision_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "phases",
    [
        [(600, 0.4, None), (900, 0.0, None)], [(777, 0.0, None), (2000, 0.3, None)], [(1000, 0.5, 0.1)],
        [(100, 0.0, 1.0), (300, 0.2, 0.4), (301, 0.0, None)], [(5000, 0.2, 0.9)], [(1, 0.7, None)],
    ],
)  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 250, 1000, 1024])
def test_the_mean_of_a_schedule_is_that_of_its_tokens(
    phases: list[tuple[int, float, float | None]], tokens: int
) -> None:
    mixture = MixtureConfig(
        schedule=tuple(
            SchedulePhase(until_tokens=until, parallel_fraction=first, to=to) for until, first, to in phases
        )
    )

    def fraction_at(at: float) -> float:
        begin = 0
        for until, first, to in phases:
            last = first if to is None else to
            if at < until:
                return first + (last - first) * (at - begin) / (until - begin)
            begin = until
        return last

    # In the middle of every token: the mean of a straight line.
    plain = sum(fraction_at(token + 0.5) for token in range(tokens)) / tokens
    assert mixture.mean_fraction(tokens) == pytest.approx(plain, abs=1e-12)
    assert MixtureConfig(parallel_fraction=0.25).mean_fraction(tokens) == 0.25


def test_a_runs_fraction_is_what_was_asked_for() -> None:
    phases = [{"until_tokens": 1024, "parallel_fraction": 0}, {"until_tokens": 9999, "parallel_fraction": 0.5}]
    sizes = {"training": {"train_steps": 20, "global_batch_size": 4, "micro_batch_size": 2}}
    for mixture, fraction in (({"parallel_fraction": 0.05}, 0.05), ({"schedule": phases}, 0.3)):
        config = from_tree(RunConfig, {**sizes, "data": {"seq_length": 32, "mixture": mixture}})
        assert config.parallel_fraction == fraction
