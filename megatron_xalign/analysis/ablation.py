"""What switching off one language's neurons does to every language's loss, beside as many random ones."""

# K languages (whose neurons), J languages (whose loss), D sentences, L layers, F ffn width, R resamples

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_xalign.analysis.resampling import percentile_interval


@dataclass(frozen=True)
class AblationEffect:
    """Change of the loss per token when the neurons of one set are switched off."""

    change: float
    """Nats per token, ablated minus intact; positive where the neurons were of use."""
    low: float
    high: float
    """Bootstrap interval over the sentences."""
    intact: float
    """Loss per token of the intact model."""


def ablation_effect(
    nll_intact_D: np.ndarray, nll_ablated_D: np.ndarray, tokens_D: np.ndarray, counts_RD: np.ndarray
) -> AblationEffect:
    """Compare one language's losses with and without a set of neurons, on the same sentences.

    Args:
        nll_intact_D: float [D]. Nats of each sentence.
        nll_ablated_D: float [D]. The same sentences with the neurons switched off.
        tokens_D: tokens of each sentence.
        counts_RD: as ``resampling.resample_counts`` gives them.

    Raises:
        ValueError: shapes differ, a loss is not finite, or a sentence has no token.
    """
    intact, ablated, tokens = (np.asarray(item, np.float64) for item in (nll_intact_D, nll_ablated_D, tokens_D))
    if intact.ndim != 1 or not intact.shape == ablated.shape == tokens.shape == counts_RD.shape[1:]:
        raise ValueError(
            f"losses of shapes {intact.shape} and {ablated.shape}, tokens of {tokens.shape} and counts of "
            f"{counts_RD.shape} are not of the same sentences."
        )
    if not (np.isfinite(intact).all() and np.isfinite(ablated).all() and (tokens > 0).all()):
        raise ValueError("a loss is not finite, or a sentence has no token.")
    change = ablated - intact
    low, high = percentile_interval((counts_RD @ change) / (counts_RD @ tokens))
    return AblationEffect(float(change.sum() / tokens.sum()), low, high, float(intact.sum() / tokens.sum()))


def random_neurons_like(neurons_LF: np.ndarray, seed: int) -> np.ndarray:
    """As many other neurons in every layer, drawn at random: bool [L, F]; the control of an ablation.

    Raises:
        ValueError: a layer has more of them than others are left.
    """
    neurons = np.asarray(neurons_LF, np.bool_)
    if neurons.ndim != 2:
        raise ValueError(f"neurons_LF has shape {neurons.shape}; [layers, neurons] is needed.")
    generator = np.random.default_rng(seed)
    drawn = np.zeros_like(neurons)
    for layer, own_F in enumerate(neurons):
        others = np.flatnonzero(~own_F)
        count = int(own_F.sum())
        if count > len(others):
            raise ValueError(f"layer {layer} has {count} neurons of the set and only {len(others)} others.")
        drawn[layer, generator.choice(others, count, replace=False)] = True
    return drawn


def selectivity(change_KJ: np.ndarray) -> np.ndarray:
    """How much more a language's own neurons matter to it than to the others: float64 [K].

    Args:
        change_KJ: change of the loss of language j when the neurons of language k are switched off.

    Raises:
        ValueError: the matrix is not square, of at least two languages.
    """
    change = np.asarray(change_KJ, np.float64)
    if change.ndim != 2 or change.shape[0] != change.shape[1] or len(change) < 2:
        raise ValueError(f"change_KJ has shape {change.shape}; a square of at least two languages is needed.")
    own = change.diagonal()
    return own - (change.sum(axis=1) - own) / (len(change) - 1)
