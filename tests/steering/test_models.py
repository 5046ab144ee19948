"""Steering is what the NumPy function says, in every block; caches, batches and padding change nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_xalign.analysis import steering as pure
from megatron_xalign.errors import ConfigError
from megatron_xalign.steering.generation import Sampling, generate, next_token
from megatron_xalign.steering.models import (
    HfModel,
    MegatronModel,
    Steering,
    block_means,
    continuation_loss,
    steered,
)

transformers = pytest.importorskip("transformers")
VOCAB, WIDTH, LAYERS = 61, 16, 3
PROMPTS = [[5, 6, 7], [9], [11, 3, 8, 2, 40, 41, 1]]


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def cached(network: Any) -> HfModel:
    return HfModel(network)


@pytest.fixture(scope="module")
def uncached(network: Any) -> MegatronModel:
    """The same network behind the other door: no cache, padded on the right."""

    class BatchFirst(MegatronModel):
        def batch_first(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    @torch.no_grad()
    def forward(tokens_BS: torch.Tensor) -> torch.Tensor:
        return network(input_ids=tokens_BS, use_cache=False).logits.float()

    return BatchFirst(forward, list(network.model.layers), VOCAB)


def vectors(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(LAYERS, WIDTH))


@pytest.mark.parametrize("norm_preserving", [True, False])
def test_every_block_is_pushed_as_the_pure_function_says(network: Any, cached: HfModel, norm_preserving: bool) -> None:
    seen: dict[str, list[np.ndarray]] = {"before": [], "after": []}
    first = network.model.layers[1]
    tokens = torch.tensor([PROMPTS[2]])
    before = first.register_forward_hook(
        lambda module, args, output: seen["before"].append((output[0] if isinstance(output, tuple) else output).numpy())
    )
    with steered(cached, Steering(vectors_LH=vectors(), strength=-0.7, norm_preserving=norm_preserving, layers=(1,))):
        after = first.register_forward_hook(
            lambda module, args, output: seen["after"].append(
                (output[0] if isinstance(output, tuple) else output).numpy()
            )
        )
        cached.all_logits(tokens, torch.tensor([7]))
        after.remove()
    before.remove()
    (old,), (new,) = seen["before"], seen["after"]
    expected = pure.steer(old, vectors()[1], -0.7) if norm_preserving else old - 0.7 * vectors()[1]
    np.testing.assert_allclose(new, expected, rtol=0, atol=1e-5)


def test_hooks_are_gone_after_an_error(network: Any, cached: HfModel) -> None:
    plain = cached.all_logits(torch.tensor([[1, 2]]), torch.tensor([2]))
    with pytest.raises(RuntimeError, match="stop"), steered(cached, Steering(vectors_LH=vectors(), strength=9.0)):
        raise RuntimeError("stop")
    torch.testing.assert_close(cached.all_logits(torch.tensor([[1, 2]]), torch.tensor([2])), plain, rtol=0, atol=0)
    assert not any(layer._forward_hooks for layer in network.model.layers)


@pytest.mark.parametrize("steering", [None, Steering(vectors_LH=vectors(), strength=0.5)])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_text_does_not_depend_on_batch_padding_or_cache(
    cached: HfModel, uncached: MegatronModel, steering: Steering | None, temperature: float
) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=temperature, seed=3)
    together = generate(cached, PROMPTS, sampling, steering)
    assert [len(made) for made in together] == [8, 8, 8]
    one_by_one = Sampling(max_new_tokens=8, temperature=temperature, seed=3, batch_size=1)
    alone = generate(cached, PROMPTS, one_by_one, steering)
    assert together == alone == generate(uncached, PROMPTS, sampling, steering)
    if temperature:
        assert together != generate(cached, PROMPTS, Sampling(max_new_tokens=8, seed=4), steering)


def test_steering_changes_the_text_and_strength_zero_does_not(cached: HfModel) -> None:
    sampling = Sampling(max_new_tokens=8)
    plain = generate(cached, PROMPTS, sampling)
    assert generate(cached, PROMPTS, sampling, Steering(vectors_LH=vectors(), strength=0.0)) == plain
    assert generate(cached, PROMPTS, sampling, Steering(vectors_LH=vectors(), strength=5.0)) != plain


def test_banned_tokens_never_come_and_stop_tokens_end_a_text(cached: HfModel) -> None:
    plain = generate(cached, PROMPTS, Sampling(max_new_tokens=12, temperature=0))
    banned = plain[0][0]
    without = generate(cached, PROMPTS, Sampling(max_new_tokens=12, banned=(banned,)))
    assert all(banned not in made for made in without)
    stopped = generate(cached, PROMPTS, Sampling(max_new_tokens=12, temperature=0, stop=(banned,)))
    assert stopped[0] == [] and all(banned not in made for made in stopped)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(cached, [[1], []], Sampling())
    with pytest.raises(ConfigError, match="positions"):
        generate(cached, [[1] * 60], Sampling())


def test_draws_follow_the_probabilities_of_the_nucleus() -> None:
    probability = np.array([0.1, 0.5, 0.3, 0.08, 0.02])
    allowed = np.ones(5, bool)
    draws = (np.arange(4000) + 0.5) / 4000
    tokens = [next_token(np.log(probability), allowed, 1.0, 0.85, draw) for draw in draws]
    # 0.5 + 0.3 is short of 0.85, so the third is in.
    nucleus = np.array([0.1, 0.5, 0.3, 0, 0]) / 0.9
    np.testing.assert_allclose(np.bincount(tokens, minlength=5) / 4000, nucleus, atol=1e-3)
    cold = [next_token(np.log(probability), allowed, 0.5, 1.0, draw) for draw in draws]
    np.testing.assert_allclose(
        np.bincount(cold, minlength=5) / 4000, probability**2 / (probability**2).sum(), atol=1e-3
    )
    assert {next_token(np.log(probability), allowed, 1.0, 1e-9, draw) for draw in draws[::100]} == {1}
    with pytest.raises(ValueError, match="not finite"):
        next_token(np.array([0.0, np.nan]), np.ones(2, bool), 1.0, 1.0, 0.5)


def test_means_and_losses_are_of_real_tokens_only(network: Any, cached: HfModel, uncached: MegatronModel) -> None:
    means = block_means(cached, PROMPTS, batch_size=2)
    np.testing.assert_allclose(means, block_means(uncached, PROMPTS), atol=1e-6)
    with torch.no_grad():
        alone = network(input_ids=torch.tensor([PROMPTS[0]]), output_hidden_states=True)
    np.testing.assert_allclose(means[0, 0], alone.hidden_states[1][0].double().mean(0).numpy(), atol=1e-6)
    loss = continuation_loss(cached, PROMPTS, [[4, 5], [], [6]])
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([[*PROMPTS[0], 4, 5]])).logits[0].double().log_softmax(-1)
    assert loss.nats_D[0] == pytest.approx(-float(logits[2, 4] + logits[3, 5]), abs=1e-5)
    assert loss.nats_D[1] == 0.0 and loss.tokens_D.tolist() == [2, 0, 1]


def test_vectors_of_another_model_are_refused(cached: HfModel) -> None:
    with pytest.raises(ConfigError, match="of 2 layers and the model has 3"):
        generate(cached, PROMPTS, Sampling(), Steering(vectors_LH=vectors()[:2], strength=1.0))
    with pytest.raises(ConfigError, match="15 features"):
        generate(cached, PROMPTS, Sampling(), Steering(vectors_LH=vectors()[:, 1:], strength=1.0))
    with pytest.raises(ValueError, match="outside"):
        Steering(vectors_LH=vectors(), strength=1.0, layers=(3,))
