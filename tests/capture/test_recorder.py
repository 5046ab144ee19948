from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from plain_model import FFN, HIDDEN, LAYERS, ONE_PROCESS, Model, make_batches, train_on

from megatron_xalign.batch import CurrentBatch
from megatron_xalign.capture.moments import StreamSums
from megatron_xalign.capture.recorder import MicroBatch, Recorder
from megatron_xalign.errors import ConfigError, XAlignError


class Everything:
    """Keeps every tensor it is handed."""

    wants_residual = True

    def __init__(self) -> None:
        self.kept: list[tuple[str, int, int, np.ndarray]] = []

    def take_neurons(self, row: int, act_SBF: torch.Tensor, micro_batch: MicroBatch) -> None:
        self.kept.append(("neurons", row, micro_batch.number, act_SBF.numpy().copy()))

    def take_gates(self, row: int, gate_SBF: torch.Tensor, micro_batch: MicroBatch) -> None:
        self.kept.append(("gates", row, micro_batch.number, gate_SBF.numpy().copy()))

    def take_residual(self, row: int, hidden_SBH: torch.Tensor, micro_batch: MicroBatch) -> None:
        self.kept.append(("residual", row, micro_batch.number, hidden_SBH.numpy().copy()))


def hooks_of(model: Model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("recompute", ["none", "reentrant", "not reentrant"])
def test_each_tensor_is_handed_over_once_also_when_forwards_run_twice(recompute: str) -> None:
    model = Model(recompute=recompute != "none", reentrant=recompute == "reentrant")
    current, listener, batches = CurrentBatch(), Everything(), make_batches(1, [2, 3])
    recorder = Recorder([model], ONE_PROCESS, current)
    recorder.start(listener)
    train_on(model, batches, current)
    recorder.stop(micro_batches=2)
    assert (recorder.layers, recorder.residual_rows, recorder.neurons) == ((0, 1, 2), (0, 1, 2, 3), (0, FFN))
    assert len(listener.kept) == 2 * (3 * LAYERS + 1)
    kept = {(what, row, number): array for what, row, number, array in listener.kept}
    assert len(kept) == len(listener.kept)
    for number, batch in enumerate(batches):
        x = model.embedding.weight.detach().double().numpy()[batch.tokens.t().numpy()]
        np.testing.assert_array_equal(kept["residual", 0, number], x)
        for row, layer in enumerate(model.decoder):
            fc1 = x @ layer.mlp.linear_fc1.weight.detach().numpy().T
            gate, up = fc1[..., :FFN], fc1[..., FFN:]
            act = gate * scipy.special.expit(gate) * up
            np.testing.assert_allclose(kept["gates", row, number], gate, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(kept["neurons", row, number], act, rtol=1e-4, atol=1e-5)
            x = x + act @ layer.mlp.linear_fc2.weight.detach().numpy().T
            np.testing.assert_allclose(kept["residual", row + 1, number], x, rtol=1e-4, atol=1e-5)


def test_gradients_are_the_same_bits_with_and_without_hooks() -> None:
    model, current, batches = Model(), CurrentBatch(), make_batches(1, [2, 3])
    plain = train_on(model, batches, current)
    recorder = Recorder([model], ONE_PROCESS, current)
    recorder.start(StreamSums(2, LAYERS, FFN, torch.device("cpu")))
    watched = train_on(model, batches, current)
    recorder.stop(micro_batches=2)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_a_layer_that_did_not_run_is_named() -> None:
    model, current = Model(), CurrentBatch()
    model.skip = 1
    recorder = Recorder([model], ONE_PROCESS, current)
    recorder.start(Everything())
    train_on(model, make_batches(1, [2]), current)
    with pytest.raises(XAlignError, match="layer 1 0 times in 1 micro-batches"):
        recorder.stop(micro_batches=1)
    assert hooks_of(model) == 0


def test_a_second_pass_over_one_micro_batch_is_refused() -> None:
    model, current, batches = Model(), CurrentBatch(), make_batches(1, [2])
    recorder = Recorder([model], ONE_PROCESS, current)
    recorder.start(Everything())
    with pytest.raises(XAlignError, match="counted twice"):
        train_on(model, batches * 2, current)
    recorder.close()
    assert hooks_of(model) == 0


def test_a_pass_of_another_shape_or_of_no_micro_batch_is_refused() -> None:
    model, current, batches = Model(), CurrentBatch(), make_batches(1, [2, 3])
    recorder = Recorder([model], ONE_PROCESS, current)
    recorder.start(Everything())
    with pytest.raises(XAlignError, match="no micro-batch was announced"):
        model(batches[0].tokens)
    current.batch = batches[0]
    with pytest.raises(XAlignError, match="micro-batch of 2 samples of 10"):
        model(batches[1].tokens)
    recorder.close()


def test_hooks_are_there_only_while_listening() -> None:
    model = Model()
    recorder = Recorder([model], ONE_PROCESS, CurrentBatch())
    assert hooks_of(model) == 0
    recorder.start(Everything())
    assert hooks_of(model) == 3 * LAYERS + 1
    with pytest.raises(ValueError, match="already listening"):
        recorder.start(Everything())
    recorder.close()
    recorder.close()
    assert hooks_of(model) == 0 and not recorder.listening


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_transformer_engine_op_fuser", True), ("cuda_graph_impl", "local"), ("enable_cuda_graph", True),
        ("mlp_chunks_for_training", 2), ("num_moe_experts", 4), ("gated_linear_unit", False),
    ],
)
def test_a_setting_that_hides_or_repeats_neurons_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        Recorder([Model(**{name: value})], ONE_PROCESS, CurrentBatch())


def test_a_fused_mlp_is_refused() -> None:
    model = Model()
    model.decoder[0].mlp.__class__ = type("TEFusedMLP", (type(model.decoder[0].mlp),), {})
    with pytest.raises(ConfigError, match="TEFusedMLP"):
        Recorder([model], ONE_PROCESS, CurrentBatch())


def test_layers_are_named_by_their_global_number_over_interleaved_chunks() -> None:
    model = Model()
    chunks = [torch.nn.ModuleList([model.decoder[2]]), torch.nn.ModuleList([model.decoder[0]])]
    recorder = Recorder(chunks, ONE_PROCESS, CurrentBatch())
    assert recorder.layers == (0, 2)
    assert recorder.residual_rows == (1, 3)
    assert recorder.hidden_size == HIDDEN
