"""Sizes of the model; its numbers are compared with Hugging Face's in tests/distributed/test_training.py."""

from __future__ import annotations

import pytest

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
