"""Sizes of the model; its numbers are compared with Hugging Face's in tests/distributed/test_training.py."""

from __future__ import annotations

import pytest

from megatron_xalign.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_xalign.errors import ConfigError
from megatron_xalign.training import model
from megatron_xalign.training.model import padded_vocab_size


@pytest.mark.parametrize("vocab_size", [1, 127, 128, 129, 1000, 50_277])
@pytest.mark.parametrize("tensor_size", [1, 2, 4])
def test_the_vocabulary_is_padded_to_the_next_multiple(vocab_size: int, tensor_size: int) -> None:
    counted = vocab_size  # Megatron counts up until it fits
    while counted % (128 * tensor_size):
        counted += 1
    assert padded_vocab_size(vocab_size, 128, tensor_size) == counted


def test_the_studys_vocabulary_is_padded_to_its_50304_rows() -> None:
    assert padded_vocab_size(50_254, 128, 1) == 50_304


def test_sizes_that_are_not_positive_are_refused() -> None:
    with pytest.raises(ValueError, match="divisible_by=0"):
        padded_vocab_size(10, 0, 1)


def test_recomputation_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    four, two_stages = ModelConfig(num_layers=4), ParallelConfig(pipeline_model_parallel_size=2)
    for method, layers, said in (("uniform", 3, "a divisor of it"), ("block", 3, "use 2 or less")):
        training = TrainingConfig(recompute="full", recompute_method=method, recompute_num_layers=layers)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"recompute_num_layers=3 .* blocks of 2 layers .*{said}"):
            model._recompute_settings(four, two_stages, "full", training)
    norms = TrainingConfig(recompute="selective", recompute_modules=("mlp", "layernorm"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="layernorm, which Megatron-Core computes again only where Transformer"):
        model._recompute_settings(four, two_stages, "selective", norms)
