"""Seeded sampling: a continuation depends on the model, the seed and the prompt's own number, not on its batch."""

# B sequences, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_xalign.steering.models import CausalModel, Steering, steered


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the defaults are the study's."""

    max_new_tokens: int = 30
    """Tokens of a continuation."""
    temperature: float = 0.7
    """0 takes the most likely token."""
    top_p: float = 0.95
    """Only the most likely tokens that together reach this probability are drawn from."""
    seed: int = 42
    """Of the draws."""
    banned: tuple[int, ...] = ()
    """Tokens never drawn, such as the end of a document, so that every continuation has the same length."""
    stop: tuple[int, ...] = ()
    """Tokens that end a continuation; they are not part of it."""
    batch_size: int = 16
    """Prompts continued at once."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}, batch_size={self.batch_size} must be positive.")
        if not (0.0 <= self.temperature < float("inf") and 0.0 < self.top_p <= 1.0):
            raise ValueError(f"temperature={self.temperature} must be 0 or more, top_p={self.top_p} in (0, 1].")


def generate(
    model: CausalModel, prompts: Sequence[Sequence[int]], sampling: Sampling, steering: Steering | None = None
) -> list[list[int]]:
    """Continue every prompt; only the new tokens are returned, so that nothing is cut by counting characters.

    Args:
        model: to be steered or not.
        prompts: token ids, at least one each.
        sampling: how tokens are drawn. Prompt number i draws from the seed and i alone.
        steering: what is added to the residual stream at every token, the prompt's included.

    Raises:
        ValueError: a prompt is empty, or every token is banned.
        ConfigError: the vectors are not of this model, or the prompt is too long for it.
    """
    if not all(map(len, prompts)):
        raise ValueError(f"prompt {[len(prompt) for prompt in prompts].index(0)} is empty.")
    allowed_V = np.ones(model.vocab_size, np.bool_)
    allowed_V[list(sampling.banned)] = False
    if not allowed_V.any():
        raise ValueError("every token is banned.")
    made: list[list[int]] = []
    with steered(model, steering):
        for start in range(0, len(prompts), sampling.batch_size):
            numbers = range(start, min(start + sampling.batch_size, len(prompts)))
            made += _continue(model, [list(prompts[number]) for number in numbers], list(numbers), sampling, allowed_V)
    return made


def _continue(
    model: CausalModel, prompts: list[list[int]], numbers: list[int], sampling: Sampling, allowed_V: np.ndarray
) -> list[list[int]]:
    draws = np.stack(
        [np.random.default_rng([sampling.seed, number]).random(sampling.max_new_tokens) for number in numbers]
    )
    session = model.begin(prompts, sampling.max_new_tokens)
    made: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for step in range(sampling.max_new_tokens):
        logits_BV = session.logits().numpy().astype(np.float64)
        tokens = [
            next_token(logits, allowed_V, sampling.temperature, sampling.top_p, draw)
            for logits, draw in zip(logits_BV, draws[:, step], strict=True)
        ]
        for row, token in enumerate(tokens):
            done[row] = done[row] or token in sampling.stop
            if not done[row]:
                made[row].append(token)
        if all(done) or step + 1 == sampling.max_new_tokens:
            break
        session.append(torch.tensor(tokens))
    return made


def next_token(logits_V: np.ndarray, allowed_V: np.ndarray, temperature: float, top_p: float, draw: float) -> int:
    """The token a uniform draw from [0, 1) falls on, among the most likely ones that reach ``top_p``.

    Raises:
        ValueError: a logit is not finite where the token is allowed.
    """
    logits = np.where(allowed_V, logits_V, -np.inf)
    if not np.isfinite(logits[allowed_V]).all():
        raise ValueError("a logit is not finite; the model has diverged, or the steering is too strong for it.")
    if temperature == 0.0:
        return int(logits.argmax())
    # The most likely first; of equal ones the lower id, so that a draw means the same everywhere.
    order = np.argsort(-logits, kind="stable")
    probability = np.exp((logits[order] - logits[order[0]]) / temperature)
    total = np.cumsum(probability)
    kept = int(np.searchsorted(total, top_p * total[-1])) + 1
    kept = min(kept, int(allowed_V.sum()))
    return int(order[min(int(np.searchsorted(total[:kept], draw * total[kept - 1], side="right")), kept - 1)])
