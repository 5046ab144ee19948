"""The built-in tasks: how well a model expects text of each language, and whether it prefers the right translation.

A model is a function from (context, continuation) pairs of token ids to log-probabilities, so the tasks neither know
nor care who computes them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_xalign.errors import CorpusError

Request = tuple[list[int], list[int]]
"""Context and continuation; the context is not empty."""

Score = Callable[[Sequence[Request]], list[float]]
"""Sum of the log-probabilities of each continuation's tokens after its context, in nats."""

Encode = Callable[[str], list[int]]

_DRAWS = 1000
DISTRACTORS = 3
"""Wrong translations beside the right one."""


@dataclass(frozen=True)
class Measured:
    """One number, and the 95 % bootstrap interval over sentences where there is one."""

    measure: str
    subject: str
    value: float
    low: float | None
    high: float | None


def text_by_language(
    texts: dict[str, list[str]], encode: Encode, score: Score, start: int, longest: int
) -> list[Measured]:
    """Bits per byte and nats per token of each language's text.

    Args:
        texts: by language.
        encode: text to token ids.
        score: the model.
        start: id of the token that ends a document; every text begins after it.
        longest: tokens of the model's longest sequence; a longer text is cut into stretches, each from its start.

    Returns:
        ``eval_bits_per_byte`` and ``eval_nll_per_token`` for each language.

    Raises:
        CorpusError: a language has no text.
    """
    found = []
    for language, items in sorted(texts.items()):
        requests: list[Request] = []
        owner: list[int] = []
        for number, text in enumerate(items):
            tokens = encode(text)
            for first in range(0, len(tokens), longest - 1):
                requests.append(([start], tokens[first : first + longest - 1]))
                owner.append(number)
        if not requests:
            raise CorpusError(f"there is no text in {language} to evaluate on.")
        nats, num_tokens = np.zeros(len(items)), np.zeros(len(items))
        for number, (_, tokens), value in zip(owner, requests, score(requests), strict=True):
            nats[number] -= value
            num_tokens[number] += len(tokens)
        num_bytes = np.array([len(text.encode("utf-8")) for text in items], dtype=float)
        found.append(_ratio("eval_bits_per_byte", language, nats / math.log(2), num_bytes))
        found.append(_ratio("eval_nll_per_token", language, nats, num_tokens))
    return found


def translation_choice(
    sources: Sequence[str], targets: Sequence[str], subject: str, encode: Encode, score: Score, start: int,
    longest: int, between: str = "\n",
) -> list[Measured]:
    """How often the right translation gains most from its source, among wrong ones of similar length.

    A candidate's gain is how much more probable it is after the source than without it. So a sentence that is likely
    anyway has no advantage, which the probability after the source alone would give it (``translation_choice_raw``).

    Args:
        sources: a sentence each.
        targets: its translation.
        subject: ``eng_Latn-fin_Latn``.
        encode: text to token ids.
        score: the model.
        start: id of the token that ends a document.
        longest: tokens of the model's longest sequence; pairs beyond it are left out.
        between: text between the two, as the model was trained on pairs.

    Returns:
        ``translation_choice``, ``translation_choice_raw`` and ``translation_choice_chance``.

    Raises:
        CorpusError: fewer pairs fit than candidates are needed.
    """
    separator = encode(between)
    contexts = [[start, *encode(text), *separator] for text in sources]
    encoded = [encode(text) for text in targets]
    longest_target = max((len(tokens) for tokens in encoded), default=0)
    kept = [
        number for number in range(len(targets))
        if encoded[number] and len(contexts[number]) + longest_target <= longest
    ]
    if len(kept) <= DISTRACTORS:
        raise CorpusError(
            f"{subject}: {len(kept)} of {len(targets)} pairs fit into sequences of {longest} tokens; {DISTRACTORS + 1} "
            "are needed to choose among."
        )
    candidates = {number: [number, *_nearest(number, kept, targets)] for number in kept}
    alone = dict(zip(kept, score([([start, *separator], encoded[number]) for number in kept]), strict=True))
    requests = [(contexts[number], encoded[other]) for number in kept for other in candidates[number]]
    scores = np.array(score(requests)).reshape(len(kept), DISTRACTORS + 1)
    gains = scores - np.array([[alone[other] for other in candidates[number]] for number in kept])
    # A tie is not a preference.
    right = (gains[:, :1] > gains[:, 1:]).all(axis=1).astype(float)
    raw = (scores[:, :1] > scores[:, 1:]).all(axis=1).astype(float)
    chance = 1 / (DISTRACTORS + 1)
    ones = np.ones(len(kept))
    return [
        _ratio("translation_choice", subject, right, ones), _ratio("translation_choice_raw", subject, raw, ones),
        Measured("translation_choice_chance", subject, chance, chance, chance),
    ]


def _nearest(number: int, kept: Sequence[int], targets: Sequence[str]) -> list[int]:
    """The other targets most like this one in length; ties in an order that no corpus has."""
    def distance(other: int) -> tuple[int, bytes]:
        salt = hashlib.blake2b(f"{number}\0{other}".encode(), digest_size=8).digest()
        return abs(len(targets[other].encode()) - len(targets[number].encode())), salt

    others = [other for other in kept if targets[other] != targets[number]]
    if len(others) < DISTRACTORS:
        raise CorpusError(f"only {len(others)} translations differ from {targets[number]!r}; give other sentences.")
    return sorted(others, key=distance)[:DISTRACTORS]


def _ratio(measure: str, subject: str, over: np.ndarray, under: np.ndarray) -> Measured:
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(over), (_DRAWS, len(over)))
    ratios = over[draws].sum(axis=1) / under[draws].sum(axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    value = float(over.sum() / under.sum())
    return Measured(measure, subject, value, min(float(low), value), max(float(high), value))
