from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_model import LENGTH, make_batches

from megatron_xalign.capture import moments
from megatron_xalign.capture.moments import StreamSums, TokenGroups, count_positive
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


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sums_per_language_are_those_of_a_loop_over_tokens(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the C++ pass, which knows float32 and bfloat16, and by torch, as on a GPU."""
    monkeypatch.setattr(moments, "block_tokens", lambda width, device: 7)  # several blocks, the last one short
    if not native:
        monkeypatch.setattr(moments, "for_native", lambda values_TX: None)
    generator = torch.Generator().manual_seed(1)
    batches = make_batches(2, [3, 2])
    # A large common offset: sums in float32 would lose digits that are compared here.
    acts = [(torch.randn(LENGTH, len(b.tokens), WIDTH, generator=generator) + 100).to(dtype) for b in batches]
    acts[0][..., 1] -= 100
    gates = [torch.randn(LENGTH, len(b.tokens), 2 * WIDTH, generator=generator)[..., :WIDTH].to(dtype) for b in batches]
    before = [act.clone() for act in acts]
    sums = StreamSums(LANGUAGES, 1, WIDTH, torch.device("cpu"))
    for number, (batch, act, gate) in enumerate(zip(batches, acts, gates, strict=True)):
        micro_batch = MicroBatch(batch, batch, number, slice(0, LENGTH))
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


def test_float32_and_bfloat16_on_a_cpu_are_read_where_they_are() -> None:
    wide = torch.randn(6, 8)
    for values in (wide, wide[:, :4], wide.bfloat16()[:, 4:]):
        native = moments.for_native(values)
        assert native is not None and native.__array_interface__["data"][0] == values.data_ptr()
    bits = moments.for_native(wide.bfloat16())
    assert bits is not None and (bits.astype(np.uint32) << 16).view(np.float32).tolist() == wide.bfloat16().tolist()
    for other in (wide.double(), wide.half(), wide.t(), wide[:, ::2]):
        assert moments.for_native(other) is None


def test_what_is_not_a_number_is_not_hidden_and_stays_with_its_language() -> None:
    batch = make_batches(2, [3])[0]
    batch.language_ids[:] = 0
    batch.language_ids[2, 5], batch.language_ids[0, 3] = -1, 1
    act = torch.ones(LENGTH, 3, WIDTH)
    act[4, 1, 2], act[5, 2, 3] = torch.nan, torch.nan  # the second one belongs to no language
    sums = StreamSums(2, 1, WIDTH, torch.device("cpu"))
    sums.take_neurons(0, act, MicroBatch(batch, batch, 0, slice(0, LENGTH)))
    for name in ("sum_KLF", "sum_of_squares_KLF", "max_KLF"):
        assert torch.isnan(getattr(sums, name)[:, 0]).nonzero().tolist() == [[0, 2]], name


def test_reset_begins_again_at_zero() -> None:
    batch = make_batches(2, [3])[0]
    act = torch.randn(LENGTH, 3, WIDTH)
    sums = StreamSums(LANGUAGES, 1, WIDTH, torch.device("cpu"))
    empty = {name: value.clone() for name, value in vars(sums).items() if isinstance(value, torch.Tensor)}
    micro_batch = MicroBatch(batch, batch, 0, slice(0, LENGTH))
    sums.take_gates(0, act, micro_batch)
    sums.take_neurons(0, act, micro_batch)
    assert sums.tokens_K.sum() > 0
    sums.reset()
    for name in ("tokens_K", "sum_KLF", "sum_of_squares_KLF", "_max_KLF", "positive_KLF", "gate_positive_KLF"):
        assert torch.equal(getattr(sums, name), empty[name]), name


def test_zero_is_not_positive() -> None:
    groups = TokenGroups(torch.tensor([[0, 0, 0]], dtype=torch.int8), 1)
    values = torch.tensor([0.0, -0.0, 1e-30]).reshape(3, 1, 1)
    count = torch.zeros(1, 1, dtype=torch.int64)
    count_positive(groups, values, count)
    assert count.tolist() == [[1]]
