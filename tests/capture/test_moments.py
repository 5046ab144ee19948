from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_model import LENGTH, make_batches

from megatron_xalign.capture import moments
from megatron_xalign.capture.moments import StreamSums, count_positive, one_hot_by_language
from megatron_xalign.capture.recorder import MicroBatch

WIDTH, LANGUAGES = 5, 3


def numpy_oracle(acts: list[torch.Tensor], gates: list[torch.Tensor], ids: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """Token by token, in the order the model has them: act[s, b] belongs to language_ids[b, s]."""
    out = {
        "tokens": np.zeros(LANGUAGES, np.int64),
        "sum": np.zeros((LANGUAGES, WIDTH)), "squares": np.zeros((LANGUAGES, WIDTH)),
        "max": np.full((LANGUAGES, WIDTH), -np.inf, np.float32),
        "positive": np.zeros((LANGUAGES, WIDTH), np.int64), "gate": np.zeros((LANGUAGES, WIDTH), np.int64),
    }
    for act, gate, language_ids in zip(acts, gates, ids, strict=True):
        for s in range(act.shape[0]):
            for b in range(act.shape[1]):
                k = int(language_ids[b, s])
                if k < 0:
                    continue
                value = act[s, b].double().numpy()
                out["tokens"][k] += 1
                out["sum"][k] += value
                out["squares"][k] += value**2
                out["max"][k] = np.maximum(out["max"][k], value)
                out["positive"][k] += value > 0
                out["gate"][k] += gate[s, b].double().numpy() > 0
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_per_language_are_those_of_a_loop_over_tokens(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "block_tokens", lambda width, device: 7)  # several blocks, the last one short
    generator = torch.Generator().manual_seed(1)
    batches = make_batches(2, [3, 2])
    # A large common offset: sums in float32 would lose digits that are compared here.
    acts = [(torch.randn(LENGTH, len(b.tokens), WIDTH, generator=generator) + 100).to(dtype) for b in batches]
    acts[0][..., 1] -= 100
    gates = [torch.randn(LENGTH, len(b.tokens), 2 * WIDTH, generator=generator)[..., :WIDTH].to(dtype) for b in batches]
    before = [act.clone() for act in acts]
    sums = StreamSums(LANGUAGES, 1, WIDTH, torch.device("cpu"))
    for number, (batch, act, gate) in enumerate(zip(batches, acts, gates, strict=True)):
        micro_batch = MicroBatch(batch, number, slice(0, LENGTH))
        sums.take_gates(0, gate, micro_batch)
        sums.take_neurons(0, act, micro_batch)
    expected = numpy_oracle(acts, gates, [batch.language_ids for batch in batches])
    np.testing.assert_array_equal(sums.tokens_K, expected["tokens"])
    np.testing.assert_allclose(sums.sum_KLF[:, 0], expected["sum"], rtol=1e-13, atol=1e-12)
    np.testing.assert_allclose(sums.sum_of_squares_KLF[:, 0], expected["squares"], rtol=1e-13)
    np.testing.assert_array_equal(sums.max_KLF[:, 0], expected["max"])
    np.testing.assert_array_equal(sums.positive_KLF[:, 0], expected["positive"])
    np.testing.assert_array_equal(sums.gate_positive_KLF[:, 0], expected["gate"])
    assert expected["tokens"][2] == 0 and np.isneginf(expected["max"][2]).all()
    for act, was in zip(acts, before, strict=True):
        assert torch.equal(act, was)


def test_reset_begins_again_at_zero() -> None:
    batch = make_batches(2, [3])[0]
    act = torch.randn(LENGTH, 3, WIDTH)
    sums = StreamSums(LANGUAGES, 1, WIDTH, torch.device("cpu"))
    empty = {name: value.clone() for name, value in vars(sums).items() if isinstance(value, torch.Tensor)}
    micro_batch = MicroBatch(batch, 0, slice(0, LENGTH))
    sums.take_gates(0, act, micro_batch)
    sums.take_neurons(0, act, micro_batch)
    assert sums.tokens_K.sum() > 0
    sums.reset()
    for name in ("tokens_K", "sum_KLF", "sum_of_squares_KLF", "_max_KLF", "positive_KLF", "gate_positive_KLF"):
        assert torch.equal(getattr(sums, name), empty[name]), name


def test_zero_is_not_positive() -> None:
    one_hot = one_hot_by_language(torch.tensor([[0, 0, 0]], dtype=torch.int8), 1)
    values = torch.tensor([0.0, -0.0, 1e-30]).reshape(3, 1, 1)
    assert count_positive(one_hot, values).tolist() == [[1]]
