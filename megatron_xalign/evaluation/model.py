"""A Hugging Face folder as a function from token ids to log-probabilities."""

# B requests, S tokens, V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_xalign.errors import ConfigError, FormatError
from megatron_xalign.evaluation.tasks import Request, Score

_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Model:
    """A model that was loaded, with its tokenizer."""

    score: Score
    tokenizer: Any
    start: int
    """Id that every text begins after: the token that ends a document, or the one that begins one."""
    longest: int
    """Tokens of its longest sequence."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@contextmanager
def load(folder: Path) -> Iterator[Model]:
    """Load a Hugging Face folder in float32, without code of the folder and without unpickling.

    Raises:
        ConfigError: transformers is not installed.
        FormatError: the folder has no model or tokenizer, or the tokenizer has no token to begin with.
    """
    try:
        import transformers
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise ConfigError(f"evaluation needs transformers ({error}): pip install 'megatron-xalign[convert]'.") from None
    transformers_logging.disable_progress_bar()
    if not (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
        raise FormatError(f"{folder} holds no config.json and tokenizer.json; a model and its tokenizer are evaluated.")
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **local)
        model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), use_safetensors=True, **local)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise FormatError(f"{folder} cannot be loaded by transformers: {error}.") from None
    model = model.float().eval()
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise FormatError(f"{folder}: its tokenizer has neither bos nor eos; texts have nothing to begin with.")
    yield Model(_scorer(model), tokenizer, int(start), int(model.config.max_position_embeddings))


def _scorer(model: Any) -> Score:
    @torch.no_grad()
    def score(requests: Sequence[Request]) -> list[float]:
        found = [0.0] * len(requests)
        order = sorted(range(len(requests)), key=lambda number: len(requests[number][0]) + len(requests[number][1]))
        batch: list[int] = []
        for number in [*order, -1]:
            length = 0 if number < 0 else sum(map(len, requests[number]))
            if batch and (number < 0 or (len(batch) + 1) * length > _BATCH_TOKENS):
                for member, value in zip(batch, _score_batch(model, [requests[i] for i in batch]), strict=True):
                    found[member] = value
                batch = []
            batch.append(number)
        return found

    return score


def _score_batch(model: Any, requests: Sequence[Request]) -> list[float]:
    # Attention is causal: what stands after a request's last token changes nothing before it.
    width = max(len(context) + len(rest) for context, rest in requests) - 1
    tokens_BS = torch.zeros(len(requests), width, dtype=torch.int64)
    for row, (context, rest) in zip(tokens_BS, requests, strict=True):
        whole = (context + rest)[:-1]
        row[: len(whole)] = torch.tensor(whole)
    logits_BSV = model(tokens_BS, use_cache=False).logits
    found = []
    for logits_SV, (context, rest) in zip(logits_BSV, requests, strict=True):
        first = len(context) - 1
        log_p_SV = logits_SV[first : first + len(rest)].double().log_softmax(-1)
        found.append(float(log_p_SV.gather(1, torch.tensor(rest)[:, None]).sum()))
    return found
