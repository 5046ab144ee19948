"""Interventions against what changed weights do, and against the same change made by hand."""

# S sequence, B batch, F ffn width, H hidden width

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from plain_model import FFN, HIDDEN, LAYERS, ONE_PROCESS, VOCAB, Model

from megatron_xalign.batch import CurrentBatch
from megatron_xalign.capture.hook_points import hugging_face_points, megatron_points
from megatron_xalign.capture.interventions import add_to_residual, clamp_neurons, scale_neurons, zero_neurons
from megatron_xalign.capture.recorder import MicroBatch, Recorder

NEURONS = {0: [0, 5], 2: [11, 3, 3]}
TOKENS = torch.arange(20).reshape(2, 10) % VOCAB


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def llama(kind: str = "Llama") -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    settings = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }
    if kind == "GPT2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings, n_inner=FFN)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
@torch.no_grad()
def test_scaling_neurons_of_a_transformers_model_is_scaling_their_outgoing_weights(kind: str) -> None:
    for factor, block in ((0.0, zero_neurons), (-2.5, lambda points, neurons: scale_neurons(points, neurons, -2.5))):
        model = llama(kind)
        points = hugging_face_points(model)
        plain = model(TOKENS).logits
        with block(points, NEURONS):
            changed = model(TOKENS).logits
        assert torch.equal(model(TOKENS).logits, plain) and hooks_of(model) == 0
        for layer, neurons in NEURONS.items():
            weight = points.layers[layer].neurons.weight
            columns = weight if kind == "Llama" else weight.t()  # Conv1D keeps [in, out]
            columns[:, sorted(set(neurons))] *= factor
        expected = model(TOKENS).logits
        assert (expected - plain).abs().max() > 0.05
        torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-5)


def by_hand(model: Model, change_act: Any = None, vectors: Any = None) -> torch.Tensor:
    x = model.embedding.weight[TOKENS.t()] + (vectors or {}).get(-1, 0)
    for number, layer in enumerate(model.decoder):
        gate, up = (x @ layer.mlp.linear_fc1.weight.t()).chunk(2, dim=-1)
        act = torch.nn.functional.silu(gate) * up
        if change_act is not None and number in NEURONS:
            act = act.clone()
            for neuron in set(NEURONS[number]):
                act[..., neuron] = change_act(act[..., neuron])
        x = x + act @ layer.mlp.linear_fc2.weight.t() + (vectors or {}).get(number, 0)
    return x


@torch.no_grad()
def test_clamping_and_adding_are_what_they_are_by_hand() -> None:
    model = Model()
    points = megatron_points([model], ONE_PROCESS)
    for low, high in ((None, 0.01), (-0.005, None), (-0.001, 0.002), (0.7, 0.7)):
        with clamp_neurons(points, NEURONS, low, high):
            changed = model(TOKENS)
        torch.testing.assert_close(changed, by_hand(model, lambda act: act.clamp(low, high)))  # noqa: B023
    vectors = {-1: torch.randn(HIDDEN), 1: torch.randn(HIDDEN)}
    with add_to_residual(points, {layer: vector.numpy() for layer, vector in vectors.items()}, strength=-0.5):
        changed = model(TOKENS)
    torch.testing.assert_close(changed, by_hand(model, vectors={key: -0.5 * value for key, value in vectors.items()}))
    last = {LAYERS - 1: 3 * vectors[1]}
    with add_to_residual(points, last, keep_norm=True):
        kept = model(TOKENS)
    plain, shifted = by_hand(model), by_hand(model, vectors=last)
    expected = shifted * plain.norm(dim=-1, keepdim=True) / shifted.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(kept, expected)
    torch.testing.assert_close(model(TOKENS), plain)
    assert hooks_of(model) == 0


def test_blocks_nest_gradients_flow_and_an_exception_leaves_the_model_as_it_was() -> None:
    model = Model()
    points = megatron_points([model], ONE_PROCESS)
    with scale_neurons(points, NEURONS, 2.0), scale_neurons(points, NEURONS, 3.0):
        changed = model(TOKENS)
    expected = by_hand(model, lambda act: act * 6)
    torch.testing.assert_close(changed, expected)
    changed.square().sum().backward()
    gradient = model.decoder[0].mlp.linear_fc1.weight.grad.clone()
    model.zero_grad()
    by_hand(model, lambda act: act * 6).square().sum().backward()
    torch.testing.assert_close(gradient, model.decoder[0].mlp.linear_fc1.weight.grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="in between"), zero_neurons(points, NEURONS):
        raise RuntimeError("in between")
    assert hooks_of(model) == 0


def test_a_recorder_inside_the_block_sees_the_changed_neurons() -> None:
    class Kept:
        wants_residual = False

        def __init__(self) -> None:
            self.acts: dict[int, np.ndarray] = {}

        def take_neurons(self, row: int, act_SBF: torch.Tensor, micro_batch: MicroBatch) -> None:
            self.acts[row] = act_SBF.numpy()

        def take_gates(self, row: int, gate_SBF: torch.Tensor, micro_batch: MicroBatch) -> None: ...

        def take_residual(self, row: int, hidden_SBH: torch.Tensor, micro_batch: MicroBatch) -> None: ...

    from plain_model import make_batches

    model, current, batch = Model(), CurrentBatch(), make_batches(1, [2])[0]
    points = megatron_points([model], ONE_PROCESS)
    kept, current.batch = Kept(), batch
    with zero_neurons(points, NEURONS):
        recorder = Recorder(points, ONE_PROCESS, current)
        recorder.start(kept)
        model(batch.tokens)
        recorder.close()
    assert not kept.acts[0][..., [0, 5]].any() and not kept.acts[2][..., [3, 11]].any() and kept.acts[1].all()


def test_what_a_model_does_not_have_is_refused() -> None:
    points = megatron_points([Model()], ONE_PROCESS)
    wrong_neurons = (({3: [0]}, "layers 0 to 2, not 3"), ({0: [FFN]}, "which has 0 to 11"), ({0: [-1]}, "-1 to"))
    for neurons, message in wrong_neurons:
        with pytest.raises(ValueError, match=message), zero_neurons(points, neurons):
            pass
    for vectors, message in (({-2: torch.ones(HIDDEN)}, "not -2"), ({0: torch.ones(HIDDEN + 1)}, "8 wide")):
        with pytest.raises(ValueError, match=message), add_to_residual(points, vectors):
            pass
    with pytest.raises(ValueError, match="needs a lower bound"), clamp_neurons(points, NEURONS):
        pass
    with pytest.raises(ValueError, match="above the upper"), clamp_neurons(points, NEURONS, 1.0, 0.0):
        pass
