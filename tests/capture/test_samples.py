from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from plain_model import FFN, LENGTH, ONE_PROCESS, Model, make_batches, train_on

from megatron_xalign.batch import Batch, CurrentBatch
from megatron_xalign.capture.recorder import Recorder
from megatron_xalign.capture.samples import NeuronSamples
from megatron_xalign.config import CaptureConfig, ModelConfig, RunConfig, SampleConfig
from megatron_xalign.errors import ConfigError, FormatError
from megatron_xalign.formats import neuron_samples

CONFIG = SampleConfig(neurons={"0": (3,), "2": (0, FFN - 1)}, tokens_per_language=9, top=5, context_tokens=2)


def sampled(batches: list[Batch], config: SampleConfig = CONFIG, steps: int = 1) -> NeuronSamples:
    model, current = Model(), CurrentBatch()
    recorder = Recorder([model], ONE_PROCESS, current)
    samples = NeuronSamples(config, 2, recorder, ONE_PROCESS)
    per_step = len(batches) // steps
    for step in range(steps):
        samples.step = step + 1
        recorder.start(samples)
        train_on(model, batches[step * per_step : (step + 1) * per_step], current)
        recorder.stop(per_step)
    return samples


def test_memory_does_not_grow_and_every_token_is_as_likely_as_any_other() -> None:
    size = sum(array.nbytes for array in sampled(make_batches(1, [2])).arrays.values())
    drawn = np.zeros(LENGTH)
    for seed in range(60):
        config = SampleConfig(neurons={"0": (3,)}, tokens_per_language=9, top=5, context_tokens=LENGTH, seed=seed)
        context = sampled(make_batches(5, [4, 4]), config).arrays["context_KRW"].reshape(-1, 2 * LENGTH + 1)
        drawn += np.bincount(LENGTH - (context == -1).int().cummin(1)[0].sum(1).numpy(), minlength=LENGTH)[:LENGTH]
    assert sum(array.nbytes for array in sampled(make_batches(1, [4] * 8)).arrays.values()) == size
    ids = torch.cat([batch.language_ids for batch in make_batches(5, [4, 4])])
    share = ((ids >= 0).sum(0) / (ids >= 0).sum()).numpy()
    # 1080 draws: a position of a tenth has a deviation of about 9.
    assert drawn.sum() == 60 * 18 and np.abs(drawn - share * drawn.sum()).max() < 45


def test_how_rows_are_cut_into_micro_batches_changes_nothing() -> None:
    whole = make_batches(1, [6])[0]
    parts = [
        Batch(**{name: value[first : first + 2] for name, value in vars(whole).items()}) for first in (4, 0, 2)
    ]
    one, other = sampled([whole]), sampled(parts)
    for name, array in one.arrays.items():
        torch.testing.assert_close(array, other.arrays[name], msg=name)
    assert (one.arrays["priority_KR"] < 2**62).all()


def test_the_step_and_the_seed_change_the_draw() -> None:
    batches = make_batches(1, [6])
    other = SampleConfig(neurons={"0": (3,)}, tokens_per_language=9, seed=9)
    drawn = [sampled(batches), sampled(batches * 2, steps=2), sampled(batches, other)]
    assert len({tuple(samples.arrays["priority_KR"].flatten().tolist()) for samples in drawn}) == 3


def test_files_come_back_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    arrays = {name: array.numpy() for name, array in sampled(make_batches(1, [6])).arrays.items()}
    samples = neuron_samples.NeuronSamples(
        step=7, languages=("eng_Latn", "fin_Latn"), neurons=tuple(CONFIG.chosen), first_step=3, seed=1, arrays=arrays
    )
    path = neuron_samples.samples_path(tmp_path, 7)
    neuron_samples.write_samples(path, samples)
    assert neuron_samples.list_samples(tmp_path) == [(7, path)]
    back = neuron_samples.read_samples(path)
    assert (back.step, back.first_step, back.neurons) == (7, 3, ((0, 3), (2, 0), (2, FFN - 1)))
    top = back.top(2, 0)
    assert [example.activation for example in top] == sorted((e.activation for e in top), reverse=True)
    assert len(back.sample(0, 3)) == 18
    with pytest.raises(ValueError, match="neuron 1:1 was not sampled; sampled were 0:3, 2:0, 2:11"):
        back.top(1, 1)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FormatError, match="not a readable file of neuron samples"):
        neuron_samples.read_samples(path)
    with pytest.raises(FormatError, match="does not exist"):
        neuron_samples.read_samples(tmp_path / "none")


def test_neurons_that_are_not_captured_are_refused_by_the_config() -> None:
    model = ModelConfig(num_layers=2)
    for neurons in ({"2": (0,)}, {"0": (model.ffn_hidden_size,)}):
        with pytest.raises(ConfigError, match=r"capture\.sample\.neurons names neuron"):
            RunConfig(model=model, capture=CaptureConfig(sample=SampleConfig(neurons=neurons)))
    with pytest.raises(ConfigError, match="which is not captured: layers are"):
        RunConfig(model=model, capture=CaptureConfig(layers=(1,), sample=SampleConfig(neurons={"0": (0,)})))
    for wrong in ({}, {"one": (0,)}, {"0": (1, 1)}):
        with pytest.raises(ConfigError, match="neurons"):
            SampleConfig(neurons=wrong)
